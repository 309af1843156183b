"""Updates of the policy: accumulated micro-batches of packed completions, one optimizer step."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.models.gemma import model as gemma
from tunix.rl.trainer import Trainer

from gemma2_grpo.config import Config, OptimizerConfig
from gemma2_grpo.engine.forward import (
    Network,
    Prefix,
    Weights,
    completion_logps,
    network_of,
    run_from_start,
    split_model,
    weights_of,
)
from gemma2_grpo.engine.lora import merge_adapters
from gemma2_grpo.engine.loss import LossTerms, policy_loss
from gemma2_grpo.engine.model import batch_sharding, on_mesh
from gemma2_grpo.engine.packing import MicroBatch, PromptBatch
from gemma2_grpo.engine.processes import gather, total


class Credit(NamedTuple):
    """What the rewards say of each token of a micro-batch."""

    advantages: Any
    """[R, W]."""
    weights: Any
    """Weight in the loss of the whole batch, 0 for what does not count, [R, W]."""


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
        reference_network, self._reference = split_model(reference)
        # Where the type keeps small changes, the adapters' own products are saved.
        self._are_merged = config.model.dtype == "float32"
        network = network_of(self._policy, config.model.remat, are_merged=self._are_merged)
        self._scale = config.model.lora_scale
        self._optimizer_def, _ = nnx.split(self._optimizer)
        self._policy_def, *_ = nnx.split(self._policy, nnx.LoRAParam, ...)
        logps = partial(
            completion_logps,
            temperature=config.rollout.temperature,
            chunk_tokens=config.model.logprob_chunk_tokens,
        )

        def prefix(network: Network, weights: Weights, prompts: jax.Array) -> Prefix:
            return run_from_start(network, weights, prompts)[1]

        def rows_loss(
            lora: nnx.State,
            prefix: Prefix,
            base: nnx.State,
            lengths: jax.Array,
            micro: MicroBatch,
            credit: Credit,
            ref: jax.Array | None,
            old: jax.Array,
            is_first: jax.Array,
        ) -> tuple[jax.Array, tuple[LossTerms, jax.Array]]:
            now = logps(network, Weights(lora, base), prefix, lengths, micro)
            old = jnp.where(is_first, jax.lax.stop_gradient(now.logps), old)
            terms = policy_loss(now, old, ref, *credit, micro.owners, config.grpo)
            return terms.loss, (terms, now.logps)

        # Said outright: what comes back laid out in another way is another program. Any row may
        # need any prompt, so that keys and values lie over tp only.
        adapters = jax.tree.map(lambda x: x.sharding, weights_of(self._policy).lora)
        heads = NamedSharding(mesh, PartitionSpec(None, None, "tp", None))

        @partial(jax.jit, donate_argnums=0, out_shardings=((adapters, heads), None, None))
        def rows_gradients(total: Any, *args: Any) -> tuple[Any, LossTerms, jax.Array]:
            gradients, (terms, logps) = jax.grad(rows_loss, (0, 1), has_aux=True)(*args)
            return jax.tree.map(jnp.add, total, gradients), terms, logps

        @partial(jax.jit, donate_argnums=0, out_shardings=adapters)
        def prompt_gradients(
            total: nnx.State, slopes: Prefix, lora: nnx.State, base: nnx.State, prompts: jax.Array
        ) -> nnx.State:
            _, pull = jax.vjp(lambda lora: prefix(network, Weights(lora, base), prompts), lora)
            return jax.tree.map(jnp.add, total, pull(slopes)[0])

        zeros = partial(jax.tree.map, jnp.zeros_like)
        self._no_gradients = jax.jit(zeros, out_shardings=adapters)
        self._no_slopes = jax.jit(zeros, out_shardings=heads)
        self._prefix = jax.jit(partial(prefix, network), out_shardings=heads)
        self._rows_gradients = rows_gradients
        self._prompt_gradients = prompt_gradients
        self._reference_prefix = jax.jit(partial(prefix, reference_network), out_shardings=heads)
        self._reference_logps = jax.jit(lambda *args: logps(reference_network, *args).logps)
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
                    self._reference_logps(self._reference, prefix, batch.lengths, micro)
                    for micro in batch.micro
                ]
                for batch in batches
                for prefix in [self._reference_prefix(self._reference, batch.prompts)]
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
        gradients, terms, all_logps = self._no_gradients(lora), [], []
        for i, batch in enumerate(batches):
            prefix = self._prefix(Weights(lora, base), batch.prompts)
            sums, logps = (gradients, self._no_slopes(prefix)), []
            for j, micro in enumerate(batch.micro):
                ref = references[i][j] if references else None
                before = old[i][j] if old else credit[i][j].weights
                sums, term, now = self._rows_gradients(
                    *(sums, lora, prefix, base, batch.lengths, micro, credit[i][j], ref, before),
                    jnp.array(old is None),
                )
                terms.append(term)
                logps.append(now)
            gradients = self._prompt_gradients(*sums, lora, base, batch.prompts)
            all_logps.append(logps)
        _, state = nnx.split(self._optimizer)
        lora, state, grad_norm = self._apply(lora, frozen, state, total(gradients))
        nnx.update(self._policy, lora)
        nnx.update(self._optimizer, state)
        return _summarise(_from_all(jax.device_get(terms)), float(grad_norm)), all_logps

    def _applied(
        self, lora: nnx.State, base: nnx.State, state: nnx.State, gradients: nnx.State
    ) -> tuple[nnx.State, nnx.State, jax.Array]:
        """One optimizer step; the base only completes the model and is neither read nor copied."""
        optimizer = nnx.merge(self._optimizer_def, state)
        model = nnx.merge(self._policy_def, lora, base)
        grad_norm = optax.tree.norm(gradients)
        optimizer.update(model, gradients)
        return nnx.state(model, nnx.LoRAParam), nnx.state(optimizer), grad_norm


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
