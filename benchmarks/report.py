"""The tables of `benchmarks.step`, for a terminal of 80 columns."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.compare import (
    PHASES,
    Clock,
    Ratio,
    median_seconds,
    paired_ratio,
    seconds,
    tokens_per_second,
)
from benchmarks.floor import Floor
from benchmarks.machine import Peaks
from benchmarks.rounds import Result

_GB = 1e9


def print_report(
    console: Console,
    results: Mapping[str, Result],
    floors: Sequence[Floor],
    peaks: Peaks,
    clock: Clock,
) -> None:
    """Prints seconds, ratios and the machine's peak."""
    name = "CPU-seconds (wall seconds)" if clock == "cpu" else "Wall seconds (CPU-seconds)"
    console.print(f"\n{name} of a step, medians", style="bold")
    console.print(_seconds_table(results, floors, clock))
    if "ours" in results and len(results) > 1:
        console.print("Times as much as ours: median (lowest to highest round)", style="bold")
        console.print(_ratio_table(results, clock))
    console.print("Times as much as the floor, medians", style="bold")
    console.print(_floor_table(results, floors, clock))
    unit = "CPU-second" if clock == "cpu" else "second"
    console.print(
        f"Peak of this machine: {peaks.flops / 1e9:,.0f} GFLOP and {peaks.bytes / _GB:,.1f} GB "
        f"a {unit} (products: NumPy {peaks.numpy_flops / 1e9:,.0f}, JAX "
        f"{peaks.jax_flops / 1e9:,.0f}; memory: read {peaks.read_bytes / _GB:,.1f}, triad "
        f"{peaks.triad_bytes / _GB:,.1f}).",
        style="dim",
    )
    for result in results.values():
        _print_compiles(console, result)


def _table(labels: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True, min_width=17)
    for label in labels:
        table.add_column(label, justify="right", no_wrap=True)
    return table


def _seconds_table(results: Mapping[str, Result], floors: Sequence[Floor], clock: Clock) -> Table:
    labels = [result.label for result in results.values()]
    table = _table([*labels, "floor"])
    other = "wall" if clock == "cpu" else "cpu"
    for phase in PHASES:
        table.add_row(
            phase,
            *(
                f"{median_seconds(result.steps, phase, clock):.2f} "
                f"({median_seconds(result.steps, phase, other):.2f})"
                for result in results.values()
            ),
            f"{median(getattr(floor, phase) for floor in floors):.2f}",
            end_section=phase == "step",
        )
    rows: dict[str, Callable[[Result], str]] = {
        "tokens/s (wall)": lambda result: f"{tokens_per_second(result.steps):,.1f}",
        "peak RSS, GB": lambda result: f"{result.summary.peak_rss_bytes / _GB:.2f}",
        "  imports alone": lambda result: f"{result.ready.import_rss_bytes / _GB:.2f}",
        "build, s (wall)": lambda result: f"{result.ready.build.wall:.1f}",
        "warm-up, s (wall)": _warmup,
    }
    if any(result.summary.device_peak_bytes for result in results.values()):
        rows["device peak, GB"] = lambda r: f"{(r.summary.device_peak_bytes or 0) / _GB:.2f}"
    for label, cell in rows.items():
        table.add_row(label, *map(cell, results.values()), "")
    return table


def _warmup(result: Result) -> str:
    return f"{sum(report.seconds['step'].wall for report in result.warmup):.1f}"


def _ratio_table(results: Mapping[str, Result], clock: Clock) -> Table:
    others = {name: result for name, result in results.items() if name != "ours"}
    table = _table([result.label for result in others.values()])
    for phase in PHASES:
        base = seconds(results["ours"].steps, phase, clock)
        table.add_row(
            phase,
            *(
                _spread(paired_ratio(seconds(result.steps, phase, clock), base))
                for result in others.values()
            ),
        )
    return table


def _floor_table(results: Mapping[str, Result], floors: Sequence[Floor], clock: Clock) -> Table:
    labels = [result.label for result in results.values()]
    table = _table(labels)
    for phase in PHASES:
        base = [getattr(floor, phase) for floor in floors]
        ratios = (
            paired_ratio(seconds(result.steps, phase, clock), base) for result in results.values()
        )
        table.add_row(phase, *(f"{ratio.median:.1f}" if ratio else "-" for ratio in ratios))
    return table


def _spread(ratio: Ratio | None) -> str:
    if ratio is None or ratio.high == 0:
        return "-"
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _print_compiles(console: Console, result: Result) -> None:
    programs = sum(report.compiled_programs for report in result.steps)
    if programs:
        spent = sum(report.compile_seconds for report in result.steps)
        console.print(
            f"{result.label} compiled {programs} programs in {spent:.1f} s within measured steps; "
            "these seconds are in the table.",
            style="yellow",
        )
