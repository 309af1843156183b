"""Sampling completions: one prefill per distinct prompt, its cache shared by the group."""

import math
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.models.gemma import model as gemma
from tunix.rl.rollout import base_rollout

from gemma2_grpo.engine.forward import Network, Weights, hidden_states, output_logits, split_model


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. A temperature of 0 takes the likeliest."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    group: int
    """Completions per prompt."""
    stop_ids: tuple[int, ...]
    pad_id: int


class Sampled(NamedTuple):
    """Completions as the device gives them, right-padded."""

    tokens: jax.Array
    """Token ids [B * G, T], the stop token included."""
    logps: jax.Array
    """Float32 log-probabilities [B * G, T] under the distribution that was sampled from."""


class GroupRollout(base_rollout.BaseRollout):
    """Tunix rollout engine for groups of completions.

    Unlike Tunix's own, it computes the prompt once per group, draws every completion from a key
    of its own, keeps the stop token (it has to be trained on), and gives the same result however
    prompts were padded.
    """

    def __init__(
        self,
        rollout_actor: gemma.Gemma,
        tokenizer: Any,
        mesh: Mesh,
        rollout_config: base_rollout.RolloutConfig,
    ) -> None:
        """Takes what `RLCluster` hands to a rollout engine."""
        del rollout_config  # It is given again at each call, where it may differ.
        self._model = rollout_actor
        self._network = split_model(rollout_actor)[0]
        self._tokenizer = tokenizer
        self._mesh = mesh

    def generate(
        self,
        prompts: list[str],
        rollout_config: base_rollout.RolloutConfig,
        **_: Any,
    ) -> base_rollout.RolloutOutput:
        """Samples one completion per entry; equal neighbours form a group and share a prefill.

        Args:
            prompts: Rendered prompts, each repeated once per completion that is wanted.
            rollout_config: Sampling settings. `seed` is the key of this very call and
                `max_prompt_length` the width to which prompts are padded.

        Returns:
            Texts, token ids with their stop token, and float32 log-probabilities under the
            distribution that was sampled from (temperature and truncation included).
        """
        # The largest group that every run of equal prompts is made of.
        group = math.gcd(*(len(list(copies)) for _, copies in groupby(prompts)))
        ids = [self._tokenizer.encode(prompt) for prompt in prompts[::group]]
        padded = pad_left(ids, rollout_config.max_prompt_length, self.pad_id())
        sampling = Sampling(
            temperature=rollout_config.temperature,
            top_p=1.0 if rollout_config.top_p is None else rollout_config.top_p,
            top_k=rollout_config.top_k or 0,
            max_tokens=rollout_config.max_tokens_to_generate,
            group=group,
            stop_ids=tuple(rollout_config.eos_tokens or (self.eos_id(),)),
            pad_id=self.pad_id(),
        )
        lengths = np.array([len(row) for row in ids], np.int32)
        sharding = batch_sharding(self._mesh, len(padded))
        sampled = jax.device_get(
            sample(
                self._network,
                split_model(self._model)[1],
                jax.device_put(padded, sharding),
                jax.device_put(lengths, sharding),
                jax.random.key(0) if rollout_config.seed is None else rollout_config.seed,
                sampling=sampling,
                mesh=self._mesh,
            )
        )
        ends = completion_lengths(sampled.tokens, sampling.stop_ids)
        tokens = [row[:end] for row, end in zip(sampled.tokens, ends, strict=True)]
        return base_rollout.RolloutOutput(
            text=[self._tokenizer.decode(row) for row in tokens],
            logits=[],
            tokens=tokens,
            left_padded_prompt_tokens=np.repeat(padded, group, axis=0),
            logprobs=[row[:end] for row, end in zip(sampled.logps, ends, strict=True)],
        )

    def get_per_token_logps(
        self, prompt_tokens: jax.Array, completion_tokens: jax.Array
    ) -> jax.Array:
        """Not part of this engine: the update computes old log-probabilities itself."""
        raise NotImplementedError("the first update iteration gives the old log-probabilities")

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Takes new weights; with a shared model there is nothing to do."""
        del filter_types
        nnx.update(self._model, params)

    def pad_id(self) -> int:
        """Id of the padding token."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """Id of the token that ends a turn."""
        return self._tokenizer.eos_id()

    def model(self) -> gemma.Gemma:
        """The policy that samples."""
        return self._model


def pad_left(rows: list[list[int]], width: int, pad_id: int) -> np.ndarray:
    """Left-pads token ids to [B, width].

    Raises:
        ValueError: if a row is longer; cutting a prompt would change the question.
    """
    padded = np.full((len(rows), width), pad_id, np.int32)
    for i, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(f"prompt of {len(row)} tokens exceeds max_prompt_tokens = {width}")
        padded[i, width - len(row) :] = row
    return padded


def completion_lengths(tokens: np.ndarray, stop_ids: tuple[int, ...]) -> np.ndarray:
    """Tokens of each completion [R] up to and with its first stop token."""
    stops = np.isin(tokens, stop_ids)
    return np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, tokens.shape[1])


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Rows over the fsdp axis where they divide, else on every device."""
    divides = rows % mesh.shape["fsdp"] == 0
    return NamedSharding(mesh, PartitionSpec("fsdp") if divides else PartitionSpec())


@partial(jax.jit, static_argnames=("network", "sampling", "mesh"))
def sample(
    network: Network,
    weights: Weights,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    key: jax.Array,
    *,
    sampling: Sampling,
    mesh: Mesh,
) -> Sampled:
    """Prefills each prompt once, then decodes its group until every row has stopped.

    Prompts are left-padded so that all rows write one cache slot at a time, and slots serve as
    positions: rotary embeddings depend only on distances, so the shift is the same distribution,
    and Tunix's sliding-window mask, which compares positions with slots, is exact.

    Args:
        network: Static half of the policy.
        weights: Its variables.
        prompts: Token ids [B, P], left-padded.
        prompt_lengths: Real tokens of each prompt [B].
        key: Key of this call; row r draws its token t from fold_in(fold_in(key, r), t).
        sampling: How tokens are drawn.
        mesh: Mesh of the weights.
    """
    batch, width = prompts.shape
    size = width + sampling.max_tokens
    rows = batch * sampling.group
    slots = jnp.arange(size)
    is_real = slots >= (width - prompt_lengths)[:, None]
    model = network.merge(weights)
    cache = _shard_cache(model.init_cache(batch, size, weights.embedding.dtype), mesh, batch)

    positions = jnp.broadcast_to(slots[:width], prompts.shape)
    causal = slots[None, :] <= slots[:width, None]
    hidden, cache = hidden_states(
        network, weights, prompts, positions, is_real[:, None] & causal[None], cache
    )
    logits = output_logits(network, weights, hidden[:, -1])

    logits, is_real, cache = jax.tree.map(
        lambda x: jnp.repeat(x, sampling.group, axis=0), (logits, is_real, cache)
    )
    cache = _shard_cache(cache, mesh, rows)
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))
    stop_ids = jnp.array(sampling.stop_ids)

    def draw(step: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
        return draw_tokens(keys, logits, sampling)

    def decode(carry: Any) -> Any:
        step, out, last, stopped, cache = carry
        slot = width + step - 1
        mask = is_real & (slots <= slot)
        hidden, cache = hidden_states(
            network, weights, last[:, None], jnp.full((rows, 1), slot), mask[:, None], cache
        )
        tokens, logps = draw(step, output_logits(network, weights, hidden[:, 0]))
        tokens = jnp.where(stopped, sampling.pad_id, tokens)
        out = Sampled(out.tokens.at[:, step].set(tokens), out.logps.at[:, step].set(logps))
        return step + 1, out, tokens, stopped | jnp.isin(tokens, stop_ids), cache

    def unfinished(carry: Any) -> jax.Array:
        step, _, _, stopped, _ = carry
        return (step < sampling.max_tokens) & ~stopped.all()

    tokens, logps = draw(jnp.array(0), logits)
    out = Sampled(
        jnp.full((rows, sampling.max_tokens), sampling.pad_id, jnp.int32).at[:, 0].set(tokens),
        jnp.zeros((rows, sampling.max_tokens), jnp.float32).at[:, 0].set(logps),
    )
    first = (jnp.array(1), out, tokens, jnp.isin(tokens, stop_ids), cache)
    return jax.lax.while_loop(unfinished, decode, first)[1]


def draw_tokens(
    keys: jax.Array, logits: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Draws a token per row and gives its log-probability under the drawing distribution.

    Args:
        keys: One key per row [R].
        logits: Float32 logits [R, V].
        sampling: Temperature and truncation.

    Returns:
        Token ids [R] and log-probabilities [R].
    """
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
        logps = jax.nn.log_softmax(logits)
    else:
        logps = jax.nn.log_softmax(truncate(logits / sampling.temperature, sampling))
        tokens = jax.vmap(jax.random.categorical)(keys, logps)
    return tokens.astype(jnp.int32), jnp.take_along_axis(logps, tokens[:, None], axis=1)[:, 0]


def truncate(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets what top-k and top-p exclude to minus infinity, [R, V]."""
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < sampling.top_p, descending, jnp.inf)
        logits = jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)
    return logits


def _shard_cache(cache: Any, mesh: Mesh, rows: int) -> Any:
    """Keys and values [R, S, K, H] over fsdp and tp; where they lie decides the decoder's speed."""
    fsdp = "fsdp" if rows % mesh.shape["fsdp"] == 0 else None
    heads = NamedSharding(mesh, PartitionSpec(fsdp, None, "tp", None))
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, heads) if x.ndim == 4 else x, cache
    )
