"""Tokens are drawn as often as they should be, and no token that truncation leaves out."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_grpo.engine.sampling import Sampling, draw_tokens, pick, truncate

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, stop_ids=(1,), pad_id=0)
# Of eight tokens, the likeliest first.
LOGITS = np.log([0.3, 0.2, 0.15, 0.12, 0.1, 0.06, 0.04, 0.03]).astype(np.float32)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.7), (1.5, 6, 0.8)],
    ids=str,
)
def test_frequencies_are_the_probabilities(
    temperature: float, top_k: int, top_p: float, truncated_logps: Callable[..., np.ndarray]
) -> None:
    sampling = dataclasses.replace(GREEDY, temperature=temperature, top_k=top_k, top_p=top_p)
    count = 40_000
    keys = jax.random.split(jax.random.key(0), count)
    logits = jnp.broadcast_to(LOGITS, (count, 8))
    tokens, logps = jax.jit(partial(draw_tokens, sampling=sampling))(keys, logits)
    expected = np.exp(truncated_logps(LOGITS.astype(np.float64), sampling))
    np.testing.assert_allclose(np.exp(logps), expected[tokens], rtol=1e-5)
    observed = np.bincount(tokens, minlength=8)
    possible = expected > 0
    assert not observed[~possible].any()
    chi_square = ((observed - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    # The 99.9th percentile for 1 to 7 degrees of freedom.
    limit = [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32][possible.sum() - 2]
    assert chi_square < limit


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = jnp.asarray([LOGITS, LOGITS[::-1]])
    tokens, logps = draw_tokens(jax.random.split(jax.random.key(0), 2), logits, GREEDY)
    assert tokens.tolist() == [0, 7]
    np.testing.assert_allclose(logps, np.log([0.3, 0.3]), rtol=1e-6)


@pytest.mark.parametrize("top_k", [0, 1, 3, 50, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.5, 0.1, 1e-6])
def test_truncation_by_hand(
    top_k: int, top_p: float, truncated_logps: Callable[..., np.ndarray]
) -> None:
    logits = 2 * np.random.default_rng(0).standard_normal((5, 50)).astype(np.float32)
    sampling = dataclasses.replace(GREEDY, temperature=1.0, top_k=top_k, top_p=top_p)
    kept = np.isfinite(truncate(jnp.asarray(logits), sampling))
    for row, actual in zip(logits, kept, strict=True):
        expected = truncated_logps(row.astype(np.float64), sampling)
        np.testing.assert_array_equal(actual, np.isfinite(expected))
        assert actual[row.argmax()]


def test_top_p_keeps_no_more_than_it_must() -> None:
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.125, 0.125]]))
    for top_p, kept in [(0.4, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.8, 4)]:
        sampling = dataclasses.replace(GREEDY, top_p=top_p)
        assert np.isfinite(truncate(logits, sampling)).sum() == kept


def test_a_row_draws_from_its_own_key() -> None:
    """The same tokens, whichever rows are drawn together."""
    keys = jax.random.split(jax.random.key(1), 50)
    logits = jnp.broadcast_to(LOGITS, (50, 8))
    sampling = dataclasses.replace(GREEDY, temperature=1.0)
    tokens, _ = draw_tokens(keys, logits, sampling)
    chosen = np.array([31, 7, 40])
    some, _ = draw_tokens(keys[chosen], logits[chosen], sampling)
    np.testing.assert_array_equal(some, tokens[chosen])
    assert len(set(tokens.tolist())) > 4


@pytest.mark.parametrize("size", [5, 128, 1000])
def test_pick_inverts_the_cumulative_distribution(size: int) -> None:
    random = np.random.default_rng(size)
    masses = random.random(size) ** 4 * (random.random(size) < 0.6)
    masses[0], masses[-2:] = 0, (0.5, 0)  # Neither the first nor the last can be drawn.
    uniforms = np.append(random.random(500), [0.0, 1 - 2**-24]).astype(np.float32)
    rows = jnp.broadcast_to(jnp.asarray(masses, jnp.float32), (len(uniforms), size))
    picked = np.asarray(pick(jnp.asarray(uniforms), rows))
    assert (masses[picked] > 0).all()
    ends = np.cumsum(masses) / masses.sum()
    # Within the rounding of sums in float32.
    assert (uniforms < ends[picked] + 1e-5).all()
    assert (uniforms > (ends - masses / masses.sum())[picked] - 1e-5).all()
    assert picked[-2] == masses.nonzero()[0][0] and picked[-1] == masses.nonzero()[0][-1]
