"""Whether a run fits in device memory and finishes in time, found without the devices."""

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from gemma2_grpo.checks import check
from gemma2_grpo.config import Config, replaced
from gemma2_grpo.errors import ConfigError
from gemma2_grpo.plan.memory import (
    Memory,
    Progress,
    Row,
    estimated_memory,
    find_architecture,
    kept_memory,
)
from gemma2_grpo.runtime.chips import Target, find_target, mesh_for

_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # What a program could not be asked for, jaxlib logs with a stack trace.
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# Programs whose memory a micro-batch decides; that of the others is decided by the rollout.
_OF_UPDATE = ("reference", "update", "update prompts", "update prompts, back")


Changes = dict[str, int | str]
"""Values of options by name."""


@dataclass(frozen=True, kw_only=True)
class Plan(Memory):
    """Memory, time and fit of a run, as `--json` prints them. Bytes are those of one chip."""

    target: str
    chips: int
    proof: str
    """`compiled` by the compiler of the target, or an `estimate` by formulas."""
    is_provable: bool
    """Whether there is a compiler for the target."""
    memory_bytes: int | None
    """Memory of one chip for programs; None where it is not known."""
    seconds_per_step: float | None
    """Estimated; None where the speed of the target is not known."""
    work: list[Row]
    """Operations and memory traffic of the parts of a step, and their time where it is known."""
    hours: float | None
    budget_hours: float
    is_in_time: bool
    changes: Changes
    """Options that would make it fit and finish, found by trying."""
    mean_completion_tokens: int


def make_plan(
    config: Config,
    target_name: str,
    *,
    budget_hours: float,
    mean_completion_tokens: int,
    note: Progress,
) -> Plan:
    """Plans a run; what was compiled once is kept in the user's cache directory.

    Raises:
        UserError: for a target or a mesh that cannot be.
    """
    target = find_target(target_name)
    _set_environment(config, target)
    _check_chips(config, target)
    given = {"budget": budget_hours, "mean_completion_tokens": mean_completion_tokens}
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} = {value} must be a finite number greater than 0")
    from gemma2_grpo.training.loss import find_objective

    find_objective(config.grpo.loss_type)
    mean = min(mean_completion_tokens, config.rollout.max_completion_tokens)
    return _planned(config, target, budget_hours, mean, note)


def _set_environment(config: Config, target: Target) -> None:
    """Sets the variables that the compilers read when they are loaded."""
    fsdp, tp = config.model.mesh_shape
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if target.accelerator:
        os.environ["TPU_ACCELERATOR_TYPE"] = target.accelerator
    if "jax" in sys.modules:  # It has read these already.
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target.name == "cpu":
        count = f"--xla_force_host_platform_device_count={fsdp * tp}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()


def _check_chips(config: Config, target: Target) -> None:
    fsdp, tp = config.model.mesh_shape
    if target.chips is not None and fsdp * tp != target.chips:
        fitting = " ".join(map(str, mesh_for(target.chips)))
        raise ConfigError(
            f"mesh_shape = {[fsdp, tp]} is not one of the {target.chips} chips of {target.name}; "
            f"give --mesh-shape {fitting}"
        )


def _planned(
    config: Config, target: Target, budget_hours: float, mean: int, note: Progress
) -> Plan:
    is_compiled = target.name == "cpu" or (
        target.topology is not None and importlib.util.find_spec("libtpu") is not None
    )
    memory = partial(estimated_memory, target=target)
    if is_compiled:  # A change leaves most programs as they are: one compiler knows them all.
        from gemma2_grpo.plan.footprint import Compiler

        memory = partial(kept_memory, target=target, note=note, compiler=Compiler(note))
    found = memory(config)
    changes = _smallest_change(config, found, memory, note)
    work = _work(config, target, mean, found.programs)
    seconds = sum(part.get("seconds", 0.0) for part in work) if target.flops else None
    hours = None if seconds is None else seconds * config.run.max_steps / 3600
    is_in_time = hours is None or hours <= budget_hours
    if hours is not None and not is_in_time and (found.fits or changes):
        # Not even one step may have the time.
        steps = int(config.run.max_steps * budget_hours / hours)
        changes = changes | {"max_steps": steps} if steps else {}
    return Plan(
        **vars(found),
        target=target.name,
        chips=math.prod(config.model.mesh_shape),
        proof="compiled" if is_compiled else "estimate",
        is_provable=target.topology is not None,
        memory_bytes=target.memory_bytes,
        seconds_per_step=seconds,
        work=work,
        hours=hours,
        budget_hours=budget_hours,
        is_in_time=is_in_time,
        changes=changes,
        mean_completion_tokens=mean,
    )


def _smallest_change(
    config: Config, found: Memory, memory: Callable[[Config], Memory], note: Progress
) -> Changes:
    """Halves what the memory depends on, least harmful first, until it fits; {} if nothing does."""
    changes: Changes = {}
    while not found.fits:
        too_large = next(row["name"] for row in found.programs if not row["fits"])
        step = next(_steps(config, too_large in _OF_UPDATE), None)
        if step is None:
            return {}
        change, config = step
        changes |= change
        note(f"trying {options(changes)}")
        found = memory(config)
    return changes


def _steps(config: Config, is_update: bool) -> Iterator[tuple[Changes, Config]]:
    """Changes that save memory of an update, or of sampling, one step at a time."""
    halves = (
        [
            ("remat", "decoder" if config.model.remat != "decoder" else None),
            ("micro_batch_tokens", config.grpo.micro_batch_tokens // 2),
            ("logprob_chunk_tokens", config.model.logprob_chunk_tokens // 2),
            ("max_completion_tokens", config.rollout.max_completion_tokens // 2),
        ]
        if is_update
        else [
            ("num_generations", config.rollout.num_generations // 2),
            ("prompts_per_step", config.rollout.prompts_per_step // 2),
        ]
    )
    for name, value in halves:
        if value is None or (isinstance(value, int) and value < 16 and is_update):
            continue
        try:
            yield {name: value}, check(replaced(config, **{name: value}))
        except ConfigError:
            continue


def options(changes: Mapping[str, int | str]) -> str:
    """Changes as options of the command line."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())


def _work(config: Config, target: Target, mean: int, programs: Sequence[Row]) -> list[Row]:
    """The parts of a step; their time is estimated from the least that they take at the peak."""
    from gemma2_grpo.plan.costs import (
        BANDWIDTH_EFFICIENCY,
        COMPUTE_EFFICIENCY,
        Work,
        model_sizes,
        moved_bytes,
        step_work,
    )

    architecture = find_architecture(config)
    works = step_work(model_sizes(architecture, config), config, mean)
    if target.flops is None or target.memory_bandwidth is None:
        return [asdict(work) for work in works]

    def timed(work: Work, floor: float, efficiency: float) -> Row:
        return asdict(work) | {"floor_seconds": floor, "seconds": floor / efficiency}

    chips, parts = math.prod(config.model.mesh_shape), []
    for work in works:
        is_bound_by_memory = work.bytes / target.memory_bandwidth > work.operations / target.flops
        efficiency = BANDWIDTH_EFFICIENCY if is_bound_by_memory else COMPUTE_EFFICIENCY
        floor = work.seconds(target, chips, config.model.dtype)
        parts.append(timed(work, floor, efficiency))
    are_known = all(program.get("collectives") is not None for program in programs)
    if target.link_bandwidth and chips > 1 and are_known:
        moved = moved_bytes(architecture, config, mean, programs)
        links = Work("links between chips", 0.0, moved * chips)
        parts.append(timed(links, moved / target.link_bandwidth, BANDWIDTH_EFFICIENCY))
    return parts
