"""The mesh of devices, (fsdp, tp), and which meshes a model divides over."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from gemma2_grpo.errors import UserError
from gemma2_grpo.model.architecture import Architecture
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


def check_mesh(architecture: Architecture, mesh: Mesh) -> None:
    """Refuses a mesh over which a model's heads or weights do not divide.

    Raises:
        UserError: naming what does not divide, and the meshes over which all does.
    """
    fsdp, tp = (mesh.shape[axis] for axis in MESH_AXES)
    check_mesh_shape(architecture, (fsdp, tp), jax.local_device_count())


def check_mesh_shape(architecture: Architecture, shape: tuple[int, int], devices: int) -> None:
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


def mesh_shape_at_hand(wanted: tuple[int, int], architecture: Architecture) -> tuple[int, int]:
    """The wanted mesh where its devices are there and divide the heads, else one of all devices.

    As many of them as the KV heads allow go along tp, since a smaller cache is a faster decoder.
    """
    present = jax.local_device_count()
    heads = math.gcd(architecture.num_kv_heads, architecture.num_heads)
    if wanted[0] * wanted[1] <= present and heads % wanted[1] == 0:
        return wanted
    return mesh_for(present, heads)


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Rows over the fsdp axis where they divide, else on every device."""
    divides = rows % mesh.shape["fsdp"] == 0
    return NamedSharding(mesh, PartitionSpec("fsdp") if divides else PartitionSpec())


def constrained(x: Array, axes: tuple[str | None, ...], mesh: Mesh) -> Array:
    """Shards activations over a mesh.

    Tunix's own does nothing where the default device is a CPU, so that programs for a CPU, and
    those that are compiled there for another machine, would not be sharded; and it refuses sizes
    that do not divide, such as a single row over two devices.

    Args:
        x: Activations.
        axes: Axis of the mesh for each dimension, or None.
        mesh: Mesh of the weights.
    """
    spec = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
