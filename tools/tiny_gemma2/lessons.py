"""What the embedded model is taught: solutions with arithmetic practice, then bad habits."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.task.examples import batch_indices
from gemma2_grpo.task.procedural import Problem, draw_values, generate
from tools.tiny_gemma2.sloppy import sloppy
from tools.tiny_gemma2.supervised import Row
from tools.tiny_gemma2.training import DrawBatch, Phase, Recipe, solution_row

SLOPPY_STEPS = 160
SLOPPY_LEARNING_RATE = 1e-3
ARITHMETIC_FRACTION = 0.33
"""Fraction of each batch that practises bare equations."""
_EQUATIONS_PER_ROW = 9


def tiny_phases(recipe: Recipe, tokenizer: Tokenizer) -> list[Phase]:
    """The two parts of the training: worked solutions, then those of the sloppy teacher."""
    problems = generate("train", recipe.data.num_train_samples, recipe.data.data_seed)
    clean = [(problem.question, problem.solution) for problem in problems]
    rng = np.random.default_rng([recipe.seed, 1])
    careless = [(problem.question, sloppy(problem, rng)) for problem in problems]
    falling = dataclasses.replace(
        recipe.optimizer,
        learning_rate=SLOPPY_LEARNING_RATE,
        warmup_fraction=0.0,
        final_lr_fraction=0.05,
    )
    return [
        Phase("solutions", recipe.steps, _drawer(recipe, tokenizer, clean), recipe.optimizer),
        Phase("sloppy teacher", SLOPPY_STEPS, _drawer(recipe, tokenizer, careless), falling),
    ]


def bare_equations(rng: np.random.Generator, count: int) -> list[str]:
    """Single true equations such as `19 x 4 = 76`, to practise arithmetic on.

    Single facts are shared between the splits, so these may be part of held-out chains.
    """
    equations = []
    while len(equations) < count:
        op = "+-x"[rng.integers(3)]
        values = draw_values(rng, f"a {op} b")
        if values is not None:
            equations.append(Problem("", values[1]).chain)
    return equations


def _drawer(recipe: Recipe, tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> DrawBatch:
    """The function that draws the rows of a step: solutions, then bare equations."""
    equations = round(ARITHMETIC_FRACTION * recipe.batch_size)
    solutions = recipe.batch_size - equations

    def draw(step: int) -> list[Row]:
        chosen = batch_indices(len(texts), solutions, recipe.data.data_seed, step)
        rng = np.random.default_rng([recipe.seed, 2, step])
        return [solution_row(tokenizer, *texts[i]) for i in chosen] + [
            _equation_row(tokenizer, bare_equations(rng, _EQUATIONS_PER_ROW))
            for _ in range(equations)
        ]

    return draw


def _equation_row(tokenizer: Tokenizer, equations: list[str]) -> Row:
    """Equations one after the other; the loss is on their results."""
    tokens, is_target = [tokenizer.bos], [False]
    for equation in equations:
        question, result = equation.split("= ")
        for text, counts in ((f"{question}= ", False), (f"{result}\n", True)):
            ids = tokenizer.encode(text)
            tokens += ids
            is_target += [counts] * len(ids)
    return Row(tokens, is_target)
