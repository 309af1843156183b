"""Attention over a prompt that a whole group shares, in little memory.

Keys come in parts, such as those of prompts, [B, P], and those of completions, [B * G, S], with a
mask each. The backward pass computes the attention weights again from the logarithm of their
normaliser, so that nothing of the size T x S is kept between the passes (as in FlashAttention,
arXiv:2205.14135, section 3.1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KeyValues(NamedTuple):
    """Keys and values of one layer."""

    keys: Float[Array, "R S K H"]
    """Rotated keys."""
    values: Float[Array, "R S K H"]


class LayerCache(NamedTuple):
    """What a layer may attend to besides the tokens that are being run."""

    prefix: KeyValues | None = None
    """KV cache of prompts, [B, P, K, H]; B divides R, and neighbouring rows share a prompt."""
    own: KeyValues | None = None
    """KV cache of each row, [R, S, K, H], written at `Visible.slot`. Without it a row has only the
    tokens that are being run."""


Masks = tuple[Bool[Array, "..."], Bool[Array, "..."]]
"""Masks of global and of sliding layers: True where a query may attend to a key."""


class Visible(NamedTuple):
    """Where the tokens that are being run are, and which keys each may attend to."""

    positions: Int[Array, "R T"]
    own: Masks
    """Keys of its row, [R, T, S]."""
    prefix: Masks | None = None
    """Keys of its prompt, [R, T, P]."""
    slot: Int[Array, ""] | int = 0
    """Where in the cache of its row the first token that is being run goes."""


def visible(
    seen: Bool[Array, "... T S"],
    queries: Int[Array, "... T"],
    keys: Int[Array, "... S"],
    window: int | None,
) -> Masks:
    """Narrows a mask to what a sliding window leaves of it.

    Args:
        seen: True where a query may attend to a key of a global layer.
        queries: Positions of the queries.
        keys: Positions of the keys.
        window: Positions that a query of a sliding layer sees, its own included.

    Returns:
        The masks of global and of sliding layers.
    """
    if window is None:
        return seen, seen
    return seen, seen & (queries[..., :, None] - keys[..., None, :] < window)


def _attention(
    queries: Float[Array, "R T N H"],
    parts: tuple[KeyValues, ...],
    masks: tuple[Bool[Array, "R T S"], ...],
    softcap: float | None,
) -> Float[Array, "R T N H"]:
    """Attention over several parts of keys as over one, softmax in float32.

    Args:
        queries: Scaled queries.
        parts: Keys and values [B, S, K, H], where B divides R and K divides N.
        masks: True where a query may attend to a key of a part. Every query must see at least one
            key.
        softcap: Logits are bounded to this by a tanh.

    Returns:
        Values of the keys, averaged for each query, in the type of the queries.
    """
    return _attend(queries, parts, masks, softcap)[0]


attend = jax.custom_vjp(_attention, nondiff_argnums=(3,))


class _Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    queries: Float[Array, "R T N H"]
    parts: tuple[KeyValues, ...]
    masks: tuple[Bool[Array, "R T S"], ...]
    output: Float[Array, "R T N H"]
    normaliser: Float[Array, "R T N 1"]
    """Logarithm of the sum of exponentials over all parts."""


def _attend(
    queries: Float[Array, "R T N H"],
    parts: tuple[KeyValues, ...],
    masks: tuple[Bool[Array, "R T S"], ...],
    softcap: float | None,
) -> tuple[Float[Array, "R T N H"], _Kept]:
    shapes = [part.keys.shape for part in parts]
    logits = [
        jnp.where(
            _spread(mask, queries.shape[2], shape),
            _logits(queries, part.keys, softcap)[0],
            -jnp.inf,
        )
        for part, mask, shape in zip(parts, masks, shapes, strict=True)
    ]
    # One maximum over all parts keeps every exponential at 1 or below.
    tops = [_unfold(each.max(axis=-1, keepdims=True), queries.shape) for each in logits]
    top = jnp.stack(tops).max(axis=0)
    # Sums of exponentials, and of values weighted by them; divided once, at the end.
    total, summed = jnp.zeros_like(top), jnp.zeros(queries.shape, jnp.float32)
    for each, part in zip(logits, parts, strict=True):
        weights = jnp.exp(each - _fold(top, part.keys.shape))
        total += _unfold(weights.sum(axis=-1, keepdims=True), queries.shape)
        summed += _unfold(_times(weights, part.values), queries.shape)
    output = (summed / total).astype(queries.dtype)
    return output, _Kept(queries, parts, masks, output, top + jnp.log(total))


def _attend_backward(
    softcap: float | None, kept: _Kept, cotangent: Float[Array, "R T N H"]
) -> tuple[Float[Array, "R T N H"], tuple[KeyValues, ...], None]:
    queries, parts, masks, output, normaliser = kept
    # The gradient of a softmax is p * (dp - sum(p * dp)), and the sum over all keys is that of
    # cotangent * output over the size of a head, which no part has to be known for.
    inner = jnp.sum(cotangent.astype(jnp.float32) * output, axis=-1, keepdims=True)
    query_cotangent, part_cotangents = jnp.zeros(queries.shape, jnp.float32), []
    for part, mask in zip(parts, masks, strict=True):
        shape = part.keys.shape
        # The attention weights of this part, computed again. Logits that the mask hides may exceed
        # the normaliser, so they are set to 0 after the exponential.
        capped, bend = _logits(queries, part.keys, softcap)
        weights = jnp.exp(capped - _fold(normaliser, shape))
        weights = jnp.where(_spread(mask, queries.shape[2], shape), weights, 0.0)
        folded = _fold(cotangent, shape)
        along = jnp.einsum("bkmh,bskh->bkms", folded, part.values, preferred_element_type=_F32)
        logit_cotangent = weights * (along - _fold(inner, shape)) * bend
        query_cotangent += _unfold(_times(logit_cotangent, part.keys), queries.shape)
        # Summed over the queries that share a key: those of a group, and heads of one KV head.
        part_cotangents.append(
            KeyValues(
                _gathered(_fold(queries, shape), logit_cotangent).astype(part.keys.dtype),
                _gathered(folded, weights).astype(part.values.dtype),
            )
        )
    return query_cotangent.astype(queries.dtype), tuple(part_cotangents), None


attend.defvjp(_attend, _attend_backward)
_F32 = jnp.float32


def _fold(x: Float[Array, "R T N X"], shape: tuple[int, ...]) -> Float[Array, "B K M X"]:
    """Brings queries next to each other that share the keys [B, S, K, H] of a head: M of them."""
    prompts, _, kv_heads, _ = shape
    rows, length, heads, size = x.shape
    x = x.reshape(prompts, rows // prompts, length, kv_heads, heads // kv_heads, size)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(prompts, kv_heads, -1, size)


def _unfold(x: Float[Array, "B K M X"], shape: tuple[int, ...]) -> Float[Array, "R T N X"]:
    """Undoes `_fold`, for queries of this shape [R, T, N, H]."""
    prompts, kv_heads, _, size = x.shape
    rows, length, heads, _ = shape
    x = x.reshape(prompts, kv_heads, rows // prompts, heads // kv_heads, length, size)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(rows, length, heads, size)


def _spread(
    mask: Bool[Array, "R T S"], heads: int, shape: tuple[int, ...]
) -> Bool[Array, "B K M S"]:
    """Brings a mask to folded queries, the same for all heads."""
    rows, length, width = mask.shape
    prompts, _, kv_heads, _ = shape
    mask = mask.reshape(prompts, 1, rows // prompts, 1, length, width)
    full = (prompts, kv_heads, rows // prompts, heads // kv_heads, length, width)
    return jnp.broadcast_to(mask, full).reshape(prompts, kv_heads, -1, width)


def _logits(
    queries: Float[Array, "R T N H"], keys: Float[Array, "B S K H"], softcap: float | None
) -> tuple[Float[Array, "B K M S"], Float[Array, "B K M S"] | float]:
    """Float32 logits, and the derivative of the soft cap."""
    logits = jnp.einsum(
        "bkmh,bskh->bkms", _fold(queries, keys.shape), keys, preferred_element_type=_F32
    )
    if softcap is None:
        return logits, 1.0
    bent = jnp.tanh(logits / softcap)
    return softcap * bent, 1 - jnp.square(bent)


def _times(
    weights: Float[Array, "B K M S"], values: Float[Array, "B S K H"]
) -> Float[Array, "B K M H"]:
    """Sums values with weights, in float32."""
    return jnp.einsum(
        "bkms,bskh->bkmh", weights.astype(values.dtype), values, preferred_element_type=_F32
    )


def _gathered(
    folded: Float[Array, "B K M H"], weights: Float[Array, "B K M S"]
) -> Float[Array, "B S K H"]:
    """Sums over queries what they give to keys with these weights, in float32.

    The large operand is the right one, which is then not copied to be transposed.
    """
    gathered = jnp.einsum(
        "bkmh,bkms->bkhs", folded, weights.astype(folded.dtype), preferred_element_type=_F32
    )
    return gathered.transpose(0, 3, 1, 2)
