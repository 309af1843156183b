"""Whether a run made the model better: before and after on the same questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma2_grpo.runs.health import number
from gemma2_grpo.runs.run_files import Answer, RunFiles
from gemma2_grpo.task.statistics import Paired, compare_paired, wilson_interval

# What is called a difference is less likely than this without one.
SIGNIFICANCE = 0.05

# Name, label, and whether it is a share.
MEASURES = (
    ("accuracy", "Right, greedy", True),
    ("official_accuracy", "Right by GSM8K's own extraction", True),
    ("format", "Perfect format", True),
    ("true_equations", "True equations", True),
    ("truncated", "Cut off", True),
    ("mean_tokens", "Tokens per completion", False),
    ("pass_at_1", "Right, sampled", True),
    ("pass_at_k", "Right in one of {k} samples", True),
    ("maj_at_k", "Right by vote of {k} samples", True),
    ("sampled_format", "Perfect format, sampled", True),
    ("sampled_true_equations", "True equations, sampled", True),
    ("sampled_reward", "Mean reward, sampled", False),
)


@dataclass(frozen=True)
class Result:
    """Of one model on one set of problems."""

    label: str
    problems: int
    correct: int
    values: Mapping[str, float]
    """By the names of MEASURES, where they were measured."""
    samples: int | None = None
    by_steps: Sequence[Mapping[str, Any]] = ()
    """Accuracy by the number of steps that a solution takes."""

    @property
    def accuracy(self) -> float:
        """Greedy pass@1."""
        return self.correct / self.problems

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(self.correct, self.problems)


@dataclass(frozen=True)
class Pair:
    """What the model said before and after to one question; None where that is not known."""

    before: Answer | None
    after: Answer | None

    @property
    def question(self) -> Answer:
        """Either, for what both have."""
        answer = self.after or self.before
        assert answer is not None
        return answer

    @property
    def kind(self) -> str:
        """`fixed`, `broken`, `wrong` (still) or `right` (still)."""
        if self.before is None or self.after is None:
            return "right" if self.question.is_correct else "wrong"
        kinds = {(False, True): "fixed", (True, False): "broken", (True, True): "right"}
        return kinds.get((self.before.is_correct, self.after.is_correct), "wrong")


@dataclass(frozen=True)
class Outcome:
    """Two measurements of the same problems, of which either may be missing."""

    problems: str
    """Which they are, in words."""
    before: Result | None
    after: Result | None
    paired: Paired | None
    pairs: Sequence[Pair]

    @property
    def is_different(self) -> bool:
        """Whether more has changed than chance explains."""
        if self.before is None or self.after is None:
            return False
        if self.paired:
            return self.paired.p_value < SIGNIFICANCE
        # Without pairs, by intervals that are apart, which asks for more than a test would.
        low, high = sorted((self.before, self.after), key=lambda result: result.accuracy)
        return low.interval[1] < high.interval[0]


def during_run(run: RunFiles) -> Outcome | None:
    """The run's own first and last measurement; None if there is none."""
    records = [record for record in run.evaluations if number(record, "problems")]
    if not records:
        return None
    first, last = records[0], records[-1]
    before = _held_out_result(first, "before") if first["step"] == 0 else None
    after = _held_out_result(last, f"after {last['step']} steps") if last["step"] else None
    old, new = (run.held_out.get(int(record["step"]), []) for record in (first, last))
    pairs = _pair(old if before else [], new if after else [])
    return _outcome("held-out problems", before, after, pairs, None)


def by_evaluation(run: RunFiles) -> Outcome | None:
    """What `evaluate` measured; None if it has not been run."""
    evaluation = run.evaluation or {}
    systems = _part(evaluation, "systems")
    base, adapter = (
        _system_result(_part(systems, name), label)
        for name, label in (("base", "base model"), ("adapter", "with adapter"))
    )
    if base is None and adapter is None:
        return None
    data = _part(evaluation, "data")
    old, new = (run.evaluated.get(name, {}) for name in ("base", "adapter"))
    indices = sorted({*old, *new})
    pairs = [Pair(old.get(i), new.get(i)) for i in indices]
    where = " ".join(str(data[name]) for name in ("source", "split") if data.get(name))
    name = f"problems of {where}" if where else "problems"
    return _outcome(name, base, adapter, pairs, _part(evaluation, "comparison"))


def _outcome(
    problems: str,
    before: Result | None,
    after: Result | None,
    pairs: Sequence[Pair],
    counted: Mapping[str, Any] | None,
) -> Outcome:
    """Counts the pairs, unless that was done where they were made."""
    names = ("both_right", "both_wrong", "fixed", "broken")
    counts = [number(counted or {}, name) for name in names]
    both = [(pair.before, pair.after) for pair in pairs]
    whole = [(old.is_correct, new.is_correct) for old, new in both if old and new]
    paired = None
    if all(count is not None for count in counts):
        paired = Paired(*(int(count or 0) for count in counts))
    elif whole and len(whole) == len(pairs):
        paired = compare_paired(*zip(*whole, strict=True))
    return Outcome(problems, before, after, paired, pairs)


def _pair(old: Sequence[Answer], new: Sequence[Answer]) -> list[Pair]:
    """Puts the answers to the same questions side by side."""
    if not old or not new:
        return [Pair(answer if old else None, answer if new else None) for answer in old or new]
    if [answer.question for answer in old] != [answer.question for answer in new]:
        return []
    return [Pair(*answers) for answers in zip(old, new, strict=True)]


def _held_out_result(record: Mapping[str, Any], label: str) -> Result | None:
    sampled = _part(record, "sampled")
    values = {
        "format": number(record, "format"),
        "true_equations": number(record, "true_equations"),
        "truncated": number(record, "truncated"),
        "mean_tokens": number(record, "mean_tokens"),
        "pass_at_1": number(sampled, "pass_at_1"),
        "pass_at_k": number(sampled, "pass_at_k"),
        "sampled_format": number(sampled, "format"),
        "sampled_true_equations": number(sampled, "true_equations"),
        "sampled_reward": number(sampled, "reward"),
    }
    return _result(record, label, values, sampled)


def _system_result(system: Mapping[str, Any], label: str) -> Result | None:
    greedy, sampled = _part(system, "greedy"), _part(system, "sampled")
    values = {
        "format": number(greedy, "format"),
        "true_equations": number(greedy, "true_equations"),
        "truncated": number(greedy, "truncated"),
        "mean_tokens": number(greedy, "mean_tokens"),
        "pass_at_1": number(sampled, "pass_at_1"),
        "pass_at_k": _at_most_samples(sampled, "pass_at_k"),
        "maj_at_k": _at_most_samples(sampled, "maj_at_k"),
        "sampled_format": number(sampled, "format"),
    }
    return _result(greedy, label, values, sampled)


def _at_most_samples(sampled: Mapping[str, Any], name: str) -> float | None:
    """The value with k = all samples."""
    return number(_part(sampled, name), str(int(number(sampled, "samples") or 0)))


def _result(
    record: Mapping[str, Any],
    label: str,
    values: Mapping[str, float | None],
    sampled: Mapping[str, Any],
) -> Result | None:
    """Puts a result together; None if the record does not say how many were right of how many."""
    problems, correct = number(record, "problems"), number(record, "correct")
    if problems is None or correct is None or not 0 <= correct <= problems or problems < 1:
        return None
    official = number(record, "official_correct")
    samples = number(sampled, "samples")
    known = {
        "accuracy": correct / problems,
        "official_accuracy": None if official is None else official / problems,
        **values,
    }
    by_steps = record.get("by_solution_steps")
    return Result(
        label=label,
        problems=int(problems),
        correct=int(correct),
        values={name: value for name, value in known.items() if value is not None},
        samples=None if samples is None else int(samples),
        by_steps=[row for row in by_steps if isinstance(row, dict)]
        if isinstance(by_steps, list)
        else (),
    )


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a record; empty where there is none."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def percent(share: float, decimals: int = 1) -> str:
    """A share for people to read."""
    return f"{100 * share:.{decimals}f}\u00a0%"


def headline(outcome: Outcome | None, run: RunFiles) -> str:
    """Says in one sentence whether the model got better, and no more than can be said."""
    control = (
        "Control run with shuffled rewards, which can teach nothing. " if run.is_control else ""
    )
    if outcome is None:
        return f"{control}Nothing has been measured yet, so that nothing can be said."
    before, after = outcome.before, outcome.after
    if before is None or after is None:
        result = before or after
        assert result is not None
        when = "before training" if after is None else result.label
        return (
            f"{control}{percent(result.accuracy)} of {result.problems:,} {outcome.problems} are "
            f"right {when}; there is nothing yet to compare that with."
        )
    flips = ""
    if outcome.paired:
        flips = f"; {outcome.paired.fixed:,} fixed, {outcome.paired.broken:,} broken"
    shares = f"{percent(before.accuracy)} to {percent(after.accuracy)}"
    where = f"on {after.problems:,} {outcome.problems}"
    if not outcome.is_different:
        return (
            f"{control}No difference can be told apart from chance: accuracy went from {shares} "
            f"{where}{flips}."
        )
    verb = "rose" if after.accuracy > before.accuracy else "fell"
    return f"{control}Accuracy {verb} from {shares} {where}{flips}."
