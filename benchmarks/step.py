"""Cost of one GRPO step: this package compared with stock Tunix and TRL, on equal work.

python -m benchmarks.step --data gsm8k/test.jsonl
"""

import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from benchmarks import floor
from benchmarks.command import status_of
from benchmarks.compare import PHASES, paired_ratio, seconds
from benchmarks.machine import Peaks, command_line, describe, load_warning, measure_peaks
from benchmarks.processes import call
from benchmarks.report import print_report
from benchmarks.rounds import Result, measure, missing_libraries, prepare
from benchmarks.session import StepReport
from benchmarks.workload import PRESETS, Sizes, Workload, read_questions
from gemma2_grpo.errors import UserError

System = Literal["ours", "tunix", "trl"]
# Of one token, in float32, by programs that add up in another order.
LOGP_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Step:
    """Measures one GRPO step of each system, round after round, never two at once."""

    systems: tuple[System, ...] = ()
    """Which systems, in which order. Default: all that are installed (gemma2-2b: ours)."""
    preset: Literal["cpu-30m", "gemma2-2b"] = "cpu-30m"
    """A model of 30 M parameters on the CPU, or Gemma 2 2B on the accelerator that JAX finds."""
    data: Path | None = None
    """JSONL with a field `question`, or a directory with test.jsonl; else procedural problems."""
    steps: int = 4
    """Measured steps of each system."""
    warmup: int = 1
    """Steps before, which replay the first measured ones; as many see every shape beforehand."""
    prompts: int | None = None
    """Prompts of a step."""
    generations: int | None = None
    """Completions of a prompt."""
    full_length: bool = False
    """All completions have the maximum length."""
    verify: bool = False
    """Check that all systems make the same number of tokens from the same weights."""
    dtype: Literal["bfloat16", "float32"] | None = None
    layers: int | None = None
    vocab: int | None = None
    max_completion_tokens: int | None = None
    mean_completion_tokens: float | None = None
    mesh: tuple[int, int] | None = None
    """Devices along (fsdp, tp), for JAX."""
    seed: int = 0
    out: Path = Path("benchmarks/results/step.json")
    """Where the raw numbers go."""

    def sizes(self) -> Sizes:
        """The preset with what the command line overrides."""
        names = {field.name for field in dataclasses.fields(Sizes)}
        given = {
            name: value for name, value in vars(self).items() if name in names and value is not None
        }
        return dataclasses.replace(PRESETS[self.preset], **given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status; users' mistakes are one line and 2."""
    command = tyro.cli(Step, args=arguments, prog="python -m benchmarks.step", description=__doc__)
    return status_of(run, command)


def run(command: Step, console: Console, progress: Console) -> None:
    """Measures, prints the tables and writes the JSON file.

    Raises:
        UserError: for what the user can correct.
        WorkerError: for a system that fails, or one whose work differs from that of the others.
    """
    if command.steps < 1 or command.warmup < 0:
        raise UserError("--steps must be at least 1, and --warmup at least 0")
    on_cpu = command.preset == "cpu-30m"
    if on_cpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    systems, notes = choose_systems(command)
    for note in notes:
        progress.print(note, markup=False)
    machine = describe()  # Now, since its load average is that of others still.
    if warning := load_warning(machine):
        notes.append(warning)
        progress.print(warning, style="yellow")
    with tempfile.TemporaryDirectory(prefix="gemma2-grpo-bench-") as folder:
        workload = prepare(
            command.sizes(),
            read_questions(command.data, command.seed),
            Path(folder),
            steps=command.steps,
            warmup=command.warmup,
            seed=command.seed,
            full_length=command.full_length,
            shares_weights=on_cpu,
        )
        peaks = call("machine", Path(folder) / "log", measure_peaks, workload.sizes.dtype)
        results = measure(workload, systems, command.verify, Path(folder), progress)
    checks = verify(results) if command.verify and len(results) > 1 else None
    if command.verify and not checks:
        notes.append("--verify: one system alone has nothing to be compared with")
        progress.print(notes[-1], style="yellow")
    device = next(iter(results.values())).summary.device
    clock = "cpu" if device == "cpu" else "wall"
    # The peaks are those of one device; CPU-seconds are those of all cores together.
    devices = 1 if clock == "cpu" else math.prod(workload.sizes.mesh)
    floors = [
        floor.step_floor(workload.sizes, batch, peaks.flops * devices, peaks.bytes * devices)
        for batch in workload.batches
    ]
    write_json(command, machine, workload, results, peaks, floors, clock, checks, notes)
    where = machine["cpu"] if device == "cpu" else device
    console.print(f"{describe_work(workload)}; {where}, {machine['cores']} cores", style="dim")
    print_report(console, results, floors, peaks, clock)
    if checks:
        console.print(checks["line"], style="green" if checks["passed"] else "bold red")
    console.print(f"Raw numbers: {command.out}", style="dim")


def choose_systems(command: Step) -> tuple[tuple[System, ...], list[str]]:
    """The systems to run, and a line for each one that is left out.

    Raises:
        UserError: if one that was named is not installed.
    """
    wanted = command.systems
    if not wanted:
        wanted = ("ours",) if command.preset == "gemma2-2b" else ("ours", "tunix", "trl")
    chosen, notes = [], []
    for system in dict.fromkeys(wanted):
        missing = missing_libraries(system)
        line = f"{system}: needs {', '.join(missing)}; install the extra `bench`"
        if not missing:
            chosen.append(system)
        elif command.systems:
            raise UserError(line)
        else:
            notes.append(f"skipped {line}")
    if command.preset == "gemma2-2b" and set(chosen) - {"ours"}:
        raise UserError("--preset gemma2-2b makes its weights on the device; it runs ours only")
    return tuple(chosen), notes


def describe_work(workload: Workload) -> str:
    """The work of a step in a line."""
    sizes = workload.sizes
    parameters = floor.layer_parameters(sizes) + sizes.width * sizes.vocab
    mean = sum(sum(batch.limits) for batch in workload.batches) / len(workload.batches)
    return (
        f"{parameters / 1e6:,.1f} M parameters in {sizes.dtype}, {sizes.prompts} x "
        f"{sizes.generations} completions of {mean / sizes.rows:.0f} tokens on average, "
        f"{sizes.iterations} updates, LoRA {sizes.lora_rank}"
    )


def verify(results: dict[str, Result]) -> dict[str, Any]:
    """Compares the work of the systems: completion tokens and a fixed log-probability."""
    tokens = {
        name: [report.completion_tokens for report in (*result.warmup, *result.steps)]
        for name, result in results.items()
    }
    logps = {name: result.summary.fixed_logps or [] for name, result in results.items()}
    spread = max(max(same) - min(same) for same in zip(*logps.values(), strict=True))
    same = len({tuple(counts) for counts in tokens.values()}) == 1
    passed = same and spread <= LOGP_TOLERANCE
    line = (
        f"{'Verified' if passed else 'NOT the same work'}: completion tokens are "
        f"{'equal' if same else 'different'}, "
        f"log-probabilities of the tokens of a fixed completion within {spread:.1e}."
    )
    return {"tokens": tokens, "logps": logps, "spread": spread, "passed": passed, "line": line}


def write_json(
    command: Step,
    machine: dict[str, Any],
    workload: Workload,
    results: dict[str, Result],
    peaks: Peaks,
    floors: Sequence[floor.Floor],
    clock: str,
    checks: dict[str, Any] | None,
    notes: Sequence[str],
) -> None:
    """Writes everything that was measured, and what it was measured on."""
    record = {
        "command": command_line("benchmarks.step", sys.argv[1:], [command.data, command.out]),
        "machine": machine,
        "sizes": vars(workload.sizes),
        "parameters": {
            "layers": floor.layer_parameters(workload.sizes),
            "embedding": workload.sizes.width * workload.sizes.vocab,
            "adapters": floor.adapter_parameters(workload.sizes),
        },
        "peaks": vars(peaks),
        "clock": clock,
        "floor_formula": floor.__doc__,
        "floors": [vars(value) | {"step": value.step} for value in floors],
        "batches": [
            {"prompt_tokens": batch.prompt_tokens, "completion_tokens": batch.limits}
            for batch in workload.batches
        ],
        "notes": list(notes),
        "verification": checks,
        "systems": {name: as_record(result) for name, result in results.items()},
        "ratios_to_ours": ratios(results, clock),
    }
    command.out.parent.mkdir(parents=True, exist_ok=True)
    command.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def as_record(result: Result) -> dict[str, Any]:
    """A system's numbers as JSON has them."""
    return {
        "label": result.label,
        "build": result.ready.build._asdict(),
        "import_rss_bytes": result.ready.import_rss_bytes,
        "warmup": [_report_record(report) for report in result.warmup],
        "steps": [_report_record(report) for report in result.steps],
    } | dataclasses.asdict(result.summary)


def _report_record(report: StepReport) -> dict[str, Any]:
    spent = {phase: instant._asdict() for phase, instant in report.seconds.items()}
    return vars(report) | {"seconds": spent}


def ratios(results: dict[str, Result], clock: str) -> dict[str, Any]:
    """Paired ratios to ours, for each system and phase."""
    if "ours" not in results:
        return {}
    found = {
        name: {
            phase: paired_ratio(
                seconds(result.steps, phase, clock),
                seconds(results["ours"].steps, phase, clock),
            )
            for phase in PHASES
        }
        for name, result in results.items()
        if name != "ours"
    }
    return {
        name: {phase: vars(ratio) if ratio else None for phase, ratio in phases.items()}
        for name, phases in found.items()
    }


if __name__ == "__main__":
    sys.exit(main())
