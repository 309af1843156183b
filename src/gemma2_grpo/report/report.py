"""`gemma2-grpo report`: what a run did, as one HTML file that loads nothing and runs nothing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gemma2_grpo.report import facts
from gemma2_grpo.report.curves import charts_of_run, charts_of_runs, charts_of_speed
from gemma2_grpo.report.excerpts import choose
from gemma2_grpo.report.page import render_page, write_page
from gemma2_grpo.run.console import without_controls
from gemma2_grpo.run.files import RunFiles, read_run
from gemma2_grpo.run.outcome import (
    Outcome,
    by_evaluation,
    count_flips,
    during_run,
    headline,
    measure_rows,
    pair_up,
    percent,
)

_MAX_NAME = 40


def write_report(path: Path, to: Path | None = None, *, plots: bool = False) -> Path:
    """Writes the report of a run, whatever state the run is in.

    Args:
        path: Directory of the run.
        to: The file to write; by default report.html in the directory.
        plots: Write the plots as PNG too, into a folder `plots` next to it.

    Returns:
        The file.

    Raises:
        UserError: if there is no run, or the file cannot be written.
    """
    run = read_run(path)
    charts = [*charts_of_run(run), *charts_of_speed(run)] if plots else []
    return write_page(to or path / "report.html", render(run), charts)


def write_comparison(
    paths: tuple[Path, Path], to: Path | None = None, *, plots: bool = False
) -> Path:
    """Writes two runs side by side, whatever state they are in; see `write_report`.

    Args:
        paths: Directories of the runs.
        to: The file to write; by default compare.html in the first directory.
        plots: Write the plots as PNG too.
    """
    runs = [read_run(path) for path in paths]
    names = _names(runs)
    charts = charts_of_runs(runs, names) if plots else []
    named = [replace(chart, name=f"compare_{chart.name}") for chart in charts]
    return write_page(to or paths[0] / "compare.html", _render_comparison(runs, names), named)


def render(run: RunFiles) -> str:
    """The report of a run, as HTML."""
    evaluated, held_out = by_evaluation(run), during_run(run)
    outcomes = [outcome for outcome in (evaluated, held_out) if outcome]
    sampled = next((outcome for outcome in outcomes if outcome.pairs), None)
    return render_page(
        "report.html.j2",
        run=run,
        headline=headline(outcomes[0] if outcomes else None, is_control=run.is_control),
        evaluated=evaluated,
        held_out=held_out,
        sampled=sampled,
        groups=choose(sampled.pairs) if sampled else [],
        sides=["Base", "With adapter"] if sampled is evaluated else ["Before", "After"],
        charts=charts_of_run(run),
        speed_charts=charts_of_speed(run),
    )


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Names of the runs: their directories, or their paths where those are alike."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    ends = (name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}" for name in names)
    return [without_controls(name) for name in ends]


def _render_comparison(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """The comparison of two runs, as HTML."""
    # What `evaluate` measured if it has seen the same problems with both, else the runs' own.
    outcomes = [by_evaluation(run) for run in runs]
    ends = _ends(outcomes, names)
    if ends is None or not ends.pairs:
        outcomes = [during_run(run) for run in runs]
        ends = _ends(outcomes, names)
    results = [outcome.results if outcome else [] for outcome in outcomes]
    columns = [(name, result) for name, own in zip(names, results, strict=True) for result in own]
    titles = {
        "fixed": f"Right only in {names[1]}",
        "broken": f"Right only in {names[0]}",
        "wrong": "Wrong in both",
        "right": "Right in both",
    }
    return render_page(
        "compare.html.j2",
        names=names,
        runs=list(zip(names, runs, strict=True)),
        headline=_headline(ends, names),
        outcome=ends,
        heads=[f"{name}, {result.label.lower()}" for name, result in columns],
        rows=measure_rows([result for _, result in columns]),
        differences=facts.differences([{**run.config, **dict(facts.origins(run))} for run in runs]),
        groups=choose(ends.pairs, titles) if ends else [],
        charts=charts_of_runs(runs, names),
    )


def _ends(outcomes: Sequence[Outcome | None], names: Sequence[str]) -> Outcome | None:
    """The last measurement of each; None if either has none after training."""
    first, second = outcomes
    if first is None or second is None or first.after is None or second.after is None:
        return None
    answers = [[p.after for p in outcome.pairs if p.after] for outcome in (first, second)]
    pairs = pair_up(*answers) if all(answers) else []
    ends = replace(first.after, label=names[0]), replace(second.after, label=names[1])
    return Outcome(first.problems, *ends, count_flips(pairs), pairs)


def _headline(both: Outcome | None, names: Sequence[str]) -> str:
    """Says in one sentence which run did better, and no more than can be said."""
    if both is None or both.before is None or both.after is None:
        return f"{names[0]} and {names[1]} have not both been measured after training."
    counts = f"{both.before.problems:,} {both.problems}"
    if not both.pairs:
        counts += ", not known to be the same for both"
    if not both.is_different:
        shares = " and ".join(percent(result.accuracy) for result in both.results)
        runs = " and ".join(names)
        return f"{runs} do not differ significantly: {shares} are right of {counts}."
    worse, better = sorted(both.results, key=lambda result: result.accuracy)
    shares = f"{percent(better.accuracy)} against {percent(worse.accuracy)}"
    return f"{better.label} is right more often than {worse.label}: {shares} of {counts}."
