"""This package, driven through `Learner.step` as `gemma2-grpo train` drives it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.session import Scorer, Session
from benchmarks.workload import Sizes
from gemma2_grpo.runtime.memory import keep_freed_memory
from gemma2_grpo.task.examples import Example


def run(session: Session) -> Scorer:
    """Makes the steps of a session."""
    keep_freed_memory()  # As `gemma2-grpo train` does.
    import gemma2_grpo.training.learner  # noqa: F401  Here, so that it counts as an import.

    session.compiles.watch()
    session.imported()
    learner = _build(session)
    _instrument(session, learner)

    def score(_: Sequence[Example], __: Sequence[str], ___: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"total": np.array(session.batch.rewards)}

    for step, batch in enumerate(session.steps()):
        examples = [Example(question, answer="0") for question in batch.questions]
        result = learner.step(step, examples, score)
        session.completion_tokens = int(result.completions.lengths.sum())
    return lambda prompt, ids: _score(learner, prompt, ids)


def _instrument(session: Session, learner: Any) -> None:
    """Forces the lengths of completions, and charges the parts of a step."""
    sample = learner.sample

    def forced(*args: Any, **kwargs: Any) -> Any:
        return sample(*args, limits=session.batch.limits, **kwargs)

    learner.sample = session.measured("rollout", forced)
    updater = learner.updater
    # The reference runs while the host scores. Rewards take no time here, so nothing is lost by
    # waiting for it.
    updater.reference_logps = session.measured("reference", updater.reference_logps)
    learner.update = session.measured("update", learner.update)


def _build(session: Session) -> Any:
    """The learner."""
    from gemma2_grpo.model.open import open_files
    from gemma2_grpo.training.learner import Learner

    workload = session.workload
    sizes, directory = workload.sizes, workload.directory
    config = _config(sizes, workload.steps, workload.seed)
    model = dataclasses.replace(config.model, model=str(directory))
    files = open_files(model, needs_weights=False)
    is_shared = (directory / "model.safetensors").exists()
    reference = files.load_base() if is_shared else files.draw_base(workload.seed)
    policy = files.make_policy(reference, workload.seed)
    # No id of the model ends a completion: its length is forced.
    tokenizer = dataclasses.replace(files.tokenizer, stop_ids=(sizes.vocab,))
    return Learner(config, policy, reference, tokenizer, files.mesh)


def _config(sizes: Sizes, steps: int, seed: int) -> Any:
    from gemma2_grpo.checks import check
    from gemma2_grpo.config import (
        Config,
        GrpoConfig,
        ModelConfig,
        OptimizerConfig,
        RolloutConfig,
        RunConfig,
    )

    # Two of the longest completions on a CPU, whose caches are small; the default elsewhere.
    is_small = sizes.dtype == "float32"
    budget = 2 * sizes.max_completion_tokens if is_small else GrpoConfig().micro_batch_tokens
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
                num_iterations=sizes.iterations,
                beta=sizes.beta,
                epsilon=sizes.epsilon,
                micro_batch_tokens=budget,
            ),
            optimizer=OptimizerConfig(learning_rate=sizes.learning_rate),
            run=RunConfig(max_steps=steps, seed=seed),
        )
    )


def _score(learner: Any, prompt: str, ids: Sequence[int]) -> Sequence[float]:
    from gemma2_grpo.sampling.rollout import Completions

    completions = Completions([""], [np.array(ids, np.int32)], np.array([True]))
    packed = learner.pack([prompt], completions)
    [[logps]] = learner.updater.reference_logps(packed.on_device)
    return logps[0, : len(ids)].tolist()
