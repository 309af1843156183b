"""The one way to run Gemma: hidden states through the model's own call, and its output head.

Qwix applies adapters by wrapping the model's `__call__`. Calling the embedder, the layers or
the final norm one by one would run the base without them, in silence and with zero gradients,
so hidden states are always taken from a whole call, and only the head, which carries no
adapter, is computed here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.gemma import model as gemma


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

    def merge(self, weights: Weights) -> gemma.Gemma:
        """Puts the model together for one call."""
        return cast(gemma.Gemma, nnx.merge(self.graphdef, *weights))


def split_model(model: gemma.Gemma) -> tuple[Network, Weights]:
    """Splits a model into its static half and its weights."""
    graphdef, lora, base = nnx.split(model, nnx.LoRAParam, ...)
    return Network(graphdef, model.config), Weights(lora, base)


# The inner jit is needed as well as harmless: Tunix's remat cannot be traced where the model was
# merged outside of the gradient's own trace.
@partial(jax.jit, static_argnames="network")
def hidden_states(
    network: Network,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    cache: Any = None,
) -> tuple[jax.Array, Any]:
    """Runs the model up to its final norm.

    Adapters are kept in float32 and cast to the type of the base where they are used; else they
    would promote the whole residual stream to float32.

    Args:
        network: Static half of the model.
        weights: Its variables.
        tokens: Token ids [B, L].
        positions: Position of each token [B, L].
        mask: True where a query may attend to a key, [B, L, S] with S the length of the cache
            or L without one.
        cache: Key-value cache of Tunix's Gemma, or None.

    Returns:
        Hidden states [B, L, D] after the final norm, and the cache with the new keys and values.
    """
    dtype = weights.embedding.dtype
    lora = jax.tree.map(lambda x: x.astype(dtype), weights.lora)
    model = network.merge(Weights(lora, weights.base))
    # The logits of this call are never used, so the compiler drops them.
    _, cache = model(tokens, positions, cache, mask, output_hidden_states=True)
    sown = cast(Any, nnx.pop(model, nnx.Intermediate))["all_hidden_states"]
    return sown.get_value()[-1], cache


def output_logits(network: Network, weights: Weights, hidden: jax.Array) -> jax.Array:
    """Logits in float32 with Gemma 2's final soft cap: [..., D] -> [..., V]."""
    softcap = network.architecture.final_logit_softcap
    logits = jnp.einsum(
        "...d,vd->...v", hidden, weights.embedding, preferred_element_type=jnp.float32
    )
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


class TokenLogps(NamedTuple):
    """What the loss and the metrics need of the distribution at each completion token."""

    logps: jax.Array
    """Log-probability of the token under the policy at the sampling temperature, [R, T]."""
    entropy: jax.Array
    """Entropy of the distribution in nats, without gradient, [R, T]."""


def completion_logps(
    network: Network,
    weights: Weights,
    tokens: jax.Array,
    prompt_lengths: jax.Array,
    completion_ids: jax.Array,
    *,
    temperature: float,
    chunk_tokens: int,
) -> TokenLogps:
    """Log-probabilities of completions that follow their prompts without a gap.

    Rows are right-padded, so that a token's slot is its position: causal and sliding masks are
    then exact whatever the prompt's length, and padding is never attended to. Logits exist for
    `chunk_tokens` of the T completion positions at a time, here and in the backward pass.

    Args:
        network: Static half of the model.
        weights: Its variables.
        tokens: Prompt and completion [R, L], right-padded.
        prompt_lengths: Tokens of each prompt [R].
        completion_ids: The completions [R, T], right-padded; T + longest prompt <= L.
        temperature: Divides the logits, as in sampling.
        chunk_tokens: Completion positions whose logits exist at one time.

    Returns:
        Float32 values [R, T]; they mean nothing at padding.
    """
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    mask = jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))
    hidden, _ = hidden_states(network, weights, tokens, positions, mask)

    # The state at a token predicts the next one.
    predicting = prompt_lengths[:, None] - 1 + jnp.arange(completion_ids.shape[1])
    hidden = jnp.take_along_axis(hidden, predicting[..., None], axis=1)

    @jax.checkpoint
    def chunk_logps(chunk: tuple[jax.Array, jax.Array]) -> TokenLogps:
        hidden, ids = chunk
        logps = jax.nn.log_softmax(output_logits(network, weights, hidden) / temperature)
        frozen = jax.lax.stop_gradient(logps)
        entropy = -jnp.sum(jnp.exp(frozen) * frozen, axis=-1)
        return TokenLogps(jnp.take_along_axis(logps, ids[..., None], axis=-1)[..., 0], entropy)

    return map_chunks(chunk_logps, (hidden, completion_ids), chunk_tokens)


def map_chunks(function: Callable[[Any], Any], arrays: Any, chunk_tokens: int) -> Any:
    """Applies a function to chunks of the second axis, strictly one after the other.

    In a Python loop the compiler is free to compute all chunks at once, which is what chunks are
    there to avoid.

    Args:
        function: Maps arrays [R, C, ...] to arrays [R, C].
        arrays: Arrays [R, T, ...].
        chunk_tokens: The most that C may be. The last chunk is padded with zeros.

    Returns:
        What the function gives, as [R, T].
    """
    width = jax.tree.leaves(arrays)[0].shape[1]
    count = -(-width // chunk_tokens)
    if count == 1:
        return function(arrays)
    size = -(-width // count)  # Of equal chunks, so that little is padding.

    def cut(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, count * size - width)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)

    results = jax.lax.map(function, jax.tree.map(cut, arrays))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :width], results)
