"""Processes that train one policy together: each is a replica with devices of its own.

A process rolls out and scores its own part of a batch on its own devices; only sums of gradients
and small values of the host go from one to another. So nothing here is needed within a step, and
with one process nothing here does anything.
"""

import atexit
import ctypes
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # Private, but the one way to tell others why a process stops.
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma2_grpo.errors import UserError
from gemma2_grpo.runtime.devices import start_jax

# A process that has not been heard of for so long is taken for dead, and ends the others.
HEARTBEAT_SECONDS = 30
# How long a process that stops waits for the others to hear of it.
_FAREWELL_SECONDS = 5
_STOPPED = "gemma2_grpo/stopped"
# Host values are sent in arrays of this many bytes or a power of two more: each size is a program.
_LEAST_BYTES = 1024

_LOST = "error: another process stopped, see its own output"
_NOT_JOINED = "error: the other processes cannot be joined"
_MEND = (
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
    why = f"{_LOST} or the lines above" if _joined.is_set() else f"{_NOT_JOINED}; {_MEND}"
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
        num_processes: How many there are.
        process_id: Which one this is, from 0.

    Yields:
        How many processes there are.

    Raises:
        UserError: if the others cannot be joined.
    """
    if os.name == "nt":
        raise UserError("several processes train together on Linux only; on Windows, use WSL2")
    is_told = None not in (coordinator, num_processes, process_id)
    # JAX aborts from a thread of its own, where no handler of Python's would be called in time.
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if is_told else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"{_NOT_JOINED.removeprefix('error: ')} ({line}); {_MEND}") from None
    _joined.set()
    # Where the devices cannot be started, JAX cannot be asked for it.
    number: Any = distributed.global_state.process_id
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
    client: Any = distributed.global_state.client
    while not is_leaving.wait(1):
        try:
            number, status, text = json.loads(client.key_value_try_get(_STOPPED))
        except RuntimeError:  # Nobody said anything.
            continue
        if is_leaving.is_set():
            return
        text = " ".join(text.removeprefix("error: ").split())
        print(f"error: process {number}: {text}", file=sys.stderr)
        _part(client, own_number)
        _exit(status)


def _tell(number: int, status: int, text: str) -> None:
    """Tells the other processes why this one stops."""
    client: Any = distributed.global_state.client
    with suppress(RuntimeError):  # Another one may have told the same, or be gone.
        client.key_value_set(_STOPPED, json.dumps([number, status, text]))
    _part(client, number)


def _part(client: Any, number: int) -> None:
    """Waits until all processes know; process 0 leaves last, since all speak through it."""
    with suppress(RuntimeError):
        client.wait_at_barrier(f"{_STOPPED}/by_all", _FAREWELL_SECONDS * 1000)
    if number == 0:
        time.sleep(1)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def share(count: int) -> slice:
    """The part of so many equal things that is this process's own; their number must divide."""
    size = count // jax.process_count()
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def has_turn(number: int) -> bool:
    """Whether this process does the piece of work of this number, of pieces done in turn."""
    return number % jax.process_count() == jax.process_index()


@contextmanager
def _together() -> Iterator[None]:
    """What all processes do at the same time, or none."""
    try:
        yield
    except Exception as error:  # Gloo's and XLA's come as several types.
        raise ProcessLostError(error) from error


def gather(value: Any) -> list[Any]:
    """What each process gives, in their order. Only JSON's types go through."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with _together():
        sizes = process_allgather(np.array(len(data), np.int32))
        room = _LEAST_BYTES
        while room < sizes.max():
            room *= 2
        rows = process_allgather(np.pad(data, (0, room - len(data))))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def from_first(value: Any) -> Any:
    """What process 0 gives."""
    return gather(value)[0]


def gather_rows(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Columns of all processes, one after the other. A process without rows may give no columns."""
    parts = gather({name: list(column) for name, column in columns.items()})
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: [row for part in parts for row in part.get(name, [])] for name in names}


def check_same(facts: Mapping[str, Any]) -> None:
    """Refuses processes that were started with different things.

    Raises:
        UserError: naming the first difference from process 0.
    """
    first, *others = gather(dict(facts))
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            differing = other.get(name)  # Another version may lack it.
            if differing != value:
                raise UserError(
                    f"process {number} has {name} = {differing!r}, but process 0 has {value!r}; "
                    "start all processes with the same"
                )


def check_replicas(tree: Any) -> None:
    """Stops a run whose processes no longer hold the same bits, before that is written down.

    Raises:
        RuntimeError: naming the processes that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        digest.update(np.asarray(leaf).tobytes())
    digests = gather(digest.hexdigest())
    differing = [number for number, each in enumerate(digests) if each != digests[0]]
    if differing:
        raise RuntimeError(f"the weights of processes {differing} are not those of process 0")


def total(tree: Any) -> Any:
    """Sums arrays over the processes; each has the same bits of the sum, placed as its own.

    Args:
        tree: Arrays on the mesh of this process, of the same shapes and shardings in all.
    """
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    shardings = [leaf.sharding for leaf in leaves]
    first_axis = [NamedSharding(each.mesh, PartitionSpec(None, *each.spec)) for each in shardings]
    own = jax.jit(_with_first_axis, out_shardings=first_axis)(leaves)
    with _together():
        parts = [
            _assemble((jax.process_count(), *leaf.shape), _over_all(each, "process"), part)
            for leaf, each, part in zip(leaves, shardings, own, strict=True)
        ]
        sums = jax.jit(_sums, out_shardings=[_over_all(each) for each in shardings])(parts)
        jax.block_until_ready(sums)
    local = [
        _assemble(leaf.shape, each, whole)
        for leaf, each, whole in zip(leaves, shardings, sums, strict=True)
    ]
    return jax.tree.unflatten(structure, local)


# Functions of the module, so that JAX knows them again at the next call.
def _with_first_axis(leaves: list[jax.Array]) -> list[jax.Array]:
    return [leaf[None] for leaf in leaves]


def _sums(parts: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(part, axis=0, dtype=part.dtype) for part in parts]


def _assemble(shape: tuple[int, ...], sharding: NamedSharding, array: jax.Array) -> jax.Array:
    """The shards of an array on this process's devices, as shards of another array."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _over_all(sharding: NamedSharding, *first: str) -> NamedSharding:
    """The sharding of one process's mesh as one of the meshes of all, which are one mesh here."""
    return NamedSharding(_meshes(sharding.mesh), PartitionSpec(*first, *sharding.spec))


@cache
def _meshes(mesh: Mesh) -> Mesh:
    """The meshes of all processes, along a new first axis."""
    size = mesh.devices.size
    devices = [
        np.array(jax.local_devices(process_index=number)[:size]).reshape(mesh.devices.shape)
        for number in range(jax.process_count())
    ]
    return Mesh(np.stack(devices), ("process", *mesh.axis_names))
