"""The border to Tunix: what its engines are given, and what is made of what they give."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from tests.fixtures.models import EMBEDDED
from tunix.models.gemma import model as gemma

from gemma2_grpo.config import Config
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.sampling.tunix import _aligned, _settings
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training.learner import Learner


def by_length(_: Sequence[Example], texts: Sequence[str], __: Any) -> Mapping[str, np.ndarray]:
    return {"total": np.array([len(text) % 7 for text in texts], np.float64)}


def test_tunix_own_engine_samples_from_the_policy_as_it_is(
    make_learner: Callable[..., Learner],
    config: Config,
    examples: list[Example],
    adapters: Callable[[gemma.Gemma], dict[str, np.ndarray]],
) -> None:
    rollout = dataclasses.replace(config.rollout, engine="vanilla")
    learner = make_learner(dataclasses.replace(config, rollout=rollout))
    result = learner.step(0, examples[:2], by_length)
    assert len(result.updates) == 1
    assert np.isfinite(result.updates[0]["grad_norm"])
    done = result.completions
    assert done.logps is not None
    for row, logps, truncated in zip(done.tokens, done.logps, done.is_truncated, strict=True):
        # Its sampler takes the stop token off; here it is back, except where there was none. How
        # likely it was is not known.
        assert truncated == (len(row) == 12 and row[-1] not in learner.tokenizer.stop_ids)
        assert np.isnan(logps).tolist() == [False] * (len(row) - 1) + [not truncated]
    # Its attention is wrong where the sliding window binds, as it does here.
    assert result.updates[0]["sampling_kl"] > 0.01
    sampler = cast(Any, learner.sample).cluster.rollout.model()
    trained = adapters(learner.policy)
    for name, value in adapters(sampler).items():
        np.testing.assert_array_equal(value, trained[name])
    prompts = [render_prompt(example.question) for example in examples[:2]]
    greedy = learner.sample(prompts, 1, jax.random.key(0), greedy=True)
    again = learner.sample(prompts, 1, jax.random.key(1), greedy=True)
    assert greedy.texts == again.texts


def test_log_probabilities_have_an_entry_for_each_token() -> None:
    tokens = [np.arange(3), np.arange(2)]
    rows = _aligned([np.array([-1.0, -2.0]), np.array([-3.0, -4.0, -5.0])], tokens)
    assert rows is not None
    np.testing.assert_array_equal(rows[0], np.float32([-1, -2, np.nan]))
    np.testing.assert_array_equal(rows[1], np.float32([-3, -4]))
    assert _aligned(None, tokens) is None, "SGLang-JAX gives none"


def test_settings_of_engines_whose_packages_are_not_here(
    config: Config, changed: Callable[..., Config], tokenizer: Tokenizer
) -> None:
    config = changed(config, model=str(EMBEDDED), top_p=0.9, top_k=5)
    vllm, sglang = (
        _settings(changed(config, engine=engine), tokenizer) for engine in ("vllm", "sglang_jax")
    )
    for settings in (vllm, sglang):
        assert (settings.temperature, settings.top_p, settings.top_k) == (0.7, 0.9, 5)
        assert (settings.max_prompt_length, settings.max_tokens_to_generate) == (28, 12)
        assert settings.kv_cache_size == 40
        assert settings.eos_tokens == list(tokenizer.stop_ids)
    assert vllm.rollout_vllm_model_version == str(EMBEDDED)
    assert vllm.rollout_vllm_lora_config == {"rank": 4, "alpha": 8.0}
    assert not vllm.rollout_vllm_init_with_random_weights
    assert sglang.rollout_sglang_jax_model_version == str(EMBEDDED)
    assert sglang.rollout_sglang_jax_max_lora_rank == 4
    assert sglang.rollout_sglang_jax_lora_scaling == 2.0
    assert sglang.rollout_sglang_jax_enable_static_lora
