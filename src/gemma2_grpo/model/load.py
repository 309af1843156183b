"""Gemma 2 on Tunix: its mesh, and weights from safetensors or at random."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tunix.models.gemma import model as gemma

from gemma2_grpo.model.architecture import query_scale, read_architecture
from gemma2_grpo.model.gemma import Network, network_of
from gemma2_grpo.model.mesh import check_mesh
from gemma2_grpo.model.pretrained import (
    Pretrained,
    VariablePath,
    check_host_memory,
    check_tensors,
    open_tensors,
)


def load_weights(directory: Path, dtype: str, mesh: Mesh) -> gemma.Gemma:
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
    with open_tensors(directory) as tensors:
        check_tensors(directory, tensors, architecture)
        check_host_memory(directory, tensors, [like.get_value() for _, like in variables])
        source = Pretrained(tensors, architecture.head_dim, query_scale(directory))
        flat = [
            (path, like.replace(source.place(path, like.get_value()))) for path, like in variables
        ]
    return _with_float32_norms(nnx.merge(graphdef, nnx.from_flat_state(flat)))


def _abstract(
    architecture: gemma.ModelConfig, dtype: str, mesh: Mesh
) -> tuple[nnx.GraphDef, list[tuple[VariablePath, nnx.Variable]]]:
    """A model without weights: its static half, and variables of shape, type and sharding."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: gemma.Gemma(architecture, rngs=nnx.Rngs(0))))
    shardings = dict(nnx.to_flat_state(nnx.get_named_sharding(state, mesh)))

    def describe(path: VariablePath, variable: nnx.Variable) -> nnx.Variable:
        shape, sharding = variable.get_value().shape, shardings[path].get_value()
        return variable.replace(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding))

    return graphdef, [(path, describe(path, x)) for path, x in nnx.to_flat_state(state)]


def random_weights(
    architecture: gemma.ModelConfig, dtype: str, mesh: Mesh, seed: int
) -> gemma.Gemma:
    """Builds a Gemma 2 with random weights, on its shards from the start.

    Tunix initialises the MLP kernels to zero, with which nothing could be learned, and the rest
    with a fixed deviation; here every matrix is drawn with the deviation 1/sqrt(fan-in), and the
    embedding, which is scaled by sqrt(width) on the way in, with 0.02.
    """
    check_mesh(architecture, mesh)
    graphdef, variables = _abstract(architecture, dtype, mesh)

    def draw(index: int, path: VariablePath, variable: nnx.Variable) -> nnx.Variable:
        like = variable.get_value()
        program = _normal(like.shape, _initial_scale(path, like.shape), dtype, like.sharding)
        return variable.replace(program(jax.random.fold_in(jax.random.key(seed), index)))

    flat = [(path, draw(i, path, like)) for i, (path, like) in enumerate(variables)]
    return _with_float32_norms(nnx.merge(graphdef, nnx.from_flat_state(flat)))


@cache
def _normal(
    shape: tuple[int, ...], scale: float, dtype: str, sharding: jax.sharding.Sharding
) -> Callable[[jax.Array], jax.Array]:
    """Program that draws a matrix, compiled once for all layers."""
    return jax.jit(
        lambda key: (scale * jax.random.normal(key, shape)).astype(dtype), out_shardings=sharding
    )


def _initial_scale(path: VariablePath, shape: tuple[int, ...]) -> float:
    if "scale" in path:  # RMSNorm multiplies by 1 + scale.
        return 0.0
    if "input_embedding" in path:
        return 0.02
    if "attn_vec_einsum" in path:
        return float(np.prod(shape[:2])) ** -0.5
    return float(shape[-2]) ** -0.5


class _Float32RMSNorm(gemma.RMSNorm):
    """RMSNorm computed in float32, as Gemma 2 was trained.

    Tunix's runs in the type of the activations; in bfloat16 that loses what the norm is for.
    Source: Gemma2RMSNorm in transformers, which casts to float32, adds 1 to the scale there, and
    casts back.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
        scale = 1 + self.scale.get_value().astype(jnp.float32)
        return (wide * inverse * scale).astype(x.dtype)


def _with_float32_norms(model: gemma.Gemma) -> gemma.Gemma:
    for _, module in nnx.iter_graph(model):
        if type(module) is gemma.RMSNorm:
            # Past nnx, which would record the class as one more attribute.
            object.__setattr__(module, "__class__", _Float32RMSNorm)
    return model


def plain_network(
    architecture: gemma.ModelConfig, mesh: Mesh | None = None, *, is_sampling: bool = False
) -> Network:
    """The static half of a model without adapters, made without any weights."""
    model = nnx.eval_shape(partial(plain_model, architecture, "float32"))
    return network_of(model, is_sampling=is_sampling, mesh=mesh)


def plain_model(architecture: gemma.ModelConfig, dtype: str) -> gemma.Gemma:
    """A model with Tunix's own initial weights; to be traced for its shapes, not to be run."""
    model = _with_float32_norms(gemma.Gemma(architecture, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
    return model
