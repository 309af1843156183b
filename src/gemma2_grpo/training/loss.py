"""The GRPO objectives: advantages, KL estimate, clipped ratio, weight of each token, metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gemma2_grpo.config import GrpoConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.logprobs import TokenLogps

# Keeps an advantage finite where a group's rewards differ by rounding only.
STD_FLOOR = 1e-6


class Advantages(NamedTuple):
    """Advantages of the completions of a batch, and which of them count."""

    values: Float[np.ndarray, "B G"]
    """Float32; 0 where a completion is unscored or its group is uniform."""
    is_scored: Bool[np.ndarray, "B G"]
    """The reward is a number."""
    is_uniform: Bool[np.ndarray, " B"]
    """All scored rewards of the group are equal, so it teaches nothing."""


def group_advantages(rewards: Float[np.ndarray, "B G"], *, scale_by_std: bool) -> Advantages:
    """Rewards relative to those of the same prompt.

    Source: DeepSeekMath (arXiv:2402.03300), section 4.1.2, with the sample standard deviation;
    without the division, Dr. GRPO (arXiv:2503.20783), section 3.2. A reward that is not a finite
    number leaves its completion out; it is never taken for zero.
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


Divisor = Callable[[Float[np.ndarray, " N"], int, int], Float[np.ndarray, " N"] | float]
"""Divisor of the loss terms of a completion's tokens, from the tokens of each completion (0
if it does not count), the number of completions that count, and the completion limit."""


@dataclass(frozen=True)
class Objective:
    """The choices in which the objectives of the GRPO family differ."""

    divisor: Divisor
    scale_by_std: bool = True
    """Whether advantages are divided by the standard deviation of their group."""
    is_ratio_of_sequence: bool = False
    """Whether all tokens of a completion share one importance ratio, the mean over its tokens."""
    is_likelihood: bool = False
    """Whether it is the log-likelihood of the completions, whatever their rewards: supervised."""


def _mean_of_means(tokens: Float[np.ndarray, " N"], count: int, _: int) -> np.ndarray:
    """The mean over the tokens of a completion, then over completions."""
    return np.maximum(tokens, 1) * count


def _mean_over_tokens(tokens: Float[np.ndarray, " N"], *_: int) -> float:
    """The mean over all tokens of the batch."""
    return max(float(tokens.sum()), 1.0)


OBJECTIVES: Mapping[str, Objective] = {
    # DeepSeekMath (arXiv:2402.03300), equation 3.
    "grpo": Objective(_mean_of_means),
    # Dr. GRPO (arXiv:2503.20783): the sum over tokens divided by a constant, so that length does
    # not matter; the constant is the completion limit.
    "drgrpo": Objective(lambda tokens, count, limit: limit * count, scale_by_std=False),
    # DAPO (arXiv:2503.14476), equation 8: the mean over all tokens of the batch.
    "token_mean": Objective(_mean_over_tokens),
    # GSPO (arXiv:2507.18071), equations 7 and 13.
    "gspo": Objective(_mean_of_means, is_ratio_of_sequence=True),
    # Mean negative log-likelihood of all tokens, of supervised fine-tuning (`gemma2-grpo sft`).
    "nll": Objective(_mean_over_tokens, scale_by_std=False, is_likelihood=True),
}
"""Objectives by their name in the configuration, `loss_type`."""


def find_objective(loss_type: str) -> Objective:
    """The objective of a `loss_type`.

    Raises:
        UserError: for a name that is not in OBJECTIVES.
    """
    if loss_type not in OBJECTIVES:
        names = ", ".join(OBJECTIVES)
        raise UserError(f"loss_type = {loss_type!r}: no such objective; there are {names}")
    return OBJECTIVES[loss_type]


def token_weights(
    lengths: Int[np.ndarray, " N"],
    is_scored: Bool[np.ndarray, " N"],
    loss_type: str,
    max_tokens: int,
) -> Float[np.ndarray, " N"]:
    """The weight of each token of a completion in the loss of a whole batch of rollouts.

    The loss is the weighted sum over all tokens, so that micro-batches of any size add up to the
    same gradient.

    Returns:
        Float32, zero for completions that do not count.
    """
    counted = np.where(is_scored, lengths, 0).astype(np.float64)
    completions = max(int(is_scored.sum()), 1)
    divisor = find_objective(loss_type).divisor(counted, completions, max_tokens)
    return (is_scored / divisor).astype(np.float32)


def k3_divergence(
    logps: Float[Array, "R W"], other_logps: Float[Array, "R W"]
) -> Float[Array, "R W"]:
    """Unbiased estimate of KL(policy || other) per token of the policy, never negative.

    Source: arXiv:2402.03300, equation 4 (k3 in Schulman's note on approximating KL divergence).
    Tunix's default, log-ratio itself, has no expected gradient on-policy.
    """
    difference = other_logps - logps
    return jnp.expm1(difference) - difference


class LossTerms(NamedTuple):
    """The loss of a micro-batch and its metrics by name; `combine` adds micro-batches up.

    A metric that is added to `means` or `maxima` is logged under its name.
    """

    loss: Float[Array, ""]
    means: Mapping[str, tuple[Array, Array]]
    """Metrics that are means, as their sum and the count of what was summed."""
    maxima: Mapping[str, Array]


def policy_loss(
    policy: TokenLogps,
    old_logps: Float[Array, "R W"],
    ref_logps: Float[Array, "R W"] | None,
    advantages: Float[Array, "R W"],
    weights: Float[Array, "R W"],
    segment_ids: Int[Array, "R W"],
    rollout_logps: Float[Array, "R W"],
    config: GrpoConfig,
) -> LossTerms:
    """Clipped policy objective with KL penalty, negated.

    Source: arXiv:2402.03300, equation 3; `epsilon_high` is DAPO's clip-higher (arXiv:2503.14476,
    equation 8).

    Args:
        policy: Log-probabilities under the policy that is trained, the only input with a
            gradient, and entropy, for the metrics.
        old_logps: Log-probabilities under the policy before the batch's first update.
        ref_logps: Log-probabilities under the reference; None without a KL penalty, and KL is 0.
        advantages: Advantage of the completion that a token belongs to.
        weights: Weight of each token, from `token_weights`; 0 for padding.
        segment_ids: Completion of each token.
        rollout_logps: Log-probabilities at sampling; NaN where they are not known.
        config: Objective and its constants.
    """
    is_token = weights > 0
    log_ratio = jnp.where(is_token, policy.logps - old_logps, 0.0)
    objective = find_objective(config.loss_type)
    if objective.is_ratio_of_sequence:
        log_ratio = _sequence_log_ratio(log_ratio, segment_ids)
    ratio = jnp.exp(log_ratio)
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    gain = ratio * advantages
    clipped_gain = jnp.clip(ratio, 1 - config.epsilon, 1 + high) * advantages
    # Chosen before the exponential: where its value is left out, its gradient could still be NaN.
    ref = policy.logps if ref_logps is None else jnp.where(is_token, ref_logps, policy.logps)
    kl = k3_divergence(policy.logps, ref)
    per_token = -jnp.minimum(gain, clipped_gain) + config.beta * kl
    if objective.is_likelihood:
        per_token = jnp.where(is_token, -policy.logps, 0.0)
    tokens = jnp.sum(is_token)
    of_solutions = {"solution_nll": (jnp.sum(per_token), tokens)} if objective.is_likelihood else {}
    return LossTerms(
        loss=jnp.sum(weights * per_token),
        means=of_solutions
        | {
            "kl": (jnp.sum(kl), tokens),
            "clip_fraction": (jnp.sum(is_token & (clipped_gain < gain)), tokens),
            "entropy": (jnp.sum(jnp.where(is_token, policy.entropy, 0.0)), tokens),
            "sampling_kl": _sampling_kl(rollout_logps, old_logps, is_token),
        },
        maxima={"max_ratio": jnp.max(jnp.where(is_token, ratio, 1.0))},
    )


def _sequence_log_ratio(
    log_ratio: Float[Array, "R W"], segment_ids: Int[Array, "R W"]
) -> Float[Array, "R W"]:
    """Mean log-ratio of each completion, as the value of every token of it.

    Every token carries the gradient of its own log-probability and the value of the mean; summed
    with equal weights this is the gradient of the sequence ratio.
    """
    together = segment_ids[:, :, None] == segment_ids[:, None, :]
    means = jnp.einsum("rst,rt->rs", together, log_ratio) / together.sum(axis=-1)
    return jax.lax.stop_gradient(means) + log_ratio - jax.lax.stop_gradient(log_ratio)


def _sampling_kl(
    rollout_logps: Float[Array, "R W"],
    old_logps: Float[Array, "R W"],
    is_token: Bool[Array, "R W"],
) -> tuple[Array, Array]:
    """Sum and count of the k3 estimate of KL(rollout || policy before its first update).

    It measures how far off-policy sampling itself is, before any update (the mismatch KL of
    others). It is 0 up to rounding if the rollout computes the same distribution as the update,
    and clearly above if the engine samples from other weights or computes them differently. With
    top-p or top-k, an engine that gives log-probabilities after truncation (ours and vLLM do) adds
    the probability that truncation removes, which is off-policy too. Tokens whose
    log-probability the engine does not give are left out.
    """
    is_known = is_token & jnp.isfinite(rollout_logps)
    rollout = jnp.where(is_known, rollout_logps, old_logps)
    return jnp.sum(k3_divergence(rollout, old_logps)), jnp.sum(is_known)


def combine(terms: Sequence[LossTerms]) -> dict[str, float]:
    """Loss and metrics of an update from those of its micro-batches, on the host, by name.

    A mean over nothing is left out, which is not a mean of 0.
    """
    metrics = {"loss": sum(float(term.loss) for term in terms)}
    for name in terms[0].means:
        sums, counts = zip(*(term.means[name] for term in terms), strict=True)
        if count := sum(int(each) for each in counts):
            metrics[name] = sum(float(each) for each in sums) / count
    for name in terms[0].maxima:
        metrics[name] = max(float(term.maxima[name]) for term in terms)
    return metrics
