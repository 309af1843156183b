"""`gemma2-grpo report`: what a run did, as one HTML file that loads nothing and runs nothing."""

import base64
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from unicodedata import category

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gemma2_grpo import __version__
from gemma2_grpo.config import UserError
from gemma2_grpo.runs import report_facts as facts
from gemma2_grpo.runs.charts import draw_svg, save_png
from gemma2_grpo.runs.curves import Chart, charts_of_run, charts_of_speed
from gemma2_grpo.runs.health import find_alarms, number
from gemma2_grpo.runs.outcome import Result, by_evaluation, during_run, headline, percent
from gemma2_grpo.runs.run_files import RunFiles, read_run
from gemma2_grpo.runs.samples import choose, mark
from gemma2_grpo.task.answers import gold_answer

_MAX_QUESTION_CHARS = 1_500


@dataclass(frozen=True)
class Drawing:
    """A chart as it stands in a page."""

    chart: Chart
    svg: Markup


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
    _write(file, render(run))
    if plots:
        _save_plots([*charts_of_run(run), *charts_of_speed(run)], file.parent / "plots")
    return file


def render(run: RunFiles) -> str:
    """The report of a run, as HTML."""
    classes: dict[str, str] = {}
    evaluated, held_out = by_evaluation(run), during_run(run)
    first = evaluated or held_out
    tables = []
    if evaluated:
        steps = number(run.evaluation or {}, "steps") or 0
        title = f"`gemma2-grpo evaluate` after {steps:.0f} steps: {evaluated.problems}"
        tables.append(facts.outcome_table(evaluated, title))
    if held_out:
        tables.append(facts.outcome_table(held_out, "Held-out problems, measured by the run"))
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
        "weights": facts.weights(run),
        "curves": _drawings(charts_of_run(run), classes),
        "alarms": find_alarms(run.metrics, run.evaluations),
        "losses": _losses(run),
        "phases": facts.phases(run),
        "speed": facts.speed(run),
        "speeds": _drawings(charts_of_speed(run), classes),
        "starts": facts.starts(run),
        "origins": facts.origins(run),
        "preset": preset[0] if preset else "",
        "differences": preset[1] if preset else None,
        "config_text": facts.config_text(run),
    }
    return _page("report.html.j2", values, classes)


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


def _drawings(charts: Sequence[Chart], classes: dict[str, str]) -> list[Drawing]:
    # What Matplotlib escapes is markup; it has no text but titles and names of curves.
    return [Drawing(chart, Markup(draw_svg(chart, classes))) for chart in charts]  # noqa: S704


def _page(template: str, values: Mapping[str, Any], classes: Mapping[str, str]) -> str:
    environment = Environment(
        loader=PackageLoader("gemma2_grpo"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=inert,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "gold": gold_answer,
        "interval": _interval,
        "mark": mark,
        "p_value": lambda p: "< 0.001" if p < 0.001 else f"= {p:.3f}",
        "percent": percent,
        "rewards": facts.reward_parts,
        "shorten": _shorten,
        "x": lambda share: f"{100 * min(max(share, 0.0), 1.0):.2f}%",
    }
    style = (resources.files("gemma2_grpo") / "templates" / "report.css").read_text("utf-8")
    style += "".join(f".{name} {{ {declarations} }}\n" for declarations, name in classes.items())
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(
        **values,
        # The favicon is an empty data URL: a browser would ask a server for one otherwise.
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        style=Markup(style),  # noqa: S704 (our own)
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def inert(value: Any) -> Any:
    """Text whose controls, such as those that turn the direction of writing, show as U+FFFD."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    controls = {c: "\ufffd" for c in set(value) if category(c)[0] == "C" and c not in "\n\t"}
    return value.translate(str.maketrans(controls)) if controls else value


def _shorten(text: str) -> str:
    too_long = len(text) > _MAX_QUESTION_CHARS
    return f"{text[:_MAX_QUESTION_CHARS]} … (cut)" if too_long else text


def _interval(result: Result) -> str:
    low, high = result.interval
    return f"{100 * low:.0f} to {100 * high:.0f}"


def _write(file: Path, text: str) -> None:
    """Replaces a file as a whole; a reader sees the old one or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        with suppress(OSError):  # There may be no folder to remove it from.
            temporary.unlink()
        raise UserError(f"report {file}: cannot be written ({error.strerror}); see --to") from None


def _save_plots(charts: Sequence[Chart], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            save_png(chart, folder / f"{chart.name}.png")
    except OSError as error:
        raise UserError(f"plots {folder}: cannot be written ({error.strerror})") from None
