"""Attention over a prompt and its completions is the softmax over all their keys at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_grpo.engine.attention import KeyValues, attend, visible

ROWS, PROMPTS, LENGTH, SIZE, PREFIX, OWN = 6, 3, 4, 8, 5, 7
Parts = list[tuple[KeyValues, jax.Array]]
attended = jax.jit(attend, static_argnums=2)


@partial(jax.jit, static_argnums=2)
def plain_attention(queries: jax.Array, parts: Parts, softcap: float | None) -> jax.Array:
    """With the keys of all parts in one line, once for each row and for each query head."""
    rows, _, heads, _ = queries.shape

    def whole(x: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.repeat(x, rows // x.shape[0], axis=0), heads // x.shape[2], axis=2)

    keys = jnp.concatenate([whole(part.keys) for part, _ in parts], axis=1)
    values = jnp.concatenate([whole(part.values) for part, _ in parts], axis=1)
    mask = jnp.concatenate([mask for _, mask in parts], axis=2)
    logits = jnp.einsum("rtnh,rsnh->rnts", queries, keys)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -1e30), axis=-1)
    return jnp.einsum("rnts,rsnh->rtnh", weights, values)


def inputs(heads: int, kv_heads: int, scale: float = 2.0) -> tuple[jax.Array, Parts]:
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
    return queries, [(own, jnp.asarray(own_mask)), (prefix, jnp.asarray(prefix_mask))]


class TestAttend:
    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1)], ids=str)
    def test_is_the_softmax_over_all_keys(
        self, heads: tuple[int, int], softcap: float | None
    ) -> None:
        queries, parts = inputs(*heads)
        actual = attended(queries, parts, softcap)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, plain_attention(queries, parts, softcap), atol=5e-6)

    def test_the_order_of_parts_does_not_matter(self) -> None:
        queries, parts = inputs(4, 2)
        one, other = attended(queries, parts, 50.0), attended(queries, parts[::-1], 50.0)
        np.testing.assert_allclose(one, other, atol=1e-6)

    def test_one_part_is_enough(self) -> None:
        queries, (own, _) = inputs(4, 2)
        own = (own[0], jnp.ones((ROWS, LENGTH, OWN), bool))
        expected = plain_attention(queries, [own], 50.0)
        np.testing.assert_allclose(attended(queries, [own], 50.0), expected, atol=5e-6)

    def test_logits_of_any_size_are_finite(self) -> None:
        """So far apart that the softmax takes the largest alone."""
        queries, parts = inputs(4, 2, scale=1e4)
        actual = attended(queries, parts, None)
        np.testing.assert_allclose(actual, plain_attention(queries, parts, None), atol=1e-5)

    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_gradient(self, softcap: float | None) -> None:
        """That of what is masked is 0 and not NaN."""
        queries, parts = inputs(4, 2)
        given = (queries, [kv for kv, _ in parts])
        masks = [mask for _, mask in parts]
        into = jnp.asarray(np.random.default_rng(1).standard_normal(queries.shape), jnp.float32)

        def summed(function: Any, given: Any) -> jax.Array:
            queries, kvs = given
            return jnp.sum(into * function(queries, list(zip(kvs, masks, strict=True)), softcap))

        actual, expected = (
            jax.jit(jax.grad(partial(summed, function)))(given)
            for function in (attend, plain_attention)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), actual, expected)
        (_, prefix), mask = actual[1], masks[1]
        unseen = ~np.asarray(mask).reshape(PROMPTS, -1, PREFIX).any(axis=1)
        assert unseen.any() and not np.asarray(prefix.keys)[unseen].any()

    def test_bfloat16_rounds_its_inputs_and_weights_only(self) -> None:
        queries, parts = inputs(4, 2)
        narrow = [
            (jax.tree.map(lambda x: x.astype(jnp.bfloat16), kv), mask) for kv, mask in parts
        ]
        actual = attended(queries.astype(jnp.bfloat16), narrow, 50.0)
        assert actual.dtype == jnp.float32
        # Of the rounded inputs. Weights between 0 and 1 keep 8 bits, values are about 1.
        rounded = jax.tree.map(lambda x: x.astype(jnp.float32), [kv for kv, _ in narrow])
        queries = queries.astype(jnp.bfloat16).astype(jnp.float32)
        parts = list(zip(rounded, [mask for _, mask in parts], strict=True))
        expected = plain_attention(queries, parts, 50.0)
        np.testing.assert_allclose(actual, expected, atol=0.02)


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
