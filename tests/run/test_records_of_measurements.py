"""Statistics of a measurement, against what plain counting says of the same completions."""

import itertools
import json
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from gemma2_grpo.config import RewardConfig
from gemma2_grpo.run.records import compare_systems, scored_completions, summarize
from gemma2_grpo.run.results import EvaluatedCompletion
from gemma2_grpo.sampling.rollout import Completions
from gemma2_grpo.task.examples import Example, load_held_out
from gemma2_grpo.task.prompts import render_solution
from gemma2_grpo.task.scoring import Scorer
from gemma2_grpo.task.statistics import wilson_interval

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
