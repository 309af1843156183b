"""Wall and CPU seconds of the phases of a step, memory, and what was compiled in between."""

import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

OTHER = "other"
_COMPILE = "/jax/core/compile/backend_compile_duration"
_LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"


class Instant(NamedTuple):
    """A moment on both clocks."""

    wall: float
    cpu: float

    def since(self, earlier: "Instant") -> "Instant":
        """Seconds from an earlier moment."""
        return Instant(self.wall - earlier.wall, self.cpu - earlier.cpu)


def now() -> Instant:
    """Wall clock, and CPU seconds of all threads of this process and of its children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Instant(time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime)


class Meter:
    """Charges time to the innermost phase that is open, so that phases never overlap."""

    def __init__(self) -> None:
        """Starts with nothing charged."""
        self.start()

    def start(self) -> None:
        """Begins a step."""
        self._open = [OTHER]
        self._spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._mark = now()

    def _charge(self) -> None:
        moment = now()
        spent = moment.since(self._mark)
        total = self._spent[self._open[-1]]
        total[0] += spent.wall
        total[1] += spent.cpu
        self._mark = moment

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges what runs within to `name`, and no longer to the phase around it."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def stop(self) -> dict[str, Instant]:
        """Ends a step: seconds of each phase, and of the step as their sum."""
        self._charge()
        phases = {name: Instant(*spent) for name, spent in self._spent.items()}
        wall, cpu = (sum(values) for values in zip(*phases.values(), strict=True))
        return phases | {"step": Instant(wall, cpu)}


class Compiles:
    """Counts the programs that JAX compiles, and the wall seconds of lowering and compiling.

    Tracing is not in the seconds: its events nest, and their sum would count time twice.
    """

    def __init__(self) -> None:
        """Counts from zero; `watch` starts the counting."""
        self.programs = 0
        self.seconds = 0.0

    def watch(self) -> None:
        """Registers with JAX, which is imported here."""
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: object) -> None:
        if event in (_COMPILE, _LOWER):
            self.seconds += duration_secs
        self.programs += event == _COMPILE


def peak_rss_bytes() -> int:
    """The most memory that this process has held at one time.

    On Linux from /proc: `ru_maxrss` survives an exec, so that a child would start with the peak
    of its parent.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def core_count() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
