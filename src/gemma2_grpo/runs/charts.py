"""Draws charts: as SVG that takes its colours from the page it stands in, and as PNG."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from gemma2_grpo.runs.curves import Chart, Curve, smooth, thin_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# As drawn, for PNG; in SVG each becomes the variable of the page's style sheet. The first is the
# text's own; the others can be told apart by colour-blind people (Okabe and Ito).
COLOURS = {
    "ink": "#1b1f24",
    "blue": "#0072b2",
    "orange": "#c85200",
    "green": "#00805c",
    "purple": "#a6518a",
    "grey": "#6b7280",
    "faint": "#d9dde2",
}
# By the look of a curve: colour and dashes.
_LOOKS: tuple[tuple[str, Any], ...] = (
    ("ink", "-"),
    ("blue", "-"),
    ("orange", (0, (4, 1.2))),
    ("green", (0, (1.4, 1))),
    ("grey", (0, (4, 1.2, 1, 1.2))),
    ("purple", (0, (6, 1))),
    ("purple", "-"),
)
_WIDTH, _HEIGHT = 360, 210  # Points; those of a phone's screen, so that text keeps its size there.
_LEFT, _BOTTOM, _TOP = 40, 24, 12
_CHAR_WIDTH = 6.1  # Of the widest letters that are likely; right of the axes there is only text.
_TEXT_SIZE = 11
_TITLE_HEIGHT = 36
_MAX_LABEL = 15
_LINE_HEIGHT = 14

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # Text stays text: to be read aloud, searched and scaled.
    "text.parse_math": False,  # The name of a run may have a "$".
    "font.size": _TEXT_SIZE,
    "axes.linewidth": 0.8,
    "path.simplify": True,
    "lines.solid_capstyle": "round",
}
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


def draw_svg(chart: Chart, classes: dict[str, str]) -> str:
    """Draws a chart as an SVG element to stand in HTML, without title and styles.

    Args:
        chart: What to draw.
        classes: Names of classes by their declarations in CSS. It is added to; the page must have
            them in its style sheet.
    """
    from matplotlib import rc_context

    with rc_context({**_SETTINGS, "svg.hashsalt": chart.name}):
        figure = _draw(chart, 0)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return _for_html(file.getvalue(), chart.description, classes)


def save_png(chart: Chart, path: Path) -> None:
    """Draws a chart with its title into a PNG file."""
    from matplotlib import rc_context

    with rc_context(_SETTINGS):
        _draw(chart, _TITLE_HEIGHT).savefig(path, format="png", dpi=192)


def _draw(chart: Chart, title_height: int) -> "Figure":
    from matplotlib.figure import Figure  # Without pyplot, which keeps a state of its own.

    height = _HEIGHT + title_height
    figure = Figure(figsize=(_WIDTH / 72, height / 72))
    labels = [len(_end_label(chart, curve)) for curve in chart.curves]
    left, right = _LEFT / _WIDTH, 1 - max(46, 10 + _CHAR_WIDTH * max(labels)) / _WIDTH
    bottom, top = _BOTTOM / height, 1 - (_TOP + title_height) / height
    axes = figure.add_axes((left, bottom, right - left, top - bottom))
    for curve in chart.curves:
        _draw_curve(axes, curve)
    _set_range(axes, chart)
    _draw_axes(axes, chart)
    _label_ends(axes, chart)
    if title_height:
        y = 1 - 16 / height
        figure.text(0.02, y, chart.title, size=_TEXT_SIZE + 1.5, weight="bold")
        figure.text(0.02, y - 15 / height, chart.unit, color=COLOURS["grey"])
    return figure


def _draw_curve(axes: "Axes", curve: Curve) -> None:
    name, dashes = _LOOKS[curve.look % len(_LOOKS)]
    colour = COLOURS[name]
    if curve.intervals:
        look: dict[str, Any] = {"color": colour, "clip_on": False}
        for step, (low, high) in zip(curve.steps, curve.intervals, strict=True):
            axes.plot([step, step], [low, high], linewidth=3.5, alpha=0.35, **look)
        axes.plot(curve.steps, curve.values, linewidth=1.7, linestyle=dashes, **look)
        axes.plot(curve.steps, curve.values, ".", markersize=8, **look)
        return
    axes.plot(*thin_out(curve), color=colour, linewidth=0.9, alpha=0.4)
    marker = "." if len(curve.values) == 1 else None
    axes.plot(*smooth(curve), color=colour, linewidth=1.7, linestyle=dashes, marker=marker)


def _set_range(axes: "Axes", chart: Chart) -> None:
    """From 0, unless values are negative, to a little above the highest."""
    values = [value for curve in chart.curves for value in curve.values]
    values += [high for curve in chart.curves for _, high in curve.intervals]
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + (0.01 if chart.is_share else 1.0)
    if chart.top is not None and high <= chart.top:
        axes.set_ylim(low, chart.top)
    else:
        axes.set_ylim(low * 1.06, low + (high - low) * 1.06)
    steps = [step for curve in chart.curves for step in curve.steps]
    first = min(steps)
    axes.set_xlim(first, max(*steps, first + 1))


def _draw_axes(axes: "Axes", chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, chart)))
    axes.tick_params(length=0, colors=COLOURS["grey"], pad=5)
    axes.grid(axis="y", color=COLOURS["faint"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(COLOURS["faint"])
    low, high = axes.get_ylim()
    if chart.limit is not None and low <= chart.limit <= high:
        axes.axhline(chart.limit, color=COLOURS["orange"], linewidth=0.9, linestyle=(0, (1, 2)))
        place = {"xytext": (0, 3), "textcoords": "offset points", "annotation_clip": False}
        corner = (axes.get_xlim()[0], chart.limit)
        axes.annotate("alarm", corner, color=COLOURS["orange"], size=_TEXT_SIZE - 1, **place)
    axes.annotate(
        "step",
        (1, 0),
        xycoords="axes fraction",
        xytext=(13, -5),
        textcoords="offset points",
        color=COLOURS["grey"],
        va="top",
    )


def _tick(value: float, chart: Chart) -> str:
    shown = 100 * value if chart.is_share else value
    return f"{shown:,.0f}" if abs(shown) >= 100 else f"{shown:.3g}"


def _end_label(chart: Chart, curve: Curve) -> str:
    """Last value and name of a curve."""
    name = curve.label if len(curve.label) <= _MAX_LABEL else f"{curve.label[: _MAX_LABEL - 1]}…"
    return f"{chart.show(_last(curve))} {name}".strip()


def _last(curve: Curve) -> float:
    return curve.values[-1] if curve.intervals else float(smooth(curve)[1][-1])


def _label_ends(axes: "Axes", chart: Chart) -> None:
    """Names the curves at their ends, with their last value, moved apart where they would meet."""
    low, high = axes.get_ylim()
    gap = (high - low) * _LINE_HEIGHT / (_HEIGHT - _BOTTOM - _TOP)
    ends = sorted(((_last(curve), curve) for curve in chart.curves), key=lambda end: end[0])
    # The lowest stays clear of the word "step".
    places = _apart([value for value, _ in ends], gap, low + gap / 2, high)
    for place, (_, curve) in zip(places, ends, strict=True):
        axes.annotate(
            _end_label(chart, curve),
            (axes.get_xlim()[1], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center_baseline",
            color=COLOURS[_LOOKS[curve.look % len(_LOOKS)][0]],
            annotation_clip=False,
        )


def _apart(values: list[float], gap: float, low: float, high: float) -> list[float]:
    """Moves ascending values up, then down, until they are a gap apart and within the axes."""
    places, floor = [], low
    for value in values:
        places.append(max(value, floor))
        floor = places[-1] + gap
    ceiling = high
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    return places


def _for_html(svg: bytes, description: str, classes: dict[str, str]) -> str:
    """Takes out what HTML does not need, and turns styles into classes.

    A strict content policy forbids `style` attributes, and only a style sheet knows whether the
    page is light or dark.
    """
    root = ElementTree.fromstring(svg)  # noqa: S314 (what Matplotlib has just written)
    for metadata in root.findall(f"{_SVG}metadata"):
        root.remove(metadata)
    used = set(re.findall(rb"#([\w.-]+)", svg))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if element.get("id", "").encode() not in used:
            element.attrib.pop("id", None)
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))
        style = element.attrib.pop("style", None)
        if style and element.tag != "style":
            element.set("class", _class_of(style, classes))
    for defs in root.findall("defs"):
        if defs.find("style") is not None:
            root.remove(defs)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": description,
        "class": "chart",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _class_of(style: str, classes: dict[str, str]) -> str:
    """The class with the declarations of a style, its colours as variables of the page."""
    for name, colour in COLOURS.items():
        style = style.replace(colour, f"var(--{name})")
    style = re.sub(r"; font-family: [^;]*", "", style)
    return classes.setdefault(style, f"m{len(classes)}")
