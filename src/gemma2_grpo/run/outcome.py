"""Whether a run made the model better: before and after on the same questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from gemma2_grpo.run.files import Answer, Numbers, RunFiles, System, is_counted, numbers
from gemma2_grpo.task.statistics import Paired, compare_paired, wilson_interval

# What is called a difference is less likely than this without one.
SIGNIFICANCE = 0.05

_NO_BREAK = "\u00a0"

# Name, label, and whether it is a share.
MEASURES = (
    ("accuracy", "Right, greedy", True),
    ("official_accuracy", "Right by GSM8K's own extraction", True),
    ("format", "Perfect format", True),
    ("true_equations", "True equations", True),
    ("truncated", "Cut off", True),
    ("mean_tokens", "Tokens per completion", False),
    ("sampled.pass_at_1", "Right, sampled", True),
    ("sampled.pass_at_k", "Right in at least one of {k} samples", True),
    ("sampled.maj_at_k", "Right by vote of {k} samples", True),
    ("sampled.format", "Perfect format, sampled", True),
    ("sampled.true_equations", "True equations, sampled", True),
    ("sampled.reward", "Mean reward, sampled", False),
)


@dataclass(frozen=True)
class Result:
    """Of one model on one set of problems."""

    label: str
    values: Numbers
    """Those of MEASURES that were measured, `problems`, `correct` and `sampled.samples`."""
    by_steps: "Mapping[int, Result]" = field(default_factory=dict)
    """Those of problems whose solution takes so many steps."""

    @property
    def problems(self) -> int:
        """How many were asked."""
        return int(self.values["problems"])

    @property
    def accuracy(self) -> float:
        """Greedy pass@1."""
        return self.values["accuracy"]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(int(self.values["correct"]), self.problems)

    @property
    def interval_text(self) -> str:
        """The same for people, in per cent."""
        low, high = self.interval
        return f"{100 * low:.0f} to {100 * high:.0f}"


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
        before, after = self.before or self.question, self.after or self.question
        if before.is_correct == after.is_correct:
            return "right" if after.is_correct else "wrong"
        return "fixed" if after.is_correct else "broken"


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
    def results(self) -> list[Result]:
        """Those that there are."""
        return [result for result in (self.before, self.after) if result]

    @property
    def heads(self) -> list[str]:
        """Names of the columns of a table."""
        labels = [result.label for result in self.results]
        return [*labels, "change"] if len(labels) == 2 else labels

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
    if not run.evaluations:
        return None
    first, last = run.evaluations[0], run.evaluations[-1]
    before = result_of("Before", first) if first["step"] == 0 else None
    after = result_of(f"After {last['step']:.0f} steps", last) if last["step"] else None
    old, new = (run.held_out.get(int(record["step"]), []) for record in (first, last))
    pairs = pair_up(old if before else [], new if after else [])
    return Outcome("held-out problems", before, after, count_flips(pairs), pairs)


def by_evaluation(run: RunFiles) -> Outcome | None:
    """What `evaluate` measured; None if it has not been run."""
    evaluation = run.evaluation
    if evaluation is None:
        return None
    base, adapter = (
        _system_result(label, evaluation.systems.get(name))
        for name, label in (("base", "Base model"), ("adapter", "With adapter"))
    )
    if base is None and adapter is None:
        return None
    pairs = pair_up(*(run.evaluated.get(name, []) for name in ("base", "adapter")))
    words = (evaluation.data.get("source"), evaluation.data.get("split"), "problems")
    problems = " ".join(str(word) for word in words if word)
    return Outcome(problems, base, adapter, evaluation.comparison or count_flips(pairs), pairs)


def pair_up(before: Sequence[Answer], after: Sequence[Answer]) -> list[Pair]:
    """Answers to the same questions side by side; none if the questions differ.

    Args:
        before: Of all questions, or empty where they are not known.
        after: Likewise.
    """
    questions = [[answer.question for answer in answers] for answers in (before, after) if answers]
    if len(questions) == 2 and questions[0] != questions[1]:
        return []
    return [Pair(*answers) for answers in zip_longest(before, after)]


def count_flips(pairs: Sequence[Pair]) -> Paired | None:
    """Counts how answers differ; None if there are none, or any is missing."""
    whole = [(p.before.is_correct, p.after.is_correct) for p in pairs if p.before and p.after]
    if not whole or len(whole) < len(pairs):
        return None
    return compare_paired(*zip(*whole, strict=True))


def _system_result(label: str, system: System | None) -> Result | None:
    if system is None:
        return None
    record = {**system.greedy.model_dump(), "sampled": system.sampled or {}}
    return result_of(label, record, system.greedy.by_solution_steps)


def result_of(
    label: str, record: Mapping[str, Any], by_steps: Sequence[Mapping[str, Any]] = ()
) -> Result | None:
    """Puts a result together; None if the record does not say how many were right of how many.

    Args:
        label: What to call it.
        record: A line of evaluations.jsonl, or measures by the same names.
        by_steps: Such records by `steps` of the solution.
    """
    values = numbers(record)
    if not is_counted(values):
        return None
    for name in ("sampled.pass_at_k", "sampled.maj_at_k"):
        of_all = f"{name}.{values.get('sampled.samples', 0):.0f}"
        if of_all in values:
            values[name] = values[of_all]
    values["accuracy"] = values["correct"] / values["problems"]
    if "official_correct" in values:
        values["official_accuracy"] = values["official_correct"] / values["problems"]
    results = {int(row.get("steps", 0)): result_of("", row) for row in map(numbers, by_steps)}
    return Result(label, values, {steps: result for steps, result in results.items() if result})


def headline(outcome: Outcome | None, *, is_control: bool) -> str:
    """Says in one sentence whether the model got better, and no more than can be said."""
    control = "Control run with shuffled rewards, which can teach nothing. " if is_control else ""
    return control + _what_changed(outcome)


def _what_changed(outcome: Outcome | None) -> str:
    if outcome is None:
        return "Nothing has been measured yet, so that nothing can be said."
    before, after = outcome.before, outcome.after
    if before is None or after is None:
        [result] = outcome.results
        when = "before training" if after is None else result.label.lower()
        return (
            f"{percent(result.accuracy)} of {result.problems:,} {outcome.problems} are "
            f"right {when}; there is nothing yet to compare that with."
        )
    change = f"from {percent(before.accuracy)} to {percent(after.accuracy)}"
    change += f" on {after.problems:,} {outcome.problems}"
    if outcome.paired:
        change += f"; {outcome.paired.fixed:,} fixed, {outcome.paired.broken:,} broken"
    if not outcome.is_different:
        return f"No difference can be told apart from chance: accuracy went {change}."
    return f"Accuracy {'rose' if after.accuracy > before.accuracy else 'fell'} {change}."


def measure_rows(results: Sequence[Result], *, with_change: bool = False) -> list[list[str]]:
    """A row of text for each of MEASURES that any result has.

    Args:
        results: One for each column.
        with_change: Add what the second has more than the first, if there are two.
    """
    k = max((result.values.get("sampled.samples", 0) for result in results), default=0)
    rows = []
    for name, label, is_share in MEASURES:
        values = [result.values.get(name) for result in results]
        if any(value is not None for value in values):
            row = [label.format(k=f"{k:.0f}"), *(_cell(value, is_share) for value in values)]
            if with_change and len(values) == 2:
                row.append(_change(values[0], values[1], is_share))
            rows.append(row)
    return rows


def _cell(value: float | None, is_share: bool) -> str:
    if value is None:
        return "–"
    return percent(value) if is_share else f"{value:.2f}"


def _change(before: float | None, after: float | None, is_share: bool) -> str:
    if before is None or after is None:
        return ""
    decimals, factor, unit = (1, 100, "\u00a0pp") if is_share else (2, 1, "")
    change = round(factor * (after - before), decimals)
    sign = "+" if change > 0 else "\u2212" if change < 0 else ""
    return f"{sign}{abs(change):.{decimals}f}{unit}"


def step_rows(results: Sequence[Result]) -> list[list[str]]:
    """Rows of text: accuracy by the number of steps of a solution, with its interval."""
    rows = []
    for steps in sorted({steps for result in results for steps in result.by_steps}):
        found = [result.by_steps.get(steps) for result in results]
        problems = max(result.problems for result in found if result)
        cells = [
            f"{percent(part.accuracy)}, {part.interval_text.replace(' ', _NO_BREAK)}"
            if part
            else "–"
            for part in found
        ]
        rows.append([f"{steps} step{'s' if steps != 1 else ''}", f"{problems:,}", *cells])
    return rows


def percent(share: float, decimals: int = 1) -> str:
    """A share for people to read."""
    return f"{100 * share:.{decimals}f}\u00a0%"
