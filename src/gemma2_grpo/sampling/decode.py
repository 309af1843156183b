"""Decoding a group of completions per prompt on a grid that shrinks as they finish."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma2_grpo.model.attention import KeyValues, LayerCache, Visible, visible
from gemma2_grpo.model.gemma import (
    Network,
    Prefix,
    Weights,
    gathered_weights,
    hidden_states,
    run_from_start,
)
from gemma2_grpo.model.logprobs import output_logits
from gemma2_grpo.model.tokenizer import bucket
from gemma2_grpo.sampling.draw import Sampling, draw_tokens

# A cache begins with room for so many tokens and doubles; each size is one more program.
_FIRST_SLOTS = 64
# A grid is not made smaller than this, nor than a quarter of its first size: the weights are then
# what decoding waits for, and every size is one more program.
_LEAST_ROWS = 4
# Tokens between two calls of `on_tokens`.
_STREAMED_TOKENS = 4

OnTokens = Callable[[np.ndarray], None]


class Grid(NamedTuple):
    """Completions that are being decoded: B prompts with G rows each, R = B * G."""

    step: jax.Array
    """Tokens that each row has, the same for all."""
    last: jax.Array
    """Token that is run next: at first the last of the prompt, [R]."""
    stopped: jax.Array
    """Rows that take no more tokens [R]."""
    limits: jax.Array
    """The most tokens of each row [R]."""
    keys: jax.Array
    """Random key of each row; its token t is drawn with fold_in(key, t), [R]."""
    lengths: jax.Array
    """Tokens of each prompt without its last [B]."""
    prefix: Prefix
    """Keys and values of those, [B, P, K, H]."""
    own: Mapping[str, KeyValues]
    """Keys and values of the rows, [R, S, K, H]."""


class Drawn(NamedTuple):
    """What one call drew; only the columns of its own steps mean anything."""

    tokens: jax.Array
    """[R, S]."""
    logps: jax.Array
    """Float32, under the distribution that was sampled from, [R, S]."""


class Completed(NamedTuple):
    """All completions, right-padded."""

    tokens: np.ndarray
    """[N, T], with the stop token."""
    logps: np.ndarray
    """[N, T]."""
    lengths: np.ndarray
    """[N]."""


def complete(
    network: Network,
    weights: Weights,
    prompts: jax.Array,
    lengths: jax.Array,
    limits: np.ndarray,
    key: jax.Array,
    *,
    max_tokens: int,
    sampling: Sampling,
    mesh: Mesh,
    first_row: int = 0,
    on_tokens: OnTokens | None = None,
) -> Completed:
    """Decodes until every row has stopped or is at its limit.

    The device runs on by itself until the cache is full, or until the rows that are left fit a
    smaller grid; then they are moved there. So the number of programs grows with the logarithm of
    the sizes. A row's randomness depends only on its own number, never on the grid.

    Args:
        network: Static half of the policy.
        weights: Its variables.
        prompts: Token ids [B, P], right-padded.
        lengths: Tokens of each prompt [B].
        limits: The most tokens of each completion [B * G]; 0 for one that is not wanted.
        key: Key of this call; row r has the key fold_in(key, first_row + r).
        max_tokens: The most that any limit may be.
        sampling: How tokens are drawn.
        mesh: Mesh of the weights.
        first_row: Number of the first row in a batch of which these are a part.
        on_tokens: Takes all tokens so far [B * G, t], every few tokens; the device waits for it.
    """
    rows = np.arange(len(limits))
    tokens = np.full((len(rows), max_tokens), sampling.pad_id, np.int32)
    logps = np.zeros((len(rows), max_tokens), np.float32)
    least = least_rows(len(limits))
    slots, step = bucket(1, _FIRST_SLOTS, max_tokens), 0
    grid = start_grid(
        *(network, weights, prompts, lengths, limits, key, np.int32(first_row)),
        slots=slots,
        mesh=mesh,
    )
    while True:
        until = np.int32(step + _STREAMED_TOKENS if on_tokens else max_tokens)
        grid, drawn = fill_grid(
            network, weights, grid, until, sampling=sampling, least=least, mesh=mesh
        )
        now, stopped, drawn = jax.device_get((grid.step, grid.stopped, drawn))
        columns, step = slice(step, int(now)), int(now)
        tokens[rows, columns] = drawn.tokens[:, columns]
        logps[rows, columns] = drawn.logps[:, columns]
        if on_tokens:
            on_tokens(tokens[:, :step])
        if stopped.all() or step == max_tokens:
            break
        kept, shape = _fit(stopped.reshape(len(grid.lengths), -1), least, mesh.shape["fsdp"])
        needed = bucket(step + 1, _FIRST_SLOTS, max_tokens)
        if (len(kept), needed) == (len(rows), slots):  # It only paused, for `on_tokens`.
            continue
        rows, slots = rows[kept], needed
        grid = regrid(grid, kept, shape=shape, slots=slots, mesh=mesh)
    return Completed(tokens, logps, _lengths(tokens, limits, sampling.stop_ids))


def least_rows(rows: int) -> int:
    """Rows of the smallest grid to which one of so many is made smaller."""
    return max(_LEAST_ROWS, rows // 4)


def cache_sizes(max_tokens: int) -> list[int]:
    """Slots that the cache of completions of so many tokens has in turn."""
    sizes = [bucket(1, _FIRST_SLOTS, max_tokens)]
    while sizes[-1] < max_tokens:
        sizes.append(bucket(sizes[-1] + 1, _FIRST_SLOTS, max_tokens))
    return sizes


def _lengths(tokens: np.ndarray, limits: np.ndarray, stop_ids: tuple[int, ...]) -> np.ndarray:
    """Tokens of each completion up to and with its first stop token."""
    stops = np.isin(tokens, stop_ids)
    ends = np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, tokens.shape[1])
    return np.minimum(ends, limits)


def _smaller(shape: tuple[int, int], least: int, fsdp: int) -> tuple[int, int] | None:
    """The next grid: half as many rows a prompt, down to one, and then half as many prompts.

    None where that would leave fewer rows than the least, or rows that do not divide over fsdp.
    One way down keeps the programs few.
    """
    prompts, group = shape
    prompts, group = (prompts, -(-group // 2)) if group > 1 else (-(-prompts // 2), 1)
    rows = prompts * group
    is_useful = least <= rows < shape[0] * shape[1] and rows % fsdp == 0
    return (prompts, group) if is_useful else None


def _fit(stopped: np.ndarray, least: int, fsdp: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Rows [R'] of the smallest grid that holds all unfinished ones, and its shape."""
    active = (~stopped).sum(axis=1)
    busy, most = int((active > 0).sum()), int(active.max())
    shape = stopped.shape
    while (smaller := _smaller(shape, least, fsdp)) and smaller[0] >= busy and smaller[1] >= most:
        shape = smaller
    # Busy prompts first and unfinished rows first; stable, so that the order is a function of it.
    prompts = np.argsort(-active, kind="stable")[: shape[0]]
    rows = np.argsort(stopped[prompts], axis=1, kind="stable")[:, : shape[1]]
    return (prompts[:, None] * stopped.shape[1] + rows).ravel(), shape


@partial(jax.jit, static_argnames=("network", "slots", "mesh"))
def start_grid(
    network: Network,
    weights: Weights,
    prompts: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    key: jax.Array,
    first_row: jax.Array | int = 0,
    *,
    slots: int,
    mesh: Mesh,
) -> Grid:
    """Runs each prompt but for its last token, which every row of its group runs first."""
    batch, rows = len(prompts), len(limits)
    _, prefix = run_from_start(network, weights, prompts[:, :-1])
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
    shape = (rows, slots, *prefix[network.layers[0]].keys.shape[2:])
    empty = jnp.zeros(shape, weights.embedding.dtype)
    own = dict.fromkeys(network.layers, KeyValues(empty, empty))
    return _sharded(
        Grid(
            step=jnp.array(0),
            last=jnp.repeat(last, rows // batch),
            stopped=limits == 0,
            limits=limits,
            keys=jax.vmap(partial(jax.random.fold_in, key))(first_row + jnp.arange(rows)),
            lengths=lengths - 1,
            prefix=prefix,
            own=own,
        ),
        mesh,
    )


@partial(jax.jit, static_argnames=("network", "sampling", "least", "mesh"), donate_argnames="grid")
def fill_grid(
    network: Network,
    weights: Weights,
    grid: Grid,
    until: jax.Array | np.integer,
    *,
    sampling: Sampling,
    least: int,
    mesh: Mesh,
) -> tuple[Grid, Drawn]:
    """Draws tokens until so many are there, the cache is full or a smaller grid would do."""
    weights = gathered_weights(network, weights)
    rows, slots = grid.own[network.layers[0]].keys.shape[:2]
    batch = len(grid.lengths)
    width = grid.prefix[network.layers[0]].keys.shape[1]
    smaller = _smaller((batch, rows // batch), least, mesh.shape["fsdp"])
    real = jnp.repeat(jnp.arange(width) < grid.lengths[:, None], rows // batch, axis=0)
    starts = jnp.repeat(grid.lengths, rows // batch)
    stop_ids = jnp.array(sampling.stop_ids)

    def fits_smaller(stopped: jax.Array) -> jax.Array:
        active = (~stopped).reshape(batch, -1).sum(axis=1)
        if smaller is None:
            return ~jnp.any(active > 0)
        return ((active > 0).sum() <= smaller[0]) & (active.max() <= smaller[1])

    def go_on(carry: tuple[Grid, Drawn]) -> jax.Array:
        grid, _ = carry
        return (grid.step < jnp.minimum(slots, until)) & ~fits_smaller(grid.stopped)

    def draw(carry: tuple[Grid, Drawn]) -> tuple[Grid, Drawn]:
        grid, drawn = carry
        step = grid.step
        positions = (starts + step)[:, None]
        written = jnp.broadcast_to(jnp.arange(slots) <= step, (rows, 1, slots))
        seen = Visible(
            own=visible(
                written,
                positions,
                starts[:, None] + jnp.arange(slots),
                network.window,
            ),
            prefix=visible(real[:, None], positions, jnp.arange(width), network.window),
            slot=step,
        )
        cache = {layer: LayerCache(grid.prefix[layer], grid.own[layer]) for layer in network.layers}
        hidden, own = hidden_states(network, weights, grid.last[:, None], positions, seen, cache)
        keys = jax.vmap(jax.random.fold_in, (0, None))(grid.keys, step)
        tokens, logps = draw_tokens(keys, output_logits(network, weights, hidden[:, 0]), sampling)
        tokens = jnp.where(grid.stopped, sampling.pad_id, tokens)
        drawn = Drawn(drawn.tokens.at[:, step].set(tokens), drawn.logps.at[:, step].set(logps))
        stopped = grid.stopped | jnp.isin(tokens, stop_ids) | (step + 1 >= grid.limits)
        return grid._replace(step=step + 1, last=tokens, stopped=stopped, own=own), drawn

    empty = Drawn(jnp.zeros((rows, slots), jnp.int32), jnp.zeros((rows, slots), jnp.float32))
    return jax.lax.while_loop(go_on, draw, (grid, empty))


@partial(jax.jit, static_argnames=("shape", "slots", "mesh"))
def regrid(grid: Grid, kept: jax.Array, *, shape: tuple[int, int], slots: int, mesh: Mesh) -> Grid:
    """Moves rows to a grid of another shape, with a cache of so many slots."""
    rows, batch = len(grid.last), len(grid.lengths)
    prompts = kept[:: shape[1]] // (rows // batch)

    def move(x: jax.Array) -> jax.Array:
        room = slots - x.shape[1]
        return jnp.pad(x[kept], [(0, 0), (0, room), (0, 0), (0, 0)])

    moved = Grid(
        step=grid.step,
        last=grid.last[kept],
        stopped=grid.stopped[kept],
        limits=grid.limits[kept],
        keys=grid.keys[kept],
        lengths=grid.lengths[prompts],
        prefix=jax.tree.map(lambda x: x[prompts], grid.prefix),
        own=jax.tree.map(move, grid.own),
    )
    return _sharded(moved, mesh)


def _sharded(grid: Grid, mesh: Mesh) -> Grid:
    """Keys and values over fsdp and tp; where they lie decides the decoder's speed."""

    def place(x: Any) -> Any:
        fsdp = "fsdp" if len(x) % mesh.shape["fsdp"] == 0 else None
        heads = NamedSharding(mesh, PartitionSpec(fsdp, None, "tp", None))
        return jax.lax.with_sharding_constraint(x, heads)

    return grid._replace(prefix=jax.tree.map(place, grid.prefix), own=jax.tree.map(place, grid.own))
