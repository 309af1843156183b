"""GRPO's loop on Tunix's cluster: rollouts, rewards, advantages, updates."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.models.gemma import model as gemma
from tunix.rl.rl_cluster import ClusterConfig, Mode, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig as TunixRolloutConfig

from gemma2_grpo.config import Config
from gemma2_grpo.model.lora import samples_merged
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.runtime.processes import gather, gather_rows, share
from gemma2_grpo.sampling.rollout import (
    Completions,
    GroupRollout,
    GroupRolloutConfig,
    engine_settings,
)
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training.loss import Advantages, group_advantages, token_weights
from gemma2_grpo.training.packing import PromptBatch, choose_shapes, prompt_batches
from gemma2_grpo.training.update import (
    Credit,
    UpdateMetrics,
    Updater,
    learning_rate_schedule,
    make_optimizer,
)


class Stream(IntEnum):
    """Independent streams of randomness, so that measuring never changes what training draws."""

    TRAIN = 0
    EVAL = 1
    CONTROL = 2


def fold_key(seed: int, stream: Stream, *counters: int) -> jax.Array:
    """A key that is a pure function of seed, stream and counters."""
    key = jax.random.fold_in(jax.random.key(seed), int(stream))
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key


Scores = Callable[[Sequence[Example], Sequence[str], np.ndarray], Mapping[str, np.ndarray]]
"""Scores completions, aligned with their examples, by text and by whether they were cut off:
columns [N], of which `total` is trained on."""


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    examples: list[Example]
    """Of each completion, [B * G]."""
    completions: Completions
    scores: Mapping[str, np.ndarray]
    """Columns [B * G] as the reward gave them; `total` is NaN where there is no score."""
    advantages: Advantages
    updates: list[UpdateMetrics]
    """One per iteration; empty where the whole batch taught nothing."""
    learning_rate: float
    """Of the step's first update."""
    rollout_seconds: float
    reward_seconds: float
    update_seconds: float


class Learner:
    """A policy, its frozen reference and the optimizer, on one mesh."""

    def __init__(
        self,
        config: Config,
        policy: gemma.Gemma,
        reference: gemma.Gemma,
        tokenizer: Tokenizer,
        mesh: Mesh,
    ) -> None:
        """Builds Tunix's cluster around models that share their base weights."""
        self.config = config
        self.tokenizer = tokenizer
        self._num_updates = config.run.max_steps * config.grpo.num_iterations
        self._schedule = learning_rate_schedule(config.optimizer, self._num_updates)
        self.cluster = RLCluster(
            actor=policy,
            reference=reference,
            tokenizer=tokenizer,
            cluster_config=ClusterConfig(
                role_to_mesh={Role.ACTOR: mesh, Role.REFERENCE: mesh, Role.ROLLOUT: mesh},
                rollout_engine=self._engine(),
                rollout_config={
                    Mode.TRAIN: self._rollout_config(config.rollout.temperature),
                    Mode.EVAL: self._rollout_config(0.0),
                },
                training_config=RLTrainingConfig(
                    actor_optimizer=make_optimizer(config.optimizer, self._num_updates),
                    eval_every_n_steps=self._num_updates + 1,
                ),
            ),
        )
        # Tunix keeps a second copy of all weights on the host for a sync that is never made here.
        self.cluster._anchor_policy_state = None
        _place_scalars(self.cluster.actor_trainer.optimizer, mesh)
        self.updater = Updater(self.cluster.actor_trainer, reference, config, mesh)

    def _engine(self) -> Any:
        """What Tunix's cluster samples with: our engine, or the name of one of its own."""
        if self.config.rollout.engine != "group":
            return self.config.rollout.engine
        scale = self.config.model.lora_scale if self.is_merged else None
        return partial(GroupRollout, merged_scale=scale)

    @property
    def is_merged(self) -> bool:
        """Whether our engine adds the adapters into the weights before sampling."""
        return samples_merged(self.config)

    def _rollout_config(self, temperature: float) -> TunixRolloutConfig:
        rollout = self.config.rollout
        return GroupRolloutConfig(
            max_tokens_to_generate=rollout.max_completion_tokens,
            max_prompt_length=rollout.max_prompt_tokens,
            kv_cache_size=rollout.kv_cache_tokens
            or rollout.max_prompt_tokens + rollout.max_completion_tokens,
            temperature=temperature,
            # Tunix's sampler takes the likeliest token only where it is given neither.
            top_p=rollout.top_p if temperature else None,
            top_k=(rollout.top_k or None) if temperature else None,
            eos_tokens=list(self.tokenizer.stop_ids),
            return_logprobs=True,
            **engine_settings(self.config),
        )

    def generate(
        self,
        prompts: Sequence[str],
        group: int,
        key: jax.Array,
        *,
        greedy: bool = False,
        limits: Sequence[int] | None = None,
        first_row: int = 0,
    ) -> Completions:
        """Completes each prompt `group` times, with randomness from `key` alone.

        Args:
            prompts: Rendered prompts.
            group: Completions of each.
            key: Key of this call.
            greedy: Take the likeliest token.
            limits: The most tokens of each completion, where they differ.
            first_row: Number of the first completion in a batch of which these are a part; with
                the key, it decides the randomness.
        """
        mode = Mode.EVAL if greedy else Mode.TRAIN
        settings = cast(GroupRolloutConfig, self.cluster.get_rollout_config(mode))
        # Tunix hands an engine the same seed at every call; here each call has its own.
        settings.seed, settings.limits, settings.first_row = key, limits, first_row
        repeated = [prompt for prompt in prompts for _ in range(group)]
        output = self.cluster.generate(repeated, mode=mode)
        tokens = output.tokens
        if self.config.rollout.engine != "group":
            tokens = [self._with_stop(row) for row in tokens]
        stops = self.tokenizer.stop_ids
        truncated = np.array([not len(row) or row[-1] not in stops for row in tokens])
        return Completions(output.text, tokens, truncated)

    def _with_stop(self, row: np.ndarray) -> np.ndarray:
        """Puts back the stop token that Tunix's engines take off, since it has to be learned."""
        is_cut = len(row) >= self.config.rollout.max_completion_tokens
        return row if is_cut else np.append(row, self.tokenizer.eos_id()).astype(np.int32)

    def step(self, step: int, batch: Sequence[Example], score: Scores) -> StepResult:
        """One batch of rollouts and its updates, of which each process does its own part.

        Args:
            step: Number of the step from 0; with the seed, it decides all randomness.
            batch: One example per prompt, for all processes.
            score: Scores the completions.
        """
        group, seed = self.config.rollout.num_generations, self.config.run.seed
        started = time.perf_counter()
        own = share(len(batch))
        rows = slice(own.start * group, own.stop * group)
        prompts = [render_prompt(example.question) for example in batch[own]]
        key = fold_key(seed, Stream.TRAIN, step)
        completions = self.generate(prompts, group, key, first_row=rows.start)
        sampled = time.perf_counter()
        examples = [example for example in batch for _ in range(group)]
        # The reference runs on the device while the host scores.
        packed, references = [], None
        if self.config.grpo.beta:
            packed = self.pack(prompts, completions, [True] * len(prompts))
            references = self.updater.reference_logps(packed)
        scores = score(examples[rows], completions.texts, completions.is_truncated)
        everyones, scores = _from_all(completions, scores)
        values = scores["total"]
        if self.config.rewards.shuffle_rewards:
            values = np.random.default_rng([seed, Stream.CONTROL, step]).permutation(values)
        advantages = group_advantages(
            values.reshape(len(batch), group),
            scale_by_std=self.config.grpo.loss_type != "drgrpo",
        )
        if not self.config.grpo.beta:
            packed = self.pack(prompts, completions, ~advantages.is_uniform[own])
        scored = time.perf_counter()
        first_update = self.updater.made
        updates = self.update(packed, references, everyones, advantages, rows)
        return StepResult(
            examples=examples,
            completions=everyones,
            scores=scores,
            advantages=advantages,
            updates=updates,
            learning_rate=np.asarray(self._schedule(first_update)).item(),
            rollout_seconds=sampled - started,
            reward_seconds=scored - sampled,
            update_seconds=time.perf_counter() - scored,
        )

    def pack(
        self, prompts: Sequence[str], completions: Completions, chosen: Sequence[bool] | np.ndarray
    ) -> list[PromptBatch]:
        """Cuts a batch into micro-batches of whole completions and puts them on the devices.

        Args:
            prompts: Rendered prompts.
            completions: A group for each.
            chosen: Which prompts are wanted.
        """
        ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        longest_prompt, longest = max(map(len, ids)), int(completions.lengths.max())
        shapes = choose_shapes(self.config, len(prompts), longest_prompt, longest)
        packed = prompt_batches(ids, completions.tokens, list(chosen), shapes, self.tokenizer.pad)
        return [self.updater.place(batch) for batch in packed]

    def update(
        self,
        packed: Sequence[PromptBatch],
        references: Sequence[Sequence[jax.Array]] | None,
        completions: Completions,
        advantages: Advantages,
        rows: slice = slice(None),
    ) -> list[UpdateMetrics]:
        """The updates of one batch; none where no completion has a score or a gradient.

        Args:
            packed: What `pack` gave, of this process's completions.
            references: What the updater's `reference_logps` gave for it.
            completions: Those of all processes, over which the loss is a mean.
            advantages: Likewise of all.
            rows: Which of them are this process's.
        """
        is_scored = advantages.is_scored.ravel()
        if not is_scored.any() or not any(gather(len(packed))):
            return []
        weights = token_weights(
            completions.lengths,
            is_scored,
            self.config.grpo.loss_type,
            self.config.rollout.max_completion_tokens,
        )
        values, weights = advantages.values.ravel()[rows], weights[rows]

        def credit(owners: np.ndarray) -> Credit:
            is_token = owners >= 0
            return Credit(
                np.where(is_token, values[owners], 0.0).astype(np.float32),
                np.where(is_token, weights[owners], 0.0).astype(np.float32),
            )

        credited = [
            self.updater.place([credit(np.asarray(micro.owners)) for micro in batch.micro])
            for batch in packed
        ]
        metrics = self.updater.update(packed, credited, references)
        self._tell_engine()
        return metrics

    def _tell_engine(self) -> None:
        """Gives the adapters to an engine of Tunix's, which has weights of its own."""
        if self.config.rollout.engine != "group":
            adapters = nnx.state(self.policy, nnx.LoRAParam)
            self.cluster.rollout.update_params(adapters, cast(Any, nnx.LoRAParam))

    @property
    def policy(self) -> gemma.Gemma:
        """The model that is trained, with its adapters."""
        return cast(gemma.Gemma, self.cluster.actor_trainer.model)

    def state(self) -> dict[str, Any]:
        """Everything that training changes: adapters and optimizer."""
        trainer = self.cluster.actor_trainer
        return {
            "lora": nnx.to_pure_dict(nnx.state(trainer.model, nnx.LoRAParam)),
            "optimizer": nnx.to_pure_dict(nnx.state(trainer.optimizer)),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Puts a state back that `state` gave."""
        trainer = self.cluster.actor_trainer
        for target, name in (
            (nnx.state(trainer.model, nnx.LoRAParam), "lora"),
            (nnx.state(trainer.optimizer), "optimizer"),
        ):
            nnx.replace_by_pure_dict(target, state[name])
            nnx.update(trainer.model if name == "lora" else trainer.optimizer, target)
        self._tell_engine()


def _from_all(
    completions: Completions, scores: Mapping[str, np.ndarray]
) -> tuple[Completions, Mapping[str, np.ndarray]]:
    """Completions and scores of all processes, in the order of the batch."""
    if jax.process_count() == 1:
        return completions, scores
    rows = gather_rows(
        {
            "texts": completions.texts,
            "tokens": [row.tolist() for row in completions.tokens],
            "is_truncated": completions.is_truncated.tolist(),
        }
    )
    gathered = Completions(
        rows["texts"],
        [np.array(row, np.int32) for row in rows["tokens"]],
        np.array(rows["is_truncated"]),
    )
    columns = gather_rows({name: column.tolist() for name, column in scores.items()})
    return gathered, {name: np.array(column) for name, column in columns.items()}


def _place_scalars(optimizer: nnx.Optimizer, mesh: Mesh) -> None:
    """Puts the counters of the optimizer on the whole mesh.

    They begin on its first device, where a restored checkpoint would then fix them, beside
    moments that lie on all devices.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = nnx.state(optimizer)
    nnx.update(
        optimizer,
        jax.tree.map(
            lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, everywhere),
            state,
        ),
    )
