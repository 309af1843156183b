"""Updates of the policy: accumulated micro-batches of packed completions, one optimizer step."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from gemma2_grpo.config import Config
from gemma2_grpo.model.gemma import Prefix
from gemma2_grpo.model.lora import merge_adapters, updates_merged
from gemma2_grpo.model.mesh import batch_sharding
from gemma2_grpo.model.weights import Model, Weights, forward_of, weights_of
from gemma2_grpo.runtime.processes import gather, total
from gemma2_grpo.training.loss import LossTerms, combine
from gemma2_grpo.training.packing import Credit, PromptBatch
from gemma2_grpo.training.programs import UpdatePrograms

Logps = list[list[Float[Array, "R W"]]]
"""Log-probabilities of the completions, by prompt batch and micro-batch."""

_Tree = TypeVar("_Tree")


class Updater:
    """Runs GRPO's updates on the policy and its optimizer.

    The step of Tunix's trainer is not used: it averages micro-batches that may not weigh the
    same, keeps no log-probabilities from one iteration for the next, and counts and logs every
    micro-batch as a step.

    The tokens of a prompt before its last are run once for all of its completions, and once more
    to take the cotangent of their keys and values back through them.
    """

    def __init__(
        self,
        policy: Model,
        optimizer: nnx.Optimizer,
        reference: Model,
        config: Config,
        mesh: Mesh,
    ) -> None:
        """Prepares the programs; each is compiled when first used."""
        self._policy = policy
        self._optimizer = optimizer
        self._mesh = mesh
        self._iterations = config.grpo.num_iterations
        # With the adapters added into the weights, the adapters' own products are saved.
        self._are_merged = updates_merged(config)
        self._scale = config.model.lora_scale
        self._reference = weights_of(reference)
        policy_def, *_ = nnx.split(policy, nnx.LoRAParam, ...)
        optimizer_def, _ = nnx.split(optimizer)
        adapters = jax.tree.map(lambda x: x.sharding, weights_of(policy).lora)
        self.programs = UpdatePrograms(
            forward_of(policy, config.model.remat, are_merged=self._are_merged),
            forward_of(reference),
            policy_def,
            optimizer_def,
            adapters,
            config,
            mesh,
        )

    @property
    def made(self) -> int:
        """Number of updates so far, without those that were left out."""
        counts = [
            int(variable.get_value())
            for path, variable in nnx.to_flat_state(nnx.state(self._optimizer, nnx.OptState))
            if path[-1] == "count"
        ]
        return max(counts)

    def place(self, batch: _Tree) -> _Tree:
        """Puts arrays on the devices, rows over fsdp."""
        return jax.device_put(
            batch, jax.tree.map(lambda x: batch_sharding(self._mesh, len(x)), batch)
        )

    def reference_logps(self, batches: Sequence[PromptBatch]) -> Logps:
        """Log-probabilities of all completions under the reference; it does not wait for them."""
        run = self.programs
        return _logps(run.reference_prefix, run.reference_logps, self._reference, batches)

    def policy_logps(self, batches: Sequence[PromptBatch]) -> Logps:
        """The same under the policy."""
        return _logps(self.programs.prefix, self.programs.policy_logps, self._weights(), batches)

    def _weights(self) -> Weights:
        """The policy's variables, its adapters added into the base if updates run it so."""
        weights = weights_of(self._policy)
        if not self._are_merged:
            return weights
        return Weights(weights.lora, merge_adapters(weights, self._scale))

    def update(
        self,
        batches: Sequence[PromptBatch],
        credit: Sequence[Sequence[Credit]],
        references: Logps | None,
    ) -> list[dict[str, float]]:
        """Makes the `num_iterations` updates of one batch of rollouts, in all processes alike.

        The log-probabilities of the first iteration, taken before any update, are the old ones
        of all: the ratio is exactly 1 there at any temperature, without a pass of its own.

        Args:
            batches: Packed prompts and completions, on the devices.
            credit: Advantages and token weights of each micro-batch; the weights of all
                micro-batches add up to one loss.
            references: Log-probabilities under the reference; None without a KL penalty.

        Returns:
            Loss and metrics of each iteration by name, over all processes, with `grad_norm`, the
            norm of the gradient before clipping. An update whose norm is not finite is left out.
        """
        metrics, old = [], None
        for _ in range(self._iterations):
            measured, logps = self._one_update(batches, credit, references, old)
            old = old or logps
            metrics.append(measured)
        return metrics

    def _one_update(
        self,
        batches: Sequence[PromptBatch],
        credit: Sequence[Sequence[Credit]],
        references: Logps | None,
        old: Logps | None,
    ) -> tuple[dict[str, float], Logps]:
        frozen = weights_of(self._policy).base
        lora, base = self._weights()
        is_first = jnp.array(old is None)
        gradients, terms, all_logps = self.programs.no_gradients(lora), [], []
        for i, batch in enumerate(batches):
            prefix = self.programs.prefix(Weights(lora, base), batch.prompts)
            sums, logps = (gradients, self.programs.no_cotangents(prefix)), []
            for j, micro in enumerate(batch.micro):
                ref = references[i][j] if references else None
                # In the first iteration the program takes its own log-probabilities and never
                # looks at these: any array of their shape will do.
                before = old[i][j] if old else credit[i][j].weights
                inputs = (lora, prefix, base, batch.lengths, micro, credit[i][j], ref, before)
                sums, term, now = self.programs.rows_gradients(sums, *inputs, is_first)
                terms.append(term)
                logps.append(now)
            gradients = self.programs.prompt_gradients(*sums, lora, base, batch.prompts)
            all_logps.append(logps)
        _, state = nnx.split(self._optimizer)
        # The all-reduce over processes; within one, the mesh has done it.
        lora, state, grad_norm = self.programs.apply(lora, frozen, state, total(gradients))
        nnx.update(self._policy, lora)
        nnx.update(self._optimizer, state)
        metrics = combine(_from_all(jax.device_get(terms)))
        return {**metrics, "grad_norm": float(grad_norm)}, all_logps


def _logps(
    prefix: Callable[..., Prefix],
    logps: Callable[..., Float[Array, "R W"]],
    weights: Weights,
    batches: Sequence[PromptBatch],
) -> Logps:
    """Log-probabilities of all completions under a model, by two of its programs."""
    found = []
    for batch in batches:
        inputs = (weights, prefix(weights, batch.prompts), batch.lengths)
        found.append([logps(*inputs, micro) for micro in batch.micro])
    return found


def _from_all(terms: Sequence[LossTerms]) -> list[LossTerms]:
    """The terms of all processes; one may have none."""
    parts = gather([jax.tree.map(lambda x: x.item(), term) for term in terms])
    return [LossTerms(*term) for part in parts for term in part]
