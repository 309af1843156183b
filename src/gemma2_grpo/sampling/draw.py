"""Drawing tokens, with their log-probabilities under the distribution they are drawn from."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

_BLOCK = 128


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. A temperature of 0 takes the likeliest."""

    temperature: float
    top_p: float
    top_k: int
    stop_ids: tuple[int, ...]
    pad_id: int


def draw_tokens(
    keys: jax.Array, logits: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Draws a token per row and gives its log-probability under the drawing distribution.

    Args:
        keys: One key per row [R].
        logits: Float32 logits [R, V].
        sampling: Temperature and truncation.

    Returns:
        Token ids [R] and log-probabilities [R].
    """
    if sampling.temperature > 0:
        logits = truncate(logits / sampling.temperature, sampling)
    top = logits.max(axis=-1, keepdims=True)
    masses = jnp.exp(logits - top)
    if sampling.temperature > 0:
        tokens = pick(jax.vmap(jax.random.uniform)(keys), masses)
    else:
        tokens = jnp.argmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    logps = chosen - top - jnp.log(masses.sum(axis=-1, keepdims=True))
    return tokens.astype(jnp.int32), logps[:, 0]


def pick(uniforms: jax.Array, masses: jax.Array) -> jax.Array:
    """Inverts the cumulative distribution of each row, first by blocks and then within one.

    One random number a row, where adding noise to the logits takes one for each of V tokens; on
    a CPU that noise costs more than the output head.

    Args:
        uniforms: In [0, 1), [R].
        masses: Unnormalised probabilities [R, V], not all zero.

    Returns:
        Indices [R], never of a mass of zero. They never fall as the uniform rises.
    """
    rows, size = masses.shape
    blocks = jnp.pad(masses, [(0, 0), (0, -size % _BLOCK)]).reshape(rows, -1, _BLOCK)
    sums = blocks.sum(axis=-1)
    cumulated = jnp.cumsum(sums, axis=-1)
    target = uniforms[:, None] * cumulated[:, -1:]
    block = _first_above(cumulated, sums, target)
    before = jnp.take_along_axis(cumulated - sums, block, axis=-1)
    within = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    index = _first_above(jnp.cumsum(within, axis=-1), within, target - before)
    return (block * _BLOCK + index)[:, 0]


def _first_above(cumulated: jax.Array, masses: jax.Array, target: jax.Array) -> jax.Array:
    """First index with a mass whose cumulated sum exceeds the target, or the last with a mass.

    Parallel sums in float32 are not monotone: where nothing is added, the sum may still rise by a
    rounding error. So an index without mass is excluded as such, not by its sum.

    Args:
        cumulated: Sums up to and with each index [R, N].
        masses: What each index adds [R, N].
        target: [R, 1].

    Returns:
        Indices [R, 1].
    """
    indices = jnp.arange(masses.shape[-1])
    has_mass = masses > 0
    is_above = has_mass & (cumulated > target)
    first = jnp.where(is_above, indices, masses.shape[-1]).min(axis=-1, keepdims=True)
    last = jnp.where(has_mass, indices, 0).max(axis=-1, keepdims=True)
    return jnp.minimum(first, last)


def truncate(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets what top-k and top-p exclude to minus infinity, [R, V]."""
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < sampling.top_p, descending, jnp.inf)
        logits = jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)
    return logits
