"""Supervised training on worked solutions, with the loss on completions only."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from gemma2_grpo.model.gemma import run_from_start
from gemma2_grpo.model.logprobs import map_chunks, output_logits
from gemma2_grpo.model.mesh import batch_sharding
from gemma2_grpo.model.weights import Forward, Model, Remat, Weights, forward_of, weights_of


@dataclass(frozen=True)
class Row:
    """One training sequence; the loss is taken where `is_target` is true."""

    tokens: list[int]
    is_target: list[bool]


def pack(rows: list[Row], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads rows to token ids and target mask, both [R, width]; longer rows are cut."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    targets = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        kept = min(width, len(row.tokens))
        tokens[i, :kept] = row.tokens[:kept]
        targets[i, :kept] = row.is_target[:kept]
    return tokens, targets


def next_token_loss(
    forward: Forward,
    weights: Weights,
    tokens: jax.Array,
    targets: jax.Array,
    chunk_tokens: int,
) -> jax.Array:
    """Mean negative log-likelihood in nats of the target tokens of right-padded rows [R, L]."""
    hidden, _ = run_from_start(forward, weights, tokens)

    @jax.checkpoint
    def chunk_losses(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, ids = chunk
        logits = output_logits(forward, weights, hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids)

    losses = map_chunks(chunk_losses, (hidden[:, :-1], tokens[:, 1:]), chunk_tokens)
    return jnp.sum(losses * targets[:, 1:]) / jnp.maximum(targets[:, 1:].sum(), 1)


def train_supervised(
    model: Model,
    batches: Iterable[list[Row]],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    width: int,
    pad_id: int,
    chunk_tokens: int = 128,
    train_base: bool = True,
    remat: Remat = "none",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains the model in place, one update per batch.

    Args:
        model: Updated in place.
        batches: Rows of each step, always equally many, so that one program is compiled.
        optimizer: What turns gradients into updates.
        mesh: Mesh of the weights.
        width: Tokens to which rows are padded or cut.
        pad_id: Id of the padding token.
        chunk_tokens: Positions whose logits exist at one time.
        train_base: Train all weights; else only the adapters.
        remat: What the backward pass recomputes instead of keeping.
        on_step: Called with the number of finished steps and the loss of the last.
    """
    forward = forward_of(model, remat)
    weights = weights_of(model)
    trained, frozen = (weights.base, weights.lora) if train_base else weights

    def loss(trained: nnx.State, frozen: nnx.State, tokens: jax.Array, targets: jax.Array):
        both = Weights(frozen, trained) if train_base else Weights(trained, frozen)
        return next_token_loss(forward, both, tokens, targets, chunk_tokens)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(trained, moments, frozen, tokens, targets):
        value, gradients = jax.value_and_grad(loss)(trained, frozen, tokens, targets)
        updates, moments = optimizer.update(gradients, moments, trained)
        return optax.apply_updates(trained, updates), moments, value

    # Updates give their inputs' buffers away; the model keeps its own until the end.
    trained = jax.jit(partial(jax.tree.map, jnp.copy))(trained)
    moments = jax.jit(optimizer.init)(trained)
    for step, (tokens, targets) in enumerate(_packed(batches, width, pad_id), start=1):
        sharding = batch_sharding(mesh, len(tokens))
        on_device = jax.device_put((tokens, targets), sharding)
        trained, moments, value = update(trained, moments, frozen, *on_device)
        on_step(step, float(value))
    nnx.update(model, trained)


def _packed(
    batches: Iterable[list[Row]], width: int, pad_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for rows in batches:
        yield pack(rows, width, pad_id)
