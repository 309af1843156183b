"""Updates are those of the textbook, however the batch is cut and wherever it lies."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.gemma import model as gemma
from tunix.rl import common
from tunix.rl.rl_cluster import RLTrainingConfig
from tunix.rl.rollout.base_rollout import CacheConfig as RolloutCacheConfig
from tunix.rl.rollout.vanilla_rollout import VanillaRollout
from tunix.rl.trainer import Trainer

from gemma2_grpo.config import Config, OptimizerConfig
from gemma2_grpo.engine.forward import Network, Weights, completion_logps, split_model
from gemma2_grpo.engine.learner import Completions, Learner, Stream
from gemma2_grpo.engine.lora import add_lora
from gemma2_grpo.engine.loss import Advantages, group_advantages
from gemma2_grpo.engine.model import with_remat
from gemma2_grpo.engine.rollout import pad_left
from gemma2_grpo.engine.tokenizer import Tokenizer
from gemma2_grpo.engine.update import (
    MicroBatch,
    Updater,
    learning_rate_schedule,
    make_optimizer,
)
from gemma2_grpo.task.data import Example
from gemma2_grpo.task.prompts import render_prompt

GROUP, LIMIT, LENGTH = 4, 12, 40
Adapters = Callable[[gemma.Gemma], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Rollouts:
    prompts: list[str]
    completions: Completions
    rewards: np.ndarray

    def first(self, count: int) -> "Rollouts":
        rows = count * GROUP
        completions = Completions(
            self.completions.texts[:rows],
            self.completions.tokens[:rows],
            self.completions.is_truncated[:rows],
        )
        return Rollouts(self.prompts[:count], completions, self.rewards[:count])

    def batches(self, learner: Learner) -> list[MicroBatch]:
        advantages = group_advantages(self.rewards, scale_by_std=True)
        return learner.micro_batches(self.prompts, self.completions, advantages)


@pytest.fixture(scope="module")
def cutter(make_learner: Callable[..., Learner], config: Config) -> Learner:
    """Cuts rollouts into micro-batches, and is never updated."""
    return make_learner(config)


@pytest.fixture(scope="module")
def rollouts(examples: list[Example], random_completions: Callable[..., Completions]) -> Rollouts:
    """Eight prompts of four completions; one of them could not be scored."""
    rewards = np.random.default_rng(2).random((8, GROUP))
    rewards[1, 2] = np.nan
    return Rollouts(
        [render_prompt(example.question) for example in examples],
        random_completions(8 * GROUP, LIMIT, seed=3),
        rewards,
    )


@cache
def _compiled(temperature: float) -> Any:
    """Log-probabilities, and loss with gradient, of one row by way of all its logits."""

    def logps(network: Network, lora: Any, base: Any, row: Any) -> tuple[jax.Array, jax.Array]:
        tokens, start, completion = row
        length = len(tokens)
        model = nnx.merge(network.graphdef, lora, base)
        mask = jnp.tri(length, dtype=bool)[None]
        logits, _ = model(tokens[None], jnp.arange(length)[None], None, mask)
        everything = jax.nn.log_softmax(logits[0] / temperature)
        predicted = everything[start - 1 + jnp.arange(len(completion))]
        chosen = jnp.take_along_axis(predicted, completion[:, None], axis=1)[:, 0]
        return chosen, -(jnp.exp(predicted) * predicted).sum(axis=-1)

    def loss(lora: Any, network: Network, base: Any, row: Any, given: Any) -> jax.Array:
        old, ref, advantage, is_token, weight, beta = given
        now, _ = logps(network, lora, base, row)
        ratio = jnp.exp(now - old)
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        kl = jnp.exp(ref - now) - (ref - now) - 1
        return weight * jnp.sum(jnp.where(is_token, -gain + beta * kl, 0.0))

    return (
        jax.jit(logps, static_argnums=0),
        jax.jit(jax.value_and_grad(loss), static_argnums=1),
    )


# Policies on one base have the same static half; programs are compiled per object.
_networks: dict[str, Network] = {}


class Textbook:
    """GRPO as its paper writes it, row by row, with plain gradient descent."""

    def __init__(
        self, policy: gemma.Gemma, tokenizer: Tokenizer, rollouts: Rollouts, config: Config
    ) -> None:
        self.logps, self.gradient = _compiled(config.rollout.temperature)
        self.beta = config.grpo.beta
        network, (lora, self.base) = split_model(policy)
        self.network = _networks.setdefault("policy", network)
        self.lora = jax.tree.map(jnp.copy, lora)
        self.rows, self.is_token, self.advantages = [], [], []
        for i, completion in enumerate(rollouts.completions.tokens):
            group = rollouts.rewards[i // GROUP]
            reward = group[i % GROUP]
            if np.isnan(reward):
                continue
            known = group[~np.isnan(group)]
            self.advantages.append((reward - known.mean()) / (known.std(ddof=1) + 1e-6))
            prompt = tokenizer.encode(rollouts.prompts[i // GROUP])
            tokens = np.zeros(LENGTH, np.int32)
            tokens[: len(prompt) + len(completion)] = [*prompt, *completion]
            padded = np.pad(completion, (0, LIMIT - len(completion)))
            self.rows.append((tokens, len(prompt), padded))
            self.is_token.append(np.arange(LIMIT) < len(completion))
        self.ref = [self.now(row, jax.tree.map(jnp.zeros_like, self.lora))[0] for row in self.rows]

    def now(self, row: Any, lora: Any = None) -> tuple[jax.Array, jax.Array]:
        return self.logps(self.network, self.lora if lora is None else lora, self.base, row)

    def descend(self, iterations: int, learning_rate: float) -> dict[str, np.ndarray]:
        """The gradient of the last iteration."""
        old = [self.now(row)[0] for row in self.rows]
        for _ in range(iterations):
            total = jax.tree.map(jnp.zeros_like, self.lora)
            for i, row in enumerate(self.rows):
                weight = 1 / self.is_token[i].sum() / len(self.rows)
                given = (
                    old[i],
                    self.ref[i],
                    self.advantages[i],
                    self.is_token[i],
                    weight,
                    self.beta,
                )
                _, gradient = self.gradient(self.lora, self.network, self.base, row, given)
                total = jax.tree.map(jnp.add, total, gradient)
            self.lora = jax.tree.map(lambda x, g: x - learning_rate * g, self.lora, total)
        return by_path(total)


def by_path(state: Any) -> dict[str, np.ndarray]:
    return {
        "/".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(state)
    }


def descent(learning_rate: float) -> optax.GradientTransformation:
    """Gradient descent whose state is its rate and the last gradient."""
    return optax.GradientTransformation(
        lambda params: (jnp.array(learning_rate), jax.tree.map(jnp.zeros_like, params)),
        lambda gradients, state, params=None: (
            jax.tree.map(lambda g: -state[0] * g, gradients),
            (state[0], gradients),
        ),
    )


def last_gradient(trainer: Trainer) -> dict[str, np.ndarray]:
    found = {}
    for path, value in by_path(nnx.state(trainer.optimizer)).items():
        if "lora" in path:
            found[path[path.index("layers") :]] = value
    return found


@pytest.fixture
def descending(
    base: gemma.Gemma, mesh: Mesh, make_policy: Callable[..., gemma.Gemma]
) -> Callable[[Config, float], tuple[Updater, Trainer]]:
    """Makes an updater that descends the plain gradient of a policy with drawn adapters."""

    def make(config: Config, learning_rate: float) -> tuple[Updater, Trainer]:
        optimizer = descent(learning_rate)
        trainer = Trainer(
            model=make_policy(filled=5, scale=0.05),
            optimizer=optimizer,
            training_config=RLTrainingConfig(actor_optimizer=optimizer, eval_every_n_steps=1000),
            custom_checkpoint_metadata_fn=dict,
        )
        return Updater(trainer, base, config, mesh), trainer

    return make


class TestTextbook:
    @pytest.mark.parametrize(
        ("iterations", "learning_rate", "clips"),
        [(1, 0.1, False), (3, 0.002, False), (3, 0.05, True)],
    )
    def test_gradient(
        self,
        iterations: int,
        learning_rate: float,
        clips: bool,
        descending: Callable[..., tuple[Updater, Trainer]],
        cutter: Learner,
        config: Config,
        changed: Callable[..., Config],
        tokenizer: Tokenizer,
        rollouts: Rollouts,
    ) -> None:
        config = changed(config, num_iterations=iterations)
        chosen = rollouts.first(2)
        updater, trainer = descending(config, learning_rate)
        textbook = Textbook(trainer.model, tokenizer, chosen, config)
        batches = chosen.batches(cutter)
        assert len(batches) == 2
        metrics = updater.update(batches)
        assert len(metrics) == iterations
        assert metrics[0].clip_fraction == 0
        assert (metrics[-1].clip_fraction > 0.1) == clips

        expected = textbook.descend(iterations, learning_rate)
        actual = last_gradient(trainer)
        assert actual.keys() == expected.keys() and len(actual) == 24
        for name, gradient in expected.items():
            error = np.linalg.norm(actual[name] - gradient) / np.linalg.norm(gradient)
            print(name, error)
            assert error < 1e-5, name
        norm = np.sqrt(sum((gradient**2).sum() for gradient in expected.values()))
        assert metrics[-1].grad_norm == pytest.approx(norm, rel=1e-5)
        for name, value in by_path(textbook.lora).items():
            np.testing.assert_allclose(
                by_path(nnx.state(trainer.model, nnx.LoRAParam))[name], value, atol=2e-5
            )

    def test_metrics(
        self,
        descending: Callable[..., tuple[Updater, Trainer]],
        cutter: Learner,
        config: Config,
        tokenizer: Tokenizer,
        rollouts: Rollouts,
    ) -> None:
        chosen = rollouts.first(2)
        updater, trainer = descending(config, 0.1)
        textbook = Textbook(trainer.model, tokenizer, chosen, config)
        (metrics,) = updater.update(chosen.batches(cutter))
        kl, entropy, loss, tokens = 0.0, 0.0, 0.0, 0
        for i, row in enumerate(textbook.rows):
            mask = textbook.is_token[i]
            now, entropies = (np.asarray(x, np.float64)[mask] for x in textbook.now(row))
            d = np.asarray(textbook.ref[i], np.float64)[mask] - now
            each = np.exp(d) - d - 1
            kl, entropy, tokens = kl + each.sum(), entropy + entropies.sum(), tokens + mask.sum()
            # The ratio is 1.
            loss += np.mean(-textbook.advantages[i] + 0.04 * each) / len(textbook.rows)
        assert metrics.kl == pytest.approx(kl / tokens, rel=1e-4)
        assert metrics.entropy == pytest.approx(entropy / tokens, rel=1e-5)
        assert metrics.loss == pytest.approx(loss, rel=1e-4)
        assert metrics.kl > 1e-3 and metrics.entropy > 1
        assert metrics.is_finite


class TestRatio:
    def test_is_exactly_one_before_the_first_update(
        self,
        make_learner: Callable[..., Learner],
        make_policy: Callable[..., gemma.Gemma],
        config: Config,
        changed: Callable[..., Config],
        rollouts: Rollouts,
    ) -> None:
        config = changed(config, num_iterations=3, temperature=0.7, learning_rate=3e-3)
        learner = make_learner(config, make_policy(filled=5))
        first, *others = learner.updater.update(rollouts.first(2).batches(learner))
        assert first.max_ratio == 1.0
        assert first.clip_fraction == 0.0
        assert all(other.max_ratio > 1.01 for other in others)
        # Of the next batch as well, although the policy has moved.
        again = learner.updater.update(rollouts.first(2).batches(learner))
        assert again[0].max_ratio == 1.0

    def test_is_not_in_stock_tunix_at_other_temperatures(
        self, base: gemma.Gemma, tokenizer: Tokenizer, rollouts: Rollouts, mesh: Mesh
    ) -> None:
        """Tunix takes old log-probabilities at temperature 1 and the loss at that of sampling."""
        del mesh
        size = RolloutCacheConfig(cache_size=48, num_layers=2, num_kv_heads=4, head_dim=8)
        engine = VanillaRollout(base, tokenizer, size)
        chosen = rollouts.first(2)
        ids = [tokenizer.encode(prompt) for prompt in chosen.prompts for _ in range(GROUP)]
        prompts = jnp.asarray(pad_left(ids, 28, 0))
        rows = chosen.completions.tokens
        completions = np.stack([np.pad(row, (0, LIMIT - len(row))) for row in rows])
        old = engine.get_per_token_logps(prompts, jnp.asarray(completions))
        ratios = {}
        for temperature in (1.0, 0.7):
            now = common.compute_per_token_logps(
                *nnx.split(base),
                prompt_tokens=prompts,
                completion_tokens=jnp.asarray(completions),
                pad_id=0,
                eos_id=107,
                temperature=temperature,
            )
            ratios[temperature] = np.exp(np.asarray(now - old)[completions != 0])
        np.testing.assert_allclose(ratios[1.0], 1, atol=1e-5)
        assert np.mean(abs(ratios[0.7] - 1) > 0.2) > 0.5


class TestMicroBatches:
    def test_one_by_eight_is_eight_by_one(
        self,
        make_learner: Callable[..., Learner],
        config: Config,
        changed: Callable[..., Config],
        rollouts: Rollouts,
        adapters: Adapters,
    ) -> None:
        results = []
        for size in (1, 8):
            learner = make_learner(
                changed(config, prompts_per_step=8, prompts_per_micro_batch=size)
            )
            batches = rollouts.batches(learner)
            assert len(batches) == 8 // size
            metrics = [learner.updater.update(batches)[0] for _ in range(2)]
            results.append((metrics, adapters(learner.cluster.actor_trainer.model)))
        (one, weights), (other, other_weights) = results
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
        for name, value in weights.items():
            np.testing.assert_allclose(other_weights[name], value, atol=1e-6, err_msg=name)
            assert value.any()

    def test_rows_by_hand(self, cutter: Learner, tokenizer: Tokenizer) -> None:
        tokens = [np.array(row, np.int32) for row in ([5, 107], [6], [7, 8, 107], [9])]
        completions = Completions([""] * 4, tokens, np.array([False, True, False, True]))
        advantages = group_advantages(np.array([[1.0, 0, np.nan, 2]]), scale_by_std=False)
        prompt = "<bos>7 apples"
        (batch,) = cutter.micro_batches([prompt], completions, advantages)
        ids = tokenizer.encode(prompt)
        assert batch.tokens.shape == (4, LENGTH)
        assert batch.prompt_lengths.tolist() == [len(ids)] * 4
        for i, row in enumerate(tokens):
            padding = LENGTH - len(ids) - len(row)
            assert batch.tokens[i].tolist() == [*ids, *row, *[0] * padding]
            assert batch.completion_ids[i].tolist() == [*row, *[0] * (LIMIT - len(row))]
        assert batch.advantages.tolist() == [0, -1, 0, 1]
        # Three completions count; the end of the turn is a token like any other.
        expected = np.zeros((4, LIMIT), np.float32)
        expected[0, :2], expected[1, 0], expected[3, 0] = 1 / 6, 1 / 3, 1 / 3
        np.testing.assert_allclose(batch.weights, expected)

    def test_groups_that_teach_nothing_are_left_out(
        self,
        make_learner: Callable[..., Learner],
        cutter: Learner,
        config: Config,
        changed: Callable[..., Config],
        rollouts: Rollouts,
        adapters: Adapters,
    ) -> None:
        chosen = rollouts.first(3)
        chosen = dataclasses.replace(chosen, rewards=chosen.rewards.copy())
        chosen.rewards[0], chosen.rewards[1] = 0.5, np.nan
        # The penalty pulls on groups of equal rewards too; nothing does on one without a score.
        batches = chosen.batches(cutter)
        assert len(batches) == 2
        assert batches[0].advantages.tolist() == [0] * 4

        config = changed(config, beta=0.0)
        learner = make_learner(config)
        batches = chosen.batches(learner)
        assert len(batches) == 1
        assert batches[0].advantages.all()
        learner.updater.update(batches)

        advantages = group_advantages(chosen.rewards, scale_by_std=True)
        everything = advantages._replace(is_uniform=np.zeros(3, bool))
        other = make_learner(config)
        batches = other.micro_batches(chosen.prompts, chosen.completions, everything)
        assert len(batches) == 3
        other.updater.update(batches)
        for name, value in adapters(learner.cluster.actor_trainer.model).items():
            np.testing.assert_allclose(
                adapters(other.cluster.actor_trainer.model)[name], value, atol=1e-7
            )


class TestWhatIsLearned:
    def test_the_end_of_a_turn(
        self,
        make_learner: Callable[..., Learner],
        config: Config,
        changed: Callable[..., Config],
        examples: list[Example],
        full_logits: Callable[..., np.ndarray],
    ) -> None:
        learner = make_learner(changed(config, beta=0.0))
        prompt = render_prompt(examples[0].question)
        ids = learner.tokenizer.encode(prompt)
        policy = learner.cluster.actor_trainer.model

        def ending() -> float:
            logits = full_logits(policy, np.array([ids]))[0, -1]
            return float(jax.nn.log_softmax(logits)[learner.tokenizer.eos_id()])

        before = ending()
        tokens = [np.array([107], np.int32)] + [np.array([200], np.int32)] * 3
        completions = Completions([""] * 4, tokens, np.array([False, True, True, True]))
        # Only the completion that is nothing but the end of the turn has an advantage.
        advantages = Advantages(
            np.array([[1.0, 0, 0, 0]], np.float32), np.ones((1, 4), bool), np.array([False])
        )
        learner.updater.update(learner.micro_batches([prompt], completions, advantages))
        assert ending() > before + 0.01

    def test_equal_rewards_without_penalty_change_nothing(
        self,
        make_learner: Callable[..., Learner],
        make_policy: Callable[..., gemma.Gemma],
        config: Config,
        changed: Callable[..., Config],
        examples: list[Example],
    ) -> None:
        learner = make_learner(changed(config, beta=0.0, weight_decay=0.1), make_policy(filled=1))
        before = jax.device_get(learner.state())
        result = learner.step(
            0, examples[:2], lambda examples, texts: {"total": np.full(len(texts), 0.3)}
        )
        assert len(result.completions.texts) == len(result.examples) == 8
        assert result.updates == []
        assert result.advantages.is_uniform.all()
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(learner.state()))

    def test_a_gradient_that_is_no_number_changes_nothing(
        self,
        make_learner: Callable[..., Learner],
        make_policy: Callable[..., gemma.Gemma],
        config: Config,
        rollouts: Rollouts,
    ) -> None:
        learner = make_learner(config, make_policy(filled=1, scale=0.05))
        batches = rollouts.first(2).batches(learner)
        learner.updater.update(batches)
        before = jax.device_get(learner.state())
        bad = batches[0]._replace(advantages=np.array([1.0, np.nan, 0, 0], np.float32))
        (metrics,) = learner.updater.update([bad, batches[1]])
        assert not metrics.is_finite
        after = jax.device_get(learner.state())
        jax.tree.map(np.testing.assert_array_equal, before["lora"], after["lora"])

        changes = {
            jax.tree_util.keystr(path): (int(old), int(new))
            for (path, old), new in zip(
                jax.tree_util.tree_leaves_with_path(before["optimizer"]),
                jax.tree.leaves(after["optimizer"]),
                strict=True,
            )
            if not np.array_equal(old, new)
        }
        names = ("total_notfinite", "notfinite_count", "last_finite", "['step']")
        assert all(any(name in key for name in names) for key in changes)
        assert next(v for k, v in changes.items() if "total_notfinite" in k) == (0, 1)
        (metrics,) = learner.updater.update(batches)
        assert metrics.is_finite
        assert not np.array_equal(
            jax.tree.leaves(after["lora"])[0], jax.tree.leaves(learner.state()["lora"])[0]
        )

    def test_shuffled_rewards_are_the_same_rewards_elsewhere(
        self,
        make_learner: Callable[..., Learner],
        config: Config,
        changed: Callable[..., Config],
        examples: list[Example],
    ) -> None:
        learner = make_learner(
            changed(config, shuffle_rewards=True, warmup_fraction=0.5, learning_rate=1e-3)
        )
        policy = learner.cluster.actor_trainer.model
        before = by_path(nnx.state(policy, nnx.LoRAParam))
        result = learner.step(
            5, examples[:2], lambda examples, texts: {"total": np.arange(len(texts)) ** 2.0}
        )
        values = np.random.default_rng([0, Stream.CONTROL, 5]).permutation(np.arange(8) ** 2.0)
        assert values.tolist() != (np.arange(8) ** 2).tolist()
        expected = group_advantages(values.reshape(2, 4), scale_by_std=True)
        np.testing.assert_array_equal(result.advantages.values, expected.values)
        # What is reported stays with its completion.
        assert result.scores["total"].tolist() == (np.arange(8) ** 2).tolist()
        assert result.examples == [examples[0]] * 4 + [examples[1]] * 4

        # The rate that is reported is the one that was used: Adam's first step is the rate
        # itself, whatever the gradient. Two of four updates warm up.
        assert result.learning_rate == pytest.approx(5e-4)
        after = by_path(nnx.state(policy, nnx.LoRAParam))
        largest = max(abs(after[name] - before[name]).max() for name in before)
        assert largest == pytest.approx(5e-4, rel=1e-2)


@jax.jit(static_argnames=("network", "chunk_tokens"))
def _logps_and_gradient(
    network: Network, weights: Weights, batch: MicroBatch, chunk_tokens: int
) -> Any:
    def loss(lora: nnx.State) -> Any:
        found = completion_logps(
            network,
            Weights(lora, weights.base),
            *batch[:3],
            temperature=0.7,
            chunk_tokens=chunk_tokens,
        )
        return jnp.sum(batch.weights * found.logps), found

    return jax.value_and_grad(loss, has_aux=True)(weights.lora)


class TestMemory:
    """What saves memory changes no value."""

    @pytest.fixture(scope="class")
    @classmethod
    def batch(cls, cutter: Learner, rollouts: Rollouts) -> MicroBatch:
        return rollouts.first(1).batches(cutter)[0]

    @pytest.fixture(scope="class")
    @classmethod
    def policy(cls, make_policy: Callable[..., gemma.Gemma]) -> gemma.Gemma:
        return make_policy(filled=5)

    @pytest.fixture(scope="class")
    @classmethod
    def plain(cls, policy: gemma.Gemma, batch: MicroBatch) -> Any:
        return _logps_and_gradient(*split_model(policy), batch, 128)

    def test_chunks(self, policy: gemma.Gemma, batch: MicroBatch, plain: Any) -> None:
        found = _logps_and_gradient(*split_model(policy), batch, 5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found, plain)

    @pytest.mark.parametrize("remat", ["block", "decoder"])
    def test_remat(self, remat: Any, policy: gemma.Gemma, batch: MicroBatch, plain: Any) -> None:
        network, weights = split_model(with_remat(policy, remat))
        found = _logps_and_gradient(network, weights, batch, 128)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found, plain)
        recomputed = str(
            jax.make_jaxpr(lambda w: _logps_and_gradient(network, w, batch, 128))(weights)
        ).count("prevent_cse")
        kinds = {"block": 2 * 2, "decoder": 2}  # Two layers; chunks add one.
        assert recomputed >= kinds[remat] + 1

    def test_stock_sampling_breaks_under_remat(
        self, base: gemma.Gemma, tokenizer: Tokenizer
    ) -> None:
        """Tunix's remat cannot be traced in its sampler, so that training and sampling need two
        graphs over the same weights.
        """
        sampler = Sampler(
            with_remat(base, "decoder"),
            tokenizer,
            CacheConfig(cache_size=48, num_layers=2, num_kv_heads=4, head_dim=8),
        )
        with pytest.raises(Exception, match="trace level"):
            sampler(["<bos>7 apples"], 4, max_prompt_length=28)


class TestOptimizer:
    def test_learning_rates_by_hand(self) -> None:
        config = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.1, final_lr_fraction=0.1)
        schedule = learning_rate_schedule(config, 20)
        # Two of twenty updates warm up; the cosine has its middle 9 updates after the peak.
        for update, rate in [(0, 5e-4), (1, 1e-3), (10, 5.5e-4), (19, 1e-4)]:
            assert float(schedule(update)) == pytest.approx(rate, rel=1e-5)
        rates = [float(schedule(update)) for update in range(1, 20)]
        assert rates == sorted(rates, reverse=True)

    @pytest.mark.parametrize("warmup_fraction", [0.0, 0.5, 1.0])
    def test_a_run_of_one_update_learns(self, warmup_fraction: float) -> None:
        config = OptimizerConfig(learning_rate=1e-3, warmup_fraction=warmup_fraction)
        assert float(learning_rate_schedule(config, 1)(0)) == pytest.approx(1e-3)

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


def test_losses_do_not_depend_on_the_mesh(
    make_learner: Callable[..., Learner],
    wide_base: gemma.Gemma,
    wide_mesh: Mesh,
    config: Config,
    changed: Callable[..., Config],
    tokenizer: Tokenizer,
    rollouts: Rollouts,
    adapters: Adapters,
    make_policy: Callable[..., gemma.Gemma],
    fill_adapters: Callable[..., None],
) -> None:
    config = changed(config, num_iterations=2)
    one = make_learner(config, make_policy(filled=5, scale=0.05))
    policy = add_lora(wide_base, config.model, wide_mesh, 0)
    fill_adapters(policy, 5, 0.05)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(nnx.state(policy, nnx.LoRAParam))]
    wide = Learner(changed(config, mesh_shape=(2, 4)), policy, wide_base, tokenizer, wide_mesh)
    chosen = rollouts.first(2)
    for _ in range(2):
        expected = one.updater.update(chosen.batches(one))
        actual = wide.updater.update(chosen.batches(wide))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    for name, value in adapters(one.cluster.actor_trainer.model).items():
        np.testing.assert_allclose(
            adapters(wide.cluster.actor_trainer.model)[name], value, atol=1e-4
        )
    flat = nnx.to_flat_state(nnx.state(policy, nnx.LoRAParam))
    moments = dict(nnx.to_flat_state(nnx.state(wide.cluster.actor_trainer.optimizer)))
    for (path, variable), before in zip(flat, shardings, strict=True):
        value = variable.get_value()
        assert value.sharding.is_equivalent_to(before, value.ndim), path
        held = [v.get_value() for p, v in moments.items() if p[-len(path) :] == path]
        assert len(held) == 2
        for moment in held:
            assert moment.sharding.is_equivalent_to(before, value.ndim), path
