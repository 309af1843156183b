"""Procedural problems: true arithmetic and separate splits."""

import hashlib
import re

import numpy as np
import pytest

from gemma2_grpo.task.procedural import Problem, generate, make_problem, split_of

EQUATION = re.compile(r"(\d+) ([-+x]) (\d+) = (\d+)")
GOLDEN = "ad455e74f8fbfaf2fbc521e82906b55c01121a8a296e9ab339654e77a0c86372"
SPLITS = ("train", "validation", "test")
SOLUTION = re.compile(
    r"<reasoning>\n((?:Step \d: \d+ [-+x] \d+ = \d+\n){2,3})Therefore, the answer is (\d+)\.\n"
    r"</reasoning>\n<answer>\n(\d+)\n</answer>"
)


def calculate(left: str, op: str, right: str) -> int:
    return eval(f"{left} {op.replace('x', '*')} {right}")


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return generate("train", 3000, seed=0)


def test_every_written_step_is_true_and_in_range(problems):
    for problem in problems:
        match = SOLUTION.fullmatch(problem.solution)
        assert match, problem.solution
        steps, said, answered = match.groups()
        equations = EQUATION.findall(steps)
        for left, op, right, result in equations:
            assert calculate(left, op, right) == int(result)
            assert all(1 <= int(value) <= 99 for value in (left, right, result))
        assert said == answered == problem.answer == equations[-1][-1]


def test_steps_use_exactly_the_numbers_of_the_question_and_earlier_results(problems):
    for problem in problems:
        given = set(map(int, re.findall(r"\d+", problem.question)))
        used, results = set(), set()
        for left, _, right, result in problem.steps:
            used |= {left, right} - (results - given)
            results.add(result)
        assert used == given, problem


def test_a_problem_in_full():
    steps = ((12, "+", 7, 19), (19, "x", 4, 76))
    problem = Problem("How many?", steps)
    assert problem.answer == "76"
    assert problem.chain == "12 + 7 = 19; 19 x 4 = 76"
    assert problem.solution == (
        "<reasoning>\nStep 1: 12 + 7 = 19\nStep 2: 19 x 4 = 76\n"
        "Therefore, the answer is 76.\n</reasoning>\n<answer>\n76\n</answer>"
    )


def test_problems_are_varied(problems):
    operators = {" ".join(op for _, op, _, _ in problem.steps) for problem in problems}
    wordings = {re.sub(r"\d+", "7", problem.question) for problem in problems}
    assert len(operators) >= 9
    assert len(wordings) > 1000
    assert all(18 <= len(problem.question.split()) <= 34 for problem in problems)
    assert len({problem.chain for problem in problems}) == len(problems)


def test_splits_share_no_chain_of_equations():
    chains = {
        split: {problem.chain for seed in range(2) for problem in generate(split, 1500, seed)}
        for split in SPLITS
    }
    assert not chains["train"] & chains["test"]
    assert not chains["train"] & chains["validation"]
    assert not chains["test"] & chains["validation"]


def test_split_is_by_chain_alone_in_shares_of_80_10_10():
    rng = np.random.default_rng(0)
    drawn = [make_problem(rng) for _ in range(4000)]
    for problem in drawn[:200]:
        assert split_of(Problem("Other words?", problem.steps)) == split_of(problem)
    shares = [np.mean([split_of(problem) == split for problem in drawn]) for split in SPLITS]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.02)


def test_generation_is_the_same_everywhere_and_extends_itself(problems):
    text = "\n".join(problem.question + problem.solution for problem in problems)
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN
    assert generate("train", 50, seed=0) == problems[:50]
    assert generate("train", 50, seed=1) != problems[:50]


def test_chains_repeat_only_where_new_ones_have_run_out(monkeypatch):
    text = "{name} and {other} have {a} and {b} {thing}, {c} times. How many?"
    monkeypatch.setattr("gemma2_grpo.task.procedural.TEMPLATES", ((text, "a x b, 1 x c"),))
    drawn = generate("test", 200, seed=0)
    chains = {problem.chain for problem in drawn}
    assert len(drawn) == 200
    assert 10 < len(chains) < 100  # All the test chains there are.
