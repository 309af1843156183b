"""The objective, term by term, against arithmetic written out and Tunix where Tunix is right."""

import dataclasses
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tunix.rl import algo_core, common
from tunix.rl.grpo.drgrpo_learner import DrGRPOConfig
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.rl.reward_manager import SequenceRewardManager

from gemma2_grpo import config as config_module
from gemma2_grpo.config import GrpoConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.logprobs import TokenLogps
from gemma2_grpo.training.loss import (
    OBJECTIVES,
    LossTerms,
    combine,
    find_objective,
    group_advantages,
    k3_divergence,
    policy_loss,
    token_weights,
)

NAN = math.nan


class TestAdvantages:
    def test_by_hand(self) -> None:
        # Mean 2; squared distances 4 + 1 + 1 + 4 = 10; sample deviation sqrt(10 / 3) = 1.825742.
        got = group_advantages(np.array([[0.0, 1, 3, 4]]), scale_by_std=True)
        expected = np.array([[-2, -1, 1, 2]]) / 1.8257419
        np.testing.assert_allclose(got.values, expected, rtol=2e-6)
        assert got.values.dtype == np.float32
        assert got.is_scored.all() and not got.is_uniform.any()

    def test_without_the_deviation(self) -> None:
        got = group_advantages(np.array([[0.0, 1, 3, 4], [1, 0, 0, 0]]), scale_by_std=False)
        assert got.values.tolist() == [[-2, -1, 1, 2], [0.75, -0.25, -0.25, -0.25]]

    def test_agree_with_tunix_where_all_are_scored(self) -> None:
        rewards = np.random.default_rng(0).random((5, 8))
        for scale_by_std, stock in [
            (True, algo_core.compute_advantages),
            (False, algo_core.compute_drgrpo_advantages),
        ]:
            np.testing.assert_allclose(
                group_advantages(rewards, scale_by_std=scale_by_std).values.ravel(),
                stock(rewards.ravel(), 8),
                atol=1e-6,
            )

    @pytest.mark.parametrize("scale_by_std", [True, False])
    @pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e6])
    def test_a_uniform_group_is_exactly_zero(self, value: float, scale_by_std: bool) -> None:
        rewards = np.array([[value] * 7, [0, 1, 0, 1, 0, 1, 0]])
        got = group_advantages(rewards, scale_by_std=scale_by_std)
        assert (got.values[0] == 0).all()
        assert got.is_uniform.tolist() == [True, False]
        assert (got.values[1] != 0).all()

    def test_rounding_does_not_become_an_advantage(self) -> None:
        """Tunix divides rounding errors by a deviation that consists of them."""
        rewards = np.array([[0.1 + 0.2, 0.3, 0.3, 0.3]])
        assert not group_advantages(rewards, scale_by_std=True).values.any()
        rewards = np.array([[1e6 + 1e-5, 1e6, 1e6, 1e6]])
        assert abs(algo_core.compute_advantages(rewards.ravel(), 4)).max() > 0.5

    @pytest.mark.parametrize("missing", [NAN, math.inf, -math.inf])
    def test_what_is_no_number_is_left_out(self, missing: float) -> None:
        # The others have mean 2 and sample deviation sqrt((4 + 0 + 4) / 2) = 2.
        got = group_advantages(np.array([[0.0, missing, 2, 4]]), scale_by_std=True)
        np.testing.assert_allclose(got.values, [[-1, 0, 0, 1]], rtol=1e-6)
        assert got.is_scored.tolist() == [[True, False, True, True]]
        assert np.isfinite(got.values).all()

    def test_none_is_left_out(self) -> None:
        got = group_advantages(np.array([[1.0, None, 0.0]], dtype=float), scale_by_std=False)
        assert got.values.tolist() == [[0.5, 0, -0.5]]

    def test_fewer_than_two_scores_teach_nothing(self) -> None:
        got = group_advantages(np.array([[NAN, NAN, 5], [NAN, NAN, NAN]]), scale_by_std=True)
        assert not got.values.any()
        assert got.is_uniform.all()
        assert got.is_scored.sum() == 1

    @pytest.mark.filterwarnings("ignore:Mean of empty slice")
    def test_stock_takes_a_missing_reward_for_zero(self) -> None:
        """Tunix sums rewards with nansum: NaN and None become 0, the worst score there is."""

        def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
            del prompts, completions
            return [1.0, NAN, None, 1.0]

        config = GRPOConfig(num_generations=4)
        manager = SequenceRewardManager([reward], config)
        stock = manager(["q"] * 4, ["a"] * 4)["rewards"]
        assert stock.tolist() == [1, 0, 0, 1]
        assert algo_core.compute_advantages(stock, 4)[1] < -0.8
        ours = group_advantages(np.array([[1.0, NAN, NAN, 1.0]]), scale_by_std=True)
        assert not ours.values.any()
        assert ours.is_scored.tolist() == [[True, False, False, True]]


class TestTokenWeights:
    LENGTHS = np.array([4, 2, 1])
    ALL = np.array([True, True, True])

    @pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
    def test_mean_over_tokens_then_completions(self, loss_type: str) -> None:
        got = token_weights(self.LENGTHS, self.ALL, loss_type, max_tokens=8)
        np.testing.assert_allclose(got, [1 / 12, 1 / 6, 1 / 3], rtol=1e-6)
        assert got.dtype == np.float32

    def test_mean_over_all_tokens(self) -> None:
        got = token_weights(self.LENGTHS, self.ALL, "token_mean", max_tokens=8)
        np.testing.assert_allclose(got, [1 / 7] * 3, rtol=1e-6)

    def test_constant_divisor(self) -> None:
        got = token_weights(self.LENGTHS, self.ALL, "drgrpo", max_tokens=8)
        np.testing.assert_allclose(got, [1 / (8 * 3)] * 3, rtol=1e-6)

    def test_unscored_completions_do_not_count(self) -> None:
        scored = np.array([False, True, True])
        expected = {
            "grpo": [0, 1 / 4, 1 / 2],
            "gspo": [0, 1 / 4, 1 / 2],
            "token_mean": [0, 1 / 3, 1 / 3],
            "drgrpo": [0, 1 / 16, 1 / 16],
        }
        for loss_type, weights in expected.items():
            got = token_weights(self.LENGTHS, scored, loss_type, max_tokens=8)
            np.testing.assert_allclose(got, weights, rtol=1e-6)

    def test_nothing_scored_weighs_nothing(self) -> None:
        for loss_type in ("grpo", "token_mean", "drgrpo", "gspo"):
            got = token_weights(self.LENGTHS, np.zeros(3, bool), loss_type, max_tokens=8)
            assert not got.any()


def test_objectives_are_those_of_the_configuration() -> None:
    field = Path(config_module.__file__).read_text().partition("loss_type: str")[2]
    assert set(OBJECTIVES) == set(re.findall(r"`(\w+)`", field.partition("OBJECTIVES")[0]))


def test_an_objective_that_there_is_not_is_refused_by_name() -> None:
    message = "loss_type = 'dapo': no such objective; there are grpo, drgrpo, token_mean, gspo, nll"
    with pytest.raises(UserError, match=f"^{message}$"):
        find_objective("dapo")


class TestDivergence:
    def test_by_hand(self) -> None:
        # Policy 0.5 and 0.2, reference 0.25 and 0.4: r = 0.5 and 2; r - 1 - ln r.
        logps, ref = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.4, 0.3])
        expected = [0.5 - 1 + math.log(2), 2 - 1 - math.log(2), 0]
        np.testing.assert_allclose(k3_divergence(logps, ref), expected, rtol=1e-6, atol=1e-7)

    def test_agrees_with_tunix(self) -> None:
        logps, ref = jax.random.normal(jax.random.key(0), (2, 50))
        np.testing.assert_allclose(
            k3_divergence(logps, ref),
            common.compute_kl_divergence(logps, ref, "low_var_kl"),
            atol=1e-5,
        )

    def test_is_never_negative_near_zero(self) -> None:
        """Tunix computes exp(d) - d - 1, which rounds to values below zero."""
        ref = jnp.linspace(-1e-3, 1e-3, 2001, dtype=jnp.float32)
        assert float(k3_divergence(jnp.zeros(2001), ref).min()) >= 0
        stock = common.compute_kl_divergence(jnp.zeros(2001), ref, "low_var_kl")
        assert float(stock.min()) < 0

    def test_pulls_on_policy_where_the_stock_default_does_not(self) -> None:
        """Tunix's default `kl`, k1 as a loss, has no expected gradient on-policy.

        Over all three symbols of a softmax policy p with reference q, the expectation over p of
        the gradient of log p - log q is the sum of p grad(log p), which is zero: beta does
        nothing. That of k3 is the sum of (p - q) grad(log p), which is p - q.
        """
        assert GRPOConfig().kl_loss_mode == "kl"
        logits, reference = jnp.array([0.5, -1.0, 0.2]), jnp.log(jnp.array([0.2, 0.5, 0.3]))
        probabilities = jax.nn.softmax(logits)

        def expected_gradient(divergence: Any) -> jax.Array:
            def of_symbol(symbol: int) -> jax.Array:
                def estimate(logits: jax.Array) -> jax.Array:
                    return divergence(jax.nn.log_softmax(logits)[symbol], reference[symbol])

                return jax.grad(estimate)(logits)

            return sum(probabilities[i] * of_symbol(i) for i in range(3))

        stock = expected_gradient(lambda p, q: common.compute_kl_divergence(p, q, "kl"))
        np.testing.assert_allclose(stock, 0, atol=1e-7)
        ours = expected_gradient(k3_divergence)
        np.testing.assert_allclose(ours, probabilities - jnp.exp(reference), atol=1e-6)
        assert abs(ours).max() > 0.3


_compiled = jax.jit(policy_loss, static_argnames="config")


def loss(config: GrpoConfig, segment_ids: np.ndarray | None = None, **values: Any) -> LossTerms:
    """The loss of one batch; what is not given is that of the policy that sampled.

    Each row is a completion of its own, with padding where tokens weigh nothing, unless
    `segment_ids` says otherwise; advantages may be given by row.
    """
    logps = jnp.asarray(values.pop("logps"), jnp.float32)
    entropy = jnp.asarray(values.pop("entropy", np.zeros(logps.shape)), jnp.float32)
    inputs = {
        "old_logps": logps,
        "ref_logps": logps,
        "weights": jnp.ones_like(logps),
        "rollout_logps": logps + NAN,
    } | {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    if inputs["advantages"].ndim == 1:
        inputs["advantages"] = jnp.broadcast_to(inputs["advantages"][:, None], logps.shape)
    rows = jnp.where(inputs["weights"] > 0, jnp.arange(len(logps))[:, None], -1)
    segment_ids = rows if segment_ids is None else jnp.asarray(segment_ids)
    return _compiled(TokenLogps(logps, entropy), **inputs, segment_ids=segment_ids, config=config)


PLAIN = GrpoConfig(beta=0.0)


class TestPolicyLoss:
    def test_clipping_by_hand(self) -> None:
        # Two completions, advantages 2 and -1, ratios by token; epsilon 0.2.
        ratio = np.array([[1.5, 1.1, 0.5], [1.5, 0.9, 0.5]])
        weights = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
        terms = loss(
            PLAIN,
            logps=np.log(ratio),
            old_logps=np.zeros((2, 3)),
            advantages=[2.0, -1.0],
            weights=weights,
        )
        # A > 0: min(r, clip(r)) A = 1.2 x 2, 1.1 x 2, 0.5 x 2; only the first is clipped.
        # A < 0: the lesser of -r and -clip(r) = -1.5, -0.9, -0.8; only the last is clipped.
        objective = (0.1 * 2.4 + 0.2 * 2.2 + 0.3 * 1.0) + (0.4 * -1.5 + 0.5 * -0.9 + 0.6 * -0.8)
        assert float(terms.loss) == pytest.approx(-objective, rel=1e-6)
        assert [int(each) for each in terms.means["clip_fraction"]] == [2, 6]
        assert float(terms.maxima["max_ratio"]) == pytest.approx(1.5)

    def test_epsilon_high_by_hand(self) -> None:
        config = dataclasses.replace(PLAIN, epsilon_high=0.4)
        terms = loss(
            config,
            logps=np.log([[1.3, 1.5, 0.7], [1.3, 1.5, 0.7]]),
            old_logps=np.zeros((2, 3)),
            advantages=[1.0, -1.0],
        )
        # Above, only 1.5 is clipped, to 1.4; below, 0.7 is clipped to 0.8 where A < 0.
        assert float(terms.loss) == pytest.approx(-(1.3 + 1.4 + 0.7) + (1.3 + 1.5 + 0.8))
        assert int(terms.means["clip_fraction"][0]) == 2

    def test_gradient_by_hand(self) -> None:
        """The gradient of a token is -weight x ratio x advantage, or 0 where it is clipped."""
        ratio = np.array([[1.5, 1.1, 0.5, 1.0], [1.5, 0.9, 0.5, 1.0]], np.float32)
        weights = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.0]])

        def of(logps: jax.Array) -> jax.Array:
            return loss(
                PLAIN,
                logps=logps,
                old_logps=np.zeros((2, 4)),
                ref_logps=np.zeros((2, 4)),
                advantages=[2.0, -1.0],
                weights=weights,
            ).loss

        expected = [
            [0, -0.2 * 1.1 * 2, -0.3 * 0.5 * 2, -0.4 * 2],
            [0.5 * 1.5, 0.6 * 0.9, 0, 0],
        ]
        np.testing.assert_allclose(jax.grad(of)(jnp.log(ratio)), expected, rtol=1e-6, atol=1e-7)

    def test_gradient_of_the_penalty_by_hand(self) -> None:
        """The derivative of q/p - 1 - ln(q/p) by ln p is 1 - q/p."""
        logps, ref = jnp.log(jnp.array([[0.5, 0.2]])), jnp.log(jnp.array([[0.25, 0.4]]))
        config = GrpoConfig(beta=0.04)

        def of(logps: jax.Array) -> jax.Array:
            return loss(config, logps=logps, old_logps=ref, ref_logps=ref, advantages=[0.0]).loss

        kl = (0.5 - 1 + math.log(2)) + (2 - 1 - math.log(2))
        assert float(of(logps)) == pytest.approx(0.04 * kl)
        np.testing.assert_allclose(
            jax.grad(of)(logps), [[0.04 * (1 - 0.5), 0.04 * (1 - 2)]], rtol=1e-5
        )

    def test_gspo_by_hand(self) -> None:
        # Log-ratios 0.3, 0.1 and -0.1 of three tokens: the sequence ratio is exp(0.1) = 1.105171
        # for each; of the other completion exp(0.4), which is clipped.
        log_ratio = np.array([[0.3, 0.1, -0.1, 9.0], [0.4, 0.4, 9.0, 9.0]], np.float32)
        mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
        weights = mask * token_weights(mask.sum(1), np.ones(2, bool), "gspo", 4)[:, None]
        config = dataclasses.replace(PLAIN, loss_type="gspo")

        def of(logps: jax.Array) -> jax.Array:
            return loss(
                config,
                logps=logps,
                old_logps=np.zeros((2, 4)),
                ref_logps=np.zeros((2, 4)),
                advantages=[1.0, 1.0],
                weights=weights,
            ).loss

        assert float(of(log_ratio)) == pytest.approx(-(math.exp(0.1) + 1.2) / 2, rel=1e-6)
        # d/dx of exp(mean of x) / 2 over three tokens.
        each = -math.exp(0.1) / 3 / 2
        np.testing.assert_allclose(
            jax.grad(of)(jnp.asarray(log_ratio)), [[each] * 3 + [0], [0] * 4], rtol=1e-6
        )

    def test_metrics_by_hand(self) -> None:
        logps, ref = np.log([[0.5, 0.2, 0.9]]), np.log([[0.25, 0.4, 0.1]])
        terms = loss(
            PLAIN,
            logps=logps,
            ref_logps=ref,
            entropy=[[0.5, 0.7, 100.0]],
            advantages=[1.0],
            weights=[[0.5, 0.5, 0.0]],
        )
        assert {name: int(count) for name, (_, count) in terms.means.items()} == {
            "kl": 2,
            "clip_fraction": 2,
            "entropy": 2,
            "sampling_kl": 0,
        }
        assert float(terms.means["entropy"][0]) == pytest.approx(1.2)
        assert float(terms.means["kl"][0]) == pytest.approx(0.5, rel=1e-5)
        assert float(terms.maxima["max_ratio"]) == 1

    def test_sampling_kl_by_hand(self) -> None:
        """KL(rollout || policy before its first update) of the tokens whose rollout is known."""
        # Drawn with 0.5 and 0.2 where the policy has 0.25 and 0.4; then a token without a
        # log-probability, and padding.
        terms = loss(
            PLAIN,
            logps=np.log([[0.9, 0.8, 0.7, 0.6]]),
            old_logps=np.log([[0.25, 0.4, 0.3, 0.3]]),
            rollout_logps=np.log([[0.5, 0.2, NAN, 0.9]]),
            advantages=[1.0],
            weights=[[0.5, 0.5, 0.5, 0.0]],
        )
        total, count = terms.means["sampling_kl"]
        assert float(total) == pytest.approx((0.5 - 1 + math.log(2)) + (2 - 1 - math.log(2)))
        assert int(count) == 2
        assert math.isfinite(float(terms.loss))

    def test_micro_batches_are_combined_by_name(self) -> None:
        one, other = (
            LossTerms(np.float32(value), {"kl": (3 * value, 4), "none": (0.0, 0)}, {"most": value})
            for value in (0.5, 2.0)
        )
        # A mean over nothing is no mean of 0.
        assert combine([one, other]) == {"loss": 2.5, "kl": 7.5 / 8, "most": 2.0}

    @pytest.mark.parametrize("loss_type", ["grpo", "gspo", "token_mean", "drgrpo"])
    def test_what_shares_a_row_does_not_matter(self, loss_type: Any) -> None:
        """Loss, gradient and metrics of packed completions are those of one to a row."""
        random = np.random.default_rng(0)
        config = GrpoConfig(loss_type=loss_type, beta=0.1, epsilon=0.1, epsilon_high=0.15)
        lengths = np.array([3, 5, 2, 4, 1])
        scored = np.array([True, True, False, True, True])
        by_completion = token_weights(lengths, scored, loss_type, 6)
        advantages = random.standard_normal(5)
        tokens = [random.standard_normal((4, n)) * 0.4 for n in lengths]

        def laid(rows: list[list[int]], width: int) -> Any:
            segment_ids = np.full((len(rows), width), -1)
            fields = np.zeros((4, len(rows), width), np.float32)
            for row, members in enumerate(rows):
                start = 0
                for i in members:
                    slots = slice(start, start := start + lengths[i])
                    segment_ids[row, slots], fields[:, row, slots] = i, tokens[i]
            is_token = segment_ids >= 0

            def of(logps: jax.Array) -> tuple[jax.Array, LossTerms]:
                terms = loss(
                    config,
                    logps=logps,
                    old_logps=fields[1],
                    ref_logps=fields[2],
                    entropy=fields[3],
                    advantages=np.where(is_token, advantages[segment_ids], 0),
                    weights=np.where(is_token, by_completion[segment_ids], 0),
                    segment_ids=segment_ids,
                )
                return terms.loss, terms

            (_, terms), gradient = jax.value_and_grad(of, has_aux=True)(jnp.asarray(fields[0]))
            return terms, [np.asarray(gradient)[segment_ids == i] for i in range(5)]

        terms, gradients = laid([[i] for i in range(5)], 5)
        packed, packed_gradients = laid([[1, 0], [3, 2, 4]], 9)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), packed, terms)
        clipped, count = map(int, terms.means["clip_fraction"])
        assert clipped > 0 and count == 3 + 5 + 4 + 1
        for one, other in zip(gradients, packed_gradients, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-7)
        assert not gradients[2].any()

    def test_without_a_reference_there_is_no_penalty(self) -> None:
        values = {
            "logps": [[-1.0, -2.0]],
            "old_logps": [[-1.1, -2.0]],
            "advantages": [1.0],
            "weights": [[0.5, 0.5]],
        }
        with_reference = loss(PLAIN, **values, ref_logps=[[-3.0, -0.5]])
        without = _compiled(
            TokenLogps(jnp.array(values["logps"]), jnp.zeros((1, 2))),
            jnp.array(values["old_logps"]),
            None,
            jnp.ones((1, 2)),
            jnp.array(values["weights"]),
            jnp.zeros((1, 2), int),
            jnp.full((1, 2), NAN),
            PLAIN,
        )
        assert float(without.loss) == float(with_reference.loss)
        assert float(without.means["kl"][0]) == 0 < float(with_reference.means["kl"][0])

    def test_what_stands_at_padding_does_not_matter(self) -> None:
        weights = [[0.5, 0.5, 0.0, 0.0]]
        results = []
        for filler in (0.0, -1e30, 80.0):
            logps = jnp.array([[-1.0, -2.0, filler, filler]])

            def of(logps: jax.Array) -> jax.Array:
                return loss(
                    GrpoConfig(),
                    logps=logps,
                    old_logps=[[-1.1, -2.0, 0.0, 0.0]],
                    ref_logps=[[-1.0, -2.5, 0.0, 0.0]],
                    advantages=[1.0],
                    weights=weights,
                ).loss

            value, gradient = jax.value_and_grad(of)(logps)
            results.append((float(value), gradient.tolist()))
        assert results[0] == results[1] == results[2]
        assert results[0][1][0][2:] == [0, 0]


class Bigrams(nnx.Module):
    """A model whose logits depend on the last token only, called as Tunix calls a model."""

    def __init__(self, logits: jax.Array) -> None:
        self.logits = nnx.Param(logits)

    def __call__(
        self, tokens: jax.Array, positions: Any, cache: Any, attention_mask: Any
    ) -> tuple[jax.Array, None]:
        del positions, cache, attention_mask
        return self.logits.get_value()[tokens], None


class TestAgainstTunix:
    """Loss and gradient of `grpo_loss_fn`, on a small table of logits."""

    PROMPTS = np.array([[0, 5], [4, 3], [0, 2]])  # Token 0 is padding.
    COMPLETIONS = np.array([[3, 1, 6, 2], [2, 2, 0, 0], [6, 0, 0, 0]])
    ADVANTAGES = np.array([1.3, -0.7, 0.4], np.float32)

    @pytest.fixture
    def tables(self) -> dict[str, jax.Array]:
        """Logits of the policy, of the policy that sampled and of the reference."""
        now, drift, ref = jax.random.normal(jax.random.key(3), (3, 7, 7))
        return {"now": now, "old": now + 0.3 * drift, "ref": now + ref}

    def logps(self, table: jax.Array) -> jax.Array:
        previous = jnp.concatenate([self.PROMPTS[:, -1:], self.COMPLETIONS[:, :-1]], axis=1)
        logps = jax.nn.log_softmax(table[previous])
        return jnp.take_along_axis(logps, self.COMPLETIONS[..., None], axis=-1)[..., 0]

    def ours(self, tables: dict[str, jax.Array], config: GrpoConfig) -> Any:
        mask = self.COMPLETIONS != 0
        weights = token_weights(mask.sum(1), np.ones(3, bool), config.loss_type, 4)

        def of(table: jax.Array) -> tuple[jax.Array, LossTerms]:
            terms = loss(
                config,
                logps=self.logps(table),
                old_logps=self.logps(tables["old"]),
                ref_logps=self.logps(tables["ref"]),
                advantages=self.ADVANTAGES,
                weights=mask * weights[:, None],
            )
            return terms.loss, terms

        return jax.value_and_grad(of, has_aux=True)(tables["now"])

    def stock(self, tables: dict[str, jax.Array], config: Any) -> Any:
        example = common.TrainExample(
            prompt_ids=jnp.asarray(self.PROMPTS),
            prompt_mask=jnp.asarray(self.PROMPTS != 0),
            completion_ids=jnp.asarray(self.COMPLETIONS),
            completion_mask=jnp.asarray(self.COMPLETIONS != 0),
            advantages=jnp.asarray(self.ADVANTAGES),
            ref_per_token_logps=self.logps(tables["ref"]),
            old_per_token_logps=self.logps(tables["old"]),
        )

        def of(model: Bigrams) -> Any:
            return algo_core.grpo_loss_fn(model, example, config, pad_id=0, eos_id=1)

        (value, aux), gradient = nnx.value_and_grad(of, has_aux=True)(Bigrams(tables["now"]))
        return value, aux, jax.tree.leaves(gradient)[0]

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ({}, {}),
            ({"loss_type": "token_mean"}, {"loss_agg_mode": "token-mean"}),
            ({"loss_type": "drgrpo"}, {"loss_agg_mode": "sequence-mean-token-scale"}),
            ({"loss_type": "gspo"}, {"loss_algo": "gspo-token"}),
            ({"beta": 0.0}, {"beta": 0.0}),
            ({"epsilon": 0.1}, {"epsilon": 0.1}),
            ({"epsilon": 0.1, "epsilon_high": 0.15}, {"epsilon": 0.1, "epsilon_high": 0.15}),
        ],
        ids=str,
    )
    def test_loss_and_gradient(
        self, ours: dict[str, Any], theirs: dict[str, Any], tables: dict[str, jax.Array]
    ) -> None:
        stock_config = SimpleNamespace(
            **{
                "beta": 0.04,
                "epsilon": 0.2,
                "epsilon_high": theirs.get("epsilon", 0.2),
                "loss_algo": "grpo",
                "loss_agg_mode": "sequence-mean-token-mean",
                "temperature": 1.0,
                "kl_loss_mode": "low_var_kl",
                "kl_clamp_value": None,
            }
            | theirs
        )
        (value, terms), gradient = self.ours(tables, GrpoConfig(**ours))
        stock_value, aux, stock_gradient = self.stock(tables, stock_config)
        assert float(value) == pytest.approx(float(stock_value), rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(gradient, stock_gradient, atol=1e-6)
        assert abs(gradient).max() > 0.05
        clipped, count = map(int, terms.means["clip_fraction"])
        assert clipped > 0
        assert clipped / count == pytest.approx(float(aux["pg_clipfrac"]))
        assert float(terms.means["kl"][0]) / count == pytest.approx(float(aux["kl"]), rel=1e-5)

    def test_names_of_tunix_mean_the_same(self) -> None:
        """Tunix's own Dr. GRPO takes the aggregation that the table above compares with."""
        config = DrGRPOConfig(num_generations=2)
        assert config.loss_agg_mode == "sequence-mean-token-scale"
        assert config.advantage_estimator == "drgrpo"
