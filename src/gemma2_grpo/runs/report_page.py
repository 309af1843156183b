"""Pages of a report: rendered, with their charts and styles, and written as one file."""

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

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gemma2_grpo import __version__
from gemma2_grpo.config import UserError
from gemma2_grpo.runs.charts import draw_svg, save_png
from gemma2_grpo.runs.completion_view import without_controls
from gemma2_grpo.runs.curves import Chart
from gemma2_grpo.runs.outcome import Result, percent
from gemma2_grpo.runs.report_results import reward_parts
from gemma2_grpo.runs.samples import mark
from gemma2_grpo.task.answers import gold_answer

_MAX_QUESTION_CHARS = 1_500


@dataclass(frozen=True)
class Drawing:
    """A chart as it stands in a page."""

    chart: Chart
    svg: Markup


def draw(charts: Sequence[Chart], classes: dict[str, str]) -> list[Drawing]:
    """Draws charts; the classes that they need are added to `classes`."""
    # What Matplotlib escapes is markup; it has no text but titles and names of curves.
    return [Drawing(chart, Markup(draw_svg(chart, classes))) for chart in charts]  # noqa: S704


def render_page(template: str, values: Mapping[str, Any], classes: Mapping[str, str]) -> str:
    """Fills in a template; all text is escaped, and the policy allows nothing but its styles.

    Args:
        template: Name of a file in `templates`.
        values: What the template says.
        classes: Names of classes by their declarations, from `draw`.
    """
    environment = Environment(
        loader=PackageLoader("gemma2_grpo"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_inert,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "gold": gold_answer,
        "interval": _interval,
        "mark": mark,
        "p_value": lambda p: "< 0.001" if p < 0.001 else f"= {p:.3f}",
        "percent": percent,
        "rewards": reward_parts,
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


def _inert(value: Any) -> Any:
    """Text whose controls, such as those that turn the direction of writing, show as U+FFFD."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return without_controls(value) if is_text else value


def _shorten(text: str) -> str:
    too_long = len(text) > _MAX_QUESTION_CHARS
    return f"{text[:_MAX_QUESTION_CHARS]} … (cut)" if too_long else text


def _interval(result: Result) -> str:
    low, high = result.interval
    return f"{100 * low:.0f} to {100 * high:.0f}"


def write_page(file: Path, text: str) -> None:
    """Replaces a file as a whole; a reader sees the old one or the new one.

    Raises:
        UserError: if it cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        with suppress(OSError):  # There may be no folder to remove it from.
            temporary.unlink()
        raise UserError(f"report {file}: cannot be written ({error.strerror}); see --to") from None


def save_plots(charts: Sequence[Chart], folder: Path) -> None:
    """Writes a PNG for each chart.

    Raises:
        UserError: if they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            save_png(chart, folder / f"{chart.name}.png")
    except OSError as error:
        raise UserError(f"plots {folder}: cannot be written ({error.strerror})") from None
