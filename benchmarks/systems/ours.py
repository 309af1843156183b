"""This package, driven through `Learner` as `gemma2-grpo train` drives it."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.session import Scorer, Session
from benchmarks.workload import Sizes


def run(session: Session) -> Scorer:
    """Makes the steps of a session."""
    from gemma2_grpo.engine.learner import Stream, fold_key
    from gemma2_grpo.engine.loss import group_advantages

    session.compiles.watch()
    session.imported()
    learner, reference = _build(session)
    updater, sizes = learner.updater, session.workload.sizes
    # Where the engine has a reference pass of its own, it is charged apart from the update.
    if hasattr(updater, "_reference_logps"):
        updater._reference_logps = session.measured("reference", updater._reference_logps)
    for step, batch in enumerate(session.steps()):
        key = fold_key(session.workload.seed, Stream.TRAIN, step)
        with session.phase("rollout"):
            completions = _generate(learner, batch.prompts, sizes.generations, key, batch.limits)
        rewards = np.array(batch.rewards).reshape(sizes.prompts, sizes.generations)
        advantages = group_advantages(rewards, scale_by_std=True)
        with session.phase("update"):
            updater.update(learner.micro_batches(batch.prompts, completions, advantages))
        session.completion_tokens = int(completions.lengths.sum())
    return lambda prompt, ids: _score(learner, reference, prompt, ids)


def _build(session: Session) -> Any:
    """The learner, and the reference model in it."""
    from gemma2_grpo.engine.learner import Learner
    from gemma2_grpo.engine.lora import add_lora
    from gemma2_grpo.engine.model import (
        load_weights,
        make_mesh,
        random_weights,
        read_architecture,
    )
    from gemma2_grpo.engine.tokenizer import load_tokenizer

    workload = session.workload
    sizes, directory = workload.sizes, workload.directory
    config = _config(sizes, workload.steps, workload.seed)
    mesh = make_mesh(sizes.mesh)
    if (directory / "model.safetensors").exists():
        reference = load_weights(directory, sizes.dtype, mesh)
    else:
        architecture = read_architecture(directory)
        reference = random_weights(architecture, sizes.dtype, mesh, workload.seed)
    policy = add_lora(reference, config.model, mesh, workload.seed)
    # No id of the model ends a completion: its length is forced.
    tokenizer = dataclasses.replace(load_tokenizer(directory), stop_ids=(sizes.vocab,))
    return Learner(config, policy, reference, tokenizer, mesh), reference


def _config(sizes: Sizes, steps: int, seed: int) -> Any:
    from gemma2_grpo.config import (
        Config,
        GrpoConfig,
        ModelConfig,
        OptimizerConfig,
        RolloutConfig,
        RunConfig,
        check,
    )

    return check(
        Config(
            model=ModelConfig(
                dtype=sizes.dtype,
                lora_rank=sizes.lora_rank,
                lora_alpha=float(sizes.lora_rank),
                mesh_shape=sizes.mesh,
                remat=sizes.remat,
            ),
            rollout=RolloutConfig(
                num_generations=sizes.generations,
                prompts_per_step=sizes.prompts,
                max_prompt_tokens=sizes.max_prompt_tokens,
                max_completion_tokens=sizes.max_completion_tokens,
            ),
            grpo=GrpoConfig(
                num_iterations=sizes.iterations, beta=sizes.beta, epsilon=sizes.epsilon
            ),
            optimizer=OptimizerConfig(learning_rate=sizes.learning_rate),
            run=RunConfig(max_steps=steps, seed=seed),
        )
    )


def _generate(
    learner: Any, prompts: Sequence[str], group: int, key: Any, limits: Sequence[int]
) -> Any:
    """Completions of the forced lengths."""
    if "limits" in inspect.signature(learner.generate).parameters:
        return learner.generate(prompts, group, key, limits=limits)
    drawn = learner.generate(prompts, group, key)
    tokens = [row[:limit] for row, limit in zip(drawn.tokens, limits, strict=True)]
    return dataclasses.replace(drawn, tokens=tokens)


def _score(learner: Any, reference: Any, prompt: str, ids: Sequence[int]) -> Sequence[float]:
    import jax.numpy as jnp

    from gemma2_grpo.engine.forward import completion_logps, split_model

    prompt_ids = learner.tokenizer.encode(prompt)
    logps = completion_logps(
        *split_model(reference),
        jnp.array([[*prompt_ids, *ids]]),
        jnp.array([len(prompt_ids)]),
        jnp.array([ids]),
        temperature=1.0,
        chunk_tokens=len(ids),
    ).logps
    return logps[0].tolist()
