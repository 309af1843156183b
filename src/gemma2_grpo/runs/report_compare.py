"""`gemma2-grpo report RUN --compare RUN2`: two runs side by side, as one HTML file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gemma2_grpo.runs import report_facts as facts
from gemma2_grpo.runs.completion_view import without_controls
from gemma2_grpo.runs.curves import charts_of_runs
from gemma2_grpo.runs.health import find_alarms
from gemma2_grpo.runs.outcome import (
    Outcome,
    Pair,
    by_evaluation,
    during_run,
    flips,
    percent,
)
from gemma2_grpo.runs.report_page import draw, render_page, save_plots, write_page
from gemma2_grpo.runs.report_results import measure_rows
from gemma2_grpo.runs.run_files import Answer, RunFiles, read_run
from gemma2_grpo.runs.samples import choose

_MAX_NAME = 40


def write_comparison(
    paths: tuple[Path, Path], to: Path | None = None, *, plots: bool = False
) -> Path:
    """Writes a comparison of two runs, whatever state they are in.

    Args:
        paths: Directories of the runs.
        to: The file to write; by default compare.html in the first directory.
        plots: Write the plots as PNG too, into a folder `plots` beside it.

    Returns:
        The file.

    Raises:
        UserError: if there is no run, or the file cannot be written.
    """
    runs = [read_run(path) for path in paths]
    names = _names(runs)
    file = to or paths[0] / "compare.html"
    write_page(file, render_comparison(runs, names))
    if plots:
        charts = [
            replace(chart, name=f"compare_{chart.name}") for chart in charts_of_runs(runs, names)
        ]
        save_plots(charts, file.parent / "plots")
    return file


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """What to call the runs: their directories, or their paths where those are alike."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    ends = (name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}" for name in names)
    return [without_controls(name) for name in ends]


def render_comparison(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """The comparison of two runs, as HTML."""
    classes: dict[str, str] = {}
    outcomes = _measured(runs)
    both = _ends(outcomes, names)
    columns = [
        (f"{name}, {result.label.lower()}", result)
        for name, outcome in zip(names, outcomes, strict=True)
        for result in ((outcome.before, outcome.after) if outcome else ())
        if result
    ]
    values = {
        "runs": [
            {
                "name": name,
                "missing": run.missing,
                "steps": len(run.metrics),
                "is_control": run.is_control,
                "alarms": find_alarms(run.metrics, run.evaluations),
                "phases": facts.phases(run),
                "speed": facts.speed(run),
                "starts": facts.starts(run),
            }
            for run, name in zip(runs, names, strict=True)
        ],
        "names": names,
        "headline": _headline(both, names),
        "outcome": both,
        "heads": [head for head, _ in columns],
        "rows": measure_rows([result for _, result in columns]),
        "groups": choose(both.pairs, _titles(names)) if both else [],
        "curves": draw(charts_of_runs(runs, names), classes),
        "differences": facts.differences([run.config for run in runs]),
        "origins": facts.different_origins(runs),
    }
    return render_page("compare.html.j2", values, classes)


def _titles(names: Sequence[str]) -> dict[str, str]:
    return {
        "fixed": f"Right only in {names[1]}",
        "broken": f"Right only in {names[0]}",
        "wrong": "Wrong in both",
        "right": "Right in both",
    }


def _measured(runs: Sequence[RunFiles]) -> list[Outcome | None]:
    """What `evaluate` measured if it has seen the same problems with both, else the runs' own."""
    evaluated = [by_evaluation(run) for run in runs]
    answers = [_last_answers(outcome) for outcome in evaluated]
    is_same = all(evaluated) and _same_questions(answers[0], answers[1])
    return evaluated if is_same else [during_run(run) for run in runs]


def _last_answers(outcome: Outcome | None) -> list[Answer | None]:
    return [pair.after for pair in outcome.pairs] if outcome else []


def _ends(outcomes: Sequence[Outcome | None], names: Sequence[str]) -> Outcome | None:
    """The last measurement of each; None if either has none after training."""
    first, second = outcomes
    if first is None or second is None or first.after is None or second.after is None:
        return None
    pairs = _same_questions(_last_answers(first), _last_answers(second))
    ends = replace(first.after, label=names[0]), replace(second.after, label=names[1])
    return Outcome(first.problems, *ends, flips(pairs), pairs)


def _same_questions(first: Sequence[Answer | None], second: Sequence[Answer | None]) -> list[Pair]:
    """Answers to the same problems side by side; none if the problems are not the same."""
    questions = [
        [answer.question if answer else None for answer in side] for side in (first, second)
    ]
    if questions[0] != questions[1] or None in questions[0]:
        return []
    return [Pair(a, b) for a, b in zip(first, second, strict=True)]


def _headline(both: Outcome | None, names: Sequence[str]) -> str:
    """Says in one sentence which run did better, and no more than can be said."""
    if both is None or both.before is None or both.after is None:
        return f"{names[0]} and {names[1]} have not both been measured after training."
    first, second = both.before, both.after
    shares = f"{percent(first.accuracy)} and {percent(second.accuracy)}"
    counts = f"{first.problems:,} {both.problems}"
    if not both.pairs:
        counts += ", not known to be the same for both"
    if not both.is_different:
        return f"{names[0]} and {names[1]} cannot be told apart: {shares} are right of {counts}."
    worse, better = sorted(zip((first.accuracy, second.accuracy), names, strict=True))
    shares = f"{percent(better[0])} against {percent(worse[0])}"
    return f"{better[1]} is right more often than {worse[1]}: {shares} of {counts}."
