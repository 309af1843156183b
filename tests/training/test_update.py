"""Updates are those of the textbook, however the batch is cut and packed and wherever it lies."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
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
from tunix.rl.rollout.base_rollout import CacheConfig as RolloutCacheConfig
from tunix.rl.rollout.vanilla_rollout import VanillaRollout

from gemma2_grpo.config import Config
from gemma2_grpo.model.lora import add_lora
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.sampling.rollout import Completions
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training.learner import Learner, Stream
from gemma2_grpo.training.loss import Advantages, group_advantages

GROUP, LIMIT, LENGTH = 4, 12, 40
Adapters = Callable[[gemma.Gemma], dict[str, np.ndarray]]
AsTunix = Callable[[gemma.Gemma], gemma.Gemma]
Metrics = dict[str, float]
Learn = Callable[..., list[Metrics]]


@dataclass(frozen=True)
class Rollouts:
    prompts: list[str]
    completions: Completions
    rewards: np.ndarray

    def first(self, count: int) -> "Rollouts":
        rows = count * GROUP
        return Rollouts(self.prompts[:count], self.completions.first(rows), self.rewards[:count])

    @property
    def given(self) -> tuple[list[str], Completions, np.ndarray]:
        return self.prompts, self.completions, self.rewards


@pytest.fixture(scope="module")
def rollouts(examples: list[Example], random_completions: Callable[..., Completions]) -> Rollouts:
    """Eight prompts of four completions. One of them has no score, and one group equal ones."""
    rewards = np.random.default_rng(2).random((8, GROUP))
    rewards[1, 2] = np.nan
    rewards[2] = 0.25
    return Rollouts(
        [render_prompt(example.question) for example in examples],
        random_completions(8 * GROUP, LIMIT, seed=3),
        rewards,
    )


@dataclass(frozen=True, eq=False)
class Stock:
    """Tunix's own layers, whose adapters Qwix applies; programs are compiled per object."""

    graphdef: nnx.GraphDef


def plain_logps(stock: Stock, lora: Any, base: Any, row: Any, temperature: Any) -> Any:
    """Log-probabilities and entropy of one completion by way of all logits of its sequence."""
    tokens, start, completion = row
    length = len(tokens)
    model = nnx.merge(stock.graphdef, lora, base)
    mask = jnp.tri(length, dtype=bool)[None]
    logits, _ = model(tokens[None], jnp.arange(length)[None], None, mask)
    everything = jax.nn.log_softmax(logits[0] / temperature)
    predicted = everything[start - 1 + jnp.arange(len(completion))]
    chosen = jnp.take_along_axis(predicted, completion[:, None], axis=1)[:, 0]
    return chosen, -(jnp.exp(predicted) * predicted).sum(axis=-1)


def plain_loss(
    lora: Any, stock: Stock, base: Any, row: Any, temperature: Any, given: Any, loss_type: str
) -> jax.Array:
    """The objective of one completion as the papers write it."""
    old, ref, advantage, is_token, scale, beta, low, high = given
    now, _ = plain_logps(stock, lora, base, row, temperature)
    count = is_token.sum()
    ratio = jnp.exp(now - old)
    if loss_type == "gspo":
        ratio = jnp.exp(jnp.where(is_token, now - old, 0).sum() / count)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)
    kl = jnp.exp(ref - now) - (ref - now) - 1
    total = jnp.where(is_token, -gain + beta * kl, 0.0).sum()
    return scale * total


compiled_logps = jax.jit(plain_logps, static_argnums=0)
compiled_loss = jax.jit(jax.grad(plain_loss), static_argnums=1, static_argnames="loss_type")


class Textbook:
    """GRPO completion by completion, with plain gradient descent and Tunix's own layers."""

    def __init__(
        self,
        policy: gemma.Gemma,
        tokenizer: Tokenizer,
        rollouts: Rollouts,
        config: Config,
        stock: Stock,
    ) -> None:
        self.config, self.stock = config, stock
        _, lora, self.base = nnx.split(policy, nnx.LoRAParam, ...)
        self.lora = jax.tree.map(jnp.copy, lora)
        self.rows, self.is_token, self.advantages = [], [], []
        for i, completion in enumerate(rollouts.completions.tokens):
            group = rollouts.rewards[i // GROUP]
            reward = group[i % GROUP]
            if np.isnan(reward):
                continue
            known = group[~np.isnan(group)]
            deviation = 1.0 if config.grpo.loss_type == "drgrpo" else known.std(ddof=1) + 1e-6
            self.advantages.append((reward - known.mean()) / deviation)
            prompt = tokenizer.encode(rollouts.prompts[i // GROUP])
            tokens = np.zeros(LENGTH, np.int32)
            tokens[: len(prompt) + len(completion)] = [*prompt, *completion]
            padded = np.pad(completion, (0, LIMIT - len(completion)))
            self.rows.append((tokens, len(prompt), padded))
            self.is_token.append(np.arange(LIMIT) < len(completion))
        self.ref = [self.now(row, jax.tree.map(jnp.zeros_like, self.lora))[0] for row in self.rows]

    def now(self, row: Any, lora: Any = None) -> tuple[jax.Array, jax.Array]:
        lora = self.lora if lora is None else lora
        return compiled_logps(self.stock, lora, self.base, row, self.config.rollout.temperature)

    def scale(self, index: int) -> float:
        """What the sum over the tokens of a completion is multiplied by."""
        count, tokens = len(self.rows), sum(mask.sum() for mask in self.is_token)
        return {
            "grpo": 1 / self.is_token[index].sum() / count,
            "gspo": 1 / self.is_token[index].sum() / count,
            "token_mean": 1 / tokens,
            "drgrpo": 1 / LIMIT / count,
        }[self.config.grpo.loss_type]

    def descend(self, learning_rate: float) -> dict[str, np.ndarray]:
        """The gradient of the last iteration."""
        grpo = self.config.grpo
        old = [self.now(row)[0] for row in self.rows]
        for _ in range(grpo.num_iterations):
            total = jax.tree.map(jnp.zeros_like, self.lora)
            for i, row in enumerate(self.rows):
                high = grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high
                given = (old[i], self.ref[i], self.advantages[i], self.is_token[i])
                constants = (self.scale(i), grpo.beta, grpo.epsilon, high)
                gradient = compiled_loss(
                    *(self.lora, self.stock, self.base, row, self.config.rollout.temperature),
                    (*given, *constants),
                    loss_type="gspo" if grpo.loss_type == "gspo" else "grpo",
                )
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


def last_gradient(learner: Learner) -> dict[str, np.ndarray]:
    found = {}
    for path, value in by_path(nnx.state(learner.optimizer)).items():
        if "lora" in path:
            found[path[path.index("layers") :]] = value
    return found


def check_close(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], limit: float
) -> None:
    """Within a small part of the norm of each tensor."""
    assert actual.keys() == expected.keys() and len(actual) == 24
    for name, gradient in expected.items():
        error = np.linalg.norm(actual[name] - gradient) / np.linalg.norm(gradient)
        assert error < limit, (name, error)


@pytest.fixture
def descending(
    monkeypatch: pytest.MonkeyPatch,
    base: gemma.Gemma,
    mesh: Mesh,
    tokenizer: Tokenizer,
    make_policy: Callable[..., gemma.Gemma],
) -> Callable[..., Learner]:
    """Makes a learner that descends the plain gradient of a policy with drawn adapters."""

    def make(config: Config, learning_rate: float) -> Learner:
        monkeypatch.setattr(
            "gemma2_grpo.training.learner.make_optimizer", lambda *_: descent(learning_rate)
        )
        return Learner(config, make_policy(filled=5, scale=0.05), base, tokenizer, mesh)

    return make


# Each with a completion without a score and a group of equal rewards, which has a penalty only.
CASES: dict[str, tuple[float, dict[str, Any]]] = {
    "one iteration": (0.1, {}),
    "three iterations": (0.002, {"num_iterations": 3}),
    "three that clip, one prompt at a time": (
        0.05,
        {"num_iterations": 3, "micro_batch_tokens": 28, "remat": "block", "temperature": 1.0},
    ),
    "gspo": (
        0.05,
        {
            "num_iterations": 2,
            "loss_type": "gspo",
            "epsilon": 0.02,
            "epsilon_high": 0.03,
            "micro_batch_tokens": 200,
        },
    ),
    "token_mean": (
        0.05,
        {
            "num_iterations": 2,
            "loss_type": "token_mean",
            "epsilon": 0.05,
            "remat": "decoder",
            "logprob_chunk_tokens": 1,
            "micro_batch_tokens": 200,
        },
    ),
    "drgrpo without a penalty": (
        0.3,
        {
            "num_iterations": 2,
            "loss_type": "drgrpo",
            "beta": 0.0,
            "epsilon": 0.05,
            "logprob_chunk_tokens": 128,
            "micro_batch_tokens": 200,
        },
    ),
}


@pytest.fixture(scope="module")
def stock(make_policy: Callable[..., gemma.Gemma], as_tunix: AsTunix) -> Stock:
    return Stock(nnx.split(as_tunix(make_policy()))[0])


class TestTextbook:
    @pytest.mark.parametrize("case", CASES)
    def test_gradient(
        self,
        case: str,
        descending: Callable[..., Learner],
        config: Config,
        changed: Callable[..., Config],
        tokenizer: Tokenizer,
        rollouts: Rollouts,
        learn: Learn,
        stock: Stock,
    ) -> None:
        learning_rate, changes = CASES[case]
        config = changed(config, **changes)
        chosen = rollouts.first(3)
        learner = descending(config, learning_rate)
        textbook = Textbook(learner.policy, tokenizer, chosen, config, stock)
        metrics = learn(learner, *chosen.given)
        assert len(metrics) == config.grpo.num_iterations
        assert metrics[0]["clip_fraction"] == 0 and metrics[0]["max_ratio"] == 1
        clips = config.grpo.num_iterations > 1 and learning_rate > 0.01
        assert (metrics[-1]["clip_fraction"] > 0.05) == clips
        references = learner.updater.programs.reference_logps._cache_size()
        assert (references > 0) == (config.grpo.beta > 0)

        self.check_metrics(metrics[0], textbook)
        expected = textbook.descend(learning_rate)
        # Later iterations carry the rounding of the weights before them.
        limit = 1e-5 if config.grpo.num_iterations == 1 else 2e-5
        check_close(last_gradient(learner), expected, limit)
        norm = np.sqrt(sum((gradient**2).sum() for gradient in expected.values()))
        assert metrics[-1]["grad_norm"] == pytest.approx(norm, rel=1e-5)
        lora = by_path(nnx.state(learner.policy, nnx.LoRAParam))
        for name, value in by_path(textbook.lora).items():
            np.testing.assert_allclose(lora[name], value, atol=2e-5)

    @staticmethod
    def check_metrics(metrics: Metrics, textbook: Textbook) -> None:
        """Those of the first iteration, where the ratio is 1; before the textbook descends."""
        kl, entropy, loss, tokens = 0.0, 0.0, 0.0, 0
        for i, row in enumerate(textbook.rows):
            mask = textbook.is_token[i]
            now, entropies = (np.asarray(x, np.float64)[mask] for x in textbook.now(row))
            d = np.asarray(textbook.ref[i], np.float64)[mask] - now
            each = np.exp(d) - d - 1
            kl, entropy, tokens = kl + each.sum(), entropy + entropies.sum(), tokens + mask.sum()
            terms = -textbook.advantages[i] + textbook.config.grpo.beta * each
            loss += textbook.scale(i) * terms.sum()
        is_penalised = textbook.config.grpo.beta > 0
        assert metrics["kl"] == pytest.approx(kl / tokens if is_penalised else 0, rel=1e-4)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
        if is_penalised:  # Else the group of equal rewards is not looked at.
            assert metrics["entropy"] == pytest.approx(entropy / tokens, rel=1e-5)
            assert metrics["kl"] > 1e-3 and metrics["entropy"] > 1
        assert np.isfinite(metrics["grad_norm"])


class TestRatio:
    """Ours is exactly 1 before the first update, as the test of the gradient shows."""

    def test_is_not_in_stock_tunix_at_other_temperatures(
        self, base: gemma.Gemma, tokenizer: Tokenizer, rollouts: Rollouts, as_tunix: AsTunix
    ) -> None:
        """Tunix takes old log-probabilities at temperature 1 and the loss at that of sampling."""
        size = RolloutCacheConfig(cache_size=48, num_layers=2, num_kv_heads=4, head_dim=8)
        stock = as_tunix(base)
        engine = VanillaRollout(stock, tokenizer, size)
        chosen = rollouts.first(2)
        ids = [tokenizer.encode(prompt) for prompt in chosen.prompts for _ in range(GROUP)]
        prompts = jnp.asarray([[0] * (28 - len(row)) + row for row in ids])
        rows = chosen.completions.tokens
        completions = np.stack([np.pad(row, (0, LIMIT - len(row))) for row in rows])
        old = engine.get_per_token_logps(prompts, jnp.asarray(completions))
        ratios = {}
        for temperature in (1.0, 0.7):
            now = common.compute_per_token_logps(
                *nnx.split(stock),
                prompt_tokens=prompts,
                completion_tokens=jnp.asarray(completions),
                pad_id=0,
                eos_id=107,
                temperature=temperature,
            )
            ratios[temperature] = np.exp(np.asarray(now - old)[completions != 0])
        np.testing.assert_allclose(ratios[1.0], 1, atol=1e-5)
        assert np.mean(abs(ratios[0.7] - 1) > 0.2) > 0.5


class TestGroupsThatTeachNothing:
    def test_are_left_out_without_a_penalty(
        self,
        make_learner: Callable[..., Learner],
        config: Config,
        changed: Callable[..., Config],
        rollouts: Rollouts,
    ) -> None:
        """They get no row, and with a penalty they do; nothing pulls on one without a score."""
        chosen = rollouts.first(3)
        learner = make_learner(changed(config, beta=0.0))
        uniform = group_advantages(chosen.rewards, scale_by_std=True).is_uniform
        assert uniform.tolist() == [False, False, True]
        for wanted, owners in [(~uniform, range(8)), (np.ones(3, bool), range(12))]:
            packed = learner.pack(chosen.prompts, chosen.completions, wanted).on_host
            found = [micro.segment_ids for batch in packed for micro in batch.micro]
            assert np.unique(np.concatenate(found)).tolist() in ([-1, *owners], [*owners])
            # Two prompts of 28 tokens at a time, and one or two rows of two completions.
            assert [len(batch.prompts) for batch in packed] == [2, 1][: len(packed)]
            assert {rows.shape for rows in found} <= {(1, 24), (2, 24)}

    def test_equal_rewards_without_penalty_change_nothing(
        self,
        make_learner: Callable[..., Learner],
        make_policy: Callable[..., gemma.Gemma],
        config: Config,
        changed: Callable[..., Config],
        rollouts: Rollouts,
        learn: Learn,
    ) -> None:
        learner = make_learner(changed(config, beta=0.0, weight_decay=0.1), make_policy(filled=1))
        before = jax.device_get(learner.state())
        for rewards in (np.full((2, GROUP), 0.3), np.full((2, GROUP), np.nan)):
            prompts, completions, _ = rollouts.first(2).given
            assert learn(learner, prompts, completions, rewards) == []
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(learner.state()))


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
        policy = learner.policy

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
        learner.update(learner.pack([prompt], completions), completions.lengths, advantages)
        assert ending() > before + 0.01

    @pytest.mark.parametrize("advantage", [np.nan, 1e25])
    def test_a_gradient_without_a_finite_norm_changes_nothing(
        self,
        advantage: float,
        make_learner: Callable[..., Learner],
        make_policy: Callable[..., gemma.Gemma],
        config: Config,
        changed: Callable[..., Config],
        rollouts: Rollouts,
        learn: Learn,
    ) -> None:
        learner = make_learner(changed(config, weight_decay=0.1), make_policy(filled=1, scale=0.05))
        chosen = rollouts.first(2)
        learn(learner, *chosen.given)
        before, made = jax.device_get(learner.state()), learner.updater.made
        advantages = group_advantages(chosen.rewards, scale_by_std=True)
        advantages.values[0, 1] = advantage
        packed = learner.pack(chosen.prompts, chosen.completions)
        (metrics,) = learner.update(packed, chosen.completions.lengths, advantages)
        assert not np.isfinite(metrics["grad_norm"])
        assert learner.updater.made == made
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
        (metrics,) = learn(learner, *chosen.given)
        assert np.isfinite(metrics["grad_norm"])
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
        policy = learner.policy
        before = by_path(nnx.state(policy, nnx.LoRAParam))
        result = learner.step(
            5, examples[:2], lambda examples, texts, _: {"total": np.arange(len(texts)) ** 2.0}
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


def test_stock_sampling_breaks_under_remat(base: gemma.Gemma, tokenizer: Tokenizer) -> None:
    """Tunix's remat cannot be traced in its sampler, so that a model of its layers has none."""
    config = dataclasses.replace(base.config, remat_config=gemma.RematConfig.DECODER)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: gemma.Gemma(config, rngs=nnx.Rngs(0))))
    sampler = Sampler(
        nnx.merge(graphdef, nnx.state(base)),
        tokenizer,
        CacheConfig(cache_size=48, num_layers=2, num_kv_heads=4, head_dim=8),
    )
    with pytest.raises(Exception, match="trace level"):
        sampler(["<bos>7 apples"], 4, max_prompt_length=28)


@pytest.mark.slow
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
    learn: Learn,
) -> None:
    config = changed(config, num_iterations=2, micro_batch_tokens=192)
    one = make_learner(config, make_policy(filled=5, scale=0.05))
    policy = add_lora(wide_base, config.model, wide_mesh, 0)
    fill_adapters(policy, 5, 0.05)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(nnx.state(policy, nnx.LoRAParam))]
    wide = Learner(changed(config, mesh_shape=(2, 4)), policy, wide_base, tokenizer, wide_mesh)
    chosen = rollouts.first(2)
    for _ in range(2):
        expected = learn(one, *chosen.given)
        actual = learn(wide, *chosen.given)
        assert actual == [pytest.approx(each, rel=1e-4, abs=1e-6) for each in expected]
        # Of each batch, although the policy has moved.
        assert actual[0]["max_ratio"] == expected[0]["max_ratio"] == 1 < actual[1]["max_ratio"]
    for name, value in adapters(one.policy).items():
        np.testing.assert_allclose(adapters(wide.policy)[name], value, atol=1e-4)
    flat = nnx.to_flat_state(nnx.state(policy, nnx.LoRAParam))
    moments = dict(nnx.to_flat_state(nnx.state(wide.optimizer)))
    for (path, variable), before in zip(flat, shardings, strict=True):
        value = variable.get_value()
        assert value.sharding.is_equivalent_to(before, value.ndim), path
        held = [v.get_value() for p, v in moments.items() if p[-len(path) :] == path]
        assert len(held) == 2
        for moment in held:
            assert moment.sharding.is_equivalent_to(before, value.ndim), path
