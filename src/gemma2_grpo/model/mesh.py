"""The mesh of devices, (fsdp, tp), and which meshes a model divides over."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.models.gemma import model as gemma

from gemma2_grpo.errors import UserError
from gemma2_grpo.runtime.chips import mesh_for

MESH_AXES = ("fsdp", "tp")


def make_mesh(shape: tuple[int, int]) -> Mesh:
    """Lays the first `fsdp x tp` devices of this process out as a mesh with those axes.

    Raises:
        UserError: if there are fewer devices.
    """
    needed, present = shape[0] * shape[1], jax.local_device_count()
    if needed > present:
        fitting = _meshes_that_fit((), present)
        raise UserError(
            f"mesh_shape = {list(shape)} needs {needed} devices but {present} "
            f"({jax.default_backend()}) are present; meshes that fit: {fitting}"
        )
    return Mesh(np.asarray(jax.local_devices()[:needed]).reshape(shape), MESH_AXES)


def check_mesh(architecture: gemma.ModelConfig, mesh: Mesh) -> None:
    """Refuses a mesh over which a model's heads or weights do not divide.

    Raises:
        UserError: naming what does not divide, and the meshes over which all does.
    """
    fsdp, tp = (mesh.shape[axis] for axis in MESH_AXES)
    check_mesh_shape(architecture, (fsdp, tp), jax.local_device_count())


def check_mesh_shape(architecture: gemma.ModelConfig, shape: tuple[int, int], devices: int) -> None:
    """The same of a mesh (fsdp, tp) whose devices need not be present.

    Args:
        architecture: Of the model.
        shape: Of the mesh.
        devices: How many there are, for the meshes that the message names.

    Raises:
        UserError: naming what does not divide, and the meshes over which all does.
    """
    sizes = [
        (1, architecture.num_kv_heads, "KV heads"),
        (1, architecture.num_heads, "query heads"),
        (0, architecture.embed_dim, "hidden units"),
        (1, architecture.embed_dim, "hidden units"),
        (1, architecture.hidden_dim, "MLP units"),
        (1, architecture.num_embed, "vocabulary entries"),
    ]
    for axis, size, name in sizes:
        parts = shape[axis]
        if size % parts:
            fitting = _meshes_that_fit([(axis, size) for axis, size, _ in sizes], devices)
            raise UserError(
                f"mesh_shape[{axis}] = {parts} does not divide the model's {size} {name}; "
                f"meshes that fit: {fitting}"
            )


def _meshes_that_fit(sizes: Sequence[tuple[int, int]], present: int) -> str:
    """Meshes of as many devices as can be used, given sizes that an axis must divide."""
    shapes = [
        (fsdp, tp)
        for fsdp in range(1, present + 1)
        for tp in range(1, present // fsdp + 1)
        if all(size % (fsdp, tp)[axis] == 0 for axis, size in sizes)
    ]
    most = max(fsdp * tp for fsdp, tp in shapes)
    return ", ".join(str(list(shape)) for shape in shapes if shape[0] * shape[1] == most)


def mesh_shape_at_hand(wanted: tuple[int, int], architecture: gemma.ModelConfig) -> tuple[int, int]:
    """The wanted mesh where there are devices for it, else one of all devices there are.

    As many of them as the KV heads allow go along tp, since a smaller cache is a faster decoder.
    """
    present = jax.local_device_count()
    if wanted[0] * wanted[1] <= present:
        return wanted
    return mesh_for(present, math.gcd(architecture.num_kv_heads, architecture.num_heads))


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Rows over the fsdp axis where they divide, else on every device."""
    divides = rows % mesh.shape["fsdp"] == 0
    return NamedSharding(mesh, PartitionSpec("fsdp") if divides else PartitionSpec())


@contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Tells Tunix's models over which mesh to shard their activations.

    They read it from where only this way of entering a mesh puts it. JAX deprecates the way, but
    under `jax.set_mesh` activations would not be sharded at all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        mesh.__enter__()
    try:
        yield
    finally:
        mesh.__exit__(None, None, None)
