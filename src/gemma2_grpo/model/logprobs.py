"""The output head: logits, and log-probabilities of tokens in chunks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma2_grpo.model.gemma import Network, Weights
from gemma2_grpo.model.layers import constrained


class TokenLogps(NamedTuple):
    """What the loss and the metrics need of the distribution at each completion token."""

    logps: jax.Array
    """Log-probability of the token under the policy at the sampling temperature, [R, T]."""
    entropy: jax.Array
    """Entropy of the distribution in nats, without gradient, [R, T]."""


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
