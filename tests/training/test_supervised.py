"""Supervised fine-tuning: the loss and its gradient are those of the solutions' tokens alone."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from tunix.models.gemma import model as gemma

from gemma2_grpo.commands.sft import supervised
from gemma2_grpo.config import Config
from gemma2_grpo.model.lora import add_lora
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.procedural import generate
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training.supervised import SupervisedLearner, solutions_of

STEPS = 2
PROMPTS = 6
Make = Callable[..., SupervisedLearner]


@pytest.fixture(scope="module")
def sft_config(config: Config, changed: Callable[..., Config]) -> Config:
    return changed(
        supervised(config),
        prompts_per_step=PROMPTS,
        max_prompt_tokens=64,
        max_completion_tokens=64,
        micro_batch_tokens=512,
        max_steps=STEPS,
    )


@pytest.fixture(scope="module")
def problems() -> list[Example]:
    """Problems of different lengths with worked solutions."""
    return [Example(p.question, p.answer, p.solution) for p in generate("train", 2 * PROMPTS, 5)]


@pytest.fixture(scope="module")
def make(
    base: gemma.Gemma, mesh: Mesh, tokenizer: Tokenizer, make_policy: Callable[..., gemma.Gemma]
) -> Make:
    def make(config: Config, filled: int | None = 3) -> SupervisedLearner:
        return SupervisedLearner(config, make_policy(filled=filled), base, tokenizer, mesh)

    return make


def no_score(_: Sequence[Example], texts: Sequence[str], __: Any) -> Mapping[str, np.ndarray]:
    """Rewards play no part, not even those that are missing."""
    return {"total": np.full(len(texts), np.nan)}


def plain_losses(
    model: gemma.Gemma, lora: nnx.State, problems: Sequence[Example], tokenizer: Tokenizer
) -> list[jax.Array]:
    """Of each solution token, one problem after the other, by Tunix's own layers."""
    graph, old, base = nnx.split(model, nnx.LoRAParam, ...)
    del old
    losses = []
    for problem in problems:
        prompt = tokenizer.encode(render_prompt(problem.question))
        target = [*tokenizer.encode(problem.solution), tokenizer.eos_id()]
        tokens = jnp.array([prompt + target])
        length = tokens.shape[1]
        mask = jnp.tri(length, dtype=bool)[None]
        logits, _ = nnx.merge(graph, lora, base)(tokens, jnp.arange(length)[None], None, mask)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        losses.append(each[0, len(prompt) - 1 :])
    return losses


def test_loss_and_gradient_are_those_of_each_problem_alone(
    make: Make,
    sft_config: Config,
    problems: list[Example],
    tokenizer: Tokenizer,
    as_tunix: Callable[[gemma.Gemma], gemma.Gemma],
) -> None:
    learner = make(sft_config)
    stock = as_tunix(learner.policy)
    lora = nnx.state(stock, nnx.LoRAParam)
    part = problems[:PROMPTS]

    def mean_loss(lora: nnx.State) -> jax.Array:
        return jnp.concatenate(plain_losses(stock, lora, part, tokenizer)).mean()

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(lora)
    result = learner.step(0, part, no_score)
    [metrics] = result.updates
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-4)
    assert result.completions.texts == [problem.solution for problem in part]


def test_updates_are_those_of_plain_adam(
    make: Make,
    sft_config: Config,
    problems: list[Example],
    tokenizer: Tokenizer,
    as_tunix: Callable[[gemma.Gemma], gemma.Gemma],
    adapters: Callable[[gemma.Gemma], dict[str, np.ndarray]],
) -> None:
    from gemma2_grpo.training.optimizer import make_optimizer

    learner = make(sft_config, filled=None)
    stock = as_tunix(learner.policy)
    lora = nnx.state(stock, nnx.LoRAParam)
    transform = make_optimizer(sft_config.optimizer, STEPS)
    moments = transform.init(lora)
    for step in range(STEPS):
        part = problems[step * PROMPTS : (step + 1) * PROMPTS]

        def mean_loss(lora: nnx.State, part: Sequence[Example] = part) -> jax.Array:
            return jnp.concatenate(plain_losses(stock, lora, part, tokenizer)).mean()

        updates, moments = transform.update(jax.jit(jax.grad(mean_loss))(lora), moments, lora)
        lora = optax.apply_updates(lora, updates)
        learner.step(step, part, no_score)
    expected = {
        "/".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(lora)
    }
    for name, value in adapters(learner.policy).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=2e-6)


def test_the_head_runs_on_solutions_alone_and_rows_hold_several(
    make: Make, sft_config: Config, problems: list[Example], tokenizer: Tokenizer
) -> None:
    learner = make(sft_config)
    part = problems[:PROMPTS]
    prompts = [render_prompt(problem.question) for problem in part]
    solutions = solutions_of(part, tokenizer)
    [batch] = learner.pack(prompts, solutions).on_host
    found: dict[int, list[int]] = {}
    segments = 0
    for micro in batch.micro:
        assert micro.places is not None and micro.targets.shape == micro.places.shape
        assert micro.targets.shape[1] < micro.inputs.shape[1]
        segments += sum(len(set(row[row >= 0].tolist())) > 1 for row in micro.segment_ids)
        for numbers, targets in zip(micro.target_ids, micro.targets, strict=True):
            for number, target in zip(numbers.tolist(), targets.tolist(), strict=True):
                if number >= 0:
                    found.setdefault(number, []).append(target)
    assert segments > 0
    assert [found[i] for i in range(PROMPTS)] == [row.tolist() for row in solutions.tokens]
    # What the prompts share is run once.
    shared = batch.prompts[0, : batch.lengths[0]].tolist()
    assert batch.prompts.shape[0] == 1 and len(shared) > 3
    for prompt in prompts:
        assert tokenizer.encode(prompt)[: len(shared)] == shared


def test_the_held_out_loss_is_that_of_each_problem_alone(
    make: Make,
    sft_config: Config,
    problems: list[Example],
    tokenizer: Tokenizer,
    as_tunix: Callable[[gemma.Gemma], gemma.Gemma],
) -> None:
    learner = make(sft_config)
    stock = as_tunix(learner.policy)
    # More than one batch, and one problem that has no solution.
    asked = [*problems[:7], Example("How many?", "1")]
    losses = plain_losses(stock, nnx.state(stock, nnx.LoRAParam), problems[:7], tokenizer)
    expected = float(jnp.concatenate(losses).mean())
    assert learner.solution_nll(asked) == pytest.approx(expected, rel=1e-5)
    assert learner.solution_nll(asked[7:]) is None


def test_a_mesh_of_eight_devices_gives_the_same(
    make: Make,
    sft_config: Config,
    problems: list[Example],
    tokenizer: Tokenizer,
    wide_base: gemma.Gemma,
    wide_mesh: Mesh,
    changed: Callable[..., Config],
) -> None:
    one = make(sft_config, filled=None).step(0, problems[:PROMPTS], no_score)
    config = changed(sft_config, mesh_shape=(2, 4))
    policy = add_lora(wide_base, config.model, wide_mesh, 0)
    wide = SupervisedLearner(config, policy, wide_base, tokenizer, wide_mesh)
    many = wide.step(0, problems[:PROMPTS], no_score)
    for name in ("loss", "grad_norm", "entropy"):
        assert many.updates[0][name] == pytest.approx(one.updates[0][name], rel=1e-4)


def test_it_resumes_exactly(
    make: Make,
    sft_config: Config,
    problems: list[Example],
    adapters: Callable[[gemma.Gemma], dict[str, np.ndarray]],
) -> None:
    whole, first, second = (make(sft_config, filled=None) for _ in range(3))
    parts = problems[:PROMPTS], problems[PROMPTS:]
    for step, part in enumerate(parts):
        whole.step(step, part, no_score)
    first.step(0, parts[0], no_score)
    second.set_state(jax.tree.map(jnp.copy, first.state()))
    second.step(1, parts[1], no_score)
    for name, value in adapters(whole.policy).items():
        np.testing.assert_array_equal(adapters(second.policy)[name], value)


def test_grpo_and_supervised_training_do_not_mix(
    config: Config, sft_config: Config, refusal: Callable[..., str]
) -> None:
    from gemma2_grpo.checks import check

    assert check(sft_config) == sft_config
    halves = dataclasses.replace(config, rollout=sft_config.rollout)
    assert refusal(check, halves) == (
        "engine = 'solutions' does not go with loss_type = 'grpo'; run gemma2-grpo sft, which sets "
        "both"
    )
    grpo = dataclasses.replace(sft_config.grpo, beta=0.1)
    assert refusal(check, dataclasses.replace(sft_config, grpo=grpo)) == (
        "beta = 0.1: supervised training takes 0; set that"
    )
