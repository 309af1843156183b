"""Attention of Gemma 2 over a prompt that a whole group shares.

Tunix's own attention knows one key per row and slot, so that a prompt has to be copied, or
computed again, for each of its completions, and its sliding window compares positions with slots.
Here keys come in two parts, those of the prompt, [B, P], and those of the completions, [B * G, S],
and what is visible is said outright.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from tunix.models.gemma import model as gemma


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


class SharedPrefixAttention(gemma.Attention):
    """Tunix's attention with the same weights, for `LayerCache` and `Visible`.

    With Tunix's own cache and mask it is Tunix's own, so that Tunix's sampler can use the model.
    """

    def block(self, x: Any, segment_pos: Any, cache: Any, attn_mask: Any) -> Any:
        """Runs one attention block; named and called as Tunix does.

        Args:
            x: Input [R, T, D].
            segment_pos: Positions [R, T].
            cache: A `LayerCache`.
            attn_mask: A `Visible`.

        Returns:
            Keys and values of the rows, with the new ones, and the output [R, T, D].
        """
        if not isinstance(attn_mask, Visible):
            return super().block(x, segment_pos, cache, attn_mask)
        queries, own = self._project(x, segment_pos)
        if cache.own is not None:
            start = (0, attn_mask.slot, 0, 0)
            own = KeyValues(
                jax.lax.dynamic_update_slice(cache.own.keys, own.keys, start),
                jax.lax.dynamic_update_slice(cache.own.values, own.values, start),
            )
        kind = int(self.attn_type == gemma.AttentionType.LOCAL_SLIDING)
        parts = [(own, attn_mask.own[kind])]
        if attn_mask.prefix is not None:
            parts.append((cache.prefix, attn_mask.prefix[kind]))
        encoded = attend(queries, parts, self.attn_logits_soft_cap)
        output = self.attn_vec_einsum(encoded.astype(x.dtype))
        return own, gemma.shard(output, cast(Any, self.shd_config.act_btd))

    def _project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, KeyValues]:
        """Rotated and scaled queries [R, T, N, H], rotated keys and values [R, T, K, H]."""
        if self.use_qkv_einsum:
            queries, keys, values = self.qkv_einsum(x)
        else:
            queries, (keys, values) = self.q_einsum(x), self.kv_einsum(x)
        queries, keys, values = (
            gemma.shard(each, cast(Any, self.shd_config.act_btnh))
            for each in (queries, keys, values)
        )
        queries = gemma.apply_rope(queries, positions, head_dim=self.head_dim)
        keys = gemma.apply_rope(keys, positions, head_dim=self.head_dim)
        return queries * self.head_dim**-0.5, KeyValues(keys, values)


def attend(
    queries: jax.Array,
    parts: list[tuple[KeyValues, jax.Array]],
    softcap: float | None,
) -> jax.Array:
    """Attention over several parts of keys as over one, softmax in float32.

    Args:
        queries: [R, T, N, H], scaled.
        parts: Keys and values [B, S, K, H], where B divides R and K divides N, each with a mask
            [R, T, S]. Every query must see at least one key.
        softcap: Logits are bounded to this by a tanh.

    Returns:
        Float32 [R, T, N, H].
    """
    logits = [_logits(queries, part.keys, mask, softcap) for part, mask in parts]
    highest = jnp.stack([each.max(axis=-1) for each in logits]).max(axis=0)
    highest = jax.lax.stop_gradient(highest)
    weights = [jnp.exp(each - highest[..., None]) for each in logits]
    total = cast(jax.Array, sum(each.sum(axis=-1) for each in weights))
    summed = sum(
        _weighted(each, part.values) for each, (part, _) in zip(weights, parts, strict=True)
    )
    rows, length, heads, size = queries.shape
    # [R, K, N/K, T, H] -> [R, T, N, H]
    return (summed / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, size)


def _logits(
    queries: jax.Array, keys: jax.Array, mask: jax.Array, softcap: float | None
) -> jax.Array:
    """Float32 logits [R, K, N/K, T, S], minus infinity where the mask is false."""
    rows, length, heads, size = queries.shape
    prompts, width, kv_heads, _ = keys.shape
    grouped = queries.reshape(prompts, rows // prompts, length, kv_heads, heads // kv_heads, size)
    logits = jnp.einsum("bgtkqh,bskh->bgkqts", grouped, keys, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits.reshape(rows, kv_heads, heads // kv_heads, length, width)
    return jnp.where(mask[:, None, None], logits, -jnp.inf)


def _weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Float32 sums of values [R, K, N/K, T, H]."""
    rows, kv_heads, per_kv, length, width = weights.shape
    prompts, size = values.shape[0], values.shape[-1]
    grouped = weights.reshape(prompts, rows // prompts, kv_heads, per_kv, length, width)
    summed = jnp.einsum(
        "bgkqts,bskh->bgkqth",
        grouped.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return summed.reshape(rows, kv_heads, per_kv, length, size)
