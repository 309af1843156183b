"""The rollout engine: what Tunix asks of it, and what Tunix's own engine gets wrong."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tunix.models.gemma import model as gemma
from tunix.rl.rollout.base_rollout import CacheConfig, RolloutOutput
from tunix.rl.rollout.vanilla_rollout import VanillaRollout

from gemma2_grpo.config import Config
from gemma2_grpo.model.gemma import split_model
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.sampling.rollout import GroupRollout, GroupRolloutConfig
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training.learner import Stream, fold_key

WIDTH, LIMIT = 28, 12


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
def texts(examples: list[Example]) -> list[str]:
    """Four prompts of 20 to 28 tokens."""
    return [render_prompt(example.question) for example in examples[:4]]


def rollout_config(**changes: Any) -> GroupRolloutConfig:
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
    return GroupRolloutConfig(**values | changes)


# Tunix's engine is greedy where top_p is None, whatever the temperature; no token stops it.
STOCK_GREEDY = rollout_config(top_p=None, eos_tokens=[-1])
GREEDY = rollout_config(temperature=0.0, eos_tokens=[-1])


def make_vanilla(model: gemma.Gemma, tokenizer: Tokenizer) -> VanillaRollout:
    architecture = model.config
    size = CacheConfig(
        cache_size=48,
        num_layers=architecture.num_layers,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
    )
    return VanillaRollout(model, tokenizer, size)


@pytest.fixture(scope="module")
def vanilla(no_window: gemma.Gemma, tokenizer: Tokenizer) -> VanillaRollout:
    return make_vanilla(no_window, tokenizer)


@pytest.fixture(scope="module")
def engine(no_window: gemma.Gemma, tokenizer: Tokenizer, mesh: Mesh) -> GroupRollout:
    return GroupRollout(no_window, tokenizer, mesh, rollout_config())


def ids(output: RolloutOutput) -> list[list[int]]:
    return [np.asarray(row).tolist() for row in output.tokens]


class TestStockEngine:
    """Tunix's engine runs on our model; where it is right, ours agrees."""

    def test_agrees_where_the_window_does_not_bind(
        self, engine: GroupRollout, vanilla: VanillaRollout, texts: list[str]
    ) -> None:
        ours = ids(engine.generate(texts, GREEDY))
        assert ours == ids(vanilla.generate(texts, STOCK_GREEDY))
        assert {len(row) for row in ours} == {LIMIT} and len({*map(tuple, ours)}) == 4

    def test_is_wrong_where_the_window_binds(
        self, base: gemma.Gemma, tokenizer: Tokenizer, texts: list[str], mesh: Mesh
    ) -> None:
        """It pads on the left, and its window mask compares positions with slots."""
        stock = ids(make_vanilla(base, tokenizer).generate(texts, STOCK_GREEDY))
        ours = ids(GroupRollout(base, tokenizer, mesh, GREEDY).generate(texts, GREEDY))
        assert sum(a != b for a, b in zip(stock, ours, strict=True)) >= 3

    def test_repeats_itself_where_our_calls_differ(
        self, engine: GroupRollout, vanilla: VanillaRollout, texts: list[str]
    ) -> None:
        """It uses PRNGKey(0), or the configured seed, at every call."""
        for seed in (None, 5):
            one, other = (ids(vanilla.generate(texts, rollout_config(seed=seed))) for _ in "ab")
            assert one == other
        keys = [fold_key(0, Stream.TRAIN, step) for step in (0, 1, 0)]
        one, other, again = (ids(engine.generate(texts, rollout_config(seed=key))) for key in keys)
        assert one == again
        assert all(a != b for a, b in zip(one, other, strict=True))

    def test_top_p_of_none_still_samples(
        self, engine: GroupRollout, vanilla: VanillaRollout, texts: list[str]
    ) -> None:
        """It takes `top_p=None` for greedy, whatever the temperature."""
        one, other = (
            ids(vanilla.generate(texts, rollout_config(top_p=None, seed=seed))) for seed in (0, 1)
        )
        assert one == other
        configs = [rollout_config(top_p=None, seed=jax.random.key(seed)) for seed in (0, 1)]
        one, other = (ids(engine.generate(texts, config)) for config in configs)
        assert all(a != b for a, b in zip(one, other, strict=True))

    def test_either_stop_token_ends_a_completion_and_is_kept(
        self, engine: GroupRollout, vanilla: VanillaRollout, tokenizer: Tokenizer, texts: list[str]
    ) -> None:
        """It strips the stop token, so that ending is never trained on."""
        output = engine.generate(texts, GREEDY)
        whole = ids(output)
        pairs = [(whole[0], whole[2]), (whole[2], whole[0])]
        stops = [max((t for t in row if t not in other), key=row.index) for row, other in pairs]
        expected = [
            row[: 1 + min((row.index(s) for s in stops if s in row), default=LIMIT)]
            for row in whole
        ]
        assert [expected[0][-1], expected[2][-1]] == stops
        assert max(len(expected[0]), len(expected[2])) > 1
        assert min(map(len, expected)) < LIMIT

        ending = engine.generate(texts, rollout_config(temperature=0.0, eos_tokens=stops))
        assert ids(ending) == expected
        for row, logps in enumerate(ending.logprobs):
            assert logps.dtype == np.float32
            np.testing.assert_allclose(logps, output.logprobs[row][: len(expected[row])], atol=1e-5)
        assert ending.text == [tokenizer.decode(np.array(row)) for row in expected]
        stock = vanilla.generate(texts, rollout_config(top_p=None, eos_tokens=stops))
        assert ids(stock) == [row[:-1] if row[-1] in stops else row for row in expected]


class TestGroups:
    def test_equal_neighbours_share_a_prompt(
        self, engine: GroupRollout, tokenizer: Tokenizer, texts: list[str]
    ) -> None:
        """What a row draws depends on its number and its prompt alone."""
        config = rollout_config(seed=jax.random.key(4))
        a, b = texts[:2]
        pairs = engine.generate([a, a, b, b], config)
        odd = engine.generate([a, b, b, b], config)
        assert len({*map(tuple, ids(pairs))}) == 4
        assert [ids(pairs)[row] for row in (0, 2, 3)] == [ids(odd)[row] for row in (0, 2, 3)]
        assert ids(pairs)[1] != ids(odd)[1]
        for output, given in ((pairs, [a, a, b, b]), (odd, [a, b, b, b])):
            assert output.left_padded_prompt_tokens.shape == (4, WIDTH)
            for row, text in zip(output.left_padded_prompt_tokens, given, strict=True):
                tokens = tokenizer.encode(text)
                assert row.tolist() == [0] * (WIDTH - len(tokens)) + tokens

    def test_limits_are_those_of_each_completion(
        self, engine: GroupRollout, texts: list[str]
    ) -> None:
        prompts = [texts[0], texts[0], texts[1], texts[1]]
        limits = [12, 0, 5, 1]
        whole = engine.generate(prompts, GREEDY)
        limited = engine.generate(prompts, dataclasses.replace(GREEDY, limits=limits))
        assert ids(limited) == [row[:n] for row, n in zip(ids(whole), limits, strict=True)]
        assert [len(row) for row in limited.logprobs] == limits
        assert limited.text[1] == ""

    def test_a_prompt_is_never_cut(self, engine: GroupRollout) -> None:
        """Tunix's engine widens the batch to the next power of two, in silence."""
        text = "<bos>" + "apples " * 40
        with pytest.raises(ValueError, match=r"^prompt of \d+ tokens exceeds max_prompt_tokens"):
            engine.generate([text], rollout_config())


class TestMergedAdapters:
    def test_they_give_what_adapters_beside_the_weights_give(
        self,
        make_policy: Callable[..., gemma.Gemma],
        fill_adapters: Callable[..., None],
        base: gemma.Gemma,
        tokenizer: Tokenizer,
        config: Config,
        texts: list[str],
        mesh: Mesh,
    ) -> None:
        """And follow the policy from call to call, without a change of the weights they share."""
        policy = make_policy(filled=1, scale=0.1)
        scale = config.model.lora_alpha / config.model.lora_rank
        merged = GroupRollout(policy, tokenizer, mesh, GREEDY, merged_scale=scale)
        beside = GroupRollout(policy, tokenizer, mesh, GREEDY)
        seen = []
        for seed in (1, 2):
            fill_adapters(policy, seed, 0.1)
            one, other = (engine.generate(texts, GREEDY) for engine in (merged, beside))
            assert ids(one) == ids(other)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
            seen.append(ids(one))
        assert seen[0] != seen[1]
        weights, expected = split_model(policy)[1].base, split_model(base)[1].base
        jax.tree.map(np.testing.assert_array_equal, weights, expected)
