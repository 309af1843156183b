"""The records of a step, of completions and of a measurement, made from what the model did."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma2_grpo.run.results import (
    ADAPTER,
    BASE,
    EvaluatedCompletion,
    GreedyMeasures,
    Rise,
    SampledMeasures,
    StepsMeasures,
    System,
)
from gemma2_grpo.run.schema import ScoredCompletion, StepRecord
from gemma2_grpo.sampling.rollout import Completions
from gemma2_grpo.task.answers import extract_number
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import parse_completion
from gemma2_grpo.task.rewards import COMPONENTS, RISING
from gemma2_grpo.task.statistics import (
    Paired,
    compare_paired,
    interval_over_problems,
    majority_at_k,
    pass_at_k,
    powers_up_to,
    wilson_interval,
)
from gemma2_grpo.training.learner import StepResult

_WINDOW = 5
_NOTABLE_RISE = 0.05

# --- A step ---


def step_record(step: int, result: StepResult, **others: Any) -> StepRecord:
    """One line of metrics.jsonl.

    Args:
        step: Finished steps before this one.
        result: Result of the step.
        others: Fields that are known elsewhere, such as memory and programs.
    """
    scores, completions = result.scores, result.completions
    return StepRecord(
        step=step + 1,
        mean_reward=_mean(scores["total"]),
        reward_std=float(np.nanstd(scores["total"])) if np.isfinite(scores["total"]).any() else 0.0,
        mean_components={name: _mean(column) for name, column in _components(scores).items()},
        correct_fraction=_mean(scores["correct"]),
        official_correct_fraction=_mean(scores["official_correct"]),
        true_equations_fraction=float(
            scores["true_equations"].sum() / max(scores["equations"].sum(), 1)
        ),
        mean_completion_tokens=float(completions.lengths.mean()),
        truncated_fraction=float(completions.is_truncated.mean()),
        uniform_groups_fraction=float(result.advantages.is_uniform.mean()),
        num_unscored=int((~result.advantages.is_scored).sum()),
        **_update_metrics(result.updates),
        num_updates=len(result.updates),
        num_updates_left_out=sum(not np.isfinite(each["grad_norm"]) for each in result.updates),
        learning_rate=result.learning_rate,
        rollout_seconds=result.rollout_seconds,
        reward_seconds=result.reward_seconds,
        update_seconds=result.update_seconds,
        tokens_per_second=int(completions.lengths.sum()) / max(result.rollout_seconds, 1e-9),
        **others,
    )


def _update_metrics(updates: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Metrics after the last update of a step, but entropy and gradient as before the first.

    All that `training.loss.policy_loss` names, so `sampling_kl` too if the engine gives the
    log-probabilities of what it sampled.
    """
    if not updates:
        still = dict.fromkeys(("kl", "loss", "entropy", "clip_fraction", "grad_norm"), 0.0)
        return {**still, "max_ratio": 1.0}
    return {**updates[-1], **{name: updates[0][name] for name in ("entropy", "grad_norm")}}


def find_rises(records: Sequence[StepRecord]) -> list[Rise]:
    """Step at which each reward component reached the middle of its rise.

    First and last are means of five steps; half-way is the first step from which on the mean of
    five steps stays at or above the middle of the two.
    """
    if any(record.solution_nll is not None for record in records):
        return []  # The solutions of supervised training earn what they earn from the start.
    rises = []
    for name in RISING:
        values = np.array([record.mean_components[name] for record in records], np.float64)
        window = min(_WINDOW, len(values))
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        first, last = float(smooth[0]), float(smooth[-1])
        half = None
        if last - first >= _NOTABLE_RISE:  # Else the last mean may itself be below the middle.
            below = np.flatnonzero(smooth < (first + last) / 2)
            half = records[below[-1] + window].step
        rises.append(Rise(name=name, first=first, last=last, half_way_step=half))
    return rises


# --- Completions ---


def scored_completions(
    examples: Sequence[Example], completions: Completions, scores: Mapping[str, np.ndarray]
) -> Iterator[ScoredCompletion]:
    """Each completion with its scores.

    Args:
        examples: The problem of each completion.
        completions: The completions.
        scores: Columns of their scores, as `Scorer` gives them.
    """
    components = _components(scores)
    for i, example in enumerate(examples):
        yield ScoredCompletion(
            question=example.question,
            answer=example.answer,
            completion=completions.texts[i],
            completion_tokens=len(completions.tokens[i]),
            truncated=bool(completions.is_truncated[i]),
            reward=float(scores["total"][i]),
            components={name: float(column[i]) for name, column in components.items()},
            correct=bool(scores["correct"][i]),
            official_correct=bool(scores["official_correct"][i]),
            num_equations=int(scores["equations"][i]),
            num_true_equations=int(scores["true_equations"][i]),
        )


def _components(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: scores[name] for name in (*COMPONENTS, "custom") if name in scores}


# --- A measurement ---


def summarize(
    records: Sequence[EvaluatedCompletion], examples: Sequence[Example]
) -> dict[str, System]:
    """Measures of each system by name.

    Args:
        records: All completions, those of each system in the order of problems and samples.
        examples: The problems, in the order of their `index`.
    """
    by_system: dict[str, list[EvaluatedCompletion]] = {}
    for record in records:
        by_system.setdefault(record.system, []).append(record)
    return {name: _system(own, examples) for name, own in by_system.items()}


def _system(records: Sequence[EvaluatedCompletion], examples: Sequence[Example]) -> System:
    sampled = [record for record in records if record.sample is not None]
    return System(
        greedy=_greedy(_only_greedy(records), examples),
        sampled=_sampled(sampled, examples) if sampled else None,
    )


def compare_systems(records: Sequence[EvaluatedCompletion]) -> Paired | None:
    """Compares the greedy answers of base and adapter; None with one system only."""
    greedy = _only_greedy(records)
    before, after = (
        [record.correct for record in greedy if record.system == name] for name in (BASE, ADAPTER)
    )
    return compare_paired(before, after) if before and after else None


def _only_greedy(records: Sequence[EvaluatedCompletion]) -> list[EvaluatedCompletion]:
    return [record for record in records if record.sample is None]


def _greedy(records: Sequence[EvaluatedCompletion], examples: Sequence[Example]) -> GreedyMeasures:
    """Measures of one greedy completion per problem."""
    count, correct = len(records), sum(record.correct for record in records)
    official = sum(record.official_correct for record in records)
    return GreedyMeasures(
        correct_fraction=correct / count,
        correct_fraction_interval=wilson_interval(correct, count),
        **_form(records),
        num_problems=count,
        num_correct=correct,
        num_official_correct=official,
        official_correct_fraction=official / count,
        by_solution_steps=_by_solution_steps(records, examples),
    )


def _sampled(
    records: Sequence[EvaluatedCompletion], examples: Sequence[Example]
) -> SampledMeasures:
    """Measures of several samples of each problem, as many of one as of another."""
    samples = len(records) // len(examples)
    groups = [records[i : i + samples] for i in range(0, len(records), samples)]
    correct = [sum(record.correct for record in group) for group in groups]
    votes = [
        # A completion votes for the number in its answer block; without one, it does not vote.
        [extract_number(parse_completion(record.completion).answer or "") for record in group]
        for group in groups
    ]
    right = [extract_number(example.answer) for example in examples]
    ks = powers_up_to(samples)
    return SampledMeasures(
        correct_fraction=pass_at_k(correct, samples, 1),
        correct_fraction_interval=interval_over_problems(correct, samples),
        **_form(records),
        num_samples=samples,
        pass_at_k={k: pass_at_k(correct, samples, k) for k in ks},
        maj_at_k={
            k: sum(map(majority_at_k, votes, right, [k] * len(votes))) / len(votes) for k in ks
        },
    )


def _form(records: Sequence[EvaluatedCompletion]) -> dict[str, Any]:
    """Measures that do not ask whether an answer is right."""
    count, equations = len(records), sum(record.num_equations for record in records)
    true = sum(record.num_true_equations for record in records)
    perfect = sum(record.components["format"] == 1 for record in records)
    return {
        "perfect_format_fraction": perfect / count,
        "true_equations_fraction": true / max(equations, 1),
        "truncated_fraction": sum(record.truncated for record in records) / count,
        "mean_completion_tokens": sum(record.completion_tokens for record in records) / count,
        "mean_reward": _mean(np.array([record.reward for record in records], np.float64)),
    }


def _by_solution_steps(
    records: Sequence[EvaluatedCompletion], examples: Sequence[Example]
) -> tuple[StepsMeasures, ...]:
    """Accuracy by the steps of the gold solution, where the source has one."""
    problems, correct = Counter[int](), Counter[int]()
    for record in records:
        steps = examples[record.index].solution_steps
        if steps is not None:
            problems[steps] += 1
            correct[steps] += record.correct
    return tuple(
        StepsMeasures(
            solution_steps=steps,
            num_problems=count,
            num_correct=correct[steps],
            correct_fraction=correct[steps] / count,
            correct_fraction_interval=wilson_interval(correct[steps], count),
        )
        for steps, count in sorted(problems.items())
    )


def _mean(values: np.ndarray) -> float | None:
    """The mean over the completions that have a value; None if none has, which is not 0."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None
