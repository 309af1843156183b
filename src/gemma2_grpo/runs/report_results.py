"""What a report says of measurements and rewards, in tables."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma2_grpo.runs.health import number
from gemma2_grpo.runs.outcome import MEASURES, Outcome, Result, percent
from gemma2_grpo.runs.run_files import Answer, RunFiles
from gemma2_grpo.task.rewards import COMPONENTS
from gemma2_grpo.task.statistics import Paired, wilson_interval


@dataclass(frozen=True)
class OutcomeTable:
    """An outcome as it is shown."""

    title: str
    results: Sequence[tuple[Result, str]]
    """With the class of each in the style sheet."""
    paired: Paired | None
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    step_heads: Sequence[str] = ()
    by_steps: Sequence[Sequence[str]] = ()
    note: str = ""


def outcome_table(outcome: Outcome, title: str, note: str = "") -> OutcomeTable:
    """Puts the measurements of an outcome side by side."""
    results = [(result, kind) for result, kind in _sides(outcome) if result]
    heads = [result.label for result, _ in results]
    both = [result for result, _ in results]
    rows = measure_rows(both)
    if len(both) == 2:
        heads.append("change")
        rows = [[*row, change] for row, change in zip(rows, _changes(*both), strict=True)]
    return OutcomeTable(
        title=title,
        results=results,
        paired=outcome.paired,
        heads=heads,
        rows=rows,
        step_heads=["problems", *(result.label for result in both)],
        by_steps=_by_steps(both),
        note=note,
    )


def _sides(outcome: Outcome) -> list[tuple[Result | None, str]]:
    return [(outcome.before, "before"), (outcome.after, "after")]


def measure_rows(results: Sequence[Result]) -> list[list[str]]:
    """A row for each of MEASURES that any result has."""
    k = max((result.samples or 0 for result in results), default=0)
    rows = []
    for name, label, is_share in _measured(results):
        cells = [_cell(result.values.get(name), is_share) for result in results]
        rows.append([label.format(k=k), *cells])
    return rows


def _measured(results: Sequence[Result]) -> list[tuple[str, str, bool]]:
    return [each for each in MEASURES if any(each[0] in result.values for result in results)]


def _cell(value: float | None, is_share: bool) -> str:
    if value is None:
        return "–"
    return percent(value) if is_share else f"{value:.2f}"


def _changes(before: Result, after: Result) -> list[str]:
    changes = []
    for name, _, is_share in _measured([before, after]):
        old, new = before.values.get(name), after.values.get(name)
        if old is None or new is None:
            changes.append("")
        else:
            text = f"{100 * (new - old):+.1f}\u00a0pp" if is_share else f"{new - old:+.2f}"
            changes.append(re.sub(r"[+-](0\.0+)\b", r"\1", text).replace("-", "\u2212"))
    return changes


def _by_steps(results: Sequence[Result]) -> list[list[str]]:
    """Accuracy by the number of steps of a solution, with its interval."""
    tables = [
        {number(row, "steps"): row for row in result.by_steps if number(row, "problems")}
        for result in results
    ]
    steps = sorted({step for table in tables for step in table if step is not None})
    rows = []
    for step in steps:
        found = [table.get(step, {}) for table in tables]
        problems = max(int(number(row, "problems") or 0) for row in found)
        name = f"{step:.0f} step{'s' if step != 1 else ''}"
        rows.append([name, f"{problems:,}", *(_share_cell(row) for row in found)])
    return rows


def _share_cell(row: Mapping[str, Any]) -> str:
    problems, correct = number(row, "problems"), number(row, "correct")
    if not problems or correct is None or not 0 <= correct <= problems:
        return "–"
    low, high = wilson_interval(int(correct), int(problems))
    return f"{percent(correct / problems)}, {100 * low:.0f} to {100 * high:.0f}"


def reward_parts(answer: Answer) -> list[tuple[str, float]]:
    """Components of the reward of an answer, and the total."""
    names = (*COMPONENTS, "custom", "total")
    return [(_spoken(name), answer.scores[name]) for name in names if name in answer.scores]


def weights(run: RunFiles) -> str:
    """The weights of the components, in words."""
    values = [(n, number(run.config.get("rewards", {}), f"{n}_weight")) for n in COMPONENTS]
    texts = [f"{_spoken(name)} × {value:.2f}" for name, value in values if value is not None]
    return f", before their weights ({', '.join(texts)})" if texts else ""


def _spoken(name: str) -> str:
    return name.replace("self_correction", "correction")
