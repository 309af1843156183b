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
        Indices [R], never of a mass of zero.
    """
    rows, size = masses.shape
    blocks = jnp.pad(masses, [(0, 0), (0, -size % _BLOCK)]).reshape(rows, -1, _BLOCK)
    cumulated = jnp.cumsum(blocks.sum(axis=-1), axis=-1)
    target = uniforms[:, None] * cumulated[:, -1:]
    block = jnp.sum(cumulated <= target, axis=-1, keepdims=True)
    before = jnp.take_along_axis(jnp.pad(cumulated, [(0, 0), (1, 0)]), block, axis=-1)
    within = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    index = jnp.sum(jnp.cumsum(within, axis=-1) <= target - before, axis=-1)
    # The two sums are rounded differently, so that the second may end below the target.
    last = _BLOCK - 1 - jnp.argmax(within[:, ::-1] > 0, axis=-1)
    return block[:, 0] * _BLOCK + jnp.minimum(index, last)


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
