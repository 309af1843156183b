"""Attention over a prompt and its completions is the softmax over all their keys at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_grpo.model.attention import KeyValues, attend, visible

ROWS, PROMPTS, LENGTH, SIZE, PREFIX, OWN = 6, 3, 4, 8, 5, 7
Parts = tuple[KeyValues, ...]
Masks = tuple[jax.Array, ...]
attended = jax.jit(attend, static_argnums=3)


@partial(jax.jit, static_argnums=3)
def plain_attention(
    queries: jax.Array, parts: Parts, masks: Masks, softcap: float | None
) -> jax.Array:
    """With the keys of all parts in one line, once for each row and for each query head."""
    rows, _, heads, _ = queries.shape

    def whole(x: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.repeat(x, rows // x.shape[0], axis=0), heads // x.shape[2], axis=2)

    keys = jnp.concatenate([whole(part.keys) for part in parts], axis=1)
    values = jnp.concatenate([whole(part.values) for part in parts], axis=1)
    mask = jnp.concatenate(masks, axis=2)
    logits = jnp.einsum("rtnh,rsnh->rnts", queries, keys)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -1e30), axis=-1)
    return jnp.einsum("rnts,rsnh->rtnh", weights, values)


def inputs(heads: int, kv_heads: int, scale: float = 2.0) -> tuple[jax.Array, Parts, Masks]:
    """Rows of three prompts, one of which is empty, with masks that are no pattern."""
    random = np.random.default_rng(heads)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    queries = scale * normal(ROWS, LENGTH, heads, SIZE)
    own = KeyValues(normal(ROWS, OWN, kv_heads, SIZE), normal(ROWS, OWN, kv_heads, SIZE))
    prefix = KeyValues(
        normal(PROMPTS, PREFIX, kv_heads, SIZE), normal(PROMPTS, PREFIX, kv_heads, SIZE)
    )
    own_mask = random.random((ROWS, LENGTH, OWN)) < 0.5
    own_mask[:, :, 2] = True  # Each query sees a key.
    prefix_mask = random.random((ROWS, LENGTH, PREFIX)) < 0.5
    prefix_mask[2:4] = False
    own_mask[5], prefix_mask[5, :, 1] = False, True  # Nothing but the prompt.
    return queries, (own, prefix), (jnp.asarray(own_mask), jnp.asarray(prefix_mask))


class TestAttend:
    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1)], ids=str)
    def test_is_the_softmax_over_all_keys(
        self, heads: tuple[int, int], softcap: float | None
    ) -> None:
        given = inputs(*heads)
        expected = plain_attention(*given, softcap)
        np.testing.assert_allclose(attended(*given, softcap), expected, atol=5e-6)

    def test_the_order_of_parts_does_not_matter(self) -> None:
        queries, parts, masks = inputs(4, 2)
        one = attended(queries, parts, masks, 50.0)
        other = attended(queries, parts[::-1], masks[::-1], 50.0)
        np.testing.assert_allclose(one, other, atol=1e-6)

    def test_one_part_is_enough(self) -> None:
        queries, parts, _ = inputs(4, 2)
        given = (queries, parts[:1], (jnp.ones((ROWS, LENGTH, OWN), bool),))
        expected = plain_attention(*given, 50.0)
        np.testing.assert_allclose(attended(*given, 50.0), expected, atol=5e-6)

    def test_logits_of_any_size_are_finite(self) -> None:
        """So far apart that the softmax takes the largest alone."""
        given = inputs(4, 2, scale=1e4)
        np.testing.assert_allclose(attended(*given, None), plain_attention(*given, None), atol=1e-5)

    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("heads", [(4, 2), (4, 4)], ids=str)
    def test_gradient(self, heads: tuple[int, int], softcap: float | None) -> None:
        """Written by hand; that of what is masked is 0 and not NaN."""
        queries, parts, masks = inputs(*heads)
        into = jnp.asarray(np.random.default_rng(1).standard_normal(queries.shape), jnp.float32)

        def summed(function: Any, given: Any) -> jax.Array:
            return jnp.sum(into * function(*given, masks, softcap))

        actual, expected = (
            jax.jit(jax.grad(partial(summed, function)))((queries, parts))
            for function in (attend, plain_attention)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), actual, expected)
        _, prefix = actual[1]
        unseen = ~np.asarray(masks[1]).reshape(PROMPTS, -1, PREFIX).any(axis=1)
        assert unseen.any() and not np.asarray(prefix.keys)[unseen].any()

    def test_nothing_of_the_size_of_the_logits_is_kept_for_the_gradient(self) -> None:
        queries, parts, masks = inputs(4, 2)
        _, pull = jax.vjp(lambda *given: attend(*given, masks, 2.0), queries, parts)
        kept = sum(x.size for x in jax.tree.leaves(pull) if x.dtype == jnp.float32)
        given = sum(x.size for x in jax.tree.leaves((queries, parts)))
        # What it was given, its output, and a number for each row, token and head.
        assert kept <= given + queries.size + ROWS * LENGTH * 4

    def test_bfloat16_rounds_its_inputs_and_weights_only(self) -> None:
        queries, parts, masks = inputs(4, 2)
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (queries, parts))
        actual = attended(*narrow, masks, 50.0)
        assert actual.dtype == jnp.bfloat16
        # Of the rounded inputs. Weights between 0 and 1 keep 8 bits, values are about 1.
        rounded = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
        expected = plain_attention(*rounded, masks, 50.0)
        np.testing.assert_allclose(np.asarray(actual, np.float32), expected, atol=0.03)


class TestVisible:
    def test_a_window_by_hand(self) -> None:
        positions = jnp.arange(4)
        everything, near = visible(jnp.tri(4, dtype=bool), positions, positions, 2)
        assert everything.astype(int).tolist() == np.tri(4, dtype=int).tolist()
        assert near.astype(int).tolist() == [
            [1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1],
        ]

    def test_without_a_window_both_kinds_see_the_same(self) -> None:
        seen = jnp.tri(4, dtype=bool)
        both = visible(seen, jnp.arange(4), jnp.arange(4), None)
        assert both == (seen, seen)

    def test_it_is_counted_in_positions_and_not_in_slots(self) -> None:
        """Two completions of one row begin at the same position."""
        seen = jnp.ones((1, 1, 4), bool)
        queries, keys = jnp.array([[9]]), jnp.array([[6, 7, 6, 7]])
        _, near = visible(seen, queries, keys, 3)
        assert near.tolist() == [[[False, True, False, True]]]
