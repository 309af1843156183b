"""The worker's side of a run: it makes a step on request, and reports what that cost."""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.meter import Compiles, Instant, Meter, now, peak_rss_bytes
from benchmarks.workload import Batch, Workload

Scorer = Callable[[str, Sequence[int]], Sequence[float]]
"""Log-probabilities of a completion's token ids after a prompt, under the initial weights."""


SYSTEMS = {"ours": "ours", "tunix": "stock_tunix", "trl": "stock_trl"}
"""Module of each system, in `benchmarks.systems`."""


@dataclass(frozen=True)
class StepReport:
    """What one step cost."""

    seconds: dict[str, Instant]
    """Wall and CPU seconds of each phase and of the whole step."""
    completion_tokens: int
    compiled_programs: int
    compile_seconds: float
    """Wall seconds of lowering and compiling within the step."""


@dataclass(frozen=True)
class Ready:
    """A system that is built and waits for its first step."""

    import_rss_bytes: int
    """Peak memory before the model was built."""
    build: Instant


@dataclass(frozen=True)
class Summary:
    """What is known at the end."""

    peak_rss_bytes: int
    fixed_logps: list[float] | None
    """Log-probabilities of the workload's fixed completion, where asked for."""
    device: str
    device_peak_bytes: int | None


class Session:
    """Hands a system its steps and measures them.

    A system imports its libraries, calls `imported`, builds itself, and iterates over `steps`,
    in whose body one whole step happens. Parts of it are charged to a `phase`.
    """

    def __init__(self, connection: Connection, workload: Workload) -> None:
        """Takes the pipe to the parent."""
        self.workload = workload
        self.meter, self.compiles = Meter(), Compiles()
        self.completion_tokens = 0
        self._connection = connection
        self._imported: tuple[int, Instant] = (0, now())
        self._step = 0

    @property
    def batch(self) -> Batch:
        """Input of the step that is under way."""
        return self.workload.batch(self._step)

    def imported(self) -> None:
        """Marks the moment before the model is built."""
        self._imported = (peak_rss_bytes(), now())

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Charges what runs within to `rollout`, `reference` or `update`."""
        return self.meter.phase(name)

    def measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, charged to a phase, with JAX arrays in its result awaited."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                result = function(*args, **kwargs)
                jax = sys.modules.get("jax")
                return jax.block_until_ready(result) if jax else result

        return wrapper

    def steps(self) -> Iterator[Batch]:
        """Yields the input of each step, once the parent asks for it."""
        rss, moment = self._imported
        self._connection.send(Ready(rss, now().since(moment)))
        while (step := self._connection.recv()) is not None:
            self._step = step
            programs, seconds = self.compiles.programs, self.compiles.seconds
            self.meter.start()
            yield self.batch
            self._connection.send(
                StepReport(
                    self.meter.stop(),
                    self.completion_tokens,
                    self.compiles.programs - programs,
                    self.compiles.seconds - seconds,
                )
            )


def serve(connection: Connection, system: str, workload: Workload, is_verified: bool) -> None:
    """Runs a system in a worker process, from its imports to the summary."""
    session = Session(connection, workload)
    score: Scorer = importlib.import_module(f"benchmarks.systems.{SYSTEMS[system]}").run(session)
    device, device_peak = _device(system)
    peak = peak_rss_bytes()  # Before the check, which may need more.
    first = workload.batches[0].prompts[0]
    scored = score(first, workload.fixed_completion) if is_verified else None
    logps = None if scored is None else [float(logp) for logp in scored]
    connection.send(Summary(peak, logps, device, device_peak))


def _device(system: str) -> tuple[str, int | None]:
    if system == "trl":
        return "cpu", None
    import jax

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.devices()]
    return jax.devices()[0].device_kind, max((peak for peak in peaks if peak), default=None)
