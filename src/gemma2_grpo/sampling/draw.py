"""Drawing tokens, with their log-probabilities under the distribution they are drawn from."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# Probabilities are summed in blocks of this many tokens, and then within one block.
_BLOCK = 128


@dataclass(frozen=True)
class Sampling:
    """Settings of token sampling. A temperature of 0 takes the most likely token (greedy)."""

    temperature: float
    top_p: float
    top_k: int
    stop_ids: tuple[int, ...]
    pad_id: int


def draw_tokens(
    keys: Key[Array, " R"], logits: Float[Array, "R V"], sampling: Sampling
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """Draws a token per row, with its log-probability under the drawing distribution.

    That includes temperature, top-k and top-p, and is in float32.
    """
    if sampling.temperature > 0:
        logits = truncate(logits / sampling.temperature, sampling)
    # Less the highest logit, no exponential overflows, and their sum is at least 1.
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    if sampling.temperature > 0:
        tokens = pick(jax.vmap(jax.random.uniform)(keys), weights)
    else:
        tokens = jnp.argmax(logits, axis=-1)
    # The log-softmax of the drawn token alone: that of all V is never written to memory.
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    logps = chosen - top - jnp.log(weights.sum(axis=-1, keepdims=True))
    return tokens.astype(jnp.int32), logps[:, 0]


def pick(uniforms: Float[Array, " R"], weights: Float[Array, "R V"]) -> Int[Array, " R"]:
    """Inverts the cumulative distribution of each row, first by blocks and then within one.

    One random number per row, where adding noise to the logits takes one for each of V tokens; on
    a CPU that noise costs more than the output head. The uniforms are in [0, 1), the weights
    unnormalised probabilities, not all zero.

    Returns:
        Indices, never of a weight of zero. They never fall as the uniform rises.
    """
    rows, size = weights.shape
    blocks = jnp.pad(weights, [(0, 0), (0, -size % _BLOCK)]).reshape(rows, -1, _BLOCK)
    sums = blocks.sum(axis=-1)
    cumulated = jnp.cumsum(sums, axis=-1)
    target = uniforms[:, None] * cumulated[:, -1:]
    # Two passes over V / 128 and over 128 entries, where one cumulative sum takes log V over V.
    block = _first_above(cumulated, sums, target)
    before = jnp.take_along_axis(cumulated - sums, block, axis=-1)
    within = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    index = _first_above(jnp.cumsum(within, axis=-1), within, target - before)
    return (block * _BLOCK + index)[:, 0]


def _first_above(
    cumulated: Float[Array, "R N"], weights: Float[Array, "R N"], target: Float[Array, "R 1"]
) -> Int[Array, "R 1"]:
    """First index with a weight whose cumulated sum exceeds the target, else the last with one.

    Parallel sums in float32 are not monotone: where nothing is added, the sum may still rise by a
    rounding error. So an index without weight is excluded as such, not by its sum.
    """
    indices = jnp.arange(weights.shape[-1])
    has_weight = weights > 0
    is_above = has_weight & (cumulated > target)
    first = jnp.where(is_above, indices, weights.shape[-1]).min(axis=-1, keepdims=True)
    last = jnp.where(has_weight, indices, 0).max(axis=-1, keepdims=True)
    return jnp.minimum(first, last)


def truncate(logits: Float[Array, "R V"], sampling: Sampling) -> Float[Array, "R V"]:
    """Sets the logits of tokens that top-k and top-p exclude to minus infinity."""
    if sampling.top_k:
        # Equal logits at the border are all kept, so that none is preferred by its index.
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending)
        # By the mass above a token, so that the token that crosses top_p is kept and one remains.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < sampling.top_p, descending, jnp.inf)
        logits = jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)
    return logits
