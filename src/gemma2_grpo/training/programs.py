"""The compiled parts of an update, made from static halves and shardings, without any weights."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma2_grpo.config import Config
from gemma2_grpo.model.attention import LayerCache, Visible, visible
from gemma2_grpo.model.gemma import Network, Prefix, Weights, hidden_states, run_from_start
from gemma2_grpo.model.logprobs import TokenLogps, token_logps
from gemma2_grpo.training.loss import LossTerms, policy_loss
from gemma2_grpo.training.packing import MicroBatch


class Credit(NamedTuple):
    """What the rewards say of each token of a micro-batch."""

    advantages: Any
    """[R, W]."""
    weights: Any
    """Weight in the loss of the whole batch, 0 for what does not count, [R, W]."""


class UpdatePrograms:
    """Programs of the update; each is compiled when first used, or ahead of time by `lower`."""

    def __init__(
        self,
        policy: Network,
        reference: Network,
        policy_def: nnx.GraphDef,
        optimizer_def: nnx.GraphDef,
        adapters: Any,
        config: Config,
        mesh: Mesh,
    ) -> None:
        """Prepares the programs.

        Args:
            policy: Static half of the policy, as it is differentiated.
            reference: Static half of the reference.
            policy_def: Graph of the policy as the optimizer knows it.
            optimizer_def: Graph of the optimizer.
            adapters: Shardings of the adapters.
            config: Objective, temperature and size of chunks.
            mesh: Mesh of the weights.
        """
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
            now = logps(policy, Weights(lora, base), prefix, lengths, micro)
            old = jnp.where(is_first, jax.lax.stop_gradient(now.logps), old)
            terms = policy_loss(now, old, ref, *credit, micro.owners, config.grpo)
            return terms.loss, (terms, now.logps)

        # Said outright: what comes back laid out in another way is another program. Any row may
        # need any prompt, so that keys and values lie over tp only.
        heads = NamedSharding(mesh, PartitionSpec(None, None, "tp", None))

        @partial(jax.jit, donate_argnums=0, out_shardings=((adapters, heads), None, None))
        def rows_gradients(total: Any, *args: Any) -> tuple[Any, LossTerms, jax.Array]:
            gradients, (terms, logps) = jax.grad(rows_loss, (0, 1), has_aux=True)(*args)
            return jax.tree.map(jnp.add, total, gradients), terms, logps

        @partial(jax.jit, donate_argnums=0, out_shardings=adapters)
        def prompt_gradients(
            total: nnx.State, slopes: Prefix, lora: nnx.State, base: nnx.State, prompts: jax.Array
        ) -> nnx.State:
            _, pull = jax.vjp(lambda lora: prefix(policy, Weights(lora, base), prompts), lora)
            return jax.tree.map(jnp.add, total, pull(slopes)[0])

        @partial(jax.jit, donate_argnums=(0, 2))
        def apply(
            lora: nnx.State, base: nnx.State, state: nnx.State, gradients: nnx.State
        ) -> tuple[nnx.State, nnx.State, jax.Array]:
            """One optimizer step; the base only completes the model, neither read nor copied."""
            optimizer = nnx.merge(optimizer_def, state)
            model = nnx.merge(policy_def, lora, base)
            grad_norm = optax.tree.norm(gradients)
            optimizer.update(model, gradients)
            return nnx.state(model, nnx.LoRAParam), nnx.state(optimizer), grad_norm

        zeros = partial(jax.tree.map, jnp.zeros_like)
        self.no_gradients = jax.jit(zeros, out_shardings=adapters)
        self.no_slopes = jax.jit(zeros, out_shardings=heads)
        self.prefix = jax.jit(partial(prefix, policy), out_shardings=heads)
        self.rows_gradients = rows_gradients
        self.prompt_gradients = prompt_gradients
        self.reference_prefix = jax.jit(partial(prefix, reference), out_shardings=heads)
        self.reference_logps = jax.jit(lambda *args: logps(reference, *args).logps)
        self.apply = apply


def completion_logps(
    network: Network,
    weights: Weights,
    prefix: Prefix,
    lengths: jax.Array,
    micro: MicroBatch,
    *,
    temperature: float,
    chunk_tokens: int,
) -> TokenLogps:
    """Log-probabilities of packed completions after the prompts that they belong to.

    Args:
        network: Static half of the model.
        weights: Its variables.
        prefix: Keys and values of the prompts [B, P, K, H], without the last token of each.
        lengths: How many of them are real [B].
        micro: The completions.
        temperature: Divides the logits, as in sampling.
        chunk_tokens: Completion positions whose logits exist at one time.

    Returns:
        Float32 values [R, W]; they mean nothing at padding.
    """
    width = micro.inputs.shape[1]
    own = micro.owners[:, :, None] == micro.owners[:, None, :]
    slots = jnp.arange(prefix[network.layers[0]].keys.shape[1])
    real = jnp.broadcast_to(
        slots < lengths[micro.prompts][:, None, None], (*micro.inputs.shape, len(slots))
    )
    seen = Visible(
        own=visible(
            own & jnp.tri(width, dtype=bool), micro.positions, micro.positions, network.window
        ),
        prefix=visible(real, micro.positions, slots, network.window),
    )
    rows = jax.tree.map(lambda x: x[micro.prompts], prefix)
    cache = {layer: LayerCache(prefix=rows[layer]) for layer in network.layers}
    hidden, _ = hidden_states(network, weights, micro.inputs, micro.positions, seen, cache)
    return token_logps(
        network,
        weights,
        hidden,
        micro.targets,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
