"""Gemma on Tunix: weights from Hugging Face safetensors, read slice by slice, or at random."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import PathParts
from jax.sharding import Mesh, Sharding
from safetensors import SafetensorError, safe_open

from gemma2_grpo.errors import UserError
from gemma2_grpo.model.architecture import Architecture, read_architecture
from gemma2_grpo.model.hub.find import read_index
from gemma2_grpo.model.layout import (
    Index,
    Sizes,
    Weight,
    all_weights,
    axis_sizes,
    tensor_shapes,
)
from gemma2_grpo.model.mesh import check_mesh
from gemma2_grpo.model.weights import Model
from gemma2_grpo.runtime.memory import available_bytes

_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}

Tensors = Mapping[str, Any]
"""Tensors by their names in transformers, mapped from their files; indexing reads a slice."""


def load_weights(directory: Path, dtype: str, mesh: Mesh) -> Model:
    """Loads a directory of HF safetensors, in one file or many, onto the mesh.

    Each device's shard is read from the mapped file, cast and placed by itself, one tensor after
    the other, so that no device ever holds the whole model and the host holds one tensor at most.
    A process reads the shards of its own devices only.

    Raises:
        UserError: if files or tensors are missing or unreadable, or host memory is short.
    """
    architecture = read_architecture(directory)
    check_mesh(architecture, mesh)
    graphdef, variables = _abstract(architecture, dtype, mesh)
    weights, sizes = all_weights(architecture), axis_sizes(architecture)
    with open_tensors(directory) as tensors:
        check_tensors(directory, tensors, architecture)
        check_host_memory(directory, tensors, [like.get_value() for _, like in variables])

        def place(path: PathParts, like: jax.ShapeDtypeStruct) -> jax.Array:
            def read(index: Index | None) -> np.ndarray:
                assert index is not None
                return _read(tensors, weights[path], index, sizes, like.dtype)

            placed = jax.make_array_from_callback(like.shape, like.sharding, read, like.dtype)
            # Else the host would hold whatever has not been transferred yet.
            return placed.block_until_ready()

        flat = [(path, like.replace(place(path, like.get_value()))) for path, like in variables]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _read(
    tensors: Tensors, weight: Weight, index: Index, sizes: Sizes, dtype: np.dtype
) -> np.ndarray:
    """Reads a slice of a variable and casts it."""

    def read(name: str, index: Index) -> np.ndarray:
        return weight.read(tensors[name].__getitem__, index, sizes).astype(dtype, copy=False)

    if len(weight.tensors) == 1:
        return read(weight.tensors[0], index)
    return np.stack([read(name, index[1:]) for name in weight.tensors[index[0]]])


def _abstract(
    architecture: Architecture, dtype: str, mesh: Mesh
) -> tuple[nnx.GraphDef, Sequence[tuple[PathParts, nnx.Variable]]]:
    """A model without weights: its static half, and variables of shape, type and sharding."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Model(architecture, rngs=nnx.Rngs(0))))
    shardings = dict(nnx.to_flat_state(nnx.get_named_sharding(state, mesh)))

    def describe(path: PathParts, variable: nnx.Variable) -> nnx.Variable:
        shape, sharding = variable.get_value().shape, shardings[path].get_value()
        return variable.replace(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding))

    return graphdef, [(path, describe(path, x)) for path, x in nnx.to_flat_state(state)]


def random_weights(architecture: Architecture, dtype: str, mesh: Mesh, seed: int) -> Model:
    """Builds a Gemma with random weights, on its shards from the start.

    Tunix initialises the MLP kernels to zero, with which nothing could be learned, and the rest
    with a fixed deviation; here every matrix is drawn with the deviation 1/sqrt(fan-in), and the
    embedding, which is scaled by sqrt(width) on the way in, with 0.02.
    """
    check_mesh(architecture, mesh)
    graphdef, variables = _abstract(architecture, dtype, mesh)
    weights, sizes = all_weights(architecture), axis_sizes(architecture)

    def draw(index: int, path: PathParts, variable: nnx.Variable) -> nnx.Variable:
        like = variable.get_value()
        scale = _initial_scale(weights[path], sizes)
        program = _normal(like.shape, scale, dtype, like.sharding)
        return variable.replace(program(jax.random.fold_in(jax.random.key(seed), index)))

    flat = [(path, draw(i, path, like)) for i, (path, like) in enumerate(variables)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


@cache
def _normal(
    shape: tuple[int, ...], scale: float, dtype: str, sharding: jax.sharding.Sharding
) -> Callable[[jax.Array], jax.Array]:
    """Program that draws a matrix, compiled once for all layers."""
    return jax.jit(
        lambda key: (scale * jax.random.normal(key, shape)).astype(dtype), out_shardings=sharding
    )


def _initial_scale(weight: Weight, sizes: Sizes) -> float:
    if not weight.inputs:  # RMSNorm multiplies by 1 + scale.
        return 0.0
    if "V" in weight.axes:
        return 0.02
    _, fan_in = weight.shape(sizes)
    return float(fan_in) ** -0.5


@contextmanager
def open_tensors(directory: Path) -> Iterator[Tensors]:
    """Maps the tensors of a directory, without reading any.

    Where there is a `model.safetensors.index.json` it says which file has which tensor, and other
    files are left alone.

    Raises:
        UserError: for files that are missing or unreadable, and for a tensor that two files have.
    """
    index = read_index(directory)
    files = {path.name for path in directory.glob("*.safetensors")}
    found, owners = {}, {}
    with ExitStack() as stack:
        for file in sorted(files if index is None else set(index.values())):
            path = directory / file
            try:
                tensors = stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a readable safetensors file ({error})") from None
            for name in list(tensors.keys()):
                if index is not None and index.get(name) != file:
                    continue
                if name in found:
                    raise UserError(
                        f"{directory}: {owners[name]} and {file} both have {name}; keep one of them"
                    )
                found[name], owners[name] = tensors.get_slice(name), file
        yield found


def check_tensors(directory: Path, tensors: Tensors, architecture: Architecture) -> None:
    """Compares names, shapes and types of the tensors with what the architecture needs.

    Raises:
        UserError: for the first difference.
    """
    needed = tensor_shapes(architecture)
    missing = sorted(needed.keys() - tensors.keys())
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} tensors are missing, such as {missing[0]}; "
            "a shard may not have been downloaded"
        )
    for name, shape in needed.items():
        present, kind = tensors[name].get_shape(), tensors[name].get_dtype()
        if present != shape:
            raise UserError(
                f"{directory}: {name} has the shape {present}, but config.json means {shape}"
            )
        if kind not in _ITEM_BYTES:
            raise UserError(
                f"{directory}: {name} has the type {kind}; only {', '.join(_ITEM_BYTES)} are read"
            )


def stored_dtype(directory: Path) -> str:
    """Type in which a model's weights are stored: `bfloat16`, or `float32` for any other.

    Raises:
        UserError: for files that are missing or unreadable.
    """
    with open_tensors(directory) as tensors:
        kinds = {part.get_dtype() for part in tensors.values()}
    return "bfloat16" if kinds == {"BF16"} else "float32"


def check_host_memory(
    directory: Path, tensors: Tensors, variables: Sequence[jax.ShapeDtypeStruct]
) -> None:
    """Checks that the host has enough memory to load the model.

    In addition to the mapping of the files, which the system takes back as it needs, loading holds
    one tensor at a time; where the devices are CPUs, their shards as well.

    Args:
        directory: The model, for the message.
        tensors: Tensors to be read.
        variables: Shape, type and sharding of each variable.

    Raises:
        UserError: saying how much is needed and how much there is.
    """
    resident, largest, dtype = 0, 0, np.dtype(variables[0].dtype)
    for like in variables:
        sharding = like.sharding
        assert isinstance(sharding, Sharding)
        devices = sharding.addressable_devices
        local = math.prod(sharding.shard_shape(like.shape)) * len(devices)
        largest = max(largest, local)
        if any(device.platform == "cpu" for device in devices):
            resident += local * dtype.itemsize
    # The embedding is the largest tensor. It is read in its own type, and then converted.
    stored = _ITEM_BYTES[tensors["model.embed_tokens.weight"].get_dtype()]
    copy = stored + (dtype.itemsize if stored != dtype.itemsize else 0)
    needed, free = resident + largest * copy, available_bytes()
    if needed > free:
        raise UserError(
            f"{directory}: loading it in {dtype} takes {needed / 1e9:.1f} GB of host memory, but "
            f"{free / 1e9:.1f} GB are free; free some, or take a machine with more"
        )
