"""The record of a step, and what a whole run's records say."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma2_grpo.task.rewards import COMPONENTS, RISING
from gemma2_grpo.training.learner import StepResult

_AVERAGED = (*COMPONENTS, "custom", "correct", "official_correct")
_NO_UPDATE = {
    "kl": 0.0,
    "loss": 0.0,
    "entropy": 0.0,
    "clip_fraction": 0.0,
    "max_ratio": 1.0,
    "grad_norm": 0.0,
}
_WINDOW = 5
_NOTABLE_RISE = 0.05


def step_record(step: int, result: StepResult) -> dict[str, Any]:
    """One line of metrics.jsonl; `step` counts finished steps, from 1."""
    scores, completions = result.scores, result.completions
    lengths, total = completions.lengths, scores["total"]
    rollout_tokens = int(lengths.sum())
    return {
        "step": step + 1,
        "reward": _mean(total),
        "reward_std": float(np.nanstd(total)) if np.isfinite(total).any() else 0.0,
        **{name: _mean(scores[name]) for name in _AVERAGED if name in scores},
        "true_equations": float(scores["true_equations"].sum() / max(scores["equations"].sum(), 1)),
        "completion_tokens": float(lengths.mean()),
        "truncated": float(completions.is_truncated.mean()),
        "uniform_groups": float(result.advantages.is_uniform.mean()),
        "unscored": int((~result.advantages.is_scored).sum()),
        **_update_metrics(result.updates),
        "updates": len(result.updates),
        "updates_left_out": sum(not np.isfinite(each["grad_norm"]) for each in result.updates),
        "learning_rate": result.learning_rate,
        "rollout_seconds": result.rollout_seconds,
        "reward_seconds": result.reward_seconds,
        "update_seconds": result.update_seconds,
        "tokens_per_second": rollout_tokens / max(result.rollout_seconds, 1e-9),
    }


def _update_metrics(updates: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Metrics after the last update of a step, but entropy and gradient as before the first.

    All that `training.loss.policy_loss` names, so `sampling_kl` too if the engine gives the
    log-probabilities of what it sampled.
    """
    if not updates:
        return _NO_UPDATE
    return {**updates[-1], **{name: updates[0][name] for name in ("entropy", "grad_norm")}}


def find_rises(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """When each reward component had made half of its way.

    First and last are means of five steps; half-way is the first step from which on the mean of
    five steps stays at or above the middle of the two.
    """
    rises = []
    for name in RISING:
        values = np.array([record[name] for record in records], np.float64)
        window = min(_WINDOW, len(values))
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        first, last = float(smooth[0]), float(smooth[-1])
        half = None
        if last - first >= _NOTABLE_RISE:  # Else the last mean may itself be below the middle.
            below = np.flatnonzero(smooth < (first + last) / 2)
            half = int(records[below[-1] + window]["step"])
        rises.append({"name": name, "first": first, "last": last, "half_way_step": half})
    return rises


def _mean(values: np.ndarray) -> float | None:
    """Of the completions that have a score; None if none has, which is not a mean of 0."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None
