"""TPUs and GPUs: memory, speed, slices, and what clouds and compilers call them.

The numbers, with their sources, are in chips.toml.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

from gemma2_grpo.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class TpuFamily:
    """One generation of TPU."""

    cloud_name: str
    """First part of a slice's name on Google Cloud."""
    gke_accelerator: str
    """Value of the node label `cloud.google.com/gke-tpu-accelerator`."""
    cores_per_chip: int
    """The number in a slice's name counts these; JAX has one device per chip all the same."""
    largest_host_chips: int
    topologies: list[str]
    gib: float
    """Memory of a chip as its compiler grants it to programs."""
    teraflops: float
    """Peak of matrix products in bfloat16 of one chip."""
    gigabytes: float
    """Bandwidth of its memory, a second."""
    gigabits: float
    """Bandwidth of all its links to other chips, a second, in both directions together."""
    compiler_options: Mapping[str, str] = field(default_factory=dict)

    def slices(self) -> dict[int, str]:
        """Topology by the number in the slice's name."""
        return {_chips(each) * self.cores_per_chip: each for each in self.topologies}


_TABLE = tomllib.loads(
    (resources.files("gemma2_grpo.runtime") / "chips.toml").read_text(encoding="utf-8")
)
TPU_FAMILIES = {name: TpuFamily(**values) for name, values in _TABLE["tpu"].items()}
# Slices that a run can be planned for: the compiler takes each as one host.
_PLANNED = ("v5e-1", "v5e-4", "v5e-8", "v6e-8", "v4-8", "v5p-8")


@dataclass(frozen=True)
class TpuSlice:
    """A TPU slice, however it is divided among hosts."""

    family: TpuFamily
    size: int
    """The number in its name."""
    topology: str

    @property
    def cloud_name(self) -> str:
        """Name on Google Cloud, such as `v5litepod-16`."""
        return f"{self.family.cloud_name}-{self.size}"

    @property
    def chips(self) -> int:
        """Number of chips, each of which is a device of JAX."""
        return _chips(self.topology)


def find_slice(accelerator: str) -> TpuSlice:
    """The TPU slice of a name: the one that is used here, or that of Google Cloud.

    Raises:
        UserError: listing the slices that are known.
    """
    name, _, size = accelerator.partition("-")
    for key, family in TPU_FAMILIES.items():
        slices = {str(number): number for number in family.slices()}
        if name in (key, family.cloud_name) and size in slices:
            return TpuSlice(family, slices[size], family.slices()[slices[size]])
    known = (f"{key}-{n}" for key, family in TPU_FAMILIES.items() for n in family.slices())
    raise UserError(
        f"accelerator {accelerator!r} is not known; TPU slices are {', '.join(known)}, and GPUs "
        "are written as NAME:COUNT of one host, such as H100:8"
    )


def mesh_for(chips: int, heads: int = 4) -> tuple[int, int]:
    """A mesh (fsdp, tp) of so many chips, with tp as large as it can divide the heads.

    Args:
        chips: All of them are used.
        heads: KV heads of the model; those of every Gemma 2 are a multiple of 4.
    """
    tp = math.gcd(chips, heads)
    return chips // tp, tp


def _chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))


@dataclass(frozen=True, kw_only=True)
class Target:
    """Chips of one kind, as the devices that a mesh is made of."""

    name: str
    chips: int | None = None
    """None: as many as the mesh needs."""
    memory_bytes: int | None = None
    """Memory of one chip in bytes; None where it is the host's."""
    flops: float | None = None
    """Peak of matrix products in bfloat16 of one chip, FLOP/s; None where unknown."""
    float32_flops: float | None = None
    """Peak operations per second in float32, as JAX multiplies it by default."""
    memory_bandwidth: float | None = None
    """Bytes/s of one chip."""
    link_bandwidth: float | None = None
    """Bytes/s that one chip sends to all its neighbours together; None where there is but one."""
    topology: str | None = None
    """Name for the TPU compiler; None where there is no compiler but the estimate."""
    accelerator: str = ""
    """The TPU compiler's name of the slice."""
    compiler_options: tuple[tuple[str, object], ...] = ()
    """More options of the TPU compiler."""


def _tpu(name: str) -> Target:
    tpu = find_slice(name)
    family = tpu.family
    one_chip = (("chips_per_host_bounds", (1, 1, 1)),) if tpu.chips == 1 else ()
    return Target(
        name=name,
        chips=tpu.chips,
        memory_bytes=int(family.gib * GIB),
        flops=family.teraflops * 1e12,
        float32_flops=family.teraflops * 1e12,  # JAX multiplies float32 in one pass of bfloat16.
        memory_bandwidth=family.gigabytes * 1e9,
        link_bandwidth=family.gigabits / 8 / 2 * 1e9,
        topology=f"{name.partition('-')[0]}:{tpu.topology}",
        accelerator=tpu.cloud_name,
        compiler_options=(*family.compiler_options.items(), *one_chip),
    )


def _gpu(name: str, peaks: Mapping[str, float]) -> Target:
    return Target(
        name=name,
        memory_bytes=int(peaks["gib"] * GIB),
        flops=peaks["teraflops"] * 1e12,
        float32_flops=peaks["float32_teraflops"] * 1e12,
        memory_bandwidth=peaks["gigabytes"] * 1e9,
    )


_GPUS = (_gpu(name, peaks) for name, peaks in _TABLE["gpu"].items())
TARGETS = {each.name: each for each in (*map(_tpu, _PLANNED), *_GPUS, Target(name="cpu"))}


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
        UserError: listing what there is.
    """
    if name not in TARGETS:
        raise UserError(f"target = {name!r}: not known; it is one of {', '.join(TARGETS)}")
    return TARGETS[name]
