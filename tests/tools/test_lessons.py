"""What the embedded model is taught, and that one command makes it."""

import dataclasses
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools.tiny_gemma2 import training
from tools.tiny_gemma2.__main__ import main, make
from tools.tiny_gemma2.lessons import bare_equations, tiny_phases
from tools.tiny_gemma2.training import Recipe

from gemma2_grpo.model.tokenizer import Tokenizer, load_tokenizer
from gemma2_grpo.task.procedural import OPERATIONS, generate
from gemma2_grpo.task.prompts import INSTRUCTION

SHIPPED = Path(str(resources.files("gemma2_grpo") / "assets" / "tiny-gemma2"))
EQUATION = re.compile(r"(\d+) ([-+x]) (\d+) = (\d+)")
# Of the rows that made the embedded model: the first 5 steps of each part, on 400 problems.
ROWS = {
    "solutions": "2cf575f103004f5a4fd5c6889aba75947610abac883ff5278edd8030dbb43129",
    "sloppy teacher": "1e8bbd0944008ebba708aa391edd3465ae9df72b53b5a0c5adeea970219b9d5e",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(SHIPPED)


def tiny(problems: int) -> Recipe:
    recipe = Recipe()
    data = dataclasses.replace(recipe.data, num_train_samples=problems)
    return dataclasses.replace(recipe, data=data)


def test_rows_are_those_that_made_the_embedded_model(tokenizer: Tokenizer) -> None:
    phases = tiny_phases(tiny(400), tokenizer)
    assert [(phase.name, phase.steps) for phase in phases] == list(
        zip(ROWS, (2500, 160), strict=True)
    )
    for phase in phases:
        digest = hashlib.sha256()
        for step in range(5):
            rows = [[row.tokens, row.is_target] for row in phase.draw(step)]
            digest.update(json.dumps(rows).encode())
        assert digest.hexdigest() == ROWS[phase.name]
    assert phases[0].optimizer == Recipe().optimizer
    last = phases[1].optimizer
    assert (last.learning_rate, last.warmup_fraction, last.final_lr_fraction) == (1e-3, 0.0, 0.05)


def test_the_sloppy_teacher_follows_clean_solutions(tokenizer: Tokenizer) -> None:
    clean, careless = (
        [[tokenizer.decode(row.tokens) for row in phase.draw(step)] for step in range(10)]
        for phase in tiny_phases(tiny(40), tokenizer)
    )
    for rows in (*clean, *careless):
        assert [INSTRUCTION in row for row in rows] == [True] * 16 + [False] * 8
        assert rows[-1].count(" = ") > 4
    solutions = tuple(p.solution for p in generate("train", 40, 0))

    def right_share(batches: list[list[str]]) -> float:
        texts = [text for batch in batches for text in batch[:16]]
        return float(np.mean([text.strip().endswith(solutions) for text in texts]))

    assert right_share(clean) == 1
    assert 0.2 < right_share(careless) < 0.8


def test_bare_equations_are_true_and_cover_the_operations():
    equations = bare_equations(np.random.default_rng(0), 900)
    assert equations == bare_equations(np.random.default_rng(0), 900)
    matches = [EQUATION.fullmatch(equation) for equation in equations]
    for match in matches:
        assert match
        left, op, right, result = match.groups()
        assert OPERATIONS[op](int(left), int(right)) == int(result) <= 99
    counts = [sum(match[2] == op for match in matches if match) for op in "+-x"]
    assert len(equations) == 900 and min(counts) > 200


def test_one_command_writes_tokenizer_architecture_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, int]] = []

    def count(_: Any, batches: Any, *__: Any, **___: Any) -> None:
        trained.extend((step, len(rows)) for step, rows in enumerate(batches))

    monkeypatch.setattr(training, "train_supervised", count)
    make(tmp_path / "made", dataclasses.replace(tiny(400), steps=1))
    assert trained == [(0, 24), *((step, 24) for step in range(160))]
    for name in ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"):
        assert (tmp_path / "made" / name).read_bytes() == (SHIPPED / name).read_bytes()
    ours, shipped = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "made", SHIPPED)
    )
    assert ours == shipped
    size = (SHIPPED / "model.safetensors").stat().st_size
    assert (tmp_path / "made" / "model.safetensors").stat().st_size == size


def test_a_directory_that_holds_a_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr("sys.argv", ["tools.tiny_gemma2", "--to", str(tmp_path)])
    assert main() == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: holds a model already; choose another --to\n"
    )
