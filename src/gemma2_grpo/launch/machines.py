"""Accelerators and hosts as the tools for clusters lay them out.

Sources: Google's tables of TPU v5e, v6e, v5p and v4 configurations; for GKE and xpk, the slices of
`system_characteristics.py` in AI-Hypercomputer/xpk.
"""

import re
from dataclasses import dataclass
from typing import Literal

from gemma2_grpo.errors import UserError
from gemma2_grpo.runtime.chips import TpuSlice, find_slice

Launcher = Literal["xpk", "jobset", "slurm", "skypilot"]

_GPUS = re.compile(r"([A-Za-z][\w-]*):([1-9]\d*)", re.ASCII)
_SMALL_HOST_CHIPS = 4  # The hosts of every slice that has several.


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
        hosts: Number of hosts; None for what the slice comes with, or for one host of GPUs.
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
    tpu = find_slice(accelerator)
    if launcher == "slurm":
        raise UserError(
            f"accelerator {accelerator!r}: slurm is written for GPUs; pass those of one host, such "
            "as --accelerator H100:8"
        )
    if launcher == "xpk" and tpu.family.cloud_name == "v5litepod" and tpu.chips < 8:
        raise UserError(f"accelerator {accelerator!r}: the smallest v5e of xpk is v5e-8")
    choices = _host_counts(tpu, launcher)
    if hosts is not None and hosts not in choices:
        known = " or ".join(map(str, choices))
        raise UserError(f"hosts = {hosts}: {accelerator} has {known} on {launcher}; change --hosts")
    hosts = hosts or choices[0]
    return Machines(accelerator, hosts, tpu.chips // hosts, tpu)


def _host_counts(tpu: TpuSlice, launcher: Launcher) -> tuple[int, ...]:
    """Over how many hosts a slice can be divided, the usual number first.

    Eight chips of v5e or v6e are one host of Cloud TPU, two hosts of xpk, and on GKE what the node
    pool's machine type says.
    """
    chips = tpu.chips
    small = max(1, chips // _SMALL_HOST_CHIPS)
    whole = 1 if chips <= tpu.family.largest_host_chips else small
    if launcher == "xpk":
        return (small,)
    return (whole, small) if launcher == "jobset" and whole != small else (whole,)
