"""The plot of `benchmarks.scaling`: one panel for each thing that was varied."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.scaling import Point

_LABELS = {
    "generations": "completions per prompt",
    "length": "tokens per completion",
    "vocab": "entries of the vocabulary",
}
_COLOURS = {"ours": "#1f5fa8", "tunix": "#c05a1c"}


def save_plot(points: Sequence["Point"], path: Path) -> None:
    """Draws CPU-seconds against group size and length, memory against vocabulary."""
    import matplotlib as mpl  # pyright: ignore[reportMissingImports]

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    axes = list(dict.fromkeys(point.axis for point in points))
    figure, panels = plt.subplots(1, len(axes), figsize=(4.6 * len(axes), 3.9), squeeze=False)
    for axis, panel in zip(axes, panels[0], strict=True):
        _draw(panel, axis, [point for point in points if point.axis == axis])
    figure.tight_layout(w_pad=2.5)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _draw(panel: Any, axis: str, points: Sequence["Point"]) -> None:
    systems = list(dict.fromkeys(point.system for point in points))
    ends = []
    for system in systems:
        own = [point for point in points if point.system == system]
        values = [point.value for point in own]
        for name, style, heights in _lines(axis, own):
            panel.plot(values, heights, style, marker="o", markersize=3.5, color=_COLOURS[system])
            ends.append((heights[-1], values[-1], f"{system} {name}", _COLOURS[system]))
    _label_ends(panel, ends)
    values = sorted({point.value for point in points})
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [_short(value) for value in values], minor=False)
    panel.minorticks_off()
    panel.set_xlim(values[0] * 0.9, values[-1] * (values[-1] / values[0]) ** 0.45)
    panel.set_ylim(bottom=0)
    panel.set_xlabel(_LABELS[axis])
    panel.set_ylabel("memory, GB" if axis == "vocab" else "CPU-seconds a step")
    panel.set_title(finding(axis, points), fontsize=9.5, loc="left")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.grid(axis="y", linewidth=0.4, alpha=0.5)


def _lines(axis: str, points: Sequence["Point"]) -> list[tuple[str, str, list[float]]]:
    """Name, style and heights of each line of a system."""
    if axis == "vocab":
        lines = [("peak RSS", "-", [point.peak_rss_bytes / 1e9 for point in points])]
        if all(point.scratch_bytes is not None for point in points):
            lines.append(("scratch", "--", [(point.scratch_bytes or 0) / 1e9 for point in points]))
        return lines
    return [
        ("update", "-", [point.update_cpu_seconds for point in points]),
        ("rollout", "--", [point.rollout_cpu_seconds for point in points]),
    ]


def _label_ends(panel: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Names the lines at their right ends, moved apart where they would overlap."""
    gap = 0.065 * max(height for height, *_ in ends)
    place = -gap / 2  # Not on the axis of zero.
    for height, value, text, colour in sorted(ends):
        place = max(height, place + gap)
        panel.annotate(
            text,
            (value, place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8.5,
        )


def finding(axis: str, points: Sequence["Point"]) -> str:
    """What the panel shows, in words, from its first to its last point."""
    texts = []
    for system in dict.fromkeys(point.system for point in points):
        first, *_, last = (point for point in points if point.system == system)
        if axis == "vocab":
            grown = (last.peak_rss_bytes - first.peak_rss_bytes) / 1e9
            texts.append(f"{system} {grown:+.1f} GB")
        else:
            before, after = (
                point.update_cpu_seconds + point.rollout_cpu_seconds for point in (first, last)
            )
            texts.append(f"{system} {after / before:.1f} times")
    times = points[-1].value / points[0].value
    return f"{times:.3g} times the {_LABELS[axis]}:\n{', '.join(texts)}"


def _short(value: int) -> str:
    if value < 1024:
        return str(value)
    return f"{value // 1024}k" if value % 1024 == 0 and value % 1000 else f"{value // 1000}k"
