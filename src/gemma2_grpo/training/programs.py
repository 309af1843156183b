"""The compiled parts of an update, made from static halves and shardings, without any weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gemma2_grpo.config import Config, GrpoConfig
from gemma2_grpo.model.attention import LayerCache, Visible, visible
from gemma2_grpo.model.gemma import Prefix, hidden_states, run_from_start
from gemma2_grpo.model.logprobs import TokenLogps, token_logps
from gemma2_grpo.model.weights import Forward, Weights
from gemma2_grpo.training.loss import LossTerms, policy_loss
from gemma2_grpo.training.packing import Credit, MicroBatch


class UpdatePrograms:
    """Programs of the update; each is compiled when first used, or ahead of time by `lower`."""

    def __init__(
        self,
        policy: Forward,
        reference: Forward,
        policy_def: nnx.GraphDef,
        optimizer_def: nnx.GraphDef,
        adapters: Any,
        config: Config,
        mesh: Mesh,
    ) -> None:
        """Prepares the programs; `adapters` are the shardings of the adapters."""
        logps = partial(
            completion_logps,
            temperature=config.rollout.temperature,
            chunk_tokens=config.model.logprob_chunk_tokens,
        )
        loss = partial(rows_loss, partial(logps, policy), config.grpo)
        zeros = partial(jax.tree.map, jnp.zeros_like)
        # Shardings of the outputs are stated: an array laid out in another way would compile
        # another program. Any row may need any prompt, so the KV cache of prompts is sharded over
        # tp only.
        heads = NamedSharding(mesh, PartitionSpec(None, None, "tp", None))
        self.no_gradients = jax.jit(zeros, out_shardings=adapters)
        self.no_cotangents = jax.jit(zeros, out_shardings=heads)
        self.prefix = jax.jit(partial(prompt_prefix, policy), out_shardings=heads)
        self.rows_gradients = jax.jit(
            partial(rows_gradients, loss),
            donate_argnums=0,
            out_shardings=((adapters, heads), None, None),
        )
        self.prompt_gradients = jax.jit(
            partial(prompt_gradients, policy), donate_argnums=0, out_shardings=adapters
        )
        # The policy's own, for a loss on held-out solutions.
        self.policy_logps = jax.jit(lambda *args: logps(policy, *args).logps)
        self.reference_prefix = jax.jit(partial(prompt_prefix, reference), out_shardings=heads)
        self.reference_logps = jax.jit(lambda *args: logps(reference, *args).logps)
        self.apply = jax.jit(
            partial(apply_gradients, policy_def, optimizer_def), donate_argnums=(0, 2)
        )


def prompt_prefix(forward: Forward, weights: Weights, prompts: Int[Array, "B P"]) -> Prefix:
    """The KV cache of right-padded prompts."""
    return run_from_start(forward, weights, prompts)[1]


def rows_loss(
    logps: Callable[..., TokenLogps],
    config: GrpoConfig,
    lora: nnx.State,
    prefix: Prefix,
    base: nnx.State,
    lengths: Int[Array, " B"],
    micro: MicroBatch,
    credit: Credit,
    ref: Float[Array, "R W"] | None,
    old: Float[Array, "R W"],
    is_first: Bool[Array, ""],
) -> tuple[Float[Array, ""], tuple[LossTerms, Float[Array, "R W"]]]:
    """The loss of a micro-batch, with its metrics and the policy's log-probabilities.

    In the first iteration these are the old ones too, whatever `old` is: the ratio is exactly 1.
    """
    now = logps(Weights(lora, base), prefix, lengths, micro)
    # One program serves all iterations, so the choice is made in it. Without stop_gradient the
    # ratio of the first iteration would be constant, and its gradient zero.
    old = jnp.where(is_first, jax.lax.stop_gradient(now.logps), old)
    terms = policy_loss(now, old, ref, *credit, micro.segment_ids, micro.rollout_logps, config)
    return terms.loss, (terms, now.logps)


def rows_gradients(
    loss: Callable[..., Any], sums: tuple[nnx.State, Prefix], *args: Any
) -> tuple[tuple[nnx.State, Prefix], LossTerms, Float[Array, "R W"]]:
    """Adds the gradients of a micro-batch to those of the ones before.

    They are two: of the adapters, through the completions alone, and the cotangent of the
    prompts' KV cache, which all micro-batches of a prompt sum up before `prompt_gradients` takes
    it back through the prompt once. So the memory of a micro-batch does not depend on the group.
    """
    # The sums come in and go out of the same buffers: they are donated.
    gradients, (terms, logps) = jax.grad(loss, (0, 1), has_aux=True)(*args)
    return jax.tree.map(jnp.add, sums, gradients), terms, logps


def prompt_gradients(
    forward: Forward,
    gradients: nnx.State,
    cotangent: Prefix,
    lora: nnx.State,
    base: nnx.State,
    prompts: Int[Array, "B P"],
) -> nnx.State:
    """Adds the gradient of the adapters through the prompts, whose KV cache has this cotangent."""

    def prefix_of(lora: nnx.State) -> Prefix:
        return prompt_prefix(forward, Weights(lora, base), prompts)

    _, pull_back = jax.vjp(prefix_of, lora)
    return jax.tree.map(jnp.add, gradients, pull_back(cotangent)[0])


def apply_gradients(
    policy_def: nnx.GraphDef,
    optimizer_def: nnx.GraphDef,
    lora: nnx.State,
    base: nnx.State,
    state: nnx.State,
    gradients: nnx.State,
) -> tuple[nnx.State, nnx.State, Float[Array, ""]]:
    """One optimizer step; the base only completes the model, neither read nor copied.

    Returns:
        Adapters, state of the optimizer, and the norm of the gradient before clipping.
    """
    optimizer = nnx.merge(optimizer_def, state)
    model = nnx.merge(policy_def, lora, base)
    grad_norm = optax.tree.norm(gradients)
    optimizer.update(model, gradients)
    return nnx.state(model, nnx.LoRAParam), nnx.state(optimizer), grad_norm


def completion_logps(
    forward: Forward,
    weights: Weights,
    prefix: Prefix,
    lengths: Int[Array, " B"],
    micro: MicroBatch,
    *,
    temperature: float,
    chunk_tokens: int,
) -> TokenLogps:
    """Log-probabilities of packed completions after the prompts that they belong to.

    `prefix` is the KV cache [B, P, K, H] of the prompts without the last token of each, of which
    `lengths` count the tokens that are not padding.

    Returns:
        Float32 values [R, W]; they mean nothing at padding.
    """
    rows, width = micro.inputs.shape
    window = forward.architecture.sliding_window_size
    # Block-diagonal and causal: a row holds several completions, and a token sees its own only.
    # Padding is a segment too, so that no token is left without a key to attend to.
    same = micro.segment_ids[:, :, None] == micro.segment_ids[:, None, :]
    causal = same & jnp.tri(width, dtype=bool)
    slots = jnp.arange(prefix[0].keys.shape[1])
    is_prompt = jnp.broadcast_to(
        slots < lengths[micro.prompts][:, None, None], (rows, width, len(slots))
    )
    # A prompt starts at position 0, so that a slot of its cache is a position.
    seen = Visible(
        micro.positions,
        own=visible(causal, micro.positions, micro.positions, window),
        prefix=visible(is_prompt, micro.positions, slots, window),
    )
    # Each row gets the cache of its prompt; the gradient of this gather sums over the rows.
    own_prompt = jax.tree.map(lambda x: x[micro.prompts], prefix)
    caches = [LayerCache(prefix=layer) for layer in own_prompt]
    hidden, _ = hidden_states(forward, weights, micro.inputs, seen, caches)
    if micro.places is not None:  # The head costs more than all layers of a small model.
        hidden = jnp.take_along_axis(hidden, jnp.maximum(micro.places, 0)[..., None], axis=1)
    return token_logps(
        forward,
        weights,
        hidden,
        micro.targets,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
