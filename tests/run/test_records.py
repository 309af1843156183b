"""What a step's record says, and when a run's components are said to rise."""

import json
import math
from typing import Any

import numpy as np
import pytest

from gemma2_grpo.run.panel import step_line
from gemma2_grpo.run.records import find_rises, step_record
from gemma2_grpo.run.schema import StepRecord, numbers
from gemma2_grpo.sampling.rollout import Completions
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.scoring import COMPONENTS
from gemma2_grpo.training.learner import StepResult
from gemma2_grpo.training.loss import group_advantages


def records(accuracy: list[float], first_step: int = 1) -> list[StepRecord]:
    return [
        StepRecord(step=step, mean_components={"format": 0.5, "logic": 0.0, "accuracy": value})
        for step, value in enumerate(accuracy, start=first_step)
    ]


def rise(accuracy: list[float]) -> dict[str, Any]:
    rises = {each.name: each.model_dump() for each in find_rises(records(accuracy))}
    assert list(rises) == ["format", "logic", "accuracy"]
    assert rises["format"] == {
        "name": "format",
        "first": pytest.approx(0.5),
        "last": pytest.approx(0.5),
        "half_way_step": None,
    }
    return rises["accuracy"]


@pytest.mark.parametrize(
    ("accuracy", "first", "last", "half"),
    [
        # Means of steps 1-5, 2-6, ...: 0, .2, .4, .6, .8, 1. The middle is .5; 4-8 is above it.
        ([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], 0, 1, 8),
        # The mean of 4-8 is above the middle, too, but that of 10-14 is below it again.
        ([0] * 5 + [1] * 3 + [0] * 4 + [1] * 5, 0, 1, 15),
        # Means .2, .2, .4; a mean that lies on the middle counts, and .3 is the middle.
        ([1, 0, 0, 0, 0, 1, 1], 0.2, 0.4, 7),
        ([0.50, 0.50, 0.50, 0.50, 0.50, 0.80], 0.5, 0.56, 6),
        ([0.50, 0.50, 0.50, 0.50, 0.50, 0.70], 0.5, 0.54, None),
        ([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], 1, 0, None),
        # Too few for two means of five: the one mean is first and last.
        ([0, 1, 1], 2 / 3, 2 / 3, None),
        ([0.25], 0.25, 0.25, None),
    ],
)
def test_half_way_is_the_first_mean_of_five_from_which_on_it_stays_up(accuracy, first, last, half):
    found = rise(accuracy)
    assert found["first"] == pytest.approx(first)
    assert found["last"] == pytest.approx(last)
    assert found["half_way_step"] == half


def test_half_way_is_a_step_of_the_run():
    [*_, found] = find_rises(records([0] * 5 + [1] * 5, first_step=101))
    assert found.half_way_step == 108


def update(**changes: float) -> dict[str, float]:
    values = {
        "loss": 0.5,
        "kl": 0.25,
        "clip_fraction": 0.125,
        "entropy": 2.0,
        "max_ratio": 1.5,
        "grad_norm": 3.0,
        "sampling_kl": 0.0625,
    }
    return values | changes


def result(total: list[float], updates: list[dict[str, float]], **columns: Any) -> StepResult:
    """Two groups of two completions, of 1 to 4 tokens."""
    scores = {name: np.array([1.0, 0.0, 0.5, 0.5]) for name in (*COMPONENTS, *CORRECT)}
    scores |= {"equations": np.array([2.0, 1, 0, 1]), "true_equations": np.array([2.0, 0, 0, 1])}
    scores |= {"total": np.array(total), **columns}
    tokens = [np.arange(length) for length in (1, 2, 3, 4)]
    return StepResult(
        examples=[Example("?", "1")] * 4,
        completions=Completions(["x"] * 4, tokens, np.array([False, False, False, True])),
        scores=scores,
        advantages=group_advantages(np.array(total).reshape(2, 2), scale_by_std=True),
        updates=updates,
        learning_rate=0.1,
        rollout_seconds=2.0,
        reward_seconds=0.5,
        update_seconds=1.0,
    )


CORRECT = ("correct", "official_correct")


def test_a_record_has_the_means_of_a_step():
    made = step_record(6, result([1.0, 0.0, 0.5, 0.5], [update(), update(loss=0.75, kl=1.0)]))
    record = json.loads(made.as_json())
    assert record.pop("mean_components") == dict.fromkeys(COMPONENTS, 0.5)
    expected = {
        "step": 7,
        "mean_reward": 0.5,
        "reward_std": math.sqrt(0.125),
        "correct_fraction": 0.5,
        "official_correct_fraction": 0.5,
        "true_equations_fraction": 0.75,
        "mean_completion_tokens": 2.5,
        "truncated_fraction": 0.25,
        "uniform_groups_fraction": 0.5,
        "num_unscored": 0,
        "kl": 1.0,  # Loss and KL are those after the earlier updates,
        "loss": 0.75,
        "entropy": 2.0,  # entropy and gradient those before any.
        "clip_fraction": 0.125,
        "max_ratio": 1.5,
        "grad_norm": 3.0,
        "sampling_kl": 0.0625,
        "num_updates": 2,
        "num_updates_left_out": 0,
        "learning_rate": 0.1,
        "rollout_seconds": 2.0,
        "reward_seconds": 0.5,
        "update_seconds": 1.0,
        "tokens_per_second": 5.0,
    }
    assert record == pytest.approx(expected)


def test_what_has_no_score_is_counted_and_not_averaged():
    record = step_record(0, result([1.0, math.nan, math.nan, 0.5], [update()]))
    assert (record.num_unscored, record.mean_reward) == (2, 0.75)
    nothing = step_record(0, result([math.nan] * 4, []))
    assert (nothing.num_unscored, nothing.num_updates) == (4, 0)
    written = json.loads(nothing.as_json())
    assert written.pop("mean_reward") is None, "which is not 0"
    assert len(numbers(written)) == len(written) - 1 + len(COMPONENTS)


def test_a_metric_of_the_loss_is_recorded_by_its_name():
    updates = [update(surprise=0.25), update(surprise=0.5)]
    assert step_record(0, result([1.0, 0, 0, 1], updates)).model_dump()["surprise"] == 0.5
    assert "surprise" not in step_record(0, result([1.0, 0, 0, 1], [])).model_dump()


def test_an_update_that_was_left_out_is_counted():
    record = step_record(0, result([1.0, 0, 0, 1], [update(), update(grad_norm=math.nan)]))
    assert (record.num_updates, record.num_updates_left_out) == (2, 1)


def test_a_custom_reward_is_a_component_of_its_own():
    custom = np.array([2.0, math.nan, 4.0, 0.0])
    record = step_record(0, result([1.0, 0, 0, 1], [update()], custom=custom))
    assert record.mean_components["custom"] == 2.0
    record = step_record(0, result([1.0, 0, 0, 1], [update()]))
    assert "custom" not in record.mean_components


def test_what_is_no_number_is_null_and_can_be_shown():
    """Python would write NaN and Infinity, which no other reader of JSON takes."""
    wild = update(loss=math.nan, kl=math.inf, grad_norm=math.nan, is_finite=False)
    record = step_record(0, result([1.0, 0, 0, 1], [wild]))
    assert '"loss":null' in record.as_json() and '"kl":null' in record.as_json()
    assert "kl none" in step_line(record, 1) and "gradient none" in step_line(record, 1)


def test_a_metric_that_is_not_in_the_schema_is_kept_by_its_name():
    record = step_record(0, result([1.0, 0, 0, 1], [update()]), surprise=0.5, worse=math.nan)
    assert StepRecord.model_validate_json(record.as_json()) == record
    assert json.loads(record.as_json()).items() >= {"surprise": 0.5, "worse": None}.items()
