"""Whether a run made the model better: before and after on the same questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import attrgetter
from typing import NamedTuple

from gemma2_grpo.run.files import RunFiles
from gemma2_grpo.run.results import ADAPTER, BASE, StepsMeasures, System
from gemma2_grpo.run.schema import ScoredCompletion
from gemma2_grpo.task.statistics import Paired, compare_paired

# Significance level below which a difference is reported.
SIGNIFICANCE = 0.05

_NO_BREAK = "\u00a0"

Value = float | tuple[float, float]
"""A measure, or an interval of it."""


class Measure(NamedTuple):
    """A row of every table of measures: in a report, on a terminal and in a model card."""

    name: str
    """Field of a `System`."""
    label: str
    """May say `{k}`, for a measure that there is for several k."""
    is_fraction: bool = True


MEASURES = (
    Measure("greedy.correct_fraction", "Right, greedy"),
    Measure("greedy.correct_fraction_interval", "  95 % interval"),
    Measure("greedy.official_correct_fraction", "Right by GSM8K's own extraction"),
    Measure("greedy.perfect_format_fraction", "Perfect format"),
    Measure("greedy.true_equations_fraction", "True equations"),
    Measure("greedy.truncated_fraction", "Cut off"),
    Measure("greedy.mean_completion_tokens", "Tokens per completion", is_fraction=False),
    Measure("sampled.correct_fraction", "Right, sampled"),
    Measure("sampled.correct_fraction_interval", "  95 % interval, sampled"),
    Measure("sampled.pass_at_k", "Right in any of {k} samples (pass@{k})"),
    Measure("sampled.maj_at_k", "Right by vote of {k} samples (maj@{k})"),
    Measure("sampled.perfect_format_fraction", "Perfect format, sampled"),
    Measure("sampled.true_equations_fraction", "True equations, sampled"),
    Measure("sampled.truncated_fraction", "Cut off, sampled"),
    Measure("sampled.mean_completion_tokens", "Tokens per completion, sampled", is_fraction=False),
    Measure("sampled.mean_reward", "Mean reward, sampled", is_fraction=False),
)


@dataclass(frozen=True)
class Result:
    """The measures of one model on one set of problems."""

    label: str
    system: System

    @property
    def problems(self) -> int:
        """Problems that were asked."""
        return self.system.greedy.num_problems

    @property
    def accuracy(self) -> float:
        """Greedy pass@1."""
        return self.system.greedy.correct_fraction

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return self.system.greedy.correct_fraction_interval

    @property
    def interval_text(self) -> str:
        """The interval for people, in per cent."""
        return _interval_text(self.interval)

    @property
    def by_steps(self) -> Mapping[int, StepsMeasures]:
        """Measures of the problems whose solution takes so many steps."""
        return {row.solution_steps: row for row in self.system.greedy.by_solution_steps}


@dataclass(frozen=True)
class Pair:
    """The answers of the model before and after to one question; None where not known."""

    before: ScoredCompletion | None
    after: ScoredCompletion | None

    @property
    def question(self) -> ScoredCompletion:
        """Either, for what both have."""
        answer = self.after or self.before
        assert answer is not None
        return answer

    @property
    def kind(self) -> str:
        """`fixed`, `broken`, `wrong` (still) or `right` (still)."""
        before, after = self.before or self.question, self.after or self.question
        if before.correct == after.correct:
            return "right" if after.correct else "wrong"
        return "fixed" if after.correct else "broken"


@dataclass(frozen=True)
class Outcome:
    """Two measurements of the same problems, of which either may be missing."""

    problems: str
    """Name of the problems, for people."""
    before: Result | None
    after: Result | None
    paired: Paired | None
    pairs: Sequence[Pair]

    @property
    def results(self) -> list[Result]:
        """The measurements that exist, before and after."""
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
    before = Result("Before", first) if first.step == 0 else None
    after = Result(f"After {last.step} steps", last) if last.step else None
    old, new = (run.held_out.get(record.step, []) for record in (first, last))
    pairs = pair_up(old if before else [], new if after else [])
    return Outcome("held-out problems", before, after, count_flips(pairs), pairs)


def by_evaluation(run: RunFiles) -> Outcome | None:
    """Result of `evaluate`; None if it has not been run."""
    evaluation = run.evaluation
    if evaluation is None:
        return None
    base, adapter = (
        Result(label, evaluation.systems[name]) if name in evaluation.systems else None
        for name, label in ((BASE, "Base model"), (ADAPTER, "With adapter"))
    )
    if base is None and adapter is None:
        return None
    pairs = pair_up(*(run.evaluated.get(name, []) for name in (BASE, ADAPTER)))
    words = (evaluation.data.source, evaluation.data.split, "problems")
    problems = " ".join(word for word in words if word)
    return Outcome(problems, base, adapter, evaluation.comparison or count_flips(pairs), pairs)


def pair_up(before: Sequence[ScoredCompletion], after: Sequence[ScoredCompletion]) -> list[Pair]:
    """Answers to the same questions side by side; none if the questions differ.

    Args:
        before: Answers to all questions, or empty where they are not known.
        after: Answers to the same questions, or empty.
    """
    questions = [[answer.question for answer in answers] for answers in (before, after) if answers]
    if len(questions) == 2 and questions[0] != questions[1]:
        return []
    return [Pair(*answers) for answers in zip_longest(before, after)]


def count_flips(pairs: Sequence[Pair]) -> Paired | None:
    """Counts how answers differ; None if there are none, or any is missing."""
    whole = [(p.before.correct, p.after.correct) for p in pairs if p.before and p.after]
    if not whole or len(whole) < len(pairs):
        return None
    return compare_paired(*zip(*whole, strict=True))


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
        change += f"; {outcome.paired.num_fixed:,} fixed, {outcome.paired.num_broken:,} broken"
    if not outcome.is_different:
        return f"No significant difference: accuracy went {change}."
    return f"Accuracy {'rose' if after.accuracy > before.accuracy else 'fell'} {change}."


def measure_rows(results: Sequence[Result], *, with_change: bool = False) -> list[list[str]]:
    """A row of text for each of MEASURES that any result has.

    Args:
        results: One for each column.
        with_change: Add the difference of the second from the first, if there are two.
    """
    rows = []
    for measure in MEASURES:
        found = [_values(result.system, measure.name) for result in results]
        for k in sorted(set().union(*found)):
            values = [values.get(k) for values in found]
            row = [measure.label.format(k=k), *(_cell(v, measure.is_fraction) for v in values)]
            if with_change and len(values) == 2:
                row.append(_change(values[0], values[1], measure.is_fraction))
            rows.append(row)
    return rows


def _values(system: System, name: str) -> Mapping[int, Value]:
    """The values of a measure: one, or one for each k from 2 on; none if it was not measured."""
    if name.startswith("sampled.") and system.sampled is None:
        return {}
    value = attrgetter(name)(system)
    if isinstance(value, Mapping):
        return {k: each for k, each in value.items() if k > 1}  # That of 1 is a measure of its own.
    return {} if value is None else {1: value}


def _cell(value: Value | None, is_fraction: bool) -> str:
    if value is None:
        return "–"
    if isinstance(value, tuple):
        return f"{_interval_text(value)}{_NO_BREAK}%"
    return percent(value) if is_fraction else f"{value:.2f}"


def _interval_text(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * low:.0f} to {100 * high:.0f}"


def _change(before: Value | None, after: Value | None, is_fraction: bool) -> str:
    if not isinstance(before, float) or not isinstance(after, float):
        return ""
    decimals, factor, unit = (1, 100, f"{_NO_BREAK}pp") if is_fraction else (2, 1, "")
    change = round(factor * (after - before), decimals)
    sign = "+" if change > 0 else "\u2212" if change < 0 else ""
    return f"{sign}{abs(change):.{decimals}f}{unit}"


def step_rows(results: Sequence[Result], *, with_change: bool = False) -> list[list[str]]:
    """Rows of text: number of steps of a solution, of problems with so many, and the accuracy.

    Args:
        results: One for each column of accuracies.
        with_change: Add the difference of the second from the first, instead of intervals.
    """
    rows = []
    for steps in sorted({steps for result in results for steps in result.by_steps}):
        found = [result.by_steps.get(steps) for result in results]
        shares = [part and part.correct_fraction for part in found]
        cells = [_cell(share, is_fraction=True) for share in shares]
        if with_change and len(cells) == 2:
            cells.append(_change(*shares, is_fraction=True))
        elif not with_change:
            intervals = [part and _interval_text(part.correct_fraction_interval) for part in found]
            cells = [
                f"{cell}, {interval.replace(' ', _NO_BREAK)}" if interval else cell
                for cell, interval in zip(cells, intervals, strict=True)
            ]
        problems = max(part.num_problems for part in found if part)
        rows.append([f"{steps} step{'s' if steps != 1 else ''}", f"{problems:,}", *cells])
    return rows


def percent(share: float, decimals: int = 1) -> str:
    """A share for people to read."""
    return f"{100 * share:.{decimals}f}\u00a0%"
