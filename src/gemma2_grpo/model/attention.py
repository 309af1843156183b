"""Attention over a prompt that a whole group shares, in little memory.

Keys come in parts, such as those of prompts, [B, P], and those of completions, [B * G, S], with a
mask each. The backward pass computes the attention weights again from the logarithm of their
normaliser, so that nothing of the size T x S is kept between the passes (as in FlashAttention,
arXiv:2205.14135, section 3.1).
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp


class KeyValues(NamedTuple):
    """Keys and values of one layer."""

    keys: jax.Array
    """[R, S, K, H], rotated."""
    values: jax.Array
    """[R, S, K, H]."""


class LayerCache(NamedTuple):
    """What a layer may attend to besides the tokens that are being run."""

    prefix: KeyValues | None = None
    """Of prompts [B, P, K, H]; B divides the rows, and neighbouring rows share a prompt."""
    own: KeyValues | None = None
    """Of each row, [R, S, K, H], written at `Visible.slot`. Without it there is only what is
    being run."""


class Visible(NamedTuple):
    """Which keys each query may attend to, in the place of Tunix's mask.

    Each mask is a pair, of global and of sliding layers.
    """

    own: tuple[jax.Array, jax.Array]
    """True where a query may attend to a key of its row, [R, T, S]."""
    prefix: tuple[jax.Array, jax.Array] | None = None
    """True where a query may attend to a key of its prompt, [R, T, P]."""
    slot: jax.Array | int = 0
    """Where in the cache of its row the first token that is being run goes."""


def visible(
    seen: jax.Array, queries: jax.Array, keys: jax.Array, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Narrows a mask to what a sliding window leaves of it.

    Args:
        seen: True where a query may attend to a key of a global layer, [..., T, S].
        queries: Positions [..., T].
        keys: Positions [..., S].
        window: Positions that a query of a sliding layer sees, its own included.

    Returns:
        The masks of global and of sliding layers.
    """
    if window is None:
        return seen, seen
    return seen, seen & (queries[..., :, None] - keys[..., None, :] < window)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    queries: jax.Array,
    parts: tuple[KeyValues, ...],
    masks: tuple[jax.Array, ...],
    softcap: float | None,
) -> jax.Array:
    """Attention over several parts of keys as over one, softmax in float32.

    Args:
        queries: [R, T, N, H], scaled.
        parts: Keys and values [B, S, K, H], where B divides R and K divides N.
        masks: True where a query may attend to a key of a part, [R, T, S]. Every query must see
            at least one key.
        softcap: Logits are bounded to this by a tanh.

    Returns:
        [R, T, N, H] in the type of the queries.
    """
    return _attend(queries, parts, masks, softcap)[0]


def _attend(
    queries: jax.Array,
    parts: tuple[KeyValues, ...],
    masks: tuple[jax.Array, ...],
    softcap: float | None,
) -> tuple[jax.Array, Any]:
    shapes = [part.keys.shape for part in parts]
    logits = [
        jnp.where(
            _spread(mask, queries.shape[2], shape),
            _logits(queries, part.keys, softcap)[0],
            -jnp.inf,
        )
        for part, mask, shape in zip(parts, masks, shapes, strict=True)
    ]
    tops = [_unfold(each.max(axis=-1, keepdims=True), queries.shape) for each in logits]
    top = jnp.stack(tops).max(axis=0)
    total, summed = 0.0, 0.0
    for each, part in zip(logits, parts, strict=True):
        weights = jnp.exp(each - _fold(top, part.keys.shape))
        total += _unfold(weights.sum(axis=-1, keepdims=True), queries.shape)
        summed += _unfold(_times(weights, part.values), queries.shape)
    output = cast(jax.Array, summed / total).astype(queries.dtype)
    normaliser = top + jnp.log(cast(jax.Array, total))
    return output, (queries, parts, masks, output, normaliser)


def _attend_backward(softcap: float | None, kept: Any, slope: jax.Array) -> Any:
    queries, parts, masks, output, normaliser = kept
    wide = slope.astype(jnp.float32)
    inner = jnp.sum(wide * output, axis=-1, keepdims=True)
    query_slope, part_slopes = 0.0, []
    for part, mask in zip(parts, masks, strict=True):
        shape = part.keys.shape
        capped, bend = _logits(queries, part.keys, softcap)
        weights = jnp.exp(capped - _fold(normaliser, shape))
        weights = jnp.where(_spread(mask, queries.shape[2], shape), weights, 0.0)
        folded = _fold(slope, shape)
        along = jnp.einsum("bkmh,bskh->bkms", folded, part.values, preferred_element_type=_F32)
        logit_slope = weights * (along - _fold(inner, shape)) * bend
        query_slope += _unfold(_times(logit_slope, part.keys), queries.shape)
        part_slopes.append(
            KeyValues(
                _gathered(_fold(queries, shape), logit_slope).astype(part.keys.dtype),
                _gathered(folded, weights).astype(part.values.dtype),
            )
        )
    return cast(jax.Array, query_slope).astype(queries.dtype), tuple(part_slopes), None


attend.defvjp(_attend, _attend_backward)
_F32 = jnp.float32


def _fold(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Brings [R, T, N, ...] to [B, K, M, ...]: M queries share the keys [B, S, K, H] of a head."""
    prompts, _, kv_heads, _ = shape
    rows, length, heads, size = x.shape
    x = x.reshape(prompts, rows // prompts, length, kv_heads, heads // kv_heads, size)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(prompts, kv_heads, -1, size)


def _unfold(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Brings [B, K, M, X] back to [R, T, N, X]."""
    prompts, kv_heads, _, size = x.shape
    rows, length, heads, _ = shape
    x = x.reshape(prompts, kv_heads, rows // prompts, heads // kv_heads, length, size)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(rows, length, heads, size)


def _spread(mask: jax.Array, heads: int, shape: tuple[int, ...]) -> jax.Array:
    """Brings a mask [R, T, S] to [B, K, M, S]."""
    rows, length, width = mask.shape
    prompts, _, kv_heads, _ = shape
    mask = mask.reshape(prompts, 1, rows // prompts, 1, length, width)
    full = (prompts, kv_heads, rows // prompts, heads // kv_heads, length, width)
    return jnp.broadcast_to(mask, full).reshape(prompts, kv_heads, -1, width)


def _logits(
    queries: jax.Array, keys: jax.Array, softcap: float | None
) -> tuple[jax.Array, jax.Array | float]:
    """Float32 logits [B, K, M, S], and their slope in what the cap bounds."""
    logits = jnp.einsum(
        "bkmh,bskh->bkms", _fold(queries, keys.shape), keys, preferred_element_type=_F32
    )
    if softcap is None:
        return logits, 1.0
    bent = jnp.tanh(logits / softcap)
    return softcap * bent, 1 - jnp.square(bent)


def _times(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Sums values [B, S, K, H] with weights [B, K, M, S] to float32 [B, K, M, H]."""
    return jnp.einsum(
        "bkms,bskh->bkmh", weights.astype(values.dtype), values, preferred_element_type=_F32
    )


def _gathered(folded: jax.Array, weights: jax.Array) -> jax.Array:
    """What queries [B, K, M, H] give to keys with weights [B, K, M, S]: float32 [B, S, K, H].

    The large operand is the right one, which is then not copied to be transposed.
    """
    gathered = jnp.einsum(
        "bkmh,bkms->bkhs", folded, weights.astype(folded.dtype), preferred_element_type=_F32
    )
    return gathered.transpose(0, 3, 1, 2)
