"""GRPO: `Learner.step` samples, scores, and updates the policy; the page to read first."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from gemma2_grpo.config import OWN_ENGINES, Config
from gemma2_grpo.model.lora import PureState, adapters_of, set_adapters
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.model.weights import Model
from gemma2_grpo.runtime.processes import gather, gather_rows, share
from gemma2_grpo.sampling.rollout import Completions, Sample, sampler
from gemma2_grpo.sampling.tunix import TunixEngine
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training.loss import (
    Advantages,
    find_objective,
    group_advantages,
    token_weights,
)
from gemma2_grpo.training.optimizer import learning_rate_schedule, make_optimizer
from gemma2_grpo.training.packing import (
    PromptBatch,
    assign_credit,
    choose_shapes,
    prompt_batches,
)
from gemma2_grpo.training.update import Logps, Updater


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
    """Completions, scores, advantages and metrics of one step."""

    examples: list[Example]
    """The example of each completion, [B * G]."""
    completions: Completions
    scores: Mapping[str, np.ndarray]
    """Columns [B * G] as the reward gave them; `total` is NaN where there is no score."""
    advantages: Advantages
    updates: list[dict[str, float]]
    """Loss and metrics of each iteration by name; empty if the whole batch taught nothing."""
    learning_rate: float
    """Learning rate of the step's first update."""
    rollout_seconds: float
    reward_seconds: float
    update_seconds: float


class Packed(NamedTuple):
    """A batch of rollouts cut into micro-batches, as the updates take it."""

    on_host: list[PromptBatch]
    on_device: list[PromptBatch]
    references: Logps | None
    """Log-probabilities under the reference, still being computed; None without a KL penalty."""


class Learner:
    """A policy, its frozen reference and the optimizer, on one mesh."""

    def __init__(
        self,
        config: Config,
        policy: Model,
        reference: Model,
        tokenizer: Tokenizer,
        mesh: Mesh,
    ) -> None:
        """Takes models that share their base weights."""
        self.config = config
        self.policy = policy
        self.tokenizer = tokenizer
        num_updates = config.run.max_steps * config.grpo.num_iterations
        self._schedule = learning_rate_schedule(config.optimizer, num_updates)
        transform = make_optimizer(config.optimizer, num_updates)
        self.optimizer = nnx.Optimizer(policy, transform, wrt=nnx.LoRAParam)
        _place_scalars(self.optimizer, mesh)
        self.updater = Updater(policy, self.optimizer, reference, config, mesh)
        self._tunix = None
        if config.rollout.engine in OWN_ENGINES:
            self.sample: Sample = sampler(config, policy, tokenizer, mesh)
        else:
            self.sample = self._tunix = TunixEngine(config, policy, tokenizer, mesh)

    def step(self, step: int, batch: Sequence[Example], score: Scores) -> StepResult:
        """One batch of rollouts and its mu updates.

        Each process rolls out, scores and packs its own part of the batch; advantages and updates
        are those of the whole batch, in all processes alike.

        Args:
            step: Number of the step from 0; with the seed, it decides all randomness.
            batch: One example per prompt, for all processes.
            score: Scores the completions.
        """
        seconds: dict[str, float] = {}
        group = self.config.rollout.num_generations
        own, rows = _own_part(len(batch), group)
        prompts = [render_prompt(example.question) for example in batch[own]]
        examples = [example for example in batch for _ in range(group)]
        with _timed(seconds, "rollout_seconds"):
            completions = self.rollout(step, batch[own], rows.start)
        with _timed(seconds, "reward_seconds"):
            # With a KL penalty all groups are trained on, so they are packed before they are
            # scored: the reference runs on the device while the host scores.
            packed = self.pack(prompts, completions) if self.config.grpo.beta else None
            scores = score(examples[rows], completions.texts, completions.is_truncated)
            everyones, scores = _from_all(completions, scores)
            advantages = self.advantages(step, scores["total"])
            # Without one, a group whose rewards are all equal teaches nothing and is left out.
            packed = packed or self.pack(prompts, completions, ~advantages.is_uniform[own])
        learning_rate = np.asarray(self._schedule(self.updater.made)).item()
        with _timed(seconds, "update_seconds"):
            updates = self.update(packed, everyones.lengths, advantages, rows)
        return StepResult(
            examples, everyones, scores, advantages, updates, learning_rate, **seconds
        )

    def rollout(self, step: int, batch: Sequence[Example], first_row: int) -> Completions:
        """Samples the group of each example, whose completions are counted from `first_row`."""
        prompts = [render_prompt(example.question) for example in batch]
        key = fold_key(self.config.run.seed, Stream.TRAIN, step)
        group = self.config.rollout.num_generations
        return self.sample(prompts, group, key, first_row=first_row)

    def advantages(self, step: int, rewards: Float[np.ndarray, " N"]) -> Advantages:
        """Advantages of a whole batch from its rewards, shuffled first in a control experiment."""
        if self.config.rewards.shuffle_rewards:
            seed = [self.config.run.seed, Stream.CONTROL, step]
            rewards = np.random.default_rng(seed).permutation(rewards)
        groups = rewards.reshape(-1, self.config.rollout.num_generations)
        objective = find_objective(self.config.grpo.loss_type)
        return group_advantages(groups, scale_by_std=objective.scale_by_std)

    def pack(
        self,
        prompts: Sequence[str],
        completions: Completions,
        chosen: Bool[np.ndarray, " B"] | None = None,
    ) -> Packed:
        """Cuts a batch into micro-batches on the devices, and starts the reference on them.

        Prompts that are not `chosen` are left out with their completions; by default none is.
        """
        ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        longest_prompt, longest = max(map(len, ids)), int(completions.lengths.max())
        batches = prompt_batches(
            ids,
            completions.tokens,
            [True] * len(ids) if chosen is None else chosen.tolist(),
            choose_shapes(self.config, len(prompts), longest_prompt, longest),
            self.tokenizer.pad,
            completions.logps,
        )
        placed = [self.updater.place(batch) for batch in batches]
        references = self.updater.reference_logps(placed) if self.config.grpo.beta else None
        return Packed(batches, placed, references)

    def update(
        self,
        packed: Packed,
        lengths: Int[np.ndarray, " N"],
        advantages: Advantages,
        rows: slice = slice(None),
    ) -> list[dict[str, float]]:
        """The mu updates of one batch; none where no completion has a score or a gradient.

        Args:
            packed: The completions of this process.
            lengths: Tokens of each completion of all processes, over which the loss is a mean.
            advantages: Advantages of all processes.
            rows: Slice of the completions that belong to this process.
        """
        is_scored = advantages.is_scored.ravel()
        if not is_scored.any() or not any(gather(len(packed.on_host))):
            return []
        grpo, limit = self.config.grpo, self.config.rollout.max_completion_tokens
        weights = token_weights(lengths, is_scored, grpo.loss_type, limit)[rows]
        values = advantages.values.ravel()[rows]
        # From the micro-batches on the host, so that nothing is fetched back from the devices.
        credit = [
            [assign_credit(micro, values, weights) for micro in batch.micro]
            for batch in packed.on_host
        ]
        metrics = self.updater.update(
            packed.on_device, self.updater.place(credit), packed.references
        )
        self._update_engine()
        return metrics

    def _update_engine(self) -> None:
        if self._tunix:
            self._tunix.update_weights(self.policy)

    def state(self) -> PureState:
        """Everything that training changes: adapters and optimizer."""
        return {
            "lora": adapters_of(self.policy),
            "optimizer": nnx.to_pure_dict(nnx.state(self.optimizer)),
        }

    def set_state(self, state: PureState) -> None:
        """Puts back a state that `state` gave."""
        set_adapters(self.policy, state["lora"])
        optimizer = nnx.state(self.optimizer)
        nnx.replace_by_pure_dict(optimizer, state["optimizer"])
        nnx.update(self.optimizer, optimizer)
        self._update_engine()


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Notes the wall time of what runs within, in seconds."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _own_part(prompts: int, group: int) -> tuple[slice, slice]:
    """The prompts of a batch that are this process's own, and their completions."""
    own = share(prompts)
    return own, slice(own.start * group, own.stop * group)


def _from_all(
    completions: Completions, scores: Mapping[str, np.ndarray]
) -> tuple[Completions, Mapping[str, np.ndarray]]:
    """Completions and scores of all processes, in the order of the batch.

    Log-probabilities are left out: each process packs its own.
    """
    if jax.process_count() == 1:
        return completions, scores
    tokens = [row.tolist() for row in completions.tokens]
    rows = gather_rows(
        {"texts": completions.texts, "tokens": tokens, "cut": completions.is_truncated.tolist()}
    )
    tokens = [np.array(row, np.int32) for row in rows["tokens"]]
    columns = gather_rows({name: column.tolist() for name, column in scores.items()})
    return Completions(rows["texts"], tokens, np.array(rows["cut"])), {
        name: np.array(column) for name, column in columns.items()
    }


def _place_scalars(optimizer: nnx.Optimizer, mesh: Mesh) -> None:
    """Puts the counters of the optimizer on the whole mesh.

    They begin on its first device. A restored checkpoint would fix them there, while the moments
    are on all devices.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x: jax.Array) -> jax.Array:
        return x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, everywhere)

    nnx.update(optimizer, jax.tree.map(place, nnx.state(optimizer)))
