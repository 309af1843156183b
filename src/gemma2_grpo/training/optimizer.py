"""The optimizer: AdamW with a schedule, clipping by norm, and no update without a finite norm."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from gemma2_grpo.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Linear warm-up and cosine decay over all updates, each of which learns.

    The rate would be zero one update before the first, and at the end of its decay one update
    after the last. The square of a sine is the cosine's (1 + cos) / 2 (SGDR, arXiv:1608.03983,
    equation 5), which rounds to zero in float32 near the end of a long run.

    Args:
        config: Highest rate, warm-up, and what the rate falls to.
        num_updates: Updates of the whole run, for the schedule.

    Returns:
        The rate of the update before which so many were made.
    """
    warmup = max(1, round(config.warmup_fraction * num_updates))
    decay = num_updates + 1 - warmup
    lowest = config.final_lr_fraction

    def rate(count: Any) -> Float[Array, ""]:
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
