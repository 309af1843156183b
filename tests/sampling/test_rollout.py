"""Sampling: where Tunix's own engine is right, ours agrees; and what Tunix's gets wrong."""

import copy
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
from tunix.rl.rollout.base_rollout import RolloutConfig as StockConfig
from tunix.rl.rollout.vanilla_rollout import VanillaRollout

from gemma2_grpo.config import RolloutConfig
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.model.weights import split_model
from gemma2_grpo.sampling.rollout import Completions, Policy, sample
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


SETTINGS = RolloutConfig(
    max_prompt_tokens=WIDTH, max_completion_tokens=LIMIT, temperature=0.7, top_p=1.0
)
KEY = jax.random.key(0)


def stock_config(**changes: Any) -> StockConfig:
    values: dict[str, Any] = {
        "max_tokens_to_generate": LIMIT,
        "max_prompt_length": WIDTH,
        "kv_cache_size": 48,
        "temperature": 0.7,
        "top_p": 1.0,
        "eos_tokens": [107, 1],
        "return_logprobs": True,
    }
    return StockConfig(**values | changes)


# Tunix's engine is greedy where top_p is None, whatever the temperature; no token stops it.
STOCK_GREEDY = stock_config(top_p=None, eos_tokens=[-1])


AsTunix = Callable[[gemma.Gemma], gemma.Gemma]


def make_vanilla(model: gemma.Gemma, tokenizer: Tokenizer, as_tunix: AsTunix) -> VanillaRollout:
    architecture = model.config
    size = CacheConfig(
        cache_size=48,
        num_layers=architecture.num_layers,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
    )
    return VanillaRollout(as_tunix(model), tokenizer, size)


@pytest.fixture(scope="module")
def vanilla(no_window: gemma.Gemma, tokenizer: Tokenizer, as_tunix: AsTunix) -> VanillaRollout:
    return make_vanilla(no_window, tokenizer, as_tunix)


@pytest.fixture(scope="module")
def policy(no_window: gemma.Gemma, tokenizer: Tokenizer, mesh: Mesh) -> Policy:
    return Policy(no_window, tokenizer, mesh)


def ids(output: RolloutOutput | Completions) -> list[list[int]]:
    return [np.asarray(row).tolist() for row in output.tokens]


def greedy(policy: Policy, texts: list[str], group: int = 1, **options: Any) -> Completions:
    """Greedy completions that no token stops, or those that are given."""
    stops = options.pop("stops", (-1,))
    policy = copy.copy(policy)
    policy.tokenizer = dataclasses.replace(policy.tokenizer, stop_ids=stops)
    return sample(policy, texts, group, KEY, SETTINGS, greedy=True, **options)


class TestStockEngine:
    """Tunix's engine runs on our model; where it is right, ours agrees."""

    def test_agrees_where_the_window_does_not_bind(
        self, policy: Policy, vanilla: VanillaRollout, texts: list[str]
    ) -> None:
        done, stock = greedy(policy, texts), vanilla.generate(texts, STOCK_GREEDY)
        ours = ids(done)
        assert ours == ids(stock)
        assert done.logps is not None and stock.logprobs is not None
        np.testing.assert_allclose(done.logps, stock.logprobs, atol=1e-4)
        assert {len(row) for row in ours} == {LIMIT} and len({*map(tuple, ours)}) == 4

    def test_is_wrong_where_the_window_binds(
        self,
        base: gemma.Gemma,
        tokenizer: Tokenizer,
        texts: list[str],
        mesh: Mesh,
        as_tunix: AsTunix,
    ) -> None:
        """It pads on the left, and its window mask compares positions with slots."""
        stock = ids(make_vanilla(base, tokenizer, as_tunix).generate(texts, STOCK_GREEDY))
        ours = ids(greedy(Policy(base, tokenizer, mesh), texts))
        assert sum(a != b for a, b in zip(stock, ours, strict=True)) >= 3

    def test_repeats_itself_where_our_calls_differ(
        self, policy: Policy, vanilla: VanillaRollout, texts: list[str]
    ) -> None:
        """It uses PRNGKey(0), or the configured seed, at every call."""
        for seed in (None, 5):
            one, other = (ids(vanilla.generate(texts, stock_config(seed=seed))) for _ in "ab")
            assert one == other
        keys = [fold_key(0, Stream.TRAIN, step) for step in (0, 1, 0)]
        one, other, again = (ids(sample(policy, texts, 1, key, SETTINGS)) for key in keys)
        assert one == again
        assert all(a != b for a, b in zip(one, other, strict=True))

    def test_top_p_of_none_is_greedy(self, vanilla: VanillaRollout, texts: list[str]) -> None:
        """It takes `top_p=None` for greedy, whatever the temperature."""
        one, other = (
            ids(vanilla.generate(texts, stock_config(top_p=None, seed=seed))) for seed in (0, 1)
        )
        assert one == other

    def test_either_stop_token_ends_a_completion_and_is_kept(
        self, policy: Policy, vanilla: VanillaRollout, tokenizer: Tokenizer, texts: list[str]
    ) -> None:
        """It strips the stop token, so that ending is never trained on."""
        output = greedy(policy, texts)
        assert output.logps is not None
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

        ending = greedy(policy, texts, stops=tuple(stops))
        assert ids(ending) == expected
        assert ending.logps is not None
        for row, logps in enumerate(ending.logps):
            assert logps.dtype == np.float32
            np.testing.assert_allclose(logps, output.logps[row][: len(expected[row])], atol=1e-5)
        stopping = dataclasses.replace(tokenizer, stop_ids=tuple(stops))
        assert ending.texts == [stopping.decode(np.array(row)) for row in expected]
        stock = vanilla.generate(texts, stock_config(top_p=None, eos_tokens=stops))
        assert ids(stock) == [row[:-1] if row[-1] in stops else row for row in expected]


class TestGroups:
    def test_what_a_row_draws_depends_on_its_number_and_its_prompt_alone(
        self, policy: Policy, texts: list[str]
    ) -> None:
        a, b = texts[:2]
        key = jax.random.key(4)
        pairs = ids(sample(policy, [a, b], 2, key, SETTINGS))
        alone = ids(sample(policy, [a, b, b, b], 1, key, SETTINGS))
        assert len({*map(tuple, pairs)}) == 4
        assert [pairs[row] for row in (0, 2, 3)] == [alone[row] for row in (0, 2, 3)]
        assert pairs[1] != alone[1]
        assert ids(sample(policy, [b], 2, key, SETTINGS, first_row=2)) == pairs[2:]

    def test_limits_are_those_of_each_completion(self, policy: Policy, texts: list[str]) -> None:
        limits = [12, 0, 5, 1]
        whole = greedy(policy, texts[:2], 2)
        limited = greedy(policy, texts[:2], 2, limits=limits)
        assert ids(limited) == [row[:n] for row, n in zip(ids(whole), limits, strict=True)]
        assert limited.logps is not None
        assert [len(row) for row in limited.logps] == limits
        assert limited.texts[1] == ""

    def test_a_prompt_is_never_cut(self, policy: Policy) -> None:
        """Tunix's engine widens the batch to the next power of two, in silence."""
        text = "<bos>" + "apples " * 40
        with pytest.raises(ValueError, match=r"^prompt of \d+ tokens exceeds max_prompt_tokens"):
            sample(policy, [text], 1, KEY, SETTINGS)


class TestMergedAdapters:
    def test_they_give_what_adapters_beside_the_weights_give(
        self,
        make_policy: Callable[..., gemma.Gemma],
        fill_adapters: Callable[..., None],
        base: gemma.Gemma,
        tokenizer: Tokenizer,
        texts: list[str],
        mesh: Mesh,
    ) -> None:
        """And follow the policy from call to call, without a change of the weights they share."""
        model = make_policy(filled=1, scale=0.1)
        policies = [Policy(model, tokenizer, mesh, is_merged=merged) for merged in (True, False)]
        seen = []
        for seed in (1, 2):
            fill_adapters(model, seed, 0.1)
            one, other = (greedy(policy, texts) for policy in policies)
            assert ids(one) == ids(other)
            assert one.logps is not None and other.logps is not None
            np.testing.assert_allclose(one.logps, other.logps, atol=1e-4)
            seen.append(ids(one))
        assert seen[0] != seen[1]
        weights, expected = split_model(model)[1].base, split_model(base)[1].base
        jax.tree.map(np.testing.assert_array_equal, weights, expected)
