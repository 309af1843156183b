"""How accelerators are laid out on hosts, as the tools that rent them name it.

Sources: Google's tables of TPU v5e, v6e, v5p and v4 configurations; for GKE and xpk, the labels and
slices of `system_characteristics.py` in AI-Hypercomputer/xpk.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from gemma2_grpo.errors import UserError

Launcher = Literal["xpk", "jobset", "slurm", "skypilot"]

_GPUS = re.compile(r"([A-Za-z][\w-]*):([1-9]\d*)", re.ASCII)
_SMALL_HOST_CHIPS = 4  # The hosts of every slice that has several.


@dataclass(frozen=True)
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

    def slices(self) -> dict[int, str]:
        """Topology by the number in the slice's name."""
        return {_chips(each) * self.cores_per_chip: each for each in self.topologies}


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
TPU_FAMILIES = {
    "v5e": TpuFamily("v5litepod", "tpu-v5-lite-podslice", 1, 8, _FLAT),
    "v6e": TpuFamily("v6e", "tpu-v6e-slice", 1, 8, _FLAT),
    "v5p": TpuFamily("v5p", "tpu-v5p-slice", 2, 4, _CUBES),
    "v4": TpuFamily("v4", "tpu-v4-podslice", 2, 4, _CUBES),
}


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


@dataclass(frozen=True)
class Machines:
    """Equal hosts, with one process on each."""

    accelerator: str
    """`v5e-16`, or the GPUs of one host, `H100:8`."""
    hosts: int
    chips_per_host: int
    tpu: TpuSlice | None
    """None for GPUs."""


def find_machines(accelerator: str, hosts: int | None, launcher: Launcher) -> Machines:
    """Lays out an accelerator on hosts.

    Args:
        accelerator: A TPU slice such as `v5e-16`, or the GPUs of one host such as `H100:8`.
        hosts: How many; None for what the slice comes with, or for one host of GPUs.
        launcher: The tool that rents it; they do not all divide a slice in the same way.

    Raises:
        UserError: for an accelerator that is not known or that the launcher does not have.
    """
    if hosts is not None and hosts < 1:
        raise UserError(f"hosts = {hosts} must be at least 1")
    if gpus := _GPUS.fullmatch(accelerator):
        if launcher in ("xpk", "jobset"):
            raise UserError(
                f"accelerator {accelerator!r}: {launcher} is written for TPU slices; use slurm or "
                "skypilot for GPUs, or pass --accelerator v5e-8"
            )
        return Machines(accelerator, hosts or 1, int(gpus[2]), None)
    tpu = _find_slice(accelerator)
    if launcher == "slurm":
        raise UserError(
            f"accelerator {accelerator!r}: slurm is written for GPUs; pass those of one host, such "
            "as --accelerator H100:8"
        )
    if launcher == "xpk" and tpu.family.cloud_name == "v5litepod" and _chips(tpu.topology) < 8:
        raise UserError(f"accelerator {accelerator!r}: the smallest v5e of xpk is v5e-8")
    choices = _host_counts(tpu, launcher)
    if hosts is not None and hosts not in choices:
        known = " or ".join(map(str, choices))
        raise UserError(f"hosts = {hosts}: {accelerator} has {known} on {launcher}; change --hosts")
    hosts = hosts or choices[0]
    return Machines(accelerator, hosts, _chips(tpu.topology) // hosts, tpu)


def _find_slice(accelerator: str) -> TpuSlice:
    """Finds a TPU slice by the name that is used here, or by that of Google Cloud."""
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


def _host_counts(tpu: TpuSlice, launcher: Launcher) -> tuple[int, ...]:
    """Over how many hosts a slice can be divided, the usual number first.

    Eight chips of v5e or v6e are one host of Cloud TPU, two hosts of xpk, and on GKE what the node
    pool's machine type says.
    """
    chips = _chips(tpu.topology)
    small = max(1, chips // _SMALL_HOST_CHIPS)
    whole = 1 if chips <= tpu.family.largest_host_chips else small
    if launcher == "xpk":
        return (small,)
    return (whole, small) if launcher == "jobset" and whole != small else (whole,)


def _chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))
