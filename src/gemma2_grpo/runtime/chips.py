"""TPUs and GPUs: memory, speed, slices, and what clouds and compilers call them.

Numbers are the makers' own. TPU: https://cloud.google.com/tpu/docs, the page of each version (peak
compute per chip, HBM bandwidth, interchip bandwidth); node labels of GKE from
`system_characteristics.py` in AI-Hypercomputer/xpk. GPU: the data sheets of H100 SXM, A100 SXM
40 GB, L4 and T4, matrix units without sparsity.
"""

import math
from dataclasses import dataclass

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
    topologies: tuple[str, ...]
    gib: float
    """Memory of a chip as its compiler grants it to programs."""
    teraflops: float
    """Peak of matrix products in bfloat16 of one chip."""
    gigabytes: float
    """Bandwidth of its memory, a second."""
    gigabits: float
    """Bandwidth of all its links to other chips, a second, in both directions together."""
    compiler_options: tuple[tuple[str, object], ...] = ()

    def slices(self) -> dict[int, str]:
        """Topology by the number in the slice's name."""
        return {_chips(each) * self.cores_per_chip: each for each in self.topologies}


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
TPU_FAMILIES = {
    "v5e": TpuFamily(
        cloud_name="v5litepod",
        gke_accelerator="tpu-v5-lite-podslice",
        cores_per_chip=1,
        largest_host_chips=8,
        topologies=_FLAT,
        gib=15.75,
        teraflops=197,
        gigabytes=819,
        gigabits=1600,
    ),
    "v6e": TpuFamily(
        cloud_name="v6e",
        gke_accelerator="tpu-v6e-slice",
        cores_per_chip=1,
        largest_host_chips=8,
        topologies=_FLAT,
        gib=31.24,
        teraflops=918,
        gigabytes=1640,
        gigabits=3584,
    ),
    "v5p": TpuFamily(
        cloud_name="v5p",
        gke_accelerator="tpu-v5p-slice",
        cores_per_chip=2,
        largest_host_chips=4,
        topologies=_CUBES,
        gib=95.73,
        teraflops=459,
        gigabytes=2765,
        gigabits=4800,
    ),
    "v4": TpuFamily(
        cloud_name="v4",
        gke_accelerator="tpu-v4-podslice",
        cores_per_chip=2,
        largest_host_chips=4,
        topologies=_CUBES,
        gib=30.75,
        teraflops=275,
        gigabytes=1228,
        gigabits=2400,
        compiler_options=(("chip_config_name", "megacore"),),
    ),
}
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
        heads: KV heads of the model; those of Gemma 2 are a multiple of 4.
    """
    tp = math.gcd(chips, heads)
    return chips // tp, tp


def _chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))


@dataclass(frozen=True)
class Target:
    """Chips of one kind, as the devices that a mesh is made of."""

    name: str
    chips: int | None
    """None: as many as the mesh needs."""
    memory_bytes: int | None
    """Memory of one chip in bytes; None where it is the host's."""
    flops: float | None
    """Peak of matrix products in bfloat16 of one chip, FLOP/s; None where unknown."""
    float32_flops: float | None
    """Peak operations per second in float32, as JAX multiplies it by default."""
    memory_bandwidth: float | None
    """Bytes/s of one chip."""
    link_bandwidth: float | None
    """Bytes/s that one chip sends to all its neighbours together; None where there is but one."""
    topology: str | None = None
    """Name for the TPU compiler; None where there is no compiler but the estimate."""
    accelerator: str = ""
    """The TPU compiler's name of the slice."""
    compiler_options: tuple[tuple[str, object], ...] = ()
    """More options of the TPU compiler."""
    title: str = ""

    @property
    def is_compiled(self) -> bool:
        """Whether its programs can be compiled here at all."""
        return self.topology is not None or self.name == "cpu"


def _tpu(name: str) -> Target:
    tpu = find_slice(name)
    family = tpu.family
    one_chip = (("chips_per_host_bounds", (1, 1, 1)),) if tpu.chips == 1 else ()
    return Target(
        name,
        tpu.chips,
        int(family.gib * GIB),
        family.teraflops * 1e12,
        family.teraflops * 1e12,  # By default JAX multiplies float32 in one pass of bfloat16.
        family.gigabytes * 1e9,
        family.gigabits / 8 / 2 * 1e9,
        f"{name.partition('-')[0]}:{tpu.topology}",
        tpu.cloud_name,
        family.compiler_options + one_chip,
        f"TPU {name}",
    )


def _gpu(name: str, gib: float, teraflops: float, float32: float, gigabytes: float) -> Target:
    return Target(
        name,
        None,
        int(gib * GIB),
        teraflops * 1e12,
        float32 * 1e12,
        gigabytes * 1e9,
        None,
        title=f"NVIDIA {name.upper()}",
    )


_ALL = (
    *map(_tpu, _PLANNED),
    _gpu("h100", 79.1, 989, 67, 3350),
    _gpu("a100", 39.4, 312, 19.5, 1555),
    _gpu("l4", 22.5, 121, 30, 300),
    _gpu("t4", 14.6, 65, 8.1, 320),
    Target("cpu", None, None, None, None, None, None, title="CPU"),
)
TARGETS = {target.name: target for target in _ALL}


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
        UserError: listing what there is.
    """
    if name not in TARGETS:
        raise UserError(f"target = {name!r}: not known; it is one of {', '.join(TARGETS)}")
    return TARGETS[name]
