"""Tokens are drawn as often as they should be, and no token that truncation leaves out."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_grpo.sampling.draw import Sampling, draw_tokens, pick, truncate

UNIFORMS = 1 << 23
"""Values that a float32 uniform takes: the multiples of 2^-23 below 1."""
VOCABULARY = 256_000
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


KNOWN = 0.41560316


def fifty_of_many() -> np.ndarray:
    """What top-k 50 leaves of a large vocabulary.

    With the last scaled so, the float32 sum of the blocks rises above KNOWN of the total where
    nothing is added.
    """
    random = np.random.default_rng(2)
    kept = np.sort(random.choice(VOCABULARY, 50, replace=False))
    masses = np.zeros(VOCABULARY, np.float32)
    masses[kept] = random.random(50, np.float32)
    masses[kept[12:]] *= np.float32(0.4467256963253021)
    return masses


def long_tail(size: int) -> np.ndarray:
    """In random order, half of it excluded."""
    random = np.random.default_rng(size)
    masses = 1 / random.permutation(np.arange(1, size + 1)) ** 1.5
    return (masses * (random.random(size) < 0.5)).astype(np.float32)


def only(*tokens: int) -> np.ndarray:
    masses = np.zeros(1000, np.float32)
    masses[list(tokens)] = np.linspace(0.2, 1, len(tokens))
    return masses


DISTRIBUTIONS: dict[str, Callable[[], np.ndarray]] = {
    "50 of 256,000": fifty_of_many,
    "a long tail": lambda: long_tail(2000),
    "one": lambda: only(300),
    "the first and the last": lambda: only(0, 999),
    "some of one block": lambda: only(130, 131, 200, 255),
    "all alike": lambda: np.ones(500, np.float32),
    "one beside specks": lambda: only(500) + np.float32(1e-30),
    "tiny, not normalised": lambda: long_tail(1000) * np.float32(1e-30),
}


def boundaries(masses: np.ndarray) -> np.ndarray:
    """Multiples of 2^-23 near which the token changes, with the first and the last ones."""
    ends = np.cumsum(masses, dtype=np.float64) / masses.sum(dtype=np.float64) * UNIFORMS
    near = ends[masses > 0].astype(np.int64)[:, None] + np.arange(-4, 5)
    return np.unique(np.clip(np.append(near, [0, UNIFORMS - 1]), 0, UNIFORMS - 1))


@jax.jit
def draw(uniforms: jax.Array, masses: jax.Array) -> jax.Array:
    """Draws a token of one distribution with each of the uniforms [C, U]."""

    def one(uniform: jax.Array) -> jax.Array:
        return pick(uniform[None], masses[None])[0]

    return jax.lax.map(jax.vmap(one), uniforms)


def check_drawn(masses: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Draws with some of the values that a uniform takes, which are given as whole numbers."""
    padded = np.pad(uniforms, (0, -len(uniforms) % (1 << 10)), mode="edge").reshape(-1, 1 << 10)
    drawn = draw(jnp.asarray(padded / UNIFORMS, jnp.float32), jnp.asarray(masses))
    tokens = np.asarray(drawn).ravel()[: len(uniforms)]
    assert (masses[tokens] > 0).all()
    assert (np.diff(tokens) >= 0).all()
    ends = np.cumsum(masses, dtype=np.float64) / masses.sum(dtype=np.float64)
    starts = ends - masses / masses.sum(dtype=np.float64)
    # Within the rounding of sums in float32.
    assert (uniforms / UNIFORMS > starts[tokens] - 3e-7).all()
    assert (uniforms / UNIFORMS < ends[tokens] + 3e-7).all()
    return tokens


def test_a_uniform_is_one_of_2_to_the_23() -> None:
    drawn = np.asarray(jax.random.uniform(jax.random.key(0), (10_000,))) * UNIFORMS
    assert (drawn == drawn.round()).all() and drawn.max() < UNIFORMS


def test_a_rounding_error_draws_nothing() -> None:
    masses = fifty_of_many()
    [token] = jax.jit(pick)(jnp.array([KNOWN], jnp.float32), jnp.asarray(masses[None]))
    assert masses[token] > 0


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_uniforms_at_boundaries_draw_what_has_mass(name: str) -> None:
    masses = DISTRIBUTIONS[name]()
    tokens = check_drawn(masses, boundaries(masses))
    likely = masses / masses.sum(dtype=np.float64) > 2**-22
    assert np.isin(np.flatnonzero(likely), tokens).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_uniform_draws_what_has_mass(name: str) -> None:
    jax.config.update("jax_disable_most_optimizations", False)
    masses = DISTRIBUTIONS[name]()
    tokens = check_drawn(masses, np.arange(UNIFORMS))
    shares = np.bincount(tokens, minlength=len(masses)) / UNIFORMS
    np.testing.assert_allclose(shares, masses / masses.sum(dtype=np.float64), atol=3e-7)
