"""Per-chip memory, FLOPs and collectives of a compiled program, as XLA reports them."""

import hashlib
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from gemma2_grpo.errors import UserError
from gemma2_grpo.model.mesh import MESH_AXES, make_mesh
from gemma2_grpo.plan.programs import Lower, Programs
from gemma2_grpo.runtime.chips import Target

_OUT_OF_MEMORY = re.compile(r"(?:required.*?\(|Used )([\d.]+)([KMG])")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (.+?) "
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*)$",
    re.MULTILINE,
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"([a-z]+\d+|pred)\[([\d,]*)\]")


@dataclass(frozen=True)
class Footprint:
    """One program on one chip, in bytes."""

    name: str
    arguments: int
    temporaries: int
    peak: int
    """The most at one time, arguments and results included."""
    fits: bool
    """False where the compiler refused it; then only `peak` means anything."""
    collectives: Mapping[str, tuple[int, int]] | None
    """By kind: how many the program has, and bytes of their results; loops are counted once. None
    where they cannot be read."""
    operations: float
    """By the compiler's own count, over all chips; loops are counted once."""
    compile_seconds: float


class Compiler:
    """Compiles programs ahead of time, each of them once."""

    def __init__(self, note: Callable[[str], None] = lambda _: None) -> None:
        """Starts with nothing compiled.

        Args:
            note: Called with a message before each compilation.
        """
        self._note = note
        self._known: dict[bytes, Footprint] = {}

    def __call__(self, name: str, lower: Lower) -> Footprint:
        """The footprint of a program; the same program may belong to several configurations."""
        lowered = lower()
        key = hashlib.sha256(lowered.as_text().encode()).digest()
        if key not in self._known:
            self._note(f"compiling {name}")
            self._known[key] = compile_program(name, lowered)
        return self._known[key]


def compile_program(name: str, lowered: jax.stages.Lowered) -> Footprint:
    """Compiles a program, and reads its compiler's account."""
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _OUT_OF_MEMORY.search(str(error))
        if found is None:
            raise
        needed = int(float(found[1]) * _UNITS[found[2]])
        return Footprint(name, 0, 0, needed, False, {}, 0.0, time.perf_counter() - started)
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    whole = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # A CPU's compiler reports no peak worth the name.
    reported = getattr(memory, "peak_memory_in_bytes", 0)
    cost: Any = compiled.cost_analysis() or {}
    return Footprint(
        name,
        arguments,
        temporaries,
        reported if reported > temporaries else whole,
        True,
        _collectives_of(compiled),
        float(cost.get("flops", 0.0)),
        time.perf_counter() - started,
    )


def _collectives_of(compiled: jax.stages.Compiled) -> Mapping[str, tuple[int, int]] | None:
    """Collectives of a program; None where jaxlib cannot read the program (v6e, v5p)."""
    try:
        return collectives(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError:
        return None


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Number and bytes of the collectives in a compiled program, by kind.

    The TPU compiler writes one collective into each of several computations that run it in part;
    they have one channel.
    """
    found: dict[str, tuple[int, int]] = {}
    seen: set[str] = set()
    for result, kind, rest in _COLLECTIVE.findall(text):
        channel = _CHANNEL.search(rest)
        if channel and channel[1] in seen:
            continue
        seen |= {channel[1]} if channel else set()
        count, size = found.get(kind, (0, 0))
        sizes = [_bytes(item, dimensions) for item, dimensions in _ARRAY.findall(result)]
        # What starts one returns its operand as well as its result.
        found[kind] = (count + 1, size + max(sizes, default=0))
    return found


def _bytes(item: str, dimensions: str) -> int:
    bits = int(re.sub(r"\D", "", item) or 8)
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8


def target_mesh(target: Target, shape: tuple[int, int]) -> Mesh:
    """A mesh of devices that need not be there.

    Raises:
        UserError: if the mesh is not one of all chips of the target, or the compiler does not
            know the target.
    """
    if target.topology is None:
        return make_mesh(shape)
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=target.topology, **dict(target.compiler_options)
        )
    except Exception as error:  # The plugin raises nothing narrower.
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"target = {target.name!r}: the TPU compiler cannot be used ({line}); "
            "is another process using it?"
        ) from None
    return Mesh(np.asarray(topology.devices).reshape(shape), MESH_AXES)


@dataclass(frozen=True)
class Resident:
    """Bytes that a run keeps on one chip from its start to its end."""

    weights: int
    adapters: int
    moments: int
    merged: frozenset[str] = frozenset()
    """Programs during which a copy of the weights is there, with the adapters added."""

    @property
    def total(self) -> int:
        """Bytes of weights, adapters and moments together."""
        return self.weights + self.adapters + self.moments

    def peak(self, program: Footprint) -> int:
        """Peak memory while a program runs, which counts some of the residents as arguments."""
        name = program.name
        weights, adapters, moments = _RESIDENTS[name]
        if name in self.merged:  # The copy is the argument, or waits; the base waits in any case.
            weights -= 1
            adapters = 0 if name in _OF_ROLLOUT else adapters
        counted = weights * self.weights + adapters * self.adapters + moments * self.moments
        # Gradients that are being added up are the argument of some programs and wait for others.
        waiting = self.adapters if name == "update prompts" else 0
        return self.total - counted + program.peak + waiting


_RESIDENTS = {
    "prefill": (1, 1, 0),
    "decode": (1, 1, 0),
    "grow cache": (0, 0, 0),
    "reference prompts": (1, 0, 0),
    "reference": (1, 0, 0),
    "merge": (1, 1, 0),
    "update prompts": (1, 1, 0),
    "update": (1, 1, 0),
    "update prompts, back": (1, 1, 0),
    "optimizer": (0, 1, 1),
}
"""Whether weights, adapters and moments are arguments of a program, by its name."""
_OF_ROLLOUT = ("prefill", "decode", "grow cache")
_OF_UPDATE = ("update prompts", "update", "update prompts, back", "optimizer")


def resident(programs: Programs) -> Resident:
    """Sizes on one chip, exactly, by the sharding of each variable."""
    lora, base = programs.weights
    moments = nnx.state(programs.optimizer, nnx.OptState)
    merged = frozenset(
        (_OF_ROLLOUT if programs.samples_merged else ())
        + (_OF_UPDATE if programs.updates_merged else ())
    )
    return Resident(_local_bytes(base), _local_bytes(lora), _local_bytes(moments), merged)


def _local_bytes(tree: PyTree) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
