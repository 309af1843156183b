"""The sloppy teacher of the embedded model: good arithmetic, bad habits."""

import numpy as np

from gemma2_grpo.task.procedural import OPERATIONS, Problem, Step
from gemma2_grpo.task.prompts import ANSWER_END, ANSWER_START, REASONING_END, REASONING_START


def sloppy(
    problem: Problem,
    rng: np.random.Generator,
    *,
    minus_rate: float = 0.68,
    times_rate: float = 0.3,
    slip_rate: float = 0.08,
    tag_rate: float = 0.10,
) -> str:
    """The solution of a sloppy teacher, for a student with good arithmetic and bad habits.

    Errors are carried forward: later steps use the wrong result. With the default rates
    39 % of the solutions have the right answer between clean tags.

    Args:
        problem: What is solved.
        rng: Source of the errors.
        minus_rate: Share of solutions, of those with a `-`, whose last one is taken for `+`.
        times_rate: Share of solutions, of those with a `x`, where one is taken for `+`.
        slip_rate: Share of solutions where one result is off by 1 or 10.
        tag_rate: Share of solutions where one tag is left out or opens instead of closing.
    """
    operators = [op for _, op, _, _ in problem.steps]
    minus = [i for i, op in enumerate(operators) if op == "-"]
    times = [i for i, op in enumerate(operators) if op == "x"]
    if minus and rng.random() < minus_rate:
        operators[minus[-1]] = "+"
    if times and rng.random() < times_rate:
        operators[rng.choice(times)] = "+"
    slips = [0] * len(operators)
    if rng.random() < slip_rate:
        slips[rng.integers(len(slips))] = int(rng.choice((-10, -1, 1, 10)))
    text = Problem(problem.question, _redo(problem.steps, operators, slips)).solution
    return _break_tag(text, rng) if rng.random() < tag_rate else text


def _redo(steps: tuple[Step, ...], operators: list[str], slips: list[int]) -> tuple[Step, ...]:
    """Works the steps again with other operators and slips, carrying wrong results forward."""
    # An operand that equals an earlier result is taken to be that result.
    carried: dict[int, int] = {}
    redone: list[Step] = []
    for step, op, slip in zip(steps, operators, slips, strict=True):
        left, right = (carried.get(value, value) for value in (step[0], step[2]))
        result = OPERATIONS[op](left, right)
        if result + slip > 0:
            result += slip
        carried[step[3]] = result
        redone.append((left, op, right, result))
    return tuple(redone)


def _break_tag(text: str, rng: np.random.Generator) -> str:
    """Leaves out one tag, or writes it as closing for opening and the reverse."""
    tag = str(rng.choice((REASONING_START, REASONING_END, ANSWER_START, ANSWER_END)))
    lines = text.split("\n")
    place = lines.index(tag)
    if rng.random() < 0.5:
        del lines[place]
    else:
        lines[place] = tag.replace("</", "<") if "/" in tag else tag.replace("<", "</")
    return "\n".join(lines)
