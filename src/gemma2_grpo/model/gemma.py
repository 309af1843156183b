"""The one way to run Gemma: hidden states through the model's own call, and its output head.

Qwix applies adapters by wrapping the model's `__call__`. Calling the embedder, the layers or
the final norm one by one would run the base without them, in silence and with zero gradients,
so hidden states are always taken from a whole call, and only the head, which carries no
adapter, is computed here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from tunix.models.gemma import model as gemma

from gemma2_grpo.model.attention import KeyValues, LayerCache, Visible, visible
from gemma2_grpo.model.layers import Remat, constrained, faster

Prefix = Mapping[str, KeyValues]
"""Keys and values of prompts, [B, P, K, H], by the name that Tunix gives a layer's cache."""


class Weights(NamedTuple):
    """Variables of a model, adapters apart; `lora` is empty for the reference."""

    lora: nnx.State
    base: nnx.State

    @property
    def embedding(self) -> jax.Array:
        """Embedding matrix, which is also the output head: [V, D]."""
        return cast(Any, self.base)["embedder"]["input_embedding"].get_value()


@dataclass(frozen=True, eq=False)
class Network:
    """The static half of a model. Programs are compiled per instance, so make one and keep it."""

    graphdef: nnx.GraphDef
    architecture: gemma.ModelConfig
    mesh: Mesh | None = None
    """Over which activations are laid."""

    def merge(self, weights: Weights) -> gemma.Gemma:
        """Puts the model together for one call."""
        return cast(gemma.Gemma, nnx.merge(self.graphdef, *weights))

    @property
    def layers(self) -> list[str]:
        """Names under which the layers keep their caches."""
        return [f"layer_{i}" for i in range(self.architecture.num_layers)]

    @property
    def window(self) -> int | None:
        """Positions that a token sees in a sliding layer."""
        return self.architecture.sliding_window_size


def network_of(
    model: gemma.Gemma,
    remat: Remat = "none",
    *,
    are_merged: bool = False,
    is_sampling: bool = False,
    mesh: Mesh | None = None,
) -> Network:
    """The static half of a model; the arguments are those of `layers.faster`.

    Activations are laid over the mesh on which the weights lie, unless another one is given.
    """
    mesh = mesh or _mesh_of(model)
    faster_model = faster(model, remat, are_merged=are_merged, is_sampling=is_sampling, mesh=mesh)
    return Network(nnx.split(faster_model)[0], model.config, mesh)


def _mesh_of(model: gemma.Gemma) -> Mesh | None:
    sharding = getattr(model.embedder.input_embedding.get_value(), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def weights_of(model: gemma.Gemma) -> Weights:
    """The variables of a model as they are now."""
    _, lora, base = nnx.split(model, nnx.LoRAParam, ...)
    return Weights(lora, base)


def split_model(model: gemma.Gemma) -> tuple[Network, Weights]:
    """Splits a model into its static half and its weights."""
    return network_of(model), weights_of(model)


def gathered_weights(network: Network, weights: Weights) -> Weights:
    """Weights brought together over fsdp, for a loop that runs one token a row in each turn.

    What lies over fsdp is brought together whenever it is used. Of a few rows that takes ten times
    longer than to use it, so a loop does it once, before. The barrier keeps the compiler from
    moving it back into the loop.
    """
    mesh = network.mesh
    if mesh is None or mesh.shape["fsdp"] == 1:
        return weights

    def gather(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        if "fsdp" not in spec:
            return x
        return constrained(x, tuple(None if axis == "fsdp" else axis for axis in spec), mesh)

    lora = jax.tree.map(lambda x: x.astype(weights.embedding.dtype), weights.lora)
    narrow = Weights(lora, weights.base)
    return jax.lax.optimization_barrier(
        jax.tree.map(gather, narrow, nnx.get_partition_spec(narrow))
    )


# The inner jit is needed as well as harmless: Tunix's remat cannot be traced where the model was
# merged outside of the gradient's own trace.
@partial(jax.jit, static_argnames="network")
def hidden_states(
    network: Network,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array,
    seen: Visible,
    cache: Mapping[str, LayerCache],
) -> tuple[jax.Array, Prefix]:
    """Runs the model up to its final norm.

    Adapters are kept in float32 and cast to the type of the base where they are used; else they
    would promote the whole residual stream to float32.

    Args:
        network: Static half of the model.
        weights: Its variables.
        tokens: Token ids [R, T].
        positions: Position of each token [R, T].
        seen: What each token may attend to.
        cache: Keys and values from before, by layer.

    Returns:
        Hidden states [R, T, D] after the final norm, and each layer's keys and values of the rows.
    """
    dtype = weights.embedding.dtype
    lora = jax.tree.map(lambda x: x.astype(dtype), weights.lora)
    model = network.merge(Weights(lora, weights.base))
    # The logits of this call are never used, so the compiler drops them.
    given: Any = (cache, seen)
    _, kept = model(tokens, positions, *given, output_hidden_states=True)
    sown = cast(Any, nnx.pop(model, nnx.Intermediate))["all_hidden_states"]
    return sown.get_value()[-1], cast(Any, kept)


def run_from_start(
    network: Network, weights: Weights, tokens: jax.Array
) -> tuple[jax.Array, Prefix]:
    """Hidden states, keys and values of right-padded rows [R, T] that begin at position 0.

    Padding comes last, so that no real token ever sees it.
    """
    rows, length = tokens.shape
    positions = jnp.arange(length)
    seen = visible(jnp.tri(length, dtype=bool), positions, positions, network.window)
    wide = tuple(jnp.broadcast_to(mask, (rows, length, length)) for mask in seen)
    return hidden_states(
        network,
        weights,
        tokens,
        jnp.broadcast_to(positions, tokens.shape),
        Visible(own=cast(Any, wide)),
        dict.fromkeys(network.layers, LayerCache()),
    )
