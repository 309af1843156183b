"""`gemma2-grpo report`: what a run did, as one HTML file that loads nothing and runs nothing."""

from pathlib import Path

from gemma2_grpo.runs.curves import charts_of_run, charts_of_speed
from gemma2_grpo.runs.outcome import by_evaluation, during_run, headline
from gemma2_grpo.runs.report_page import render_page, write_page
from gemma2_grpo.runs.run_files import RunFiles, read_run
from gemma2_grpo.runs.samples import choose


def write_report(run_path: Path, to: Path | None = None, *, plots: bool = False) -> Path:
    """Writes the report of a run, whatever state the run is in.

    Args:
        run_path: Directory of the run.
        to: The file to write; by default report.html in the directory.
        plots: Write the plots as PNG too, into a folder `plots` beside the report.

    Returns:
        The file.

    Raises:
        UserError: if there is no run, or the file cannot be written.
    """
    run = read_run(run_path)
    charts = [*charts_of_run(run), *charts_of_speed(run)] if plots else []
    return write_page(to or run_path / "report.html", render(run), charts)


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
