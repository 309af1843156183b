"""What a run can be planned for: chips, their memory and speed, and what the compiler calls them.

Numbers are the makers' own. TPU: https://cloud.google.com/tpu/docs, the page of each version (peak
compute per chip, HBM bandwidth, interchip bandwidth). GPU: the data sheets of H100 SXM, A100 SXM
40 GB, L4 and T4, matrix units without sparsity.
"""

from dataclasses import dataclass

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
    compiler_options: tuple[tuple[str, str], ...] = ()
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
    **options: str,
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
