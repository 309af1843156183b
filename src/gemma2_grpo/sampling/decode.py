"""Decoding a group of completions per prompt, in a batch that shrinks as they finish."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from gemma2_grpo.model.attention import KeyValues, LayerCache, Visible, visible
from gemma2_grpo.model.gemma import hidden_states, run_from_start
from gemma2_grpo.model.logprobs import output_logits
from gemma2_grpo.model.weights import Forward, Weights, gathered_weights
from gemma2_grpo.sampling.decoding_batch import (
    DecodingBatch,
    cache_length,
    least_rows,
    resize,
    sharded,
    smaller_shape,
    smallest_fit,
)
from gemma2_grpo.sampling.draw import Sampling, draw_tokens

# Tokens between two calls of `on_tokens`.
_STREAMED_TOKENS = 4

OnTokens = Callable[[np.ndarray], None]
"""Takes all tokens drawn so far, [B * G, t]."""


class Drawn(NamedTuple):
    """Tokens drawn by one call; only the columns of its own steps mean anything."""

    tokens: Int[Array, "R S"]
    logps: Float[Array, "R S"]
    """Float32 log-probabilities under the distribution that was sampled from."""


class Completed(NamedTuple):
    """All completions, right-padded."""

    tokens: Int[np.ndarray, "N T"]
    """Token ids, with the stop token."""
    logps: Float[np.ndarray, "N T"]
    lengths: Int[np.ndarray, " N"]


def complete(
    forward: Forward,
    weights: Weights,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    limits: Int[np.ndarray, " N"],
    key: Key[Array, ""],
    *,
    max_tokens: int,
    sampling: Sampling,
    mesh: Mesh,
    first_row: int = 0,
    on_tokens: OnTokens | None = None,
) -> Completed:
    """Decodes until every completion has its stop token or is at its limit.

    A row's randomness depends only on its own number, never on the shape of the batch.

    Args:
        forward: How the policy is run.
        weights: Its variables.
        prompts: Token ids, right-padded.
        lengths: Tokens of each prompt.
        limits: Most tokens of each completion, N = B * G; 0 for one that is not wanted.
        key: Key of this call; row r has the key fold_in(key, first_row + r).
        max_tokens: The highest that any limit may be.
        sampling: Temperature, top-p, top-k, and stop and padding tokens.
        mesh: Mesh of the weights.
        first_row: Number of the first row in a batch of which these are a part.
        on_tokens: Called every few tokens, while the device waits.
    """
    tokens = np.full((len(limits), max_tokens), sampling.pad_id, np.int32)
    logps = np.zeros(tokens.shape, np.float32)
    # Which completion each row of the decoding batch is.
    rows = np.arange(len(limits))
    least, length, step = least_rows(len(limits)), cache_length(1, max_tokens), 0
    first = np.int32(first_row)
    batch = prefill(
        forward, weights, prompts, lengths, limits, key, first, length=length, mesh=mesh
    )
    while True:
        # The device runs on by itself until the cache is full or the unfinished rows fit a
        # smaller batch. So the number of programs grows with the logarithm of the sizes, and the
        # host waits for the device a few times per batch, not at every token.
        until = np.int32(step + _STREAMED_TOKENS if on_tokens else max_tokens)
        batch, drawn = decode_until(
            forward, weights, batch, until, sampling=sampling, least=least, mesh=mesh
        )
        now, stopped, drawn = jax.device_get((batch.step, batch.stopped, drawn))
        columns, step = slice(step, int(now)), int(now)
        tokens[rows, columns] = drawn.tokens[:, columns]
        logps[rows, columns] = drawn.logps[:, columns]
        if on_tokens:
            on_tokens(tokens[:, :step])
        if stopped.all() or step == max_tokens:
            break
        kept, shape = smallest_fit(stopped.reshape(batch.shape), least, mesh.shape["fsdp"])
        needed = cache_length(step + 1, max_tokens)
        if (len(kept), needed) == (len(rows), length):  # It only paused, for `on_tokens`.
            continue
        rows, length = rows[kept], needed
        batch = resize(batch, kept, shape=shape, length=length, mesh=mesh)
    return Completed(tokens, logps, _lengths(tokens, limits, sampling.stop_ids))


def _lengths(
    tokens: Int[np.ndarray, "N T"], limits: Int[np.ndarray, " N"], stop_ids: tuple[int, ...]
) -> Int[np.ndarray, " N"]:
    """Tokens of each completion up to and with its first stop token."""
    stops = np.isin(tokens, stop_ids)
    ends = np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, tokens.shape[1])
    return np.minimum(ends, limits)


@partial(jax.jit, static_argnames=("forward", "length", "mesh"))
def prefill(
    forward: Forward,
    weights: Weights,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    limits: Int[Array, " R"],
    key: Key[Array, ""],
    first_row: jax.Array | np.integer | int = 0,
    *,
    length: int,
    mesh: Mesh,
) -> DecodingBatch:
    """Runs each prompt once, but for its last token, which every row of its group runs first.

    The KV cache of the completions is empty, with room for `length` tokens of each.
    """
    rows, group = len(limits), len(limits) // len(prompts)
    _, prefix = run_from_start(forward, weights, prompts[:, :-1])
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
    shape = (rows, length, *prefix[0].keys.shape[2:])
    empty = jnp.zeros(shape, weights.embedding.dtype)
    batch = DecodingBatch(
        step=jnp.array(0),
        last=jnp.repeat(last, group),
        stopped=limits == 0,
        limits=limits,
        keys=jax.vmap(partial(jax.random.fold_in, key))(first_row + jnp.arange(rows)),
        lengths=lengths - 1,
        prefix=prefix,
        own=(KeyValues(empty, empty),) * len(prefix),
    )
    return sharded(batch, mesh)


@partial(jax.jit, static_argnames=("forward", "sampling", "least", "mesh"), donate_argnames="batch")
def decode_until(
    forward: Forward,
    weights: Weights,
    batch: DecodingBatch,
    until: jax.Array | np.integer,
    *,
    sampling: Sampling,
    least: int,
    mesh: Mesh,
) -> tuple[DecodingBatch, Drawn]:
    """Draws tokens until so many are there, the cache is full or a smaller batch would do.

    The old batch is donated: its KV cache is written in place.
    """
    # Once for all tokens: within the loop, each token would wait for an all-gather over fsdp.
    weights = gathered_weights(forward, weights)
    group, length = batch.shape[1], batch.cache_length
    prompt_slots = jnp.arange(batch.prompt_width)
    # The prompt's last token is run with the completion, so that a row's own keys begin at the
    # position of that token. Prompts differ in length: positions are the row's own, while the
    # slot in the cache that a step writes is the same for all rows.
    starts = jnp.repeat(batch.lengths, group)
    is_prompt = jnp.repeat(prompt_slots < batch.lengths[:, None], group, axis=0)
    stop_ids = jnp.array(sampling.stop_ids)
    window = forward.architecture.sliding_window_size
    smaller = smaller_shape(batch.shape, least, mesh.shape["fsdp"])

    def is_on(carry: tuple[DecodingBatch, Drawn]) -> Bool[Array, ""]:
        batch, _ = carry
        return (batch.step < jnp.minimum(length, until)) & ~_fits(batch, smaller)

    def draw(carry: tuple[DecodingBatch, Drawn]) -> tuple[DecodingBatch, Drawn]:
        batch, drawn = carry
        step = batch.step
        positions = (starts + step)[:, None]
        # The slot of this step is written before it is attended to, so it counts as written. The
        # window is by positions, which padding between prompt and completion does not shift.
        written = jnp.broadcast_to(jnp.arange(length) <= step, (len(starts), 1, length))
        own_positions = starts[:, None] + jnp.arange(length)
        seen = Visible(
            positions,
            own=visible(written, positions, own_positions, window),
            prefix=visible(is_prompt[:, None], positions, prompt_slots, window),
            slot=step,
        )
        caches = [LayerCache(*parts) for parts in zip(batch.prefix, batch.own, strict=True)]
        hidden, own = hidden_states(forward, weights, batch.last[:, None], seen, caches)
        # By row and step alone, so that a completion is the same wherever its row is moved.
        keys = jax.vmap(jax.random.fold_in, (0, None))(batch.keys, step)
        tokens, logps = draw_tokens(keys, output_logits(forward, weights, hidden[:, 0]), sampling)
        # A stopped row is run along with the others until it is left out of a smaller batch.
        tokens = jnp.where(batch.stopped, sampling.pad_id, tokens)
        drawn = Drawn(drawn.tokens.at[:, step].set(tokens), drawn.logps.at[:, step].set(logps))
        stopped = batch.stopped | jnp.isin(tokens, stop_ids) | (step + 1 >= batch.limits)
        return batch._replace(step=step + 1, last=tokens, stopped=stopped, own=own), drawn

    shape = (len(batch.last), length)
    empty = Drawn(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    return jax.lax.while_loop(is_on, draw, (batch, empty))


def _fits(batch: DecodingBatch, smaller: tuple[int, int] | None) -> Bool[Array, ""]:
    """Whether the unfinished rows fit the next smaller batch; if there is none, whether all end."""
    active = (~batch.stopped).reshape(batch.shape).sum(axis=1)
    if smaller is None:
        return ~jnp.any(active > 0)
    return ((active > 0).sum() <= smaller[0]) & (active.max() <= smaller[1])
