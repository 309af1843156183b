"""`gemma2-grpo report`: what a run did, as one HTML file that loads nothing and runs nothing."""

from pathlib import Path

from gemma2_grpo.runs import report_facts as facts
from gemma2_grpo.runs.curves import charts_of_run, charts_of_speed
from gemma2_grpo.runs.health import find_alarms, number
from gemma2_grpo.runs.outcome import by_evaluation, during_run, headline
from gemma2_grpo.runs.report_page import draw, render_page, save_plots, write_page
from gemma2_grpo.runs.report_results import outcome_table, weights
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
    file = to or run_path / "report.html"
    write_page(file, render(run))
    if plots:
        save_plots([*charts_of_run(run), *charts_of_speed(run)], file.parent / "plots")
    return file


def render(run: RunFiles) -> str:
    """The report of a run, as HTML."""
    classes: dict[str, str] = {}
    evaluated, held_out = by_evaluation(run), during_run(run)
    first = evaluated or held_out
    tables = []
    if evaluated:
        steps = number(run.evaluation or {}, "steps") or 0
        title = f"By gemma2-grpo evaluate, after {steps:.0f} steps"
        tables.append(outcome_table(evaluated, title))
    if held_out:
        tables.append(outcome_table(held_out, "Held-out problems, measured by the run"))
    chosen = next((o for o in (evaluated, held_out) if o and o.pairs), None)
    preset = facts.differences_from_preset(run)
    values = {
        "run": run,
        "status": _status(run),
        "headline": headline(first, run),
        "facts": facts.setup(run),
        "outcomes": tables,
        "groups": choose(chosen.pairs) if chosen else [],
        "samples_of": chosen.problems if chosen else "",
        "sides": ["Base", "With adapter"] if chosen is evaluated else ["Before", "After"],
        "weights": weights(run),
        "curves": draw(charts_of_run(run), classes),
        "alarms": find_alarms(run.metrics, run.evaluations),
        "losses": _losses(run),
        "phases": facts.phases(run),
        "speed": facts.speed(run),
        "speeds": draw(charts_of_speed(run), classes),
        "starts": facts.starts(run),
        "origins": facts.origins(run),
        "preset": preset[0] if preset else "",
        "differences": preset[1] if preset else None,
        "config_text": facts.config_text(run),
    }
    return render_page("report.html.j2", values, classes)


def _status(run: RunFiles) -> str:
    of = "" if run.max_steps is None else f" of {run.max_steps:,}"
    return f"{'finished' if run.is_finished else 'not finished'}, {run.steps:,}{of} steps"


def _losses(run: RunFiles) -> list[str]:
    """What was left out, if anything was."""
    lines = []
    for name, what in (
        ("unscored", "completions had no reward and were left out"),
        ("updates_left_out", "updates were not finite and were left out"),
    ):
        count = sum(number(record, name) or 0 for record in run.metrics)
        if count:
            lines.append(f"{count:,.0f} {what}.")
    return lines
