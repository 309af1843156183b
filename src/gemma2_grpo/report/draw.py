"""Draws charts: as SVG that takes its colours from the page around it, and as PNG."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from gemma2_grpo.report.curves import Chart, Curve, running_mean, thin_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# As drawn, for PNG; in SVG each becomes the variable of the page's style sheet. The first is the
# text's own; colour-blind people can distinguish the others (Okabe and Ito).
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
_CHAR_WIDTH = 6.1  # Width of the widest likely letters; right of the axes there is only text.
_TEXT_SIZE = 11
_MAX_LABEL = 15
_LINE_HEIGHT = 14

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # Text stays text: to be read aloud, searched and scaled.
    "text.parse_math": False,  # The name of a run may have a "$".
    "font.size": _TEXT_SIZE,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "axes.linewidth": 0.8,
    "axes.edgecolor": COLOURS["faint"],
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["faint"],
    "xtick.color": COLOURS["grey"],
    "xtick.major.size": 0,
    "xtick.major.pad": 5,
    "ytick.color": COLOURS["grey"],
    "ytick.major.size": 0,
    "ytick.major.pad": 5,
}
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


def draw_svg(chart: Chart) -> str:
    """Draws a chart as an SVG element to stand in HTML, without title and styles."""
    from matplotlib import rc_context

    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({**_SETTINGS, "svg.hashsalt": chart.name}):
        file = io.BytesIO()
        figure = _draw(chart)
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    return _for_html(file.getvalue(), chart.description)


def save_png(chart: Chart, path: Path) -> None:
    """Draws a chart with its title into a PNG file."""
    from matplotlib import rc_context

    with rc_context(_SETTINGS):
        figure = _draw(chart)
        [axes] = figure.axes
        corner = (axes.get_xlim()[0], axes.get_ylim()[1])
        _write(
            axes, chart.title, corner, (6 - _LEFT, 33), "ink", size=_TEXT_SIZE + 1.5, weight="bold"
        )
        _write(axes, chart.unit, corner, (6 - _LEFT, 18), "grey")
        figure.savefig(path, format="png", dpi=192, bbox_inches="tight")


def _draw(chart: Chart) -> "Figure":
    from matplotlib.figure import Figure  # Without pyplot, which keeps a state of its own.

    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
    label = max(len(_end_label(chart, curve)) for curve in chart.curves)
    left, right = _LEFT / _WIDTH, 1 - max(46, 10 + _CHAR_WIDTH * label) / _WIDTH
    bottom, top = _BOTTOM / _HEIGHT, 1 - _TOP / _HEIGHT
    axes = figure.add_axes((left, bottom, right - left, top - bottom))
    for curve in chart.curves:
        _draw_curve(axes, curve)
    _set_range(axes, chart)
    _draw_axes(axes, chart)
    _label_ends(axes, chart)
    return figure


def _draw_curve(axes: "Axes", curve: Curve) -> None:
    name, dashes = _LOOKS[curve.look % len(_LOOKS)]
    colour = COLOURS[name]
    if curve.intervals:
        for step, interval in zip(curve.steps, curve.intervals, strict=True):
            axes.plot([step, step], interval, lw=3.5, alpha=0.35, color=colour, clip_on=False)
        look = {"linestyle": dashes, "marker": ".", "markersize": 8}
        axes.plot(curve.steps, curve.values, color=colour, clip_on=False, **look)
        return
    axes.plot(*thin_out(curve.steps, curve.values), color=colour, lw=0.9, alpha=0.4)
    means = thin_out(curve.steps, running_mean(curve.values))
    marker = "." if len(curve.values) == 1 else None
    axes.plot(*means, color=colour, linestyle=dashes, marker=marker)


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
    axes.set_xlim(min(steps), max(*steps, min(steps) + 1))


def _draw_axes(axes: "Axes", chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: _tick(value, chart))
    _write(axes, "step", (axes.get_xlim()[1], axes.get_ylim()[0]), (13, -5), "grey", va="top")
    low, high = axes.get_ylim()
    if chart.limit is not None and low <= chart.limit <= high:
        axes.axhline(chart.limit, color=COLOURS["orange"], lw=0.9, linestyle=(0, (1, 2)))
        corner = (axes.get_xlim()[0], chart.limit)
        _write(axes, "alarm", corner, (0, 3), "orange", size=_TEXT_SIZE - 1)


def _tick(value: float, chart: Chart) -> str:
    shown = 100 * value if chart.is_share else value
    return f"{shown:,.0f}" if 100 <= abs(shown) < 1e6 else f"{shown:.3g}"


def _write(
    axes: "Axes",
    text: str,
    place: tuple[float, float],
    offset_points: tuple[float, float],
    colour: str,
    **look: Any,
) -> None:
    look |= {"textcoords": "offset points", "annotation_clip": False, "color": COLOURS[colour]}
    axes.annotate(text, place, offset_points, **look)


def _end_label(chart: Chart, curve: Curve) -> str:
    """Last value and name of a curve."""
    name = curve.label if len(curve.label) <= _MAX_LABEL else f"{curve.label[: _MAX_LABEL - 1]}…"
    return f"{chart.show(_last(curve))} {name}".strip()


def _last(curve: Curve) -> float:
    return curve.values[-1] if curve.intervals else float(running_mean(curve.values)[-1])


def _label_ends(axes: "Axes", chart: Chart) -> None:
    """Names the curves at their ends, with their last value, moved apart where they would meet."""
    low, high = axes.get_ylim()
    gap = (high - low) * _LINE_HEIGHT / (_HEIGHT - _BOTTOM - _TOP)
    curves = sorted(chart.curves, key=_last)
    # The lowest stays clear of the word "step".
    places = _apart([_last(curve) for curve in curves], gap, low + gap / 2, high)
    for place, curve in zip(places, curves, strict=True):
        end, colour = (axes.get_xlim()[1], place), _LOOKS[curve.look % len(_LOOKS)][0]
        _write(axes, _end_label(chart, curve), end, (6, 0), colour, va="center_baseline")


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


def _for_html(svg: bytes, description: str) -> str:
    """Turns styles into attributes, and takes out what HTML does not need.

    A strict content policy forbids `style`, and only the page knows whether it is light or dark.
    """
    root = ElementTree.fromstring(svg)  # noqa: S314 (what Matplotlib has just written)
    colours = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
    root.remove(root[0])  # Styles of all elements.
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if element.tag == "g":
            element.attrib.pop("id", None)  # Other charts of the page have the same.
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))
        for declaration in filter(None, element.attrib.pop("style", "").split("; ")):
            name, value = declaration.split(": ")
            if name != "font-family":
                element.set(name, colours.get(value, value))
    size = root.attrib["viewBox"]
    root.attrib = {"viewBox": size, "role": "img", "aria-label": description, "class": "chart"}
    return ElementTree.tostring(root, encoding="unicode")
