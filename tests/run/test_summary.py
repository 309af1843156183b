"""Statistics of an evaluation, against what plain counting says of the same completions."""

import itertools
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from gemma2_grpo.config import RewardConfig
from gemma2_grpo.run.summary import summarize, summarize_greedy
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


def record(system: str, index: int, sample: int | None, kind: str) -> dict[str, Any]:
    text, example = say("", index, kind), EXAMPLES[index]
    scores = Scorer(RewardConfig())([example], [text])
    return {
        "system": system,
        "index": index,
        "sample": sample,
        "completion": text,
        "tokens": len(text),
        "truncated": kind == "cut",
        **{name: float(column[0]) for name, column in scores.items()},
    }


def all_records(*systems: str) -> list[dict[str, Any]]:
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
    found = summarize(all_records("base", "adapter"), EXAMPLES)["systems"][system]["greedy"]
    kinds = GREEDY[system]
    right = [is_right(kind) for kind in kinds]
    assert (found["problems"], found["correct"]) == (6, sum(right))
    assert found["accuracy"] == sum(right) / 6
    assert found["interval"] == list(wilson_interval(sum(right), 6))
    # The official extraction refuses "$30.00" and takes the first number of "30 or 7".
    official = kinds.count("right") + kinds.count("two")
    assert found["official_correct"] == official
    assert found["official_accuracy"] == official / 6
    assert found["format"] == mean([kind != "cut" for kind in kinds])
    assert found["truncated"] == kinds.count("cut") / 6
    assert found["mean_tokens"] == mean([len(say("", i, kind)) for i, kind in enumerate(kinds)])
    written = sum((1 + i % 3) if k == "right" else k in ("alike", "wrong", "other")
                  for i, k in enumerate(kinds))  # fmt: skip
    assert found["true_equations"] == (written - kinds.count("wrong")) / written
    assert found["by_solution_steps"] == [
        {
            "steps": steps,
            "problems": 2,
            "correct": sum(right[steps - 1 :: 3]),
            "accuracy": sum(right[steps - 1 :: 3]) / 2,
            "interval": list(wilson_interval(sum(right[steps - 1 :: 3]), 2)),
        }
        for steps in (1, 2, 3)
    ]


@pytest.mark.parametrize("system", ["base", "adapter"])
def test_sampled_statistics_over_all_subsets(system: str) -> None:
    found = summarize(all_records("base", "adapter"), EXAMPLES)["systems"][system]["sampled"]
    drawn = [tuple(kinds.split()) for kinds in DRAWN[system]]
    assert found["samples"] == SAMPLES
    assert list(found["pass_at_k"]) == list(found["maj_at_k"]) == ["1", "2", "4"]
    for k in (1, 2, 4):
        subsets = [list(itertools.combinations(kinds, k)) for kinds in drawn]
        passed = mean([mean([any(map(is_right, s)) for s in each]) for each in subsets])
        voted = mean([mean([vote(s) for s in each]) for each in subsets])
        assert found["pass_at_k"][str(k)] == pytest.approx(passed)
        assert found["maj_at_k"][str(k)] == pytest.approx(voted)
    right = mean([is_right(kind) for kinds in drawn for kind in kinds])
    assert found["pass_at_1"] == pytest.approx(right)
    low, high = found["interval"]
    assert low < right < high
    # Problems are the unit: with 24 independent trials it would be narrower.
    assert high - low > np.subtract(*wilson_interval(round(24 * right), 24)[::-1])
    assert found["format"] == mean([kind != "cut" for kinds in drawn for kind in kinds])
    assert found["truncated"] == mean([kind == "cut" for kinds in drawn for kind in kinds])
    records = [r for r in all_records(system) if r["sample"] is not None]
    assert found["reward"] == pytest.approx(mean([r["total"] for r in records]))
    assert found["mean_tokens"] == pytest.approx(mean([r["tokens"] for r in records]))


def test_the_comparison_is_of_greedy_answers() -> None:
    assert summarize(all_records("base", "adapter"), EXAMPLES)["comparison"] == {
        "both_right": 1,
        "both_wrong": 0,
        "fixed": 4,
        "broken": 1,
        "p_value": 12 / 32,
    }


def test_a_model_alone_is_compared_with_nothing() -> None:
    greedy = [r for r in all_records("base") if r["sample"] is None]
    found = summarize(greedy, EXAMPLES)
    assert found["comparison"] is None
    assert list(found["systems"]) == ["base"]
    assert found["systems"]["base"]["sampled"] is None


def test_problems_without_a_solution_have_no_steps() -> None:
    bare = [Example(example.question, example.answer) for example in EXAMPLES]
    greedy = [r for r in all_records("base") if r["sample"] is None]
    assert summarize_greedy(greedy, bare)["by_solution_steps"] == []


def test_gold_solutions_are_all_right() -> None:
    """Of what an evaluation is made on by default, in the steps in which it is made."""
    from gemma2_grpo.presets import load_config

    examples = load_held_out(load_config("tiny").data, 20)
    scores = Scorer(RewardConfig())(examples, [example.solution for example in examples])
    records = [
        {"index": i, "tokens": 1, "truncated": False, **{n: c[i] for n, c in scores.items()}}
        for i in range(20)
    ]
    found = summarize_greedy(records, examples)
    assert (found["accuracy"], found["format"], found["true_equations"]) == (1, 1, 1)
    assert sum(row["problems"] for row in found["by_solution_steps"]) == 20
    assert {row["steps"] for row in found["by_solution_steps"]} == {2, 3}
