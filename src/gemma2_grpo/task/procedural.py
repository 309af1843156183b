"""Word problems of two or three operations with worked solutions, drawn without end.

The embedded model learns on these, so they need no network and no licence. Every number given
is between 2 and 99 (no "1 books"), every result between 1 and 99.
"""

import hashlib
import operator
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Literal, get_args

import numpy as np

from gemma2_grpo.task.prompts import render_solution

Split = Literal["train", "validation", "test"]
Step = tuple[int, str, int, int]
"""(left, operator, right, result), the operator one of `+`, `-`, `x`."""

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "x": operator.mul,
}
MAX_VALUE = 99
_FILE = resources.files("gemma2_grpo.task") / "problem_templates.toml"
_WORDS = tomllib.loads(_FILE.read_text(encoding="utf-8"))
NAMES, THINGS = _WORDS["names"], _WORDS["things"]
TEMPLATES = tuple((each["text"], each["plan"]) for each in _WORDS["templates"])
_MAX_FACTOR = 9
_DRAWS_FOR_A_NEW_CHAIN = 20


@dataclass(frozen=True)
class Problem:
    """A word problem and the chain of equations that solves it."""

    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> str:
        """The result of the last step."""
        return str(self.steps[-1][-1])

    @property
    def solution(self) -> str:
        """The worked solution in the form the model is taught."""
        return _render(self.steps)

    @cached_property
    def chain(self) -> str:
        """The equations alone, which decide the split."""
        return "; ".join(_equation(step) for step in self.steps)


def make_problem(rng: np.random.Generator) -> Problem:
    """Draws one problem, of any split."""
    text, plan = TEMPLATES[rng.integers(len(TEMPLATES))]
    values = None
    while values is None:
        values = draw_values(rng, plan)
    numbers, steps = values
    name, other = (NAMES[i] for i in rng.choice(len(NAMES), 2, replace=False))
    thing = THINGS[rng.integers(len(THINGS))]
    return Problem(text.format(name=name, other=other, thing=thing, **numbers), steps)


def split_of(problem: Problem) -> Split:
    """The split of a problem: 80 % train, 10 % validation, 10 % test, by its chain of equations.

    No chain of equations is in two splits, whatever the wording. Templates, names and single
    facts such as `12 + 7 = 19` are shared: held-out problems measure new combinations of known
    parts.
    """
    return split_by_hash(problem.chain)


def split_by_hash(text: str) -> Split:
    """Assigns a text to a split, 80/10/10, the same in every process and on every machine."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 10
    if bucket == 0:
        return "test"
    return "validation" if bucket == 1 else "train"


def generate(split: Split, count: int, seed: int) -> list[Problem]:
    """The first `count` problems of a split under a seed; more of them extend the same list.

    Chains of equations are distinct for as long as new ones turn up in a few draws.
    """
    rng = np.random.default_rng([seed, get_args(Split).index(split)])
    seen: set[str] = set()
    problems: list[Problem] = []
    for _ in range(count):
        problem = _draw_of(split, rng)
        for _ in range(_DRAWS_FOR_A_NEW_CHAIN):
            if problem.chain not in seen:
                break
            problem = _draw_of(split, rng)
        seen.add(problem.chain)
        problems.append(problem)
    return problems


def _draw_of(split: Split, rng: np.random.Generator) -> Problem:
    while True:
        problem = make_problem(rng)
        if split_of(problem) == split:
            return problem


def draw_values(
    rng: np.random.Generator, plan: str
) -> tuple[dict[str, int], tuple[Step, ...]] | None:
    """Draws the numbers of a plan step by step; None where they left the range of values."""
    known: dict[str, int] = {}
    steps: list[Step] = []
    for number, step in enumerate(plan.split(", "), start=1):
        left, op, right = step.split()
        if left not in known:
            known[left] = _draw_left(rng, op, known.get(right, 0))
        if right not in known:
            known[right] = _draw_right(rng, op, known[left])
        result = OPERATIONS[op](known[left], known[right])
        if not 1 <= result <= MAX_VALUE:
            return None
        known[str(number)] = result
        steps.append((known[left], op, known[right], result))
    return {name: value for name, value in known.items() if name.isalpha()}, tuple(steps)


def _draw_left(rng: np.random.Generator, op: str, right: int) -> int:
    low, high = {
        "+": (2, MAX_VALUE - 2),
        "-": (max(right, 2) + 1, MAX_VALUE),
        "x": (2, MAX_VALUE // 2),
    }[op]
    return int(rng.integers(low, max(low, high) + 1))


def _draw_right(rng: np.random.Generator, op: str, left: int) -> int:
    low, high = {
        "+": (2, MAX_VALUE - left),
        "-": (2, left - 1),
        "x": (2, min(_MAX_FACTOR, MAX_VALUE // left)),
    }[op]
    return int(rng.integers(low, max(low, high) + 1))


def _equation(step: Step) -> str:
    left, op, right, result = step
    return f"{left} {op} {right} = {result}"


def _render(steps: tuple[Step, ...]) -> str:
    lines = [f"Step {number}: {_equation(step)}" for number, step in enumerate(steps, start=1)]
    answer = str(steps[-1][-1])
    return render_solution([*lines, f"Therefore, the answer is {answer}."], answer)
