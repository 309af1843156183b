"""What this machine can do at best: matrix products and memory traffic, and what it is."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.meter import core_count, now

_SIDE = 1024
_FLOATS = 2**26  # 256 MiB of float32, beyond any cache.
_SECONDS = 1.0
_IDLE_LOAD = 0.5
_LIBRARIES = "google-tunix jax jaxlib flax qwix numpy torch transformers peft trl".split()


@dataclass(frozen=True)
class Peaks:
    """The best of several tries. Per CPU-second on a CPU, per second on an accelerator."""

    numpy_flops: float
    """Float32 matrix product of NumPy; 0 where there is an accelerator."""
    jax_flops: float
    """Matrix product of JAX in the type of the benchmark."""
    read_bytes: float
    """NumPy's dot product of an array with itself; 0 where there is an accelerator."""
    triad_bytes: float
    """JAX's a + s * b: two arrays read and one written."""

    @property
    def flops(self) -> float:
        """The higher rate of computing."""
        return max(self.numpy_flops, self.jax_flops)

    @property
    def bytes(self) -> float:
        """The higher rate of reading."""
        return max(self.read_bytes, self.triad_bytes)


def measure_peaks(dtype: str) -> Peaks:
    """Measures this machine, or the first accelerator if JAX finds one."""
    import jax
    import jax.numpy as jnp

    is_cpu = jax.default_backend() == "cpu"
    side = _SIDE if is_cpu else 8 * _SIDE
    # Products follow one another on the device, so that an accelerator is never waited for.
    depth = 1 if is_cpu else 16
    product = jax.jit(lambda x: jax.lax.fori_loop(0, depth, lambda _, y: x @ y, x))
    matrix = jnp.full((side, side), 1 / side, dtype)
    vectors = jnp.ones((2, _FLOATS), jnp.float32)
    triad = jax.jit(lambda x: x[0] + 2.0 * x[1])
    numpy_flops = read_bytes = 0.0
    if is_cpu:
        array, square = np.asarray(vectors[0]), np.full((side, side), 1 / side, np.float32)
        numpy_flops = 2 * side**3 / _best(lambda: square @ square, True)
        read_bytes = array.nbytes / _best(lambda: np.dot(array, array), True)
    return Peaks(
        numpy_flops=numpy_flops,
        jax_flops=depth * 2 * side**3 / _best(lambda: product(matrix).block_until_ready(), is_cpu),
        read_bytes=read_bytes,
        triad_bytes=3 * 4 * _FLOATS / _best(lambda: triad(vectors).block_until_ready(), is_cpu),
    )


def _best(function: Callable[[], Any], on_cpu_clock: bool) -> float:
    """The fewest seconds that a call takes, of as many as fit into a second."""
    function()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = now()
        function()
        spent = now().since(start)
        best = min(best, spent.cpu if on_cpu_clock else spent.wall)
    return best


def describe() -> dict[str, Any]:
    """The machine and the libraries, as a record of a result needs them."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": _cpu_model(),
        "cores": core_count(),
        "python": platform.python_version(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def load_warning(machine: Mapping[str, Any]) -> str | None:
    """A line on other work, if there is any to speak of."""
    load = (machine["load_average"] or (0.0,))[0]
    if load < _IDLE_LOAD:
        return None
    return (
        f"The load average is {load:.1f} on {machine['cores']} cores: other work is running, and "
        "seconds of either kind will be more than on an idle machine."
    )


def command_line(module: str, arguments: Sequence[str], paths: Sequence[Path | None]) -> str:
    """The command as a result records it: of paths only the names, which mean something elsewhere.

    Args:
        module: What `python -m` runs.
        arguments: Its arguments.
        paths: Which of them are paths.
    """
    names = {str(path): path.name for path in paths if path is not None}
    return " ".join(["python -m", module, *(names.get(text, text) for text in arguments)])


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
