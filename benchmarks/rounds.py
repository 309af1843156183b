"""Rounds of steps: the systems take turns, each in a process of its own."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console

from benchmarks.model_files import write_config, write_weights
from benchmarks.processes import Worker, call
from benchmarks.session import Ready, StepReport, Summary, serve
from benchmarks.tokens import write_tokenizer
from benchmarks.workload import Sizes, Workload, make_batches
from gemma2_grpo.task.prompts import render_prompt

NEEDED = {
    "ours": ("jax", "tunix"),
    "tunix": ("jax", "tunix"),
    "trl": ("torch", "transformers", "peft", "trl"),
}
_VERSIONS = {"tunix": "google-tunix", "trl": "trl"}


@dataclass(frozen=True)
class Result:
    """All that one system reported."""

    label: str
    """Name and version."""
    ready: Ready
    warmup: list[StepReport]
    steps: list[StepReport]
    summary: Summary


def missing_libraries(system: str) -> list[str]:
    """What has to be installed before a system can run."""
    return [name for name in NEEDED[system] if importlib.util.find_spec(name) is None]


def prepare(
    sizes: Sizes,
    questions: Sequence[str],
    folder: Path,
    *,
    steps: int,
    warmup: int,
    seed: int,
    full_length: bool,
    shares_weights: bool = True,
) -> Workload:
    """Writes the model directory and decides all inputs."""
    directory = folder / "model"
    directory.mkdir(parents=True)
    write_tokenizer(directory, map(render_prompt, questions), sizes.vocab)
    write_config(directory, sizes)
    if shares_weights:
        call("weights", folder / "log", write_weights, directory, sizes, seed)
    batches = make_batches(sizes, questions, directory, steps, seed, full_length)
    return Workload(sizes, directory, batches, warmup, seed)


def measure(
    workload: Workload,
    systems: Sequence[str],
    is_verified: bool,
    folder: Path,
    progress: Console,
) -> dict[str, Result]:
    """Runs the systems in turn: A B C A B C, each in a process of its own."""
    with workers(workload, systems, is_verified, folder) as started:
        ready: dict[str, Ready] = {}
        for name, worker in started.items():
            ready[name] = worker.receive()
            progress.print(f"{name} built in {ready[name].build.wall:.1f} s", style="dim")
        reports: dict[str, list[StepReport]] = {name: [] for name in started}
        for step in range(workload.steps):
            for name, worker in started.items():
                worker.send(step)
                report = worker.receive()
                reports[name].append(report)
                progress.print(_progress_line(workload, step, name, report), style="dim")
        summaries: dict[str, Summary] = {}
        for name, worker in started.items():
            worker.send(None)
            summaries[name] = worker.receive()
    cut = workload.warmup
    return {
        name: Result(_label(name), ready[name], rows[:cut], rows[cut:], summaries[name])
        for name, rows in reports.items()
    }


@contextmanager
def workers(
    workload: Workload, systems: Sequence[str], is_verified: bool, folder: Path
) -> Iterator[dict[str, Worker]]:
    """Starts the processes one after the other, and ends them all."""
    started: dict[str, Worker] = {}
    try:
        for name in systems:
            log = folder / f"{name}.log"
            started[name] = Worker(name, log, serve, name, workload, is_verified)
        yield started
    finally:
        for worker in started.values():
            worker.close()


def _progress_line(workload: Workload, step: int, name: str, report: StepReport) -> str:
    total = report.seconds["step"]
    number = step - workload.warmup + 1
    title = f"step {number} of {len(workload.batches)}" if number > 0 else "warm-up"
    compiled = f", {report.compiled_programs} compiled" if report.compiled_programs else ""
    return (
        f"{title}: {name} {total.cpu:.1f} CPU-s, {total.wall:.1f} s, "
        f"{report.completion_tokens} tokens{compiled}"
    )


def _label(system: str) -> str:
    package = _VERSIONS.get(system)
    return f"{system} {metadata.version(package)}" if package else system
