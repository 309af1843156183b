"""Everything a run needs, opened in the order of its price: cheap checks first, weights last."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError

from gemma2_grpo.config import OWN_ENGINES, Config
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.adapter import save_adapter
from gemma2_grpo.model.layout import adapter_parameters
from gemma2_grpo.model.lora import AdapterSize, adapter_size, samples_merged
from gemma2_grpo.model.open import open_files
from gemma2_grpo.run.directory import RunDirectory, check_free_space
from gemma2_grpo.run.schema import Data, RunFacts
from gemma2_grpo.runtime.checkpoint import (
    clean_temporaries,
    latest_step,
    restore_checkpoint,
    save_checkpoint,
)
from gemma2_grpo.runtime.processes import (
    check_replicas,
    check_same,
    from_first,
    total,
)
from gemma2_grpo.sampling.tunix import check_engine
from gemma2_grpo.task.examples import Example, Splits, drop_long
from gemma2_grpo.training.learner import Learner
from gemma2_grpo.training.supervised import SupervisedLearner

# Two moments and the parameters themselves, in float32.
_STATE_BYTES_PER_PARAMETER = 12


@dataclass(frozen=True)
class Session:
    """A policy with its data, restored from the run's last checkpoint."""

    config: Config
    learner: Learner
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    finished_steps: int
    facts: RunFacts
    """What is known of run.json."""
    plan: Mapping[str, str]
    """Facts that are shown before the run starts."""
    directory: RunDirectory

    def save(self, steps: int) -> None:
        """Writes a checkpoint after so many finished steps; the policies of all processes agree.

        Raises:
            UserError: if it cannot be written; earlier ones are kept.
        """
        state = self.learner.state()
        check_replicas(state["lora"])
        if not self.directory.writes:
            return
        keep = self.config.run.keep_checkpoints
        try:
            save_checkpoint(self.directory.checkpoints, steps, state, keep)
        except OSError as error:
            raise UserError(
                f"run directory {self.directory.path}: {error}; the checkpoints before it are "
                "kept: fix the cause and run again"
            ) from None

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter as it is now.

        Raises:
            UserError: if it cannot be written.
        """
        base = self.facts.base_sha256
        assert base is not None  # A session knows it.
        try:
            save_adapter(self.learner.policy, folder, self.config.model, base)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: the adapter cannot be written ({error})") from None


def open_session(config: Config, splits: Splits, directory: RunDirectory) -> Session:
    """Loads tokenizer and weights, adds adapters and restores the last checkpoint.

    Raises:
        UserError: for every mistake of the user, before the weights load.
    """
    files = open_files(config.model)
    check_engine(config.rollout.engine, files.architecture)

    def count_tokens(prompt: str) -> int:
        return len(files.tokenizer.encode(prompt))

    limit, split = config.rollout.max_prompt_tokens, config.data.eval_split
    needed = config.rollout.prompts_per_step
    train, dropped = drop_long(splits.train, count_tokens, limit, needed)
    kind = Learner
    if config.rollout.engine == "solutions":
        kind = SupervisedLearner
        num_solved = len(train)
        train = solved(config, train, count_tokens)
        dropped += num_solved - len(train)
    held_out, dropped_held_out = drop_long(getattr(splits, split), count_tokens, limit)
    directory.check_same("data_sha256", splits.sha256)
    directory.check_same("base_sha256", files.sha256)
    check_same({"base_sha256": files.sha256})
    adapter = Path(config.model.adapter) if config.model.adapter else None
    files.check_adapters(adapter)
    _check_room(config, directory, adapter_parameters(files.architecture, config.model.lora_rank))
    reference = files.load_base()
    policy = files.make_policy(reference, config.run.seed, adapter)
    size = adapter_size(policy)
    learner = kind(config, policy, reference, files.tokenizer, files.mesh)
    finished = _restore(learner, directory)
    facts = RunFacts(
        devices=tuple(map(str, files.mesh.devices.ravel())),
        data=Data(source=splits.source, num_dropped=dropped),
        data_sha256=splits.sha256,
        base_sha256=files.sha256,
        num_adapted_matrices=size.matrices,
        num_adapted_parameters=size.parameters,
    )
    plan = {
        "devices": _describe_devices(files.mesh),
        "model": _describe_model(config, reference),
        "adapters": _describe_adapters(config, size),
        "data": f"{splits.source}: {len(train)} train, {len(held_out)} {split} problems; "
        f"{dropped + dropped_held_out} too long, dropped",
        "steps": _describe_steps(config, finished),
        "sampling": _describe_sampling(config, files.architecture.sliding_window_size),
        "run": str(directory.path),
    }
    return Session(config, learner, train, held_out, finished, facts, plan, directory)


def solved(
    config: Config, examples: tuple[Example, ...], count_tokens: Callable[[str], int]
) -> tuple[Example, ...]:
    """The examples that have a worked solution of at most `max_completion_tokens`.

    Raises:
        UserError: if fewer are left than a step takes.
    """
    limit, needed = config.rollout.max_completion_tokens, config.rollout.prompts_per_step
    with_solution = [example for example in examples if example.solution]
    if not with_solution:
        raise UserError(f"dataset = {config.data.dataset}: has no worked solutions to train on")
    # One more token ends the turn.
    kept = tuple(each for each in with_solution if count_tokens(each.solution) < limit)
    if len(kept) < needed:
        raise UserError(
            f"max_completion_tokens = {limit} leaves {len(kept)} of {len(with_solution)} worked "
            f"solutions where {needed} are needed; raise it"
        )
    return kept


def _check_room(config: Config, directory: RunDirectory, parameters: int) -> None:
    """Refuses a run that is further than it should go, and a disk that cannot hold it."""
    done = latest_step(directory.checkpoints)
    if done > config.run.max_steps:
        raise UserError(
            f"max_steps = {config.run.max_steps} is less than the {done} steps that are done; "
            "raise it"
        )
    if directory.writes:
        checkpoints = config.run.keep_checkpoints + 1
        check_free_space(directory.path, parameters * _STATE_BYTES_PER_PARAMETER * checkpoints)


def _restore(learner: Learner, directory: RunDirectory) -> int:
    """Restores the last good checkpoint, which process 0 reads; returns its finished steps."""
    state, restored, checkpoints = learner.state(), None, directory.checkpoints
    try:
        if directory.writes:
            clean_temporaries(checkpoints)
            restored = restore_checkpoint(checkpoints, state)
    except OSError as error:
        raise UserError(str(error)) from None
    except ValueError as error:  # Orbax, of shapes.
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"{checkpoints}: of adapters of another shape ({line}); lora_rank and lora_modules "
            "cannot change within a run"
        ) from None
    finished = from_first(restored[0] if restored else 0)
    if finished:
        # The others add nothing to what process 0 has read.
        learner.set_state(total(restored[1] if restored else jax.tree.map(_zeros, state)))
    return finished


def _zeros(array: jax.Array) -> jax.Array:
    return jax.device_put(np.zeros(array.shape, array.dtype), array.sharding)


def _describe_devices(mesh: Mesh) -> str:
    kind, idle = mesh.devices.ravel()[0].device_kind, jax.local_device_count() - mesh.size
    text = f"{mesh.size} x {kind}, mesh {mesh.shape['fsdp']} fsdp x {mesh.shape['tp']} tp"
    return f"{text}; {idle} more are not used" if idle else text


def _describe_model(config: Config, model: nnx.Module) -> str:
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model)))
    return f"{config.model.model}, {count:,} parameters in {config.model.dtype}"


def _describe_adapters(config: Config, size: AdapterSize) -> str:
    return (
        f"LoRA rank {config.model.lora_rank} on {size.matrices} matrices, "
        f"{size.parameters:,} parameters in float32"
    )


def _describe_sampling(config: Config, window: int | None) -> str:
    rollout = config.rollout
    if rollout.engine in OWN_ENGINES:
        how = "added into" if samples_merged(config) else "run next to"
        return f"adapters {how} the {config.model.dtype} weights"
    text = f"Tunix's engine {rollout.engine}"
    if window and rollout.max_prompt_tokens + rollout.max_completion_tokens > window:
        text += f"; it is inexact beyond the sliding window of {window} tokens"
    return text


def _describe_steps(config: Config, finished: int) -> str:
    rollout, grpo, steps = config.rollout, config.grpo, config.run.max_steps
    text = (
        f"{steps} of {rollout.prompts_per_step} prompts x {rollout.num_generations} completions, "
        f"{grpo.num_iterations} update{'s' if grpo.num_iterations > 1 else ''} each"
    )
    if rollout.engine == "solutions":
        text = f"{steps} updates on {rollout.prompts_per_step} worked solutions each"
    return f"{text}; {finished} done, resuming" if finished else text
