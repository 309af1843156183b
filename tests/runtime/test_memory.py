"""Memory of devices and of the host. No backend here reports memory, so devices are stand-ins."""

import platform
import subprocess
import sys
from dataclasses import dataclass

import jax
import pytest

from gemma2_grpo.runtime.memory import MemoryMonitor


@dataclass
class Device:
    in_use: int
    peak: int
    limit: int = 1000 * 2**20

    def memory_stats(self) -> dict[str, int]:
        return {
            "num_allocs": 7,
            "bytes_in_use": self.in_use,
            "peak_bytes_in_use": self.peak,
            "bytes_limit": self.limit,
        }


class Silent:
    def memory_stats(self) -> None:
        return None


class Partial:
    """Some allocators know no peak."""

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_in_use": 10}


def test_the_devices_and_the_fullest_of_them_are_recorded() -> None:
    mib = 2**20
    monitor = MemoryMonitor([Device(300 * mib, 500 * mib), Device(100 * mib, 750 * mib), Silent()])
    assert monitor.as_record() == {
        "memory_bytes": 100 * mib,
        "peak_memory_bytes": 750 * mib,
        "peak_memory_fraction": 0.75,
        "peak_memory_bytes_by_device": [500 * mib, 750 * mib],
    }


@pytest.mark.parametrize("devices", [None, [], [Silent(), Partial()]], ids=["CPUs", "no", "silent"])
def test_nothing_is_recorded_where_nothing_is_known(devices: list | None) -> None:
    assert jax.local_devices()[0].memory_stats() is None
    monitor = MemoryMonitor(devices)
    assert monitor.as_record() == {}
    assert monitor.warning() is None


def test_a_nearly_full_device_is_warned_of_once() -> None:
    fuller = Device(0, 899 * 2**20)
    monitor = MemoryMonitor([Device(0, 0), fuller])
    assert monitor.warning() is None
    fuller.peak = 900 * 2**20
    assert monitor.warning() == (
        "device memory: 90% of 0.98 GiB were in use at the peak, so that longer completions may "
        "not fit; lower micro_batch_tokens for updates, prompts_per_step for sampling"
    )
    fuller.peak = 950 * 2**20
    assert monitor.warning() is None
    assert monitor.as_record()["peak_memory_fraction"] == 0.95


# --- Freed buffers stay with the process ---

PROGRAM = """
import ctypes, resource, sys
from gemma2_grpo.runtime.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 100_000_000
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = libc.malloc(SIZE)
    ctypes.memset(buffer, 1, SIZE)
    libc.free(buffer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", PROGRAM, mode]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_a_freed_buffer_is_used_again_without_asking_the_kernel() -> None:
    assert faults("kept") < 10
    # Nothing is gained where the kernel hands out huge pages, but here it is by the page.
    assert faults("stock") > 10
