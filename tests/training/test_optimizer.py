"""The schedule by hand, and gradients that are clipped or left out whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma2_grpo.config import OptimizerConfig
from gemma2_grpo.training.optimizer import learning_rate_schedule, make_optimizer

# Updates, warm-up, what the rate falls to, and the rates by hand in parts of the highest: with
# sin(60 degrees)^2 = 3/4, sin(45)^2 = 1/2, sin(30)^2 = 1/4.
SCHEDULES: list[tuple[int, float, float, list[float]]] = [
    (3, 0.0, 0.0, [1, 0.75, 0.25]),
    (3, 0.0, 0.2, [1, 0.8, 0.4]),
    (2, 0.5, 0.0, [1, 0.5]),
    (5, 0.6, 0.0, [1 / 3, 2 / 3, 1, 0.75, 0.25]),
    (4, 1.0, 0.0, [0.25, 0.5, 0.75, 1]),
    (4, 0.5, 1.0, [0.5, 1, 1, 1]),
    (1, 0.0, 0.0, [1]),
    (1, 0.5, 0.3, [1]),
    (1, 1.0, 0.0, [1]),
]


class TestOptimizer:
    @pytest.mark.parametrize(("updates", "warmup", "final", "rates"), SCHEDULES, ids=str)
    def test_learning_rates_by_hand(
        self, updates: int, warmup: float, final: float, rates: list[float]
    ) -> None:
        config = OptimizerConfig(
            learning_rate=1e-3, warmup_fraction=warmup, final_lr_fraction=final
        )
        schedule = learning_rate_schedule(config, updates)
        found = [float(schedule(count)) for count in range(updates)]
        np.testing.assert_allclose(found, 1e-3 * np.array(rates), rtol=1e-6)
        assert float(schedule(updates)) == pytest.approx(1e-3 * final, rel=1e-6, abs=1e-12)

    @pytest.mark.parametrize(("updates", "last"), [(1800, 9.390173e-7), (100_000, 3.046107e-10)])
    def test_the_last_update_of_a_long_run_learns(self, updates: int, last: float) -> None:
        """By hand sin(90 / 1621 degrees)^2; 1 + cos(180 / 90001 degrees) is 0 in float32."""
        schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2e-6), updates)
        assert float(jax.jit(schedule)(updates - 1)) == pytest.approx(2e-6 * last, rel=1e-4)
        assert (schedule(jnp.arange(updates)) > 0).all()

    def test_optax_ends_one_update_too_early(self) -> None:
        stock = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=1, decay_steps=3)
        assert [float(stock(count)) for count in (1, 2, 3)] == pytest.approx([1, 0.5, 0], abs=1e-7)

    @pytest.mark.parametrize("entry", [1e20, np.inf, np.nan])
    def test_a_gradient_without_a_finite_norm_is_left_out_whole(self, entry: float) -> None:
        """Finite entries whose squares add up to infinity would be cut to zero, and decay."""
        config = OptimizerConfig(weight_decay=0.1, warmup_fraction=0.0)
        optimizer = make_optimizer(config, 10)
        params = {"a": jnp.ones(2), "b": jnp.ones(3)}
        gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0, 0.0])}
        _, before = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
        gradient["b"] = gradient["b"].at[1].set(entry)
        updates, after = jax.jit(optimizer.update)(gradient, before, params)
        assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
        for name in ("mu", "nu"):
            old, new = optax.tree.get(before, name), optax.tree.get(after, name)
            jax.tree.map(np.testing.assert_array_equal, old, new)
        for state in (before, after):
            counts = optax.tree.get_all_with_path(state, "count")
            assert [int(count) for _, count in counts] == [1, 1]
        assert int(optax.tree.get(after, "total_notfinite")) == 1

    def test_the_largest_finite_norm_is_cut(self) -> None:
        config = OptimizerConfig(max_grad_norm=1.0, adam_b1=0.9)
        optimizer = make_optimizer(config, 10)
        params = {"a": jnp.zeros(2)}
        gradient = {"a": jnp.array([6e18, 8e18])}
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        np.testing.assert_allclose(optax.tree.get(state, "mu")["a"], [0.06, 0.08], rtol=1e-5)

    @pytest.mark.parametrize("limit", [0.1, 100.0])
    def test_long_gradients_are_cut(self, limit: float) -> None:
        """Adam forgets the length of its first gradient, but its moments do not."""
        config = OptimizerConfig(max_grad_norm=limit, adam_b1=0.9, adam_b2=0.99)
        optimizer = make_optimizer(config, 10)
        params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
        gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0, 0.0])}
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        scale = min(1.0, limit / 5)
        mu, nu = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
        np.testing.assert_allclose(mu["a"], [0.1 * scale * 3, 0], rtol=1e-5)
        np.testing.assert_allclose(nu["b"], [0, 0.01 * (scale * 4) ** 2, 0], rtol=1e-5)
