"""Pages of a report: rendered with their styles, and written as one file each."""

import base64
import hashlib
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from markupsafe import Markup

from gemma2_grpo import __version__
from gemma2_grpo.errors import UserError
from gemma2_grpo.report import facts
from gemma2_grpo.report.curves import Chart
from gemma2_grpo.report.draw import draw_svg, save_png
from gemma2_grpo.report.excerpts import mark
from gemma2_grpo.run.console import without_controls
from gemma2_grpo.run.health import find_alarms
from gemma2_grpo.run.outcome import measure_rows, percent, step_rows
from gemma2_grpo.runtime.atomic import write_whole
from gemma2_grpo.runtime.templates import templates_of
from gemma2_grpo.task.answers import gold_answer


def render_page(template: str, **values: object) -> str:
    """Fills in a template; all text is escaped, and the policy allows nothing but our styles.

    Args:
        template: Name of a file in `templates`.
        values: Values for the template. Functions that any page may use need not be given.
    """
    environment = templates_of(
        "gemma2_grpo.report",
        is_html=True,
        thousands="{:,}".format,
        gold=gold_answer,
        percent=percent,
        x=lambda share: f"{100 * min(max(share, 0.0), 1.0):.2f}%",
    )
    environment.finalize = _inert
    environment.globals |= {
        "alarms_of": lambda run: find_alarms(run.metrics, run.evaluations),
        "facts": facts,
        "mark": mark,
        "measure_rows": measure_rows,
        "step_rows": step_rows,
        # What Matplotlib escapes is markup; it has no text but titles and names of curves.
        "svg": lambda chart: Markup(draw_svg(chart)),  # noqa: S704
    }
    style = (resources.files("gemma2_grpo.report") / "templates" / "report.css").read_text("utf-8")
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


def _inert(value: object) -> object:
    """Text whose controls, such as those that turn the direction of writing, show as U+FFFD."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return without_controls(value)
    return value


def write_page(file: Path, text: str, charts: Sequence[Chart] = ()) -> Path:
    """Replaces a file as a whole; a reader sees the old one or the new one.

    Args:
        file: The file.
        text: Content of the page.
        charts: Written as PNG into a folder `plots` next to it.

    Returns:
        The file.

    Raises:
        UserError: if it cannot be written.
    """
    plots = file.parent / "plots"
    try:
        write_whole(file, text)
        for chart in charts:
            plots.mkdir(exist_ok=True)
            save_png(chart, plots / f"{chart.name}.png")
    except OSError as error:
        raise UserError(f"report {file}: cannot be written ({error.strerror}); see --to") from None
    return file
