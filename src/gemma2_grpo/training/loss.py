"""The GRPO objective: advantages, KL estimate, clipped ratio and the weight of each token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_grpo.config import GrpoConfig
from gemma2_grpo.model.logprobs import TokenLogps

# Keeps an advantage finite where a group's rewards differ by rounding only.
STD_FLOOR = 1e-6


class Advantages(NamedTuple):
    """Advantages of the completions of a batch, and which of them count."""

    values: np.ndarray
    """Float32 [B, G]; 0 where a completion is unscored or its group is uniform."""
    is_scored: np.ndarray
    """Bool [B, G]: the reward is a number."""
    is_uniform: np.ndarray
    """Bool [B]: all scored rewards of the group are equal, so it teaches nothing."""


def group_advantages(rewards: np.ndarray, *, scale_by_std: bool) -> Advantages:
    """Rewards relative to those of the same prompt.

    Source: DeepSeekMath (arXiv:2402.03300), section 4.1.2, with the sample standard deviation;
    without the division, Dr. GRPO (arXiv:2503.20783), section 3.2. A reward that is not a finite
    number leaves its completion out; it is never taken for zero.

    Args:
        rewards: [B, G]; NaN where a completion could not be scored.
        scale_by_std: Divide by the group's standard deviation.
    """
    rewards = np.asarray(rewards, np.float64)
    is_scored = np.isfinite(rewards)
    counts = is_scored.sum(axis=1, keepdims=True)
    known = np.where(is_scored, rewards, 0.0)
    means = known.sum(axis=1, keepdims=True) / np.maximum(counts, 1)
    centred = np.where(is_scored, rewards - means, 0.0)
    is_uniform = np.abs(centred).max(axis=1) < STD_FLOOR
    if scale_by_std:
        variance = (centred**2).sum(axis=1, keepdims=True) / np.maximum(counts - 1, 1)
        centred = centred / (np.sqrt(variance) + STD_FLOOR)
    values = np.where(is_uniform[:, None], 0.0, centred).astype(np.float32)
    return Advantages(values, is_scored, is_uniform)


def token_weights(
    lengths: np.ndarray, is_scored: np.ndarray, loss_type: str, max_tokens: int
) -> np.ndarray:
    """The weight of each token of a completion in the loss of a whole batch of rollouts.

    The loss is the weighted sum over all tokens, so that micro-batches of any size add up to the
    same gradient.

    - `grpo`, `gspo`: mean over tokens, then over completions (arXiv:2402.03300, equation 3).
    - `token_mean`: mean over all tokens of the batch (DAPO, arXiv:2503.14476, equation 8).
    - `drgrpo`: sum over tokens by a constant, mean over completions (arXiv:2503.20783); the
      constant is the completion limit, so that length does not matter.

    Args:
        lengths: Tokens of each completion, [N].
        is_scored: Completions that count, [N].
        loss_type: One of the names above.
        max_tokens: The completion limit.

    Returns:
        Float32 [N], zero for completions that do not count.
    """
    counted = np.where(is_scored, lengths, 0).astype(np.float64)
    completions = max(int(is_scored.sum()), 1)
    divisor = {
        "grpo": np.maximum(counted, 1) * completions,
        "gspo": np.maximum(counted, 1) * completions,
        "token_mean": max(counted.sum(), 1),
        "drgrpo": max_tokens * completions,
    }[loss_type]
    return (is_scored / divisor).astype(np.float32)


def k3_divergence(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """Unbiased estimate of KL(policy || reference) per token, never negative.

    Source: arXiv:2402.03300, equation 4 (k3 in Schulman's note on approximating KL divergence).
    Tunix's default, log-ratio itself, has no expected gradient on-policy.
    """
    difference = ref_logps - logps
    return jnp.expm1(difference) - difference


class LossTerms(NamedTuple):
    """The loss of a micro-batch and the token sums from which its metrics are made."""

    loss: jax.Array
    kl_sum: jax.Array
    clipped_sum: jax.Array
    entropy_sum: jax.Array
    token_count: jax.Array
    max_ratio: jax.Array


def policy_loss(
    policy: TokenLogps,
    old_logps: jax.Array,
    ref_logps: jax.Array | None,
    advantages: jax.Array,
    weights: jax.Array,
    owners: jax.Array,
    config: GrpoConfig,
) -> LossTerms:
    """Clipped policy objective with KL penalty, negated.

    Source: arXiv:2402.03300, equation 3; ratios of whole sequences for `gspo` (arXiv:2507.18071,
    equations 7 and 13); `epsilon_high` is DAPO's clip-higher (arXiv:2503.14476, equation 8).

    Args:
        policy: Log-probabilities under the policy that is trained, [R, T], the only input with a
            gradient, and entropy, for the metrics.
        old_logps: Under the policy that sampled, [R, T].
        ref_logps: Under the reference, [R, T]; None without a KL penalty, whose value is then 0.
        advantages: Of the completion that a token belongs to, [R, T].
        weights: Weight of each token, from `token_weights`; 0 where there is none, [R, T].
        owners: Completion of each token [R, T].
        config: Objective and its constants.
    """
    is_token = weights > 0
    log_ratio = jnp.where(is_token, policy.logps - old_logps, 0.0)
    if config.loss_type == "gspo":
        log_ratio = _sequence_log_ratio(log_ratio, owners)
    ratio = jnp.exp(log_ratio)
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    gain = ratio * advantages
    clipped_gain = jnp.clip(ratio, 1 - config.epsilon, 1 + high) * advantages
    # Chosen before the exponential: where its value is left out, its gradient could still be NaN.
    ref = policy.logps if ref_logps is None else jnp.where(is_token, ref_logps, policy.logps)
    kl = k3_divergence(policy.logps, ref)
    per_token = -jnp.minimum(gain, clipped_gain) + config.beta * kl
    return LossTerms(
        loss=jnp.sum(weights * per_token),
        kl_sum=jnp.sum(kl),
        clipped_sum=jnp.sum(is_token & (clipped_gain < gain)),
        entropy_sum=jnp.sum(jnp.where(is_token, policy.entropy, 0.0)),
        token_count=jnp.sum(is_token),
        max_ratio=jnp.max(jnp.where(is_token, ratio, 1.0)),
    )


def _sequence_log_ratio(log_ratio: jax.Array, owners: jax.Array) -> jax.Array:
    """Mean log-ratio of each completion, as the value of every token of it.

    Every token carries the gradient of its own log-probability and the value of the mean; summed
    with equal weights this is the gradient of the sequence ratio.
    """
    together = owners[:, :, None] == owners[:, None, :]
    means = jnp.einsum("rst,rt->rs", together, log_ratio) / together.sum(axis=-1)
    return jax.lax.stop_gradient(means) + log_ratio - jax.lax.stop_gradient(log_ratio)
