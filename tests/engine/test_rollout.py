"""Completions are drawn from the policy as the update sees it, each from a key of its own."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.gemma import model as gemma
from tunix.rl.rollout.base_rollout import CacheConfig as RolloutCacheConfig
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.rl.rollout.vanilla_rollout import VanillaRollout

from gemma2_grpo.config import Config
from gemma2_grpo.engine.forward import Network, split_model
from gemma2_grpo.engine.learner import Learner, Stream, fold_key
from gemma2_grpo.engine.lora import add_lora
from gemma2_grpo.engine.model import load_weights
from gemma2_grpo.engine.rollout import (
    GroupRollout,
    Sampled,
    Sampling,
    batch_sharding,
    completion_lengths,
    draw_tokens,
    pad_left,
    sample,
    truncate,
)
from gemma2_grpo.engine.tokenizer import Tokenizer
from gemma2_grpo.task.data import Example
from gemma2_grpo.task.prompts import render_prompt

WIDTH, LIMIT = 28, 12
GREEDY = Sampling(
    temperature=0.0, top_p=1.0, top_k=0, max_tokens=LIMIT, group=1, stop_ids=(-1,), pad_id=0
)
# So many stop tokens that some completions end.
WARM = dataclasses.replace(GREEDY, temperature=0.7, stop_ids=tuple(range(3, 90)))
PAIRS = dataclasses.replace(WARM, group=2)


@pytest.fixture(scope="module")
def policy(make_policy: Callable[..., gemma.Gemma]) -> gemma.Gemma:
    return make_policy(filled=3)


@pytest.fixture(scope="module")
def no_window(
    goldens: ModuleType,
    tiny_values: dict[str, Any],
    mesh: Mesh,
    tmp_path_factory: pytest.TempPathFactory,
) -> gemma.Gemma:
    """The tiny model with a window that no sequence here is as long as."""
    directory = tmp_path_factory.mktemp("models") / "no-window"
    goldens.write_model(directory, tiny_values | {"sliding_window": 64}, seed=7)
    return load_weights(directory, "float32", mesh)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Prompts shorter and longer than the window of 10."""
    random = np.random.default_rng(11)
    return [random.integers(3, 496, length).tolist() for length in (26, 5, 14, 28)]


@cache
def network_of(model: gemma.Gemma) -> Network:
    """Programs are compiled per network."""
    return split_model(model)[0]


def draw(
    model: gemma.Gemma,
    prompts: list[list[int]],
    sampling: Sampling,
    mesh: Mesh,
    key: int = 0,
) -> Sampled:
    _, weights = split_model(model)
    sharding = batch_sharding(mesh, len(prompts))
    lengths = np.array([len(row) for row in prompts], np.int32)
    sampled = sample(
        network_of(model),
        weights,
        jax.device_put(pad_left(prompts, WIDTH, sampling.pad_id), sharding),
        jax.device_put(lengths, sharding),
        jax.random.key(key),
        sampling=sampling,
        mesh=mesh,
    )
    return jax.device_get(sampled)


def row_logits(
    full_logits: Callable[..., np.ndarray],
    model: gemma.Gemma,
    prompts: list[list[int]],
    completions: np.ndarray,
) -> np.ndarray:
    """Logits [R, T, V] that predict each completion token, from one whole right-padded pass."""
    tokens = np.zeros((len(prompts), WIDTH + LIMIT), np.int32)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens[i, : len(prompt) + len(completion)] = [*prompt, *completion]
    logits = full_logits(model, tokens)
    width = completions.shape[1]
    return np.stack(
        [logits[i, len(p) - 1 : len(p) - 1 + width] for i, p in enumerate(prompts)]
    ).astype(np.float64)


def plain_greedy(
    full_logits: Callable[..., np.ndarray], model: gemma.Gemma, prompts: list[list[int]]
) -> np.ndarray:
    """Greedy completions by a whole pass per token, without a cache."""
    completions = np.zeros((len(prompts), 0), np.int32)
    for _ in range(LIMIT):
        blank = np.concatenate([completions, np.zeros((len(prompts), 1), np.int32)], axis=1)
        last = row_logits(full_logits, model, prompts, blank)[:, -1]
        completions = np.concatenate([completions, last.argmax(-1)[:, None]], axis=1)
    return completions


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def truncated_logps(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The drawing distribution by hand, token by token from the likeliest: [V] -> [V]."""
    logps = log_softmax(logits / sampling.temperature)
    order = np.argsort(-logps)
    kept = order[: sampling.top_k] if sampling.top_k else order
    probabilities = np.exp(logps[kept]) / np.exp(logps[kept]).sum()
    chosen, total = [], 0.0
    for token, probability in zip(kept, probabilities, strict=True):
        if total >= sampling.top_p and sampling.top_p < 1:
            break
        chosen.append(token)
        total += probability
    result = np.full(len(logits), -np.inf)
    result[chosen] = log_softmax(logps[chosen])
    return result


class TestGreedy:
    def test_is_the_argmax_of_whole_passes(
        self,
        policy: gemma.Gemma,
        prompts: list[list[int]],
        mesh: Mesh,
        full_logits: Callable[..., np.ndarray],
    ) -> None:
        expected = plain_greedy(full_logits, policy, prompts)
        assert len({tuple(row) for row in expected}) == 4
        sampled = draw(policy, prompts, GREEDY, mesh)
        np.testing.assert_array_equal(sampled.tokens, expected)
        logits = row_logits(full_logits, policy, prompts, expected)
        logps = np.take_along_axis(log_softmax(logits), expected[..., None], -1)[..., 0]
        np.testing.assert_allclose(sampled.logps, logps, atol=1e-4)

    def test_does_not_depend_on_padding_or_company(
        self, policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh
    ) -> None:
        together = draw(policy, prompts, GREEDY, mesh)
        for i, prompt in enumerate(prompts[:3]):
            alone = draw(policy, [prompt], GREEDY, mesh)
            np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
            np.testing.assert_allclose(alone.logps[0], together.logps[i], atol=1e-5)

    def test_does_not_depend_on_the_mesh(
        self,
        policy: gemma.Gemma,
        prompts: list[list[int]],
        mesh: Mesh,
        wide_base: gemma.Gemma,
        wide_mesh: Mesh,
        config: Config,
        fill_adapters: Callable[..., None],
    ) -> None:
        wide = add_lora(wide_base, config.model, wide_mesh, 0)
        fill_adapters(wide, 3)
        expected = draw(policy, prompts, PAIRS, mesh)
        for count in (4, 3):  # Three prompts do not divide over fsdp.
            actual = draw(wide, prompts[:count], PAIRS, wide_mesh)
            np.testing.assert_array_equal(actual.tokens, expected.tokens[: 2 * count])
            np.testing.assert_allclose(actual.logps, expected.logps[: 2 * count], atol=1e-4)

    @pytest.mark.oracle
    def test_is_that_of_transformers(
        self, base: gemma.Gemma, tiny_directory: Path, prompts: list[list[int]], mesh: Mesh
    ) -> None:
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        model = transformers.Gemma2ForCausalLM.from_pretrained(
            tiny_directory, attn_implementation="eager"
        )
        tokens = draw(base, prompts, GREEDY, mesh).tokens
        for prompt, row in zip(prompts, tokens, strict=True):
            output = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                do_sample=False,
                max_new_tokens=LIMIT,
                eos_token_id=None,
            )
            assert output[0, len(prompt) :].tolist() == row.tolist()


class TestStockSampler:
    """Tunix's sampler pads on the left, and its window mask compares positions with slots."""

    @staticmethod
    def greedy(model: gemma.Gemma, tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
        architecture = model.config
        sampler = Sampler(
            model,
            tokenizer,
            CacheConfig(
                cache_size=48,
                num_layers=architecture.num_layers,
                num_kv_heads=architecture.num_kv_heads,
                head_dim=architecture.head_dim,
            ),
        )
        # No token stops it, so that it strips none.
        output = sampler(texts, LIMIT, max_prompt_length=WIDTH, eos_tokens=[-1])
        return [row.tolist() for row in output.tokens]

    @pytest.fixture
    def texts(self, examples: list[Example]) -> list[str]:
        return [render_prompt(example.question) for example in examples[:4]]

    def test_agrees_where_the_window_does_not_bind(
        self, no_window: gemma.Gemma, tokenizer: Tokenizer, texts: list[str], mesh: Mesh
    ) -> None:
        sampled = draw(no_window, [tokenizer.encode(text) for text in texts], GREEDY, mesh)
        assert self.greedy(no_window, tokenizer, texts) == sampled.tokens.tolist()

    def test_is_wrong_where_the_window_binds(
        self,
        base: gemma.Gemma,
        tokenizer: Tokenizer,
        texts: list[str],
        mesh: Mesh,
        full_logits: Callable[..., np.ndarray],
    ) -> None:
        ids = [tokenizer.encode(text) for text in texts]
        expected = plain_greedy(full_logits, base, ids).tolist()
        assert draw(base, ids, GREEDY, mesh).tokens.tolist() == expected
        stock = self.greedy(base, tokenizer, texts)
        assert sum(a != b for a, b in zip(stock, expected, strict=True)) >= 3


class TestLogps:
    @pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.6), (30, 0.8)], ids=str)
    def test_are_those_of_a_whole_pass(
        self,
        top_k: int,
        top_p: float,
        policy: gemma.Gemma,
        prompts: list[list[int]],
        mesh: Mesh,
        full_logits: Callable[..., np.ndarray],
    ) -> None:
        sampling = dataclasses.replace(PAIRS, top_k=top_k, top_p=top_p)
        sampled = draw(policy, prompts, sampling, mesh)
        ends = completion_lengths(sampled.tokens, sampling.stop_ids)
        assert (ends < LIMIT).sum() >= 3  # Some end with a stop token, which counts.
        repeated = [prompt for prompt in prompts for _ in range(2)]
        logits = row_logits(full_logits, policy, repeated, sampled.tokens)
        for row, end in enumerate(ends):
            for t in range(end):
                expected = truncated_logps(logits[row, t], sampling)[sampled.tokens[row, t]]
                assert sampled.logps[row, t] == pytest.approx(expected, abs=1e-4)


class TestKeys:
    def test_one_key_one_outcome(
        self, policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh
    ) -> None:
        one, same, other = (draw(policy, prompts, WARM, mesh, key) for key in (0, 0, 1))
        np.testing.assert_array_equal(one.tokens, same.tokens)
        np.testing.assert_array_equal(one.logps, same.logps)
        assert (one.tokens != other.tokens).any(axis=1).all()

    def test_rows_of_a_group_differ(
        self, policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh
    ) -> None:
        tokens = draw(policy, prompts, PAIRS, mesh).tokens
        assert len({tuple(row) for row in tokens}) == 8

    def test_a_row_does_not_depend_on_the_others(
        self, policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh
    ) -> None:
        first, second, third, fourth = prompts
        one = draw(policy, [first, second, third, fourth], WARM, mesh)
        other = draw(policy, [fourth, second, first, third], WARM, mesh)
        np.testing.assert_array_equal(one.tokens[1], other.tokens[1])
        np.testing.assert_allclose(one.logps[1], other.logps[1], atol=1e-5)
        # The same prompt in another row draws anew.
        assert one.tokens[0].tolist() != other.tokens[2].tolist()

    def test_a_group_draws_as_if_each_row_had_been_prefilled(
        self, policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh
    ) -> None:
        grouped = draw(policy, prompts, PAIRS, mesh)
        repeated = draw(policy, [p for p in prompts for _ in range(2)], WARM, mesh)
        np.testing.assert_array_equal(grouped.tokens, repeated.tokens)
        np.testing.assert_allclose(grouped.logps, repeated.logps, atol=1e-5)

    def test_streams_steps_and_seeds_are_apart(self) -> None:
        keys = [
            fold_key(seed, stream, step)
            for seed in (0, 1)
            for stream in Stream
            for step in range(3)
        ]
        assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 18
        np.testing.assert_array_equal(
            jax.random.key_data(fold_key(1, Stream.EVAL, 2)), jax.random.key_data(keys[9 + 3 + 2])
        )


def rollout_config(**changes: Any) -> RolloutConfig:
    values: dict[str, Any] = {
        "max_tokens_to_generate": LIMIT,
        "max_prompt_length": WIDTH,
        "kv_cache_size": 48,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": None,
        "eos_tokens": [107, 1],
        "return_logprobs": True,
    }
    return RolloutConfig(**values | changes)


@pytest.fixture(scope="module")
def vanilla(no_window: gemma.Gemma, tokenizer: Tokenizer) -> VanillaRollout:
    architecture = no_window.config
    size = RolloutCacheConfig(
        cache_size=48,
        num_layers=architecture.num_layers,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
    )
    return VanillaRollout(no_window, tokenizer, size)


@pytest.fixture(scope="module")
def engine(no_window: gemma.Gemma, tokenizer: Tokenizer, mesh: Mesh) -> GroupRollout:
    return GroupRollout(no_window, tokenizer, mesh, rollout_config())


class TestEngine:
    @pytest.fixture
    def texts(self, examples: list[Example]) -> list[str]:
        return [render_prompt(example.question) for example in examples[:2] for _ in range(2)]

    def test_calls_differ_where_the_stock_engine_repeats_itself(
        self, engine: GroupRollout, vanilla: VanillaRollout, texts: list[str]
    ) -> None:
        """Tunix's engine uses PRNGKey(0), or the configured seed, at every call."""
        for seed in (None, 5):
            stock = [vanilla.generate(texts, rollout_config(seed=seed)).tokens for _ in range(2)]
            for one, other in zip(*stock, strict=True):
                np.testing.assert_array_equal(one, other)
        keys = [fold_key(0, Stream.TRAIN, step) for step in (0, 1, 0)]
        ours = [engine.generate(texts, rollout_config(seed=key)).tokens for key in keys]
        for one, other, again in zip(*ours, strict=True):
            assert one.tolist() != other.tolist()
            np.testing.assert_array_equal(one, again)

    def test_either_stop_token_ends_a_completion_and_is_kept(
        self,
        engine: GroupRollout,
        vanilla: VanillaRollout,
        tokenizer: Tokenizer,
        texts: list[str],
        mesh: Mesh,
    ) -> None:
        """Tunix's engine strips the stop token, so that ending is never trained on."""
        ids = [tokenizer.encode(text) for text in texts]
        whole = draw(engine.model(), ids, GREEDY, mesh).tokens.tolist()
        # One token of each text that the other does not have.
        stops = [next(t for t in whole[0][3:] if t not in whole[2])]
        stops += [next(t for t in whole[2][5:] if t not in whole[0])]
        expected = [row[: 1 + min(row.index(s) for s in stops if s in row)] for row in whole]
        assert {row[-1] for row in expected} == set(stops)
        assert all(3 < len(row) < LIMIT for row in expected)

        ending = rollout_config(temperature=0.0, eos_tokens=stops)
        output = engine.generate(texts, ending)
        assert [row.tolist() for row in output.tokens] == expected
        assert [len(row) for row in output.logprobs] == [len(row) for row in expected]
        # Greedy, as the last test of this class shows.
        stock = vanilla.generate(texts, rollout_config(top_p=None, eos_tokens=stops))
        assert [row.tolist() for row in stock.tokens] == [row[:-1] for row in expected]

    @pytest.mark.parametrize("counts", [(2, 2), (1, 3)])
    def test_equal_neighbours_share_a_prefill(
        self,
        counts: tuple[int, ...],
        engine: GroupRollout,
        tokenizer: Tokenizer,
        examples: list[Example],
        mesh: Mesh,
    ) -> None:
        prompts = [render_prompt(example.question) for example in examples]
        texts = [prompts[i] for i, count in enumerate(counts) for _ in range(count)]
        output = engine.generate(texts, rollout_config(seed=jax.random.key(4)))
        ids = [tokenizer.encode(text) for text in texts]
        sampling = dataclasses.replace(WARM, stop_ids=(107, 1))
        expected = draw(engine.model(), ids, sampling, mesh, key=4)
        ends = completion_lengths(expected.tokens, sampling.stop_ids)
        for row, tokens in enumerate(output.tokens):
            np.testing.assert_array_equal(tokens, expected.tokens[row, : ends[row]])
            np.testing.assert_array_equal(
                output.left_padded_prompt_tokens[row], pad_left([ids[row]], WIDTH, 0)[0]
            )
            assert output.text[row] == tokenizer.decode(tokens)

    def test_a_prompt_is_never_cut(self, engine: GroupRollout) -> None:
        """Tunix's engine widens the batch to the next power of two, in silence."""
        text = "<bos>" + "apples " * 40
        with pytest.raises(ValueError, match=r"^prompt of \d+ tokens exceeds max_prompt_tokens"):
            engine.generate([text], rollout_config())

    def test_top_p_of_none_still_samples(
        self, engine: GroupRollout, vanilla: VanillaRollout, texts: list[str]
    ) -> None:
        """Tunix's engine takes `top_p=None` for greedy, whatever the temperature."""
        stock = [
            vanilla.generate(texts, rollout_config(top_p=None, seed=seed)).tokens for seed in (0, 1)
        ]
        for one, other in zip(*stock, strict=True):
            np.testing.assert_array_equal(one, other)
        ours = [
            engine.generate(texts, rollout_config(top_p=None, seed=jax.random.key(seed))).tokens
            for seed in (0, 1)
        ]
        assert all(a.tolist() != b.tolist() for a, b in zip(*ours, strict=True))


def test_truncated_completions_are_flagged(
    make_policy: Callable[..., gemma.Gemma],
    base: gemma.Gemma,
    tokenizer: Tokenizer,
    config: Config,
    examples: list[Example],
    mesh: Mesh,
) -> None:
    stopping = dataclasses.replace(tokenizer, stop_ids=(107, *range(200, 260)))
    learner = Learner(config, make_policy(filled=3), base, stopping, mesh)
    prompts = [render_prompt(example.question) for example in examples[:4]]
    completions = learner.generate(prompts, 4, jax.random.key(0))
    for row, truncated in zip(completions.tokens, completions.is_truncated, strict=True):
        assert not set(row[:-1].tolist()) & set(stopping.stop_ids)
        assert truncated == (row[-1] not in stopping.stop_ids)
        assert not truncated or len(row) == 12
    assert 2 < completions.is_truncated.sum() < 14
    assert completions.lengths.tolist() == [len(row) for row in completions.tokens]

    again = learner.generate(prompts, 4, jax.random.key(0))
    assert again.texts == completions.texts


class TestDrawing:
    LOGITS = np.log([0.3, 0.2, 0.15, 0.12, 0.1, 0.06, 0.04, 0.03]).astype(np.float32)

    @pytest.mark.parametrize(
        ("temperature", "top_k", "top_p"),
        [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.7), (1.5, 6, 0.8)],
        ids=str,
    )
    def test_frequencies_are_the_probabilities(
        self, temperature: float, top_k: int, top_p: float
    ) -> None:
        sampling = dataclasses.replace(GREEDY, temperature=temperature, top_k=top_k, top_p=top_p)
        count = 40_000
        keys = jax.random.split(jax.random.key(0), count)
        logits = jnp.broadcast_to(self.LOGITS, (count, 8))
        tokens, logps = jax.jit(partial(draw_tokens, sampling=sampling))(keys, logits)
        expected = np.exp(truncated_logps(self.LOGITS.astype(np.float64), sampling))
        np.testing.assert_allclose(np.exp(logps), expected[tokens], rtol=1e-5)
        observed = np.bincount(tokens, minlength=8)
        possible = expected > 0
        assert not observed[~possible].any()
        chi_square = (
            (observed - count * expected)[possible] ** 2 / (count * expected[possible])
        ).sum()
        # The 99.9th percentile for 1 to 7 degrees of freedom.
        limit = [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32][possible.sum() - 2]
        assert chi_square < limit

    def test_temperature_zero_takes_the_likeliest(self) -> None:
        logits = jnp.asarray([self.LOGITS, self.LOGITS[::-1]])
        tokens, logps = draw_tokens(jax.random.split(jax.random.key(0), 2), logits, GREEDY)
        assert tokens.tolist() == [0, 7]
        np.testing.assert_allclose(logps, np.log([0.3, 0.3]), rtol=1e-6)

    @pytest.mark.parametrize("top_k", [0, 1, 3, 50, 1000])
    @pytest.mark.parametrize("top_p", [1.0, 0.999, 0.5, 0.1, 1e-6])
    def test_truncation_by_hand(self, top_k: int, top_p: float) -> None:
        logits = 2 * np.random.default_rng(0).standard_normal((5, 50)).astype(np.float32)
        sampling = dataclasses.replace(WARM, temperature=1.0, top_k=top_k, top_p=top_p)
        kept = np.isfinite(truncate(jnp.asarray(logits), sampling))
        for row, actual in zip(logits, kept, strict=True):
            expected = truncated_logps(row.astype(np.float64), sampling)
            np.testing.assert_array_equal(actual, np.isfinite(expected))
            assert actual[row.argmax()]

    def test_top_p_keeps_no_more_than_it_must(self) -> None:
        logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.125, 0.125]]))
        for top_p, kept in [(0.4, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.8, 4)]:
            sampling = dataclasses.replace(GREEDY, top_p=top_p)
            assert np.isfinite(truncate(logits, sampling)).sum() == kept


def test_completion_lengths_count_the_first_stop_token() -> None:
    tokens = np.array([[5, 6, 7, 8], [5, 1, 7, 1], [9, 6, 7, 5], [3, 3, 3, 9]])
    assert completion_lengths(tokens, (1, 9)).tolist() == [4, 2, 1, 4]


def test_pad_left() -> None:
    assert pad_left([[5], [6, 7, 8]], 4, 0).tolist() == [[0, 0, 0, 5], [0, 6, 7, 8]]
