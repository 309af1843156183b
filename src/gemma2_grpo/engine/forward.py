"""The one way to run Gemma: hidden states through the model's own call, and its output head.

Qwix applies adapters by wrapping the model's `__call__`. Calling the embedder, the layers or
the final norm one by one would run the base without them, in silence and with zero gradients,
so hidden states are always taken from a whole call, and only the head, which carries no
adapter, is computed here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from tunix.models.gemma import model as gemma

from gemma2_grpo.engine.attention import KeyValues, LayerCache, Visible, visible
from gemma2_grpo.engine.layers import Remat, constrained, faster
from gemma2_grpo.engine.loss import TokenLogps
from gemma2_grpo.engine.packing import MicroBatch

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


def output_logits(network: Network, weights: Weights, hidden: jax.Array) -> jax.Array:
    """Logits in float32 with Gemma 2's final soft cap: [..., D] -> [..., V]."""
    logits = _uncapped_logits(hidden, weights.embedding)
    return _cap(logits, network.architecture.final_logit_softcap)


def _gathered_head(network: Network, embedding: jax.Array) -> jax.Array:
    """The output head, brought together over fsdp once for all chunks."""
    if network.mesh is None or network.mesh.shape["fsdp"] == 1:
        return embedding
    return jax.lax.optimization_barrier(constrained(embedding, ("tp", None), network.mesh))


def _uncapped_logits(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
    return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)


def _cap(logits: jax.Array, softcap: float | None) -> jax.Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


class _Softmax(NamedTuple):
    """Of logits [R, C, V]: capped, their exponentials, the sum of these, and those of targets."""

    capped: jax.Array
    masses: jax.Array
    total: jax.Array
    chosen: jax.Array


def token_logps(
    network: Network,
    weights: Weights,
    hidden: jax.Array,
    targets: jax.Array,
    *,
    temperature: float,
    chunk_tokens: int,
) -> TokenLogps:
    """Log-probabilities of tokens from the hidden states that predict them.

    Logits exist for `chunk_tokens` of the T positions at a time. The gradient with respect to the
    hidden state, up to a factor per token, is taken while they do, so that the backward pass
    needs no logits: that of log p(y) is W[y] less the mean of W under p.

    Args:
        network: Static half of the model.
        weights: Its variables; the output head gets no gradient.
        hidden: Hidden states [R, T, D].
        targets: The tokens they predict [R, T].
        temperature: Divides the logits, as in sampling.
        chunk_tokens: Positions whose logits exist at one time.

    Returns:
        Float32 values [R, T].
    """
    softcap = network.architecture.final_logit_softcap
    head = _gathered_head(network, weights.embedding)

    def distribution(hidden: jax.Array, targets: jax.Array) -> tuple[TokenLogps, _Softmax]:
        capped = _cap(_uncapped_logits(hidden, head), softcap)
        scaled = capped / temperature
        top = scaled.max(axis=-1, keepdims=True)
        masses = jnp.exp(scaled - top)
        total = masses.sum(axis=-1, keepdims=True)
        normaliser = top + jnp.log(total)
        chosen = jnp.take_along_axis(capped, targets[..., None], axis=-1)
        mean = jnp.sum(masses * scaled, axis=-1, keepdims=True) / total
        logps = TokenLogps((chosen / temperature - normaliser)[..., 0], (normaliser - mean)[..., 0])
        return logps, _Softmax(capped, masses, total, chosen)

    @jax.custom_vjp
    def logps_of(hidden: jax.Array, targets: jax.Array) -> TokenLogps:
        chunks = (hidden, targets)
        return map_chunks(lambda chunk: distribution(*chunk)[0], chunks, chunk_tokens)

    def with_slopes(hidden: jax.Array, targets: jax.Array) -> tuple[TokenLogps, jax.Array]:
        def chunk_slopes(chunk: tuple[jax.Array, jax.Array]) -> tuple[TokenLogps, jax.Array]:
            logps, softmax = distribution(*chunk)
            capped, masses, total, chosen = softmax
            bend = 1.0 if softcap is None else 1 - jnp.square(capped / softcap)
            chosen_bend = 1.0 if softcap is None else 1 - jnp.square(chosen / softcap)
            mean = jnp.einsum(
                "...v,vd->...d",
                (masses * bend).astype(hidden.dtype),
                head,
                preferred_element_type=jnp.float32,
            )
            slopes = head[chunk[1]] * chosen_bend - mean / total
            return logps, (slopes / temperature).astype(hidden.dtype)

        return map_chunks(chunk_slopes, (hidden, targets), chunk_tokens)

    def backward(slopes: jax.Array, cotangents: TokenLogps) -> tuple[jax.Array, None]:
        return (cotangents.logps[..., None] * slopes).astype(slopes.dtype), None

    logps_of.defvjp(with_slopes, backward)
    return logps_of(hidden, targets)


def completion_logps(
    network: Network,
    weights: Weights,
    prefix: Prefix,
    lengths: jax.Array,
    micro: MicroBatch,
    *,
    temperature: float,
    chunk_tokens: int,
) -> TokenLogps:
    """Log-probabilities of packed completions after the prompts that they belong to.

    Args:
        network: Static half of the model.
        weights: Its variables.
        prefix: Keys and values of the prompts [B, P, K, H], without the last token of each.
        lengths: How many of them are real [B].
        micro: The completions.
        temperature: Divides the logits, as in sampling.
        chunk_tokens: Completion positions whose logits exist at one time.

    Returns:
        Float32 values [R, W]; they mean nothing at padding.
    """
    width = micro.inputs.shape[1]
    own = micro.owners[:, :, None] == micro.owners[:, None, :]
    slots = jnp.arange(prefix[network.layers[0]].keys.shape[1])
    real = jnp.broadcast_to(
        slots < lengths[micro.prompts][:, None, None], (*micro.inputs.shape, len(slots))
    )
    seen = Visible(
        own=visible(
            own & jnp.tri(width, dtype=bool), micro.positions, micro.positions, network.window
        ),
        prefix=visible(real, micro.positions, slots, network.window),
    )
    rows = jax.tree.map(lambda x: x[micro.prompts], prefix)
    cache = {layer: LayerCache(prefix=rows[layer]) for layer in network.layers}
    hidden, _ = hidden_states(network, weights, micro.inputs, micro.positions, seen, cache)
    return token_logps(
        network,
        weights,
        hidden,
        micro.targets,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )


def map_chunks(function: Callable[[Any], Any], arrays: Any, chunk_tokens: int) -> Any:
    """Applies a function to chunks of the second axis, strictly one after the other.

    In a Python loop the compiler is free to compute all chunks at once, which is what chunks are
    there to avoid.

    Args:
        function: Maps arrays [R, C, ...] to arrays [R, C, ...].
        arrays: Arrays [R, T, ...].
        chunk_tokens: The most that C may be. The last chunk is padded with zeros.

    Returns:
        What the function gives, as [R, T, ...].
    """
    width = jax.tree.leaves(arrays)[0].shape[1]
    count = -(-width // chunk_tokens)
    if count == 1:
        return function(arrays)
    size = -(-width // count)  # Of equal chunks, so that little is padding.

    def cut(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, count * size - width)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        rows_first = x.swapaxes(0, 1)
        return rows_first.reshape(rows_first.shape[0], -1, *x.shape[3:])[:, :width]

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(cut, arrays)))
