"""How the cost of a step grows with group size, completion length and vocabulary.

python -m benchmarks.scaling --systems ours tunix
"""

import dataclasses
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.command import status_of
from benchmarks.compare import median_seconds
from benchmarks.machine import command_line, describe, load_warning
from benchmarks.rounds import Result, measure, missing_libraries, prepare
from benchmarks.workload import Sizes, read_questions
from gemma2_grpo.errors import UserError

Axis = Literal["generations", "length", "vocab"]
System = Literal["ours", "tunix"]

# Small enough that a point takes seconds, with the shape of Gemma 2.
_BASE = Sizes(layers=4, width=256, head_dim=32, hidden=1024, vocab=8192, max_completion_tokens=128)
# So narrow that what grows with the vocabulary is what shows.
_NARROW = dataclasses.replace(
    _BASE, layers=2, width=64, head_dim=8, hidden=256, generations=4, max_completion_tokens=64
)
AXES: dict[str, dict[int, Sizes]] = {
    "generations": {n: dataclasses.replace(_BASE, generations=n) for n in (4, 8, 16, 32)},
    "length": {n: dataclasses.replace(_BASE, max_completion_tokens=n) for n in (64, 128, 256, 512)},
    "vocab": {n: dataclasses.replace(_NARROW, vocab=n) for n in (2**15, 2**16, 2**17, 256_000)},
}
# In buffer assignments that XLA writes. The one such allocation of a program is its scratch memory,
# which `memory_analysis()` of a compiled program calls temp_size_in_bytes.
_SCRATCH = re.compile(r"size (\d+), preallocated-temp")
_MODULE = re.compile(r"module_\d+\.(?:jit_)?(.+?)\.\w*after_optimizations")


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Measures one system after the other at each point, in a fresh process per point."""

    systems: tuple[System, ...] = ("ours",)
    """Which systems."""
    axes: tuple[Axis, ...] = ("generations", "length", "vocab")
    """What to vary: completions per prompt, tokens per completion, entries of the vocabulary."""
    data: Path | None = None
    """JSONL with a field `question`, or a directory with test.jsonl; else procedural problems."""
    steps: int = 2
    """Measured steps of each point, after one that is not measured."""
    seed: int = 0
    out: Path = Path("benchmarks/results/scaling.json")
    """Where the raw numbers go; the plot is written next to them."""


@dataclass(frozen=True)
class Point:
    """What one system costs at one place."""

    axis: str
    value: int
    system: str
    rollout_cpu_seconds: float
    update_cpu_seconds: float
    """With the passes for reference and old log-probabilities."""
    peak_rss_bytes: int
    import_rss_bytes: int
    scratch_bytes: int | None
    """Scratch memory of the program that needs the most, by XLA's own account."""
    scratch_program: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status; users' mistakes are one line and 2."""
    command = tyro.cli(
        Scaling, args=arguments, prog="python -m benchmarks.scaling", description=__doc__
    )
    return status_of(run, command)


def run(command: Scaling, console: Console, progress: Console) -> None:
    """Measures all points, prints the table and writes JSON and plot.

    Raises:
        UserError: for what the user can correct.
        WorkerError: for a system that fails.
    """
    for system in command.systems:
        if missing := missing_libraries(system):
            raise UserError(f"{system}: needs {', '.join(missing)}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    questions = read_questions(command.data, command.seed)
    machine = describe()
    if warning := load_warning(machine):
        progress.print(warning, style="yellow")
    points = list(measure_points(command, questions, progress))
    command.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": command_line("benchmarks.scaling", sys.argv[1:], [command.data, command.out]),
        "machine": machine,
        "sizes": {
            axis: {str(value): asdict(sizes) for value, sizes in AXES[axis].items()}
            for axis in command.axes
        },
        "points": [asdict(point) for point in points],
    }
    command.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(make_table(points))
    console.print(f"Raw numbers: {command.out}", style="dim")
    if importlib.util.find_spec("matplotlib") is None:
        console.print("No plot: it needs matplotlib; install the extra `bench`", style="yellow")
        return
    from benchmarks.plot import save_plot

    picture = command.out.with_suffix(".png")
    save_plot(points, picture)
    console.print(f"Plot: {picture}", style="dim")


def measure_points(
    command: Scaling, questions: Sequence[str], progress: Console
) -> Iterator[Point]:
    """Yields each point once it is measured."""
    for axis in command.axes:
        for value, sizes in AXES[axis].items():
            for system in command.systems:
                progress.print(f"{axis} {value:,}: {system}", style="dim")
                yield _measure_point(axis, value, sizes, system, command, questions)


def _measure_point(
    axis: str, value: int, sizes: Sizes, system: str, command: Scaling, questions: Sequence[str]
) -> Point:
    with tempfile.TemporaryDirectory(prefix="gemma2-grpo-bench-") as name:
        folder = Path(name)
        workload = prepare(
            sizes,
            questions,
            folder,
            steps=command.steps,
            warmup=1,
            seed=command.seed,
            full_length=True,
        )
        with _xla_flags(f"--xla_dump_to={folder / 'xla'} --xla_dump_hlo_as_text"):
            results = measure(workload, [system], False, folder, Console(quiet=True))
        program, scratch = largest_scratch(folder / "xla")
    return _point(axis, value, system, results[system], program, scratch)


def _point(
    axis: str, value: int, system: str, result: Result, program: str | None, scratch: int | None
) -> Point:
    def cpu(phase: str) -> float:
        return median_seconds(result.steps, phase, "cpu")

    return Point(
        axis=axis,
        value=value,
        system=system,
        rollout_cpu_seconds=cpu("rollout"),
        update_cpu_seconds=cpu("reference") + cpu("update"),
        peak_rss_bytes=result.summary.peak_rss_bytes,
        import_rss_bytes=result.ready.import_rss_bytes,
        scratch_bytes=scratch,
        scratch_program=program,
    )


@contextmanager
def _xla_flags(flags: str) -> Iterator[None]:
    """Adds flags for the processes that start within."""
    before = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{before or ''} {flags}".strip()
    try:
        yield
    finally:
        if before is None:
            del os.environ["XLA_FLAGS"]
        else:
            os.environ["XLA_FLAGS"] = before


def largest_scratch(dump: Path) -> tuple[str | None, int | None]:
    """Name and scratch bytes of the program that needs the most, from what XLA has dumped."""
    found = []
    for path in dump.glob("*after_optimizations-buffer-assignment.txt"):
        name = _MODULE.match(path.name)
        sizes = _SCRATCH.findall(path.read_text(encoding="utf-8", errors="replace"))
        found += [(int(size), name[1] if name else path.name) for size in sizes]
    size, name = max(found, default=(None, None))
    return name, size


def make_table(points: Sequence[Point]) -> Table:
    """All points, for a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD)
    headings = ("rollout, CPU-s", "update, CPU-s", "scratch, GB", "peak RSS, GB")
    for heading in ("", "", "system"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "" else "left")
    for heading in headings:
        table.add_column(heading, justify="right")
    for i, point in enumerate(points):
        ends = i + 1 == len(points) or points[i + 1].axis != point.axis
        table.add_row(
            point.axis,
            f"{point.value:,}",
            point.system,
            f"{point.rollout_cpu_seconds:.2f}",
            f"{point.update_cpu_seconds:.2f}",
            "-" if point.scratch_bytes is None else f"{point.scratch_bytes / 1e9:.3f}",
            f"{point.peak_rss_bytes / 1e9:.2f}",
            end_section=ends,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
