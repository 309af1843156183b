"""Drawing tokens, with their log-probabilities under the distribution they are drawn from."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


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
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
        logps = jax.nn.log_softmax(logits)
    else:
        logps = jax.nn.log_softmax(truncate(logits / sampling.temperature, sampling))
        tokens = jax.vmap(jax.random.categorical)(keys, logps)
    return tokens.astype(jnp.int32), jnp.take_along_axis(logps, tokens[:, None], axis=1)[:, 0]


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
