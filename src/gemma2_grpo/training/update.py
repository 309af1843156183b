"""Updates of the policy: accumulated micro-batches of packed completions, one optimizer step."""

from collections.abc import Sequence
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
from gemma2_grpo.model.gemma import Weights, network_of, split_model, weights_of
from gemma2_grpo.model.lora import merge_adapters, updates_merged
from gemma2_grpo.model.mesh import batch_sharding, on_mesh
from gemma2_grpo.runtime.processes import gather, total
from gemma2_grpo.training.loss import LossTerms
from gemma2_grpo.training.packing import PromptBatch
from gemma2_grpo.training.programs import Credit, UpdatePrograms


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
    """Whether the update was made; one whose gradient has no finite norm is left out."""


def learning_rate_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Linear warm-up and cosine decay over all updates, each of which learns.

    The rate would be zero one update before the first, and at the end of its decay one update
    after the last. The square of a sine is the cosine's (1 + cos) / 2 (SGDR, arXiv:1608.03983,
    equation 5), which rounds to zero in float32 near the end of a long run.

    Args:
        config: Highest rate, warm-up, and what the rate falls to.
        num_updates: Of the whole run.

    Returns:
        The rate of the update before which so many were made.
    """
    warmup = max(1, round(config.warmup_fraction * num_updates))
    decay = num_updates + 1 - warmup
    lowest = config.final_lr_fraction

    def rate(count: Any) -> jax.Array:
        rise = jnp.minimum((count + 1) / warmup, 1)
        left = jnp.clip((num_updates - count) / decay, 0, 1)
        fall = jnp.square(jnp.sin(jnp.pi / 2 * left))
        return config.learning_rate * rise * (lowest + (1 - lowest) * fall)

    return rate


def make_optimizer(config: OptimizerConfig, num_updates: int) -> optax.GradientTransformation:
    """AdamW with global-norm clipping, warm-up and cosine decay.

    A gradient whose norm is not finite changes neither the weights nor the moments.
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
    return _apply_if_norm_finite(optimizer)


def _apply_if_norm_finite(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Leaves a gradient out whole where an entry, or the norm, is not a finite number.

    The squares of finite entries may add up to infinity. Optax looks at entries only and would
    clip such a gradient to zero, with which Adam's moments and the weights would still decay.
    """
    careful = optax.apply_if_finite(optimizer, max_consecutive_errors=np.iinfo(np.int32).max)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        is_finite = jnp.isfinite(optax.tree.norm(updates))
        marked = jax.tree.map(lambda x: jnp.where(is_finite, x, jnp.nan), updates)
        return careful.update(marked, state, params)

    return optax.GradientTransformation(careful.init, update)


class Updater:
    """Runs GRPO's updates on the model and the optimizer of Tunix's actor trainer.

    The trainer's own step is not used: it averages micro-batches that may not weigh the same,
    keeps no log-probabilities from one iteration for the next, and counts and logs every
    micro-batch as a step.

    The tokens of a prompt that come before its last are run once for all of its completions, and
    once more to take back through them what the micro-batches of its completions say of their
    keys and values. So the memory of a micro-batch does not depend on the size of a group.
    """

    def __init__(self, trainer: Trainer, reference: gemma.Gemma, config: Config, mesh: Mesh):
        """Prepares the programs; each is compiled when first used."""
        self._policy = cast(gemma.Gemma, trainer.model)
        self._optimizer = trainer.optimizer
        self._mesh = mesh
        self._iterations = config.grpo.num_iterations
        # Then the adapters' own products are saved.
        self._are_merged = updates_merged(config)
        self._scale = config.model.lora_scale
        reference_network, self._reference = split_model(reference)
        policy_def, *_ = nnx.split(self._policy, nnx.LoRAParam, ...)
        optimizer_def, _ = nnx.split(self._optimizer)
        adapters = jax.tree.map(lambda x: x.sharding, weights_of(self._policy).lora)
        self.programs = UpdatePrograms(
            network_of(self._policy, config.model.remat, are_merged=self._are_merged),
            reference_network,
            policy_def,
            optimizer_def,
            adapters,
            config,
            mesh,
        )

    @property
    def made(self) -> int:
        """Updates made so far, without those that were left out."""
        counts = [
            int(variable.get_value())
            for path, variable in nnx.to_flat_state(nnx.state(self._optimizer, nnx.OptState))
            if path[-1] == "count"
        ]
        return max(counts)

    def place(self, batch: Any) -> Any:
        """Puts arrays on the devices, rows over fsdp."""
        return jax.device_put(
            batch, jax.tree.map(lambda x: batch_sharding(self._mesh, len(x)), batch)
        )

    def reference_logps(self, batches: Sequence[PromptBatch]) -> list[list[jax.Array]]:
        """Log-probabilities of all completions under the reference; it does not wait for them."""
        with on_mesh(self._mesh):
            return [
                [
                    self.programs.reference_logps(self._reference, prefix, batch.lengths, micro)
                    for micro in batch.micro
                ]
                for batch in batches
                for prefix in [self.programs.reference_prefix(self._reference, batch.prompts)]
            ]

    def update(
        self,
        batches: Sequence[PromptBatch],
        credit: Sequence[Sequence[Credit]],
        references: Sequence[Sequence[jax.Array]] | None,
    ) -> list[UpdateMetrics]:
        """Makes the `num_iterations` updates of one batch of rollouts, in all processes alike.

        The log-probabilities of the first iteration, taken before any update, are the old ones
        of all: the ratio is exactly 1 there at any temperature, without a pass of its own.

        Args:
            batches: What `place` gave.
            credit: Of each micro-batch; the token weights of all add up to one loss.
            references: What `reference_logps` gave; None without a KL penalty.

        Returns:
            Metrics of each iteration, over all processes.
        """
        metrics, old = [], None
        with on_mesh(self._mesh):
            for _ in range(self._iterations):
                measured, logps = self._one_update(batches, credit, references, old)
                old = old or logps
                metrics.append(measured)
        return metrics

    def _one_update(
        self,
        batches: Sequence[PromptBatch],
        credit: Sequence[Sequence[Credit]],
        references: Sequence[Sequence[jax.Array]] | None,
        old: Sequence[Sequence[jax.Array]] | None,
    ) -> tuple[UpdateMetrics, list[list[jax.Array]]]:
        lora, frozen = weights = weights_of(self._policy)
        base = merge_adapters(weights, self._scale) if self._are_merged else frozen
        gradients, terms, all_logps = self.programs.no_gradients(lora), [], []
        for i, batch in enumerate(batches):
            prefix = self.programs.prefix(Weights(lora, base), batch.prompts)
            sums, logps = (gradients, self.programs.no_slopes(prefix)), []
            for j, micro in enumerate(batch.micro):
                ref = references[i][j] if references else None
                before = old[i][j] if old else credit[i][j].weights
                sums, term, now = self.programs.rows_gradients(
                    *(sums, lora, prefix, base, batch.lengths, micro, credit[i][j], ref, before),
                    jnp.array(old is None),
                )
                terms.append(term)
                logps.append(now)
            gradients = self.programs.prompt_gradients(*sums, lora, base, batch.prompts)
            all_logps.append(logps)
        _, state = nnx.split(self._optimizer)
        lora, state, grad_norm = self.programs.apply(lora, frozen, state, total(gradients))
        nnx.update(self._policy, lora)
        nnx.update(self._optimizer, state)
        return _summarise(_from_all(jax.device_get(terms)), float(grad_norm)), all_logps


def _from_all(terms: Sequence[LossTerms]) -> list[LossTerms]:
    """The terms of all processes; one may have none."""
    parts = gather([[value.item() for value in term] for term in terms])
    return [LossTerms(*term) for part in parts for term in part]


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
