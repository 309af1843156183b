"""Records of steps and of measurements, and when a component is said to rise."""

import itertools
import json
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from gemma2_grpo.config import RewardConfig
from gemma2_grpo.run.panel import step_line
from gemma2_grpo.run.records import (
    compare_systems,
    find_rises,
    scored_completions,
    step_record,
    summarize,
)
from gemma2_grpo.run.results import EvaluatedCompletion
from gemma2_grpo.run.schema import StepRecord, numbers
from gemma2_grpo.sampling.rollout import Completions
from gemma2_grpo.task.examples import Example, load_held_out
from gemma2_grpo.task.prompts import render_solution
from gemma2_grpo.task.scoring import COMPONENTS, Scorer
from gemma2_grpo.task.statistics import wilson_interval
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


# --- Measurements, against what plain counting says of the same completions ---

SAMPLES = 4


def problem(number: int, steps: int) -> Example:
    """Its answer is `number + steps`."""
    lines = [f"Step {i + 1}: {number + i} + 1 = {number + i + 1}" for i in range(steps)]
    answer = str(number + steps)
    return Example(f"What is {number} and {steps}?", answer, render_solution(lines, answer))


EXAMPLES = [problem(10 * i, 1 + i % 3) for i in range(6)]


def say(text: str, index: int, kind: str) -> str:
    """A completion of one kind for a problem."""
    example = EXAMPLES[index]
    right = int(example.answer)
    return {
        "right": example.solution,
        "alike": render_solution([f"{right - 1} + 1 = {right}"], f"${right}.00"),
        "wrong": render_solution(["2 + 2 = 5"], "7"),
        "other": render_solution(["1 + 1 = 2"], "8"),
        "two": render_solution(["so"], f"{right} or 7"),
        "cut": "<reasoning>\nStep 1",
    }[kind] + text


GREEDY = {
    "base": ["right", "wrong", "cut", "alike", "wrong", "two"],
    "adapter": ["right", "right", "alike", "wrong", "right", "right"],
}
DRAWN = {
    "base": ["right alike wrong other", "wrong wrong right cut", "cut two cut two",
             "right right right alike", "wrong other wrong other", "right wrong right wrong"],
    "adapter": ["right right wrong right", "right other wrong two", "alike alike right right",
                "wrong wrong wrong right", "right cut cut cut", "right wrong right wrong"],
}  # fmt: skip


def record(system: str, index: int, sample: int | None, kind: str) -> EvaluatedCompletion:
    place = {"system": system, "index": index, "sample": sample}
    return scored(EXAMPLES[index], say("", index, kind), truncated=kind == "cut", **place)


def scored(example: Example, text: str, *, truncated: bool, **place: Any) -> EvaluatedCompletion:
    """The record of a completion with a token for each of its characters."""
    scores = Scorer(RewardConfig())([example], [text])
    completions = Completions([text], [np.zeros(len(text))], np.array([truncated]))
    [each] = scored_completions([example], completions, scores)
    return EvaluatedCompletion(**place, **vars(each))


def all_records(*systems: str) -> list[EvaluatedCompletion]:
    """As they are written: the systems in turn, greedy ones first."""
    greedy = [record(s, i, None, GREEDY[s][i]) for i in range(6) for s in systems]
    sampled = [
        record(s, i, j, DRAWN[s][i].split()[j])
        for i in range(6)
        for s in systems
        for j in range(SAMPLES)
    ]
    return greedy + sampled


def is_right(kind: str) -> bool:
    return kind in ("right", "alike")


def vote(kinds: tuple[str, ...]) -> Fraction:
    """Chance that the right answer wins: equal numbers are one answer, doubts do not vote."""
    answers = {"right": "r", "alike": "r", "wrong": "7", "other": "8"}
    votes = Counter(answers[kind] for kind in kinds if kind in answers)
    level = [answer for answer in votes if votes[answer] == max(votes.values())]
    return Fraction("r" in level, max(len(level), 1))


def mean(values: list[Any]) -> float:
    return float(sum(values) / len(values))


@pytest.mark.parametrize("system", ["base", "adapter"])
def test_greedy_statistics_by_counting(system: str) -> None:
    system_measures = summarize(all_records("base", "adapter"), EXAMPLES)[system]
    found = json.loads(system_measures.model_dump_json())["greedy"]
    kinds = GREEDY[system]
    right = [is_right(kind) for kind in kinds]
    assert (found["num_problems"], found["num_correct"]) == (6, sum(right))
    assert found["correct_fraction"] == sum(right) / 6
    assert found["correct_fraction_interval"] == list(wilson_interval(sum(right), 6))
    # The official extraction refuses "$30.00" and takes the first number of "30 or 7".
    official = kinds.count("right") + kinds.count("two")
    assert found["num_official_correct"] == official
    assert found["official_correct_fraction"] == official / 6
    assert found["perfect_format_fraction"] == mean([kind != "cut" for kind in kinds])
    assert found["truncated_fraction"] == kinds.count("cut") / 6
    assert found["mean_completion_tokens"] == mean(
        [len(say("", i, kind)) for i, kind in enumerate(kinds)]
    )
    written = sum((1 + i % 3) if k == "right" else k in ("alike", "wrong", "other")
                  for i, k in enumerate(kinds))  # fmt: skip
    assert found["true_equations_fraction"] == (written - kinds.count("wrong")) / written
    assert found["by_solution_steps"] == [
        {
            "solution_steps": steps,
            "num_problems": 2,
            "num_correct": sum(right[steps - 1 :: 3]),
            "correct_fraction": sum(right[steps - 1 :: 3]) / 2,
            "correct_fraction_interval": list(wilson_interval(sum(right[steps - 1 :: 3]), 2)),
        }
        for steps in (1, 2, 3)
    ]


@pytest.mark.parametrize("system", ["base", "adapter"])
def test_sampled_statistics_over_all_subsets(system: str) -> None:
    system_measures = summarize(all_records("base", "adapter"), EXAMPLES)[system]
    found = json.loads(system_measures.model_dump_json())["sampled"]
    drawn = [tuple(kinds.split()) for kinds in DRAWN[system]]
    assert found["num_samples"] == SAMPLES
    assert list(found["pass_at_k"]) == list(found["maj_at_k"]) == ["1", "2", "4"]
    for k in (1, 2, 4):
        subsets = [list(itertools.combinations(kinds, k)) for kinds in drawn]
        passed = mean([mean([any(map(is_right, s)) for s in each]) for each in subsets])
        voted = mean([mean([vote(s) for s in each]) for each in subsets])
        assert found["pass_at_k"][str(k)] == pytest.approx(passed)
        assert found["maj_at_k"][str(k)] == pytest.approx(voted)
    right = mean([is_right(kind) for kinds in drawn for kind in kinds])
    assert found["correct_fraction"] == pytest.approx(right)
    low, high = found["correct_fraction_interval"]
    assert low < right < high
    # Problems are the unit: with 24 independent trials it would be narrower.
    assert high - low > np.subtract(*wilson_interval(round(24 * right), 24)[::-1])
    assert found["perfect_format_fraction"] == mean(
        [kind != "cut" for kinds in drawn for kind in kinds]
    )
    assert found["truncated_fraction"] == mean([kind == "cut" for kinds in drawn for kind in kinds])
    records = [r for r in all_records(system) if r.sample is not None]
    assert found["mean_reward"] == pytest.approx(mean([r.reward for r in records]))
    tokens = [record.completion_tokens for record in records]
    assert found["mean_completion_tokens"] == pytest.approx(mean(tokens))


def test_the_comparison_is_of_greedy_answers() -> None:
    compared = compare_systems(all_records("base", "adapter"))
    assert compared is not None
    assert compared.model_dump() == {
        "num_both_right": 1,
        "num_both_wrong": 0,
        "num_fixed": 4,
        "num_broken": 1,
        "p_value": 12 / 32,
    }


def test_a_model_alone_is_compared_with_nothing() -> None:
    greedy = [r for r in all_records("base") if r.sample is None]
    assert compare_systems(greedy) is None
    found = summarize(greedy, EXAMPLES)
    assert list(found) == ["base"]
    assert found["base"].sampled is None


def test_problems_without_a_solution_have_no_steps() -> None:
    bare = [Example(example.question, example.answer) for example in EXAMPLES]
    greedy = [r for r in all_records("base") if r.sample is None]
    assert summarize(greedy, bare)["base"].greedy.by_solution_steps == ()


def test_gold_solutions_are_all_right() -> None:
    """Of what an evaluation is made on by default, in the steps in which it is made."""
    from gemma2_grpo.presets import load_config

    examples = load_held_out(load_config("tiny").data, 20)
    records = [
        scored(each, each.solution, truncated=False, system="base", index=i, sample=None)
        for i, each in enumerate(examples)
    ]
    found = summarize(records, examples)["base"].greedy
    assert found.correct_fraction == found.perfect_format_fraction == 1
    assert found.true_equations_fraction == 1
    assert sum(row.num_problems for row in found.by_solution_steps) == 20
    assert {row.solution_steps for row in found.by_solution_steps} == {2, 3}
