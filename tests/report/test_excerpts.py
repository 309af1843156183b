"""Excerpts of a report: which answers are shown, and the marks at their equations."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gemma2_grpo.report.excerpts import choose, mark
from gemma2_grpo.run.files import read_run
from gemma2_grpo.run.outcome import during_run
from gemma2_grpo.task.prompts import render_solution
from gemma2_grpo.task.rewards import score_completion

Write = Callable[..., Path]


def test_what_flipped_is_shown_first(write: Write) -> None:
    path = write([False, True, True, False] * 4, [True, False, True, False] * 4)
    outcome = during_run(read_run(path))
    assert outcome
    groups = choose(outcome.pairs)
    assert [(g.title[:5], g.total, len(g.shown), len(g.folded)) for g in groups] == [
        ("Fixed", 4, 3, 1),
        ("Broke", 4, 3, 1),
        ("Wrong", 4, 1, 3),
        ("Right", 4, 1, 3),
    ]
    assert [pair.question.question[:10] for pair in groups[0].shown] == [
        "Question 0",
        "Question 4",
        "Question 8",
    ]


def test_equations_are_marked_where_they_stand() -> None:
    text = render_solution(["2 + 2 = 4 eggs", "4 + 1 = 6 = 3 + 3"], "6")
    pieces = mark(text)
    assert "".join(piece.text for piece in pieces) == text
    marked = [(p.text, p.kind) for p in pieces if p.kind in ("true", "false")]
    assert marked == [
        ("2 + 2 = 4", "true"),
        ("4 + 1 = 6", "false"),
        (" = 3 + 3", "true"),
    ]
    scored = score_completion(text, "6").equations
    assert [kind == "true" for _, kind in marked] == [e.is_true for e in scored]


@pytest.mark.parametrize(
    "text", ["", "x" * 20_000, "\n" * 20_000, "<reasoning>" * 500, "1 = 1 " * 3000, "3 + 4 = 8"]
)
def test_marks_of_any_text_keep_its_beginning(text: str) -> None:
    shown = "".join(piece.text for piece in mark(text))
    assert text.startswith(shown) and len(shown) <= 3_000 and shown.count("\n") <= 50
