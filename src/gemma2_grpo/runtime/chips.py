"""What a run can be planned for: chips, their memory and speed, and what the compiler calls them.

Numbers are the makers' own. TPU: https://cloud.google.com/tpu/docs, the page of each version (peak
compute per chip, HBM bandwidth, interchip bandwidth). GPU: the data sheets of H100 SXM, A100 SXM
40 GB, L4 and T4, matrix units without sparsity.
"""

from dataclasses import dataclass

from gemma2_grpo.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True)
class Target:
    """Chips of one kind, as the devices that a mesh is made of."""

    name: str
    chips: int | None
    """None: as many as the mesh needs."""
    memory_bytes: int | None
    """What one chip has for programs; None where it is the host's."""
    flops: float | None
    """Peak of matrix products in bfloat16 of one chip, FLOP/s; None where unknown."""
    float32_flops: float | None
    """The same in float32, as JAX multiplies it by default."""
    memory_bandwidth: float | None
    """Bytes/s of one chip."""
    link_bandwidth: float | None
    """Bytes/s that one chip sends to all its neighbours together; None where there is but one."""
    topology: str | None = None
    """Name for the TPU compiler; None where there is no compiler but the estimate."""
    accelerator: str = ""
    """The TPU compiler's name of the slice."""
    compiler_options: tuple[tuple[str, object], ...] = ()
    """What the TPU compiler must be told besides."""
    title: str = ""

    @property
    def is_compiled(self) -> bool:
        """Whether its programs can be compiled here at all."""
        return self.topology is not None or self.name == "cpu"


def _tpu(
    name: str,
    chips: int,
    gib: float,
    teraflops: float,
    gigabytes: float,
    gigabits: float,
    topology: str,
    accelerator: str,
    **options: object,
) -> Target:
    # JAX multiplies float32 on a TPU in one pass of bfloat16 unless told otherwise. A link's bits
    # count both directions.
    return Target(
        name,
        chips,
        int(gib * GIB),
        teraflops * 1e12,
        teraflops * 1e12,
        gigabytes * 1e9,
        gigabits / 8 / 2 * 1e9,
        topology,
        accelerator,
        tuple(options.items()),
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


_ONE_CHIP = {"chips_per_host_bounds": (1, 1, 1)}
# Memory of a TPU as its compiler grants it to programs.
_ALL = (
    _tpu(
        "v5e-1", 1, 15.75, 197, 819, 1600, "v5e:1x1", "v5litepod-1", chips_per_host_bounds=(1, 1, 1)
    ),
    _tpu("v5e-4", 4, 15.75, 197, 819, 1600, "v5e:2x2", "v5litepod-4"),
    _tpu("v5e-8", 8, 15.75, 197, 819, 1600, "v5e:2x4", "v5litepod-8"),
    _tpu("v6e-8", 8, 31.24, 918, 1640, 3584, "v6e:2x4", "v6e-8"),
    _tpu("v4-8", 4, 30.75, 275, 1228, 2400, "v4:2x2x1", "v4-8", chip_config_name="megacore"),
    _tpu("v5p-8", 4, 95.73, 459, 2765, 4800, "v5p:2x2x1", "v5p-8"),
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
