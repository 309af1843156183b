"""Updates of the policy: accumulated micro-batches of prompt groups, one optimizer step."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tunix.models.gemma import model as gemma
from tunix.rl.trainer import Trainer

from gemma2_grpo.config import Config, OptimizerConfig
from gemma2_grpo.engine.forward import Weights, completion_logps, split_model
from gemma2_grpo.engine.loss import LossTerms, policy_loss
from gemma2_grpo.engine.model import on_mesh, with_remat
from gemma2_grpo.engine.rollout import batch_sharding


class MicroBatch(NamedTuple):
    """R completions with their prompts. All arrays lie on the device, rows over fsdp."""

    tokens: Any
    """Prompt and completion without a gap, right-padded, [R, L]."""
    prompt_lengths: Any
    """[R]."""
    completion_ids: Any
    """[R, T], right-padded."""
    advantages: Any
    """[R]."""
    weights: Any
    """Weight of each token in the loss of the whole batch, [R, T]."""


class UpdateMetrics(NamedTuple):
    """One update, over all micro-batches."""

    loss: float
    kl: float
    """Mean over tokens of the KL estimate, nats."""
    clip_fraction: float
    entropy: float
    """Mean over tokens, nats."""
    max_ratio: float
    grad_norm: float
    """Global norm before clipping."""
    is_finite: bool
    """Whether the update was made; one with a non-finite gradient is left out."""


def learning_rate_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Linear warm-up and cosine decay over all updates; the first one already learns."""
    warmup = max(1, round(config.warmup_fraction * num_updates))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(num_updates, warmup + 1),
        end_value=config.learning_rate * config.final_lr_fraction,
    )
    return lambda count: schedule(count + 1)


def make_optimizer(config: OptimizerConfig, num_updates: int) -> optax.GradientTransformation:
    """AdamW with global-norm clipping, warm-up and cosine decay.

    A non-finite gradient changes neither the weights nor the moments.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(config, num_updates),
            b1=config.adam_b1,
            b2=config.adam_b2,
            weight_decay=config.weight_decay,
        ),
    )
    return optax.apply_if_finite(optimizer, max_consecutive_errors=np.iinfo(np.int32).max)


class Updater:
    """Runs GRPO's updates on the model and the optimizer of Tunix's actor trainer.

    The trainer's own step is not used: it averages micro-batches that may not weigh the same,
    keeps no log-probabilities from one iteration for the next, and counts and logs every
    micro-batch as a step.
    """

    def __init__(self, trainer: Trainer, reference: gemma.Gemma, config: Config, mesh: Mesh):
        """Prepares the programs; each is compiled when first used."""
        self._policy = cast(gemma.Gemma, trainer.model)
        self._optimizer = trainer.optimizer
        self._mesh = mesh
        self._iterations = config.grpo.num_iterations
        self._reference_network, self._reference = split_model(reference)
        self._policy_network, _ = split_model(with_remat(self._policy, config.model.remat))
        self._optimizer_def, _ = nnx.split(self._optimizer)
        logps = partial(
            completion_logps,
            temperature=config.rollout.temperature,
            chunk_tokens=config.model.logprob_chunk_tokens,
        )
        self._reference_logps = jax.jit(
            lambda weights, micro: logps(self._reference_network, weights, *micro[:3]).logps
        )

        def loss(
            lora: nnx.State, base: nnx.State, micro: MicroBatch, ref: Any, old: Any, is_first: Any
        ) -> tuple[jax.Array, tuple[LossTerms, jax.Array]]:
            now = logps(self._policy_network, Weights(lora, base), *micro[:3])
            old = jnp.where(is_first, jax.lax.stop_gradient(now.logps), old)
            terms = policy_loss(
                now.logps, old, ref, now.entropy, micro.advantages, micro.weights, config.grpo
            )
            return terms.loss, (terms, now.logps)

        self._gradients = jax.jit(jax.grad(loss, has_aux=True))
        self._add = jax.jit(partial(jax.tree.map, jnp.add), donate_argnums=0)
        self._apply = jax.jit(self._applied, donate_argnums=(0, 2))

    @property
    def made(self) -> int:
        """Updates made so far, without those that were left out."""
        counts = [
            int(variable.get_value())
            for path, variable in nnx.to_flat_state(nnx.state(self._optimizer, nnx.OptState))
            if path[-1] == "count"
        ]
        return max(counts)

    def update(self, batch: Sequence[MicroBatch]) -> list[UpdateMetrics]:
        """Makes the `num_iterations` updates of one batch of rollouts.

        The log-probabilities of the first iteration, taken before any update, are the old ones
        of all: the ratio is exactly 1 there at any temperature, without a pass of its own.

        Args:
            batch: Micro-batches whose token weights add up to one loss. All of one shape, or
                each shape is compiled.

        Returns:
            Metrics of each iteration; nothing, and no update, for an empty batch.
        """
        if not batch:
            return []
        with on_mesh(self._mesh):
            placed = [
                jax.device_put(micro, batch_sharding(self._mesh, len(micro.tokens)))
                for micro in batch
            ]
            references = [self._reference_logps(self._reference, micro) for micro in placed]
            metrics, old = [], None
            for _ in range(self._iterations):
                measured, logps = self._one_update(placed, references, old)
                old = old or logps
                metrics.append(measured)
        return metrics

    def _one_update(
        self,
        batch: Sequence[MicroBatch],
        references: Sequence[jax.Array],
        old: Sequence[jax.Array] | None,
    ) -> tuple[UpdateMetrics, list[jax.Array]]:
        _, (lora, base) = split_model(self._policy)
        total, terms, all_logps = None, [], []
        for micro, ref, previous in zip(batch, references, old or references, strict=True):
            gradients, (term, logps) = self._gradients(
                lora, base, micro, ref, previous, jnp.array(old is None)
            )
            total = gradients if total is None else self._add(total, gradients)
            terms.append(term)
            all_logps.append(logps)
        _, state = nnx.split(self._optimizer)
        lora, state, grad_norm = self._apply(lora, base, state, total)
        nnx.update(self._policy, lora)
        nnx.update(self._optimizer, state)
        return _summarise(jax.device_get(terms), float(grad_norm)), all_logps

    def _applied(
        self, lora: nnx.State, base: nnx.State, state: nnx.State, gradients: nnx.State
    ) -> tuple[nnx.State, nnx.State, jax.Array]:
        """One optimizer step; the base only completes the model and is neither read nor copied."""
        optimizer = nnx.merge(self._optimizer_def, state)
        model = self._policy_network.merge(Weights(lora, base))
        grad_norm = optax.tree.norm(gradients)
        optimizer.update(model, gradients)
        return nnx.state(model, nnx.LoRAParam), nnx.state(optimizer), grad_norm


def _summarise(terms: Sequence[LossTerms], grad_norm: float) -> UpdateMetrics:
    tokens = max(sum(int(term.token_count) for term in terms), 1)
    loss = sum(float(term.loss) for term in terms)
    return UpdateMetrics(
        loss=loss,
        kl=sum(float(term.kl_sum) for term in terms) / tokens,
        clip_fraction=sum(int(term.clipped_sum) for term in terms) / tokens,
        entropy=sum(float(term.entropy_sum) for term in terms) / tokens,
        max_ratio=max(float(term.max_ratio) for term in terms),
        grad_norm=grad_norm,
        is_finite=bool(np.isfinite(grad_norm)),
    )
