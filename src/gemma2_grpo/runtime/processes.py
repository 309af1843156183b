"""Processes that train one policy together: each is a replica with devices of its own.

A process rolls out and scores its own part of a batch on its own devices; only sums of gradients
and small values of the host go from one to another. So nothing here is needed within a step, and
with one process nothing here does anything.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from gemma2_grpo.errors import UserError
from gemma2_grpo.runtime.farewell import ProcessLostError

T = TypeVar("T")

# Host values are sent in arrays of this many bytes or a power of two more: each size is a program.
_LEAST_BYTES = 1024


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
    """A collective operation: all processes take part in it, or none."""
    try:
        yield
    except Exception as error:  # Gloo's and XLA's come as several types.
        raise ProcessLostError(error) from error


def gather(value: T) -> list[T]:
    """Gathers a value from each process, in their order (all-gather). Only JSON's types."""
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


def from_first(value: T) -> T:
    """The value of process 0, in all processes (broadcast)."""
    return gather(value)[0]


def gather_rows(columns: Mapping[str, Sequence[T]]) -> dict[str, list[T]]:
    """Columns of all processes, one after the other. A process without rows may give no columns."""
    parts = gather({name: list(column) for name, column in columns.items()})
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: [row for part in parts for row in part.get(name, [])] for name in names}


def check_same(facts: Mapping[str, object]) -> None:
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


def check_replicas(tree: PyTree) -> None:
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


def total(tree: PyTree) -> PyTree:
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
