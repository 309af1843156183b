"""Memory of devices, with a warning when one is nearly full; reuse of freed host memory."""

import ctypes
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import psutil

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_INT = 2**31 - 1

_WARN_FRACTION = 0.9
# Statistics of XLA's allocators; CPU devices have none.
_NAMES = {"bytes_in_use", "peak_bytes_in_use", "bytes_limit"}


def keep_freed_memory() -> bool:
    """Makes glibc keep freed buffers for reuse; call it before JAX is imported.

    XLA on a CPU allocates one large buffer per call of a program and frees it again. By default
    glibc returns it to the kernel, which clears it page by page when it is allocated again: a fifth
    of the time of an update. One arena, because each thread would otherwise keep its own buffers.

    Returns:
        Whether it was done; False without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {
        _M_ARENA_MAX: 1,
        _M_MMAP_THRESHOLD: 2**30,
        _M_TRIM_THRESHOLD: _LARGEST_INT,
    }
    return all(libc.mallopt(name, value) for name, value in settings.items())


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process can still take, by the machine and by its container's limit."""
    machine = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text(encoding="utf-8"))
        used = dict(
            line.split()
            for line in (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines()
        )
        return min(machine, limit - int(used["anon"]))
    except (OSError, ValueError, LookupError):  # Another system, or no limit.
        return machine


class _Device(Protocol):
    def memory_stats(self) -> dict[str, int] | None: ...


class MemoryMonitor:
    """Watches the memory of devices, and warns once when one is nearly full."""

    def __init__(self, devices: Sequence[_Device] | None = None) -> None:
        """Takes devices; by default the local ones, because remote ones report nothing."""
        import jax

        self._devices = jax.local_devices() if devices is None else devices
        self._has_warned = False

    def as_record(self) -> dict[str, float | list[int]]:
        """Memory for metrics.jsonl; empty where no device reports it.

        For the fullest device, `memory_bytes` is in use now, `peak_memory_bytes` is the maximum
        since the process began, and `peak_memory_fraction` its share of what programs can
        use. `peak_memory_bytes_by_device` has all devices.
        """
        known = self._known()
        if not known:
            return {}
        fullest = max(known, key=_peak_fraction)
        return {
            "memory_bytes": fullest["bytes_in_use"],
            "peak_memory_bytes": fullest["peak_bytes_in_use"],
            "peak_memory_fraction": _peak_fraction(fullest),
            "peak_memory_bytes_by_device": [each["peak_bytes_in_use"] for each in known],
        }

    def warning(self) -> str | None:
        """A line when a device first exceeds 90 % of its memory; otherwise None."""
        fullest = max(self._known(), key=_peak_fraction, default=None)
        if self._has_warned or fullest is None or _peak_fraction(fullest) < _WARN_FRACTION:
            return None
        self._has_warned = True
        limit = fullest["bytes_limit"] / 2**30
        return (
            f"device memory: {_peak_fraction(fullest):.0%} of {limit:.2f} GiB were in use at the "
            "peak, so that longer completions may not fit; lower micro_batch_tokens for updates, "
            "prompts_per_step for sampling"
        )

    def _known(self) -> list[dict[str, int]]:
        stats = [device.memory_stats() or {} for device in self._devices]
        return [each for each in stats if each.keys() >= _NAMES]


def _peak_fraction(stats: dict[str, int]) -> float:
    return stats["peak_bytes_in_use"] / stats["bytes_limit"]
