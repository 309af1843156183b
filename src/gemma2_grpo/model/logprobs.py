"""The output head: logits, and log-probabilities of tokens in chunks."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma2_grpo.model.mesh import constrained
from gemma2_grpo.model.weights import Forward, Weights

_Chunk = TypeVar("_Chunk")
_Mapped = TypeVar("_Mapped")


class TokenLogps(NamedTuple):
    """What the loss and the metrics need of the distribution at each completion token."""

    logps: Float[Array, "R T"]
    """Log-probability of the token under the policy at the sampling temperature."""
    entropy: Float[Array, "R T"]
    """Entropy of the distribution in nats, without gradient."""


def output_logits(
    forward: Forward, weights: Weights, hidden: Float[Array, "... D"]
) -> Float[Array, "... V"]:
    """Logits in float32, with the final soft cap."""
    logits = _uncapped_logits(hidden, weights.embedding)
    return _cap(logits, forward.architecture.final_logit_softcap)


def _gathered_head(forward: Forward, embedding: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """The output head, gathered over fsdp once for all chunks."""
    if forward.mesh.shape["fsdp"] == 1:
        return embedding
    return jax.lax.optimization_barrier(constrained(embedding, ("tp", None), forward.mesh))


def _uncapped_logits(
    hidden: Float[Array, "... D"], embedding: Float[Array, "V D"]
) -> Float[Array, "... V"]:
    return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)


def _cap(logits: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


class _Softmax(NamedTuple):
    """A softmax over the vocabulary, before its division."""

    capped: Float[Array, "R C V"]
    masses: Float[Array, "R C V"]
    """Exponentials of the capped logits, the largest of which is 1."""
    total: Float[Array, "R C 1"]
    """Sum of the masses."""
    chosen: Float[Array, "R C 1"]
    """Capped logits of the targets."""


def token_logps(
    forward: Forward,
    weights: Weights,
    hidden: Float[Array, "R T D"],
    targets: Int[Array, "R T"],
    *,
    temperature: float,
    chunk_tokens: int,
) -> TokenLogps:
    """Log-probabilities of tokens from the hidden states that predict them.

    Logits exist for `chunk_tokens` of the T positions at a time. The gradient with respect to the
    hidden state, up to a factor per token, is taken while they do, so that the backward pass
    needs no logits: that of log p(y) is W[y] less the mean of W under p.

    Args:
        forward: How the model is run.
        weights: Its variables; the output head gets no gradient.
        hidden: Hidden states.
        targets: The tokens they predict.
        temperature: Divides the logits, as in sampling.
        chunk_tokens: Positions whose logits exist at one time.

    Returns:
        Float32 values.
    """
    softcap = forward.architecture.final_logit_softcap
    head = _gathered_head(forward, weights.embedding)

    def distribution(hidden: Array, targets: Array) -> tuple[TokenLogps, _Softmax]:
        capped = _cap(_uncapped_logits(hidden, head), softcap)
        # What is sampled from is the capped distribution at the temperature, and so it is here:
        # else the ratio of the first iteration would not be 1.
        scaled = capped / temperature
        top = scaled.max(axis=-1, keepdims=True)
        masses = jnp.exp(scaled - top)
        total = masses.sum(axis=-1, keepdims=True)
        normaliser = top + jnp.log(total)
        chosen = jnp.take_along_axis(capped, targets[..., None], axis=-1)
        # Entropy is the normaliser less the mean of the scaled logits.
        mean = jnp.sum(masses * scaled, axis=-1, keepdims=True) / total
        logps = TokenLogps((chosen / temperature - normaliser)[..., 0], (normaliser - mean)[..., 0])
        return logps, _Softmax(capped, masses, total, chosen)

    @jax.custom_vjp
    def logps_of(hidden: Array, targets: Array) -> TokenLogps:
        chunks = (hidden, targets)
        return map_chunks(lambda chunk: distribution(*chunk)[0], chunks, chunk_tokens)

    def with_slopes(hidden: Array, targets: Array) -> tuple[TokenLogps, Array]:
        def chunk_slopes(chunk: tuple[Array, Array]) -> tuple[TokenLogps, Array]:
            logps, softmax = distribution(*chunk)
            capped, masses, total, chosen = softmax
            # Derivative of the soft cap: of all logits, and of the target's.
            bend = 1.0 if softcap is None else 1 - jnp.square(capped / softcap)
            chosen_bend = 1.0 if softcap is None else 1 - jnp.square(chosen / softcap)
            # The division comes after the product, on [R, C, D] instead of [R, C, V].
            mean = jnp.einsum(
                "...v,vd->...d",
                (masses * bend).astype(hidden.dtype),
                head,
                preferred_element_type=jnp.float32,
            )
            slopes = head[chunk[1]] * chosen_bend - mean / total
            return logps, (slopes / temperature).astype(hidden.dtype)

        return map_chunks(chunk_slopes, (hidden, targets), chunk_tokens)

    def backward(slopes: Array, cotangents: TokenLogps) -> tuple[Array, None]:
        # The loss weighs each token, which is all that was not known in the forward pass.
        return (cotangents.logps[..., None] * slopes).astype(slopes.dtype), None

    logps_of.defvjp(with_slopes, backward)
    return logps_of(hidden, targets)


def map_chunks(function: Callable[[_Chunk], _Mapped], arrays: _Chunk, chunk_tokens: int) -> _Mapped:
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
