"""Joining the other processes of a run, and how they hear why one of them stops.

JAX's own end of a process that lost another one is an abort in the middle of a line. So a process
that stops leaves its reason in the coordination service, and the others listen for it.
"""

import atexit
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax
from jax._src import distributed  # Private, but the one way to tell others why a process stops.

from gemma2_grpo.errors import UserError
from gemma2_grpo.runtime.devices import start_jax

# A process that has not been heard of for so long is taken for dead, and ends the others.
HEARTBEAT_SECONDS = 30
# How long a process that stops waits for the others to hear of it.
_FAREWELL_SECONDS = 5
_STOPPED = "gemma2_grpo/stopped"
_LOST = "error: another process stopped, see its own output"
_NOT_JOINED = "error: the other processes cannot be joined"
_FIX = (
    "give --coordinator, --num-processes and --process-id, the same number to all, or "
    "--num-processes 1 to run alone"
)


class ProcessLostError(SystemExit):
    """Another process is gone: one line and exit status 1."""

    def __init__(self, error: Exception) -> None:
        """Takes what came of speaking to it."""
        super().__init__(f"{_LOST} ({' '.join(str(error).split())})")


_joined = threading.Event()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_: int) -> None:
    """Has JAX's abrupt end, when process 0 does not answer, close with a line for a person."""
    why = f"{_LOST} or the lines above" if _joined.is_set() else f"{_NOT_JOINED}; {_FIX}"
    print(why, file=sys.stderr)
    _exit(1)


@contextmanager
def joined(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[int]:
    """Makes this process one of several, which stop together if one of them fails.

    What is None is asked of the cluster: TPU pods, GKE, Slurm and Open MPI, as JAX knows them.

    Args:
        coordinator: Host and port of process 0.
        num_processes: Number of processes.
        process_id: Rank of this process, from 0.

    Yields:
        How many processes there are.

    Raises:
        UserError: if the others cannot be joined.
    """
    if os.name == "nt":
        raise UserError("several processes train together on Linux only; on Windows, use WSL2")
    is_explicit = None not in (coordinator, num_processes, process_id)
    # JAX aborts from a thread of its own, where no handler of Python's would be called in time.
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if is_explicit else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"{_NOT_JOINED.removeprefix('error: ')} ({line}); {_FIX}") from None
    _joined.set()
    # Where the devices cannot be started, JAX cannot be asked for it.
    number: int = distributed.global_state.process_id
    # JAX has put a handler of its own there, by which the signal is noted and comes to nothing.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    is_leaving = threading.Event()
    listener = threading.Thread(target=_listen, args=(number, is_leaving), daemon=True)
    listener.start()
    try:
        start_jax(print)
        _keep_own_programs()
        yield jax.process_count()
    except BaseException as error:
        is_leaving.set()
        if isinstance(error, SystemExit) and not isinstance(error, ProcessLostError):
            jax.distributed.shutdown()  # All have agreed to stop here.
            raise
        status = _status(error)
        _tell(number, status, str(error) or type(error).__name__)
        # Not JAX's own way out, which would wait for processes that no longer come. The error is
        # still printed first: what was registered last is called first, but after that.
        atexit.register(_exit, status)
        raise
    is_leaving.set()
    listener.join()
    jax.distributed.shutdown()


def _keep_own_programs() -> None:
    """Has JAX keep the compiled programs of every process, not only of process 0.

    Except on GPUs, a program is kept for the very devices that it was compiled for. So the others
    would find none, and all would wait for them at every launch.
    """
    if jax.default_backend() != "gpu":  # After this, JAX asks its devices which process this is.
        distributed.global_state.process_id = 0


def _status(error: BaseException) -> int:
    """Exit status of an error, as `cli.main` has it."""
    if isinstance(error, UserError):
        return 2
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _listen(own_number: int, is_leaving: threading.Event) -> None:
    """Ends this process when another one says why it stops. JAX ends it if one dies silently."""
    while not is_leaving.wait(1):
        try:
            number, status, text = json.loads(_client().key_value_try_get(_STOPPED))
        except RuntimeError:  # Nobody said anything.
            continue
        if is_leaving.is_set():
            return
        text = " ".join(text.removeprefix("error: ").split())
        print(f"error: process {number}: {text}", file=sys.stderr)
        _part(own_number)
        _exit(status)


def _tell(number: int, status: int, text: str) -> None:
    """Sends the other processes the reason why this one stops."""
    with suppress(RuntimeError):  # Another one may have been first, or be gone.
        _client().key_value_set(_STOPPED, json.dumps([number, status, text]))
    _part(number)


def _client() -> Any:
    """JAX's client of the coordination service, which is typed nowhere."""
    return distributed.global_state.client


def _part(number: int) -> None:
    """Waits until all processes know; process 0 leaves last, since all speak through it."""
    with suppress(RuntimeError):
        _client().wait_at_barrier(f"{_STOPPED}/by_all", _FAREWELL_SECONDS * 1000)
    if number == 0:
        time.sleep(1)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
