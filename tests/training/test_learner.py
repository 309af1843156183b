import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from tunix.models.gemma import model as gemma

from gemma2_grpo.config import Config
from gemma2_grpo.model.lora import add_lora
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.runtime.checkpoint import restore_checkpoint, save_checkpoint
from gemma2_grpo.sampling.rollout import Policy, sample
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training.learner import Learner, Stream, fold_key


def by_length(_: Sequence[Example], texts: Sequence[str], __: Any) -> Mapping[str, np.ndarray]:
    return {"total": np.array([len(text) % 7 for text in texts], np.float64)}


def test_keys_are_a_function_of_seed_stream_and_step() -> None:
    def data(*arguments: int, stream: Stream = Stream.TRAIN) -> bytes:
        seed, *counters = arguments
        return np.asarray(jax.random.key_data(fold_key(seed, stream, *counters))).tobytes()

    assert data(0, 1) == data(0, 1)
    different = {data(0, 1), data(0, 2), data(1, 1), data(0, 1, stream=Stream.EVAL), data(0, 1, 0)}
    assert len(different) == 5


@pytest.fixture(scope="module")
def stopping(
    make_policy: Callable[..., gemma.Gemma],
    base: gemma.Gemma,
    tokenizer: Tokenizer,
    config: Config,
    mesh: Mesh,
) -> Learner:
    """A learner with so many stop tokens that some completions end; it is not trained."""
    stopping = dataclasses.replace(tokenizer, stop_ids=(107, *range(200, 260)))
    return Learner(config, make_policy(filled=3), base, stopping, mesh)


def test_truncated_completions_are_flagged(stopping: Learner, examples: list[Example]) -> None:
    prompts = [render_prompt(example.question) for example in examples[:4]]
    completions = stopping.sample(prompts, 4, jax.random.key(0))
    for row, truncated in zip(completions.tokens, completions.is_truncated, strict=True):
        assert not set(row[:-1].tolist()) & set(stopping.tokenizer.stop_ids)
        assert truncated == (row[-1] not in stopping.tokenizer.stop_ids)
        assert not truncated or len(row) == 12
    assert 2 < completions.is_truncated.sum() < 14
    assert completions.lengths.tolist() == [len(row) for row in completions.tokens]

    # One key is one outcome, and limits cut it off.
    limits = [12, 3, 0, 1] * 4
    again = stopping.sample(prompts, 4, jax.random.key(0), limits=limits)
    for row, whole, limit, truncated in zip(
        again.tokens, completions.tokens, limits, again.is_truncated, strict=True
    ):
        np.testing.assert_array_equal(row, whole[:limit])
        assert truncated == (not len(row) or row[-1] not in stopping.tokenizer.stop_ids)
    assert stopping.sample(prompts, 4, jax.random.key(0)).texts == completions.texts


def test_a_step_learns_from_what_it_sampled(
    make_learner: Callable[..., Learner],
    config: Config,
    examples: list[Example],
    learn: Callable[..., list[dict[str, float]]],
    adapters: Callable[[gemma.Gemma], dict[str, np.ndarray]],
) -> None:
    """The update of a step is that of its completions and scores, in the order they are told."""
    batch = examples[:2]
    learner, other = make_learner(config), make_learner(config)
    result = learner.step(3, batch, by_length)
    assert result.examples == [batch[0]] * 4 + [batch[1]] * 4
    prompts = [render_prompt(example.question) for example in batch]
    key = fold_key(config.run.seed, Stream.TRAIN, 3)
    assert other.sample(prompts, 4, key).texts == result.completions.texts
    metrics = learn(other, prompts, result.completions, result.scores["total"].reshape(2, 4))
    assert metrics == [pytest.approx(update, rel=1e-6) for update in result.updates]
    for name, value in adapters(learner.policy).items():
        np.testing.assert_array_equal(adapters(other.policy)[name], value)


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_sampling_kl_tells_whether_the_rollout_is_of_the_policy(
    make_learner: Callable[..., Learner],
    make_policy: Callable[..., gemma.Gemma],
    changed: Callable[..., Config],
    config: Config,
    examples: list[Example],
    tokenizer: Tokenizer,
    mesh: Mesh,
    num_iterations: int,
) -> None:
    config = changed(config, num_iterations=num_iterations, learning_rate=1e-2)
    learner = make_learner(config, make_policy(filled=3))
    own = learner.step(0, examples[:2], by_length).updates
    # Before any update, so the same in all iterations, whose ratios are no longer 1.
    assert [0 <= update["sampling_kl"] < 1e-9 for update in own] == [True] * num_iterations
    assert (own[-1]["max_ratio"] > 1.01) == (num_iterations > 1)

    # An engine that has fallen behind samples from the weights of another policy.
    stale = Policy(make_policy(filled=4), tokenizer, mesh)
    learner.sample = partial(sample, stale, settings=config.rollout)
    assert learner.step(1, examples[:2], by_length).updates[-1]["sampling_kl"] > 0.01


def test_what_truncation_removes_is_part_of_sampling_kl(
    make_learner: Callable[..., Learner],
    make_policy: Callable[..., gemma.Gemma],
    changed: Callable[..., Config],
    config: Config,
    examples: list[Example],
) -> None:
    learner = make_learner(changed(config, top_k=5), make_policy(filled=3))
    assert learner.step(0, examples[:2], by_length).updates[0]["sampling_kl"] > 0.01


@pytest.mark.slow
def test_a_run_resumes_on_several_devices(
    wide_base: gemma.Gemma,
    wide_mesh: Mesh,
    tokenizer: Tokenizer,
    config: Config,
    examples: list[Example],
    tmp_path: Path,
) -> None:
    """The optimizer's counters begin on one device; restored there, they fit no update."""

    def learner() -> Learner:
        policy = add_lora(wide_base, config.model, wide_mesh, 0)
        return Learner(config, policy, wide_base, tokenizer, wide_mesh)

    batch = examples[: config.rollout.prompts_per_step]
    straight = learner()
    straight.step(0, batch, by_length)
    save_checkpoint(tmp_path, 1, straight.state(), keep=1)
    straight.step(1, batch, by_length)

    resumed = learner()
    leaves = jax.tree.leaves(resumed.state())
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in leaves)
    restored = restore_checkpoint(tmp_path, resumed.state())
    assert restored is not None
    assert restored[0] == 1
    resumed.set_state(restored[1])
    resumed.step(1, batch, by_length)
    for one, other in zip(
        jax.tree.leaves(straight.state()), jax.tree.leaves(resumed.state()), strict=True
    ):
        np.testing.assert_array_equal(one, other)
