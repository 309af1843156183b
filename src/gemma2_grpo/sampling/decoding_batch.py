"""The decoding batch: completions under way with their KV cache, and the sizes that it takes.

It starts with all completions of a batch of prompts and a short cache. As completions finish, the
batch shrinks; as they get longer, the cache grows. Each size is one more compiled program.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Key

from gemma2_grpo.model.attention import KeyValues
from gemma2_grpo.model.gemma import Prefix
from gemma2_grpo.model.tokenizer import bucket

# The KV cache starts with room for this many tokens of each completion, and doubles.
_FIRST_LENGTH = 64
# The batch shrinks neither below this nor below a quarter of its first size: reading the weights
# then takes most of the time, and every size is one more program.
_LEAST_ROWS = 4


class DecodingBatch(NamedTuple):
    """Completions that are being decoded: B prompts with G rows each, R = B * G."""

    step: Int[Array, ""]
    """Tokens drawn so far, the same number in each row."""
    last: Int[Array, " R"]
    """Token that is run next: at first the last of the prompt."""
    stopped: Bool[Array, " R"]
    """Rows that take no more tokens."""
    limits: Int[Array, " R"]
    """Most tokens of each row."""
    keys: Key[Array, " R"]
    """Random key of each row; its token t is drawn with fold_in(key, t)."""
    lengths: Int[Array, " B"]
    """Tokens of each prompt without its last."""
    prefix: Prefix
    """KV cache of those prompt tokens by layer, [B, P, K, H], which the rows of a group share."""
    own: tuple[KeyValues, ...]
    """KV cache of the completions by layer, [R, S, K, H]."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of prompts, and rows of each, (B, G)."""
        return len(self.lengths), len(self.last) // len(self.lengths)

    @property
    def prompt_width(self) -> int:
        """Padded length P of the prompts."""
        return self.prefix[0].keys.shape[1]

    @property
    def cache_length(self) -> int:
        """Room for tokens of each completion, S."""
        return self.own[0].keys.shape[1]


def least_rows(rows: int) -> int:
    """Rows of the smallest batch to which a decoding batch of this many rows shrinks."""
    return max(_LEAST_ROWS, rows // 4)


def cache_length(tokens: int, max_tokens: int) -> int:
    """KV-cache length that holds this many tokens of each completion."""
    return bucket(tokens, _FIRST_LENGTH, max_tokens)


def cache_lengths(max_tokens: int) -> list[int]:
    """KV-cache lengths used in turn for completions of up to `max_tokens`."""
    lengths = [cache_length(1, max_tokens)]
    while lengths[-1] < max_tokens:
        lengths.append(cache_length(lengths[-1] + 1, max_tokens))
    return lengths


def smaller_shape(shape: tuple[int, int], least: int, fsdp: int) -> tuple[int, int] | None:
    """The next smaller batch: half as many rows per prompt, down to one, then half the prompts.

    None if that would leave fewer rows than `least`, or rows that do not divide over fsdp. With
    only one way to shrink there are few programs.
    """
    prompts, group = shape
    prompts, group = (prompts, -(-group // 2)) if group > 1 else (-(-prompts // 2), 1)
    rows = prompts * group
    is_useful = least <= rows < shape[0] * shape[1] and rows % fsdp == 0
    return (prompts, group) if is_useful else None


def smallest_fit(
    stopped: Bool[np.ndarray, "B G"], least: int, fsdp: int
) -> tuple[Int[np.ndarray, " R"], tuple[int, int]]:
    """Rows and shape of the smallest batch that holds all unfinished completions."""
    active = (~stopped).sum(axis=1)
    busy, most = int((active > 0).sum()), int(active.max())
    shape = stopped.shape
    while (
        (smaller := smaller_shape(shape, least, fsdp)) and smaller[0] >= busy and smaller[1] >= most
    ):
        shape = smaller
    # Prompts with the most unfinished rows come first, and in each its unfinished rows. The sort
    # is stable, so that the order depends on `stopped` alone.
    prompts = np.argsort(-active, kind="stable")[: shape[0]]
    rows = np.argsort(stopped[prompts], axis=1, kind="stable")[:, : shape[1]]
    return (prompts[:, None] * stopped.shape[1] + rows).ravel(), shape


@partial(jax.jit, static_argnames=("shape", "length", "mesh"))
def resize(
    batch: DecodingBatch,
    kept: Int[Array, " R"],
    *,
    shape: tuple[int, int],
    length: int,
    mesh: Mesh,
) -> DecodingBatch:
    """Moves rows to a decoding batch of another shape, with a KV cache of another length."""
    prompts = kept[:: shape[1]] // batch.shape[1]

    def move(x: jax.Array) -> jax.Array:
        return jnp.pad(x[kept], [(0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)])

    moved = DecodingBatch(
        step=batch.step,
        last=batch.last[kept],
        stopped=batch.stopped[kept],
        limits=batch.limits[kept],
        keys=batch.keys[kept],
        lengths=batch.lengths[prompts],
        prefix=jax.tree.map(lambda x: x[prompts], batch.prefix),
        own=jax.tree.map(move, batch.own),
    )
    return sharded(moved, mesh)


def sharded(batch: DecodingBatch, mesh: Mesh) -> DecodingBatch:
    """Shards the KV caches, rows over fsdp and heads over tp, which decides decoding speed."""

    def place(x: jax.Array) -> jax.Array:
        fsdp = "fsdp" if len(x) % mesh.shape["fsdp"] == 0 else None
        heads = NamedSharding(mesh, PartitionSpec(fsdp, None, "tp", None))
        return jax.lax.with_sharding_constraint(x, heads)

    prefix, own = jax.tree.map(place, (batch.prefix, batch.own))
    return batch._replace(prefix=prefix, own=own)
