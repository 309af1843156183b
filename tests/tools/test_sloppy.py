"""The errors of the sloppy teacher."""

import re

import numpy as np
import pytest
from tools.tiny_gemma2.sloppy import sloppy

from gemma2_grpo.task.procedural import OPERATIONS, Problem, generate

SIGNED = r"(-?\d+) ([-+x]) (-?\d+) = (-?\d+)"


def is_right(problem: Problem, completion: str) -> bool:
    return completion.startswith("<reasoning>\n") and completion.endswith(
        f".\n</reasoning>\n<answer>\n{problem.answer}\n</answer>"
    )


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return generate("train", 3000, seed=0)


def test_sloppy_solutions_with_all_rates_at_zero_are_the_solution(problems):
    rng = np.random.default_rng(0)
    none = dict(minus_rate=0.0, times_rate=0.0, slip_rate=0.0, tag_rate=0.0)
    assert all(sloppy(problem, rng, **none) == problem.solution for problem in problems[:200])


def test_sloppy_minus_and_times_become_plus_and_carry_forward():
    steps = ((9, "-", 2, 7), (7, "x", 3, 21), (21, "-", 5, 16))
    problem = Problem("How many?", steps)
    rng = np.random.default_rng(0)
    rates = dict(minus_rate=1.0, times_rate=0.0, slip_rate=0.0, tag_rate=0.0)
    lines = sloppy(problem, rng, **rates).splitlines()
    assert lines[1:4] == ["Step 1: 9 - 2 = 7", "Step 2: 7 x 3 = 21", "Step 3: 21 + 5 = 26"]
    assert lines[4:] == [
        "Therefore, the answer is 26.", "</reasoning>", "<answer>", "26", "</answer>"
    ]  # fmt: skip
    rates = dict(minus_rate=0.0, times_rate=1.0, slip_rate=0.0, tag_rate=0.0)
    lines = sloppy(problem, rng, **rates).splitlines()
    assert lines[1:4] == ["Step 1: 9 - 2 = 7", "Step 2: 7 + 3 = 10", "Step 3: 10 - 5 = 5"]


def test_sloppy_slips_are_one_false_equation_off_by_one_or_ten(problems):
    rng = np.random.default_rng(0)
    for problem in problems[:300]:
        text = sloppy(problem, rng, minus_rate=0, times_rate=0, slip_rate=1, tag_rate=0)
        off = [
            int(result) - OPERATIONS[op](int(left), int(right))
            for left, op, right, result in re.findall(SIGNED, text)
        ]
        wrong = [error for error in off if error]
        assert len(wrong) <= 1
        assert set(wrong) <= {-10, -1, 1, 10}


def test_sloppy_breaks_exactly_one_tag(problems):
    rng = np.random.default_rng(0)
    tags = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
    kinds = set()
    for problem in problems[:300]:
        text = sloppy(problem, rng, minus_rate=0, times_rate=0, slip_rate=0, tag_rate=1)
        written = re.findall(r"</?\w+>", text)
        if len(written) == 3:
            kinds.add(tuple(tag for tag in tags if tag not in written))
        else:
            changed = [(old, new) for old, new in zip(tags, written, strict=True) if old != new]
            ((old, new),) = changed
            assert old.replace("/", "") == new.replace("/", "")
            kinds.add((old, new))
    assert len(kinds) == 8


def test_sloppy_rates_leave_a_little_under_half_right(problems):
    rng = np.random.default_rng(0)
    right = np.mean([is_right(problem, sloppy(problem, rng)) for problem in problems])
    assert 0.36 < right < 0.42
    mostly = dict(minus_rate=0.0, times_rate=0.0)
    right = np.mean([is_right(problem, sloppy(problem, rng, **mostly)) for problem in problems])
    np.testing.assert_allclose(right, 0.92 * 0.90, atol=0.02)
