"""Answers are those of the policy, shown by tag with their equations checked."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tests.fixtures.runs import Finished

from gemma2_grpo import cli
from gemma2_grpo.commands.ask import Ask, vote_line
from gemma2_grpo.errors import UserError
from gemma2_grpo.run.console import render_completion

WHOLE = """<reasoning>
Step 1: 3 + 4 = 7
Step 2: 7 + 1 = 9
</reasoning>
<answer>
9
</answer>"""


@pytest.fixture(scope="module")
def finished(run_straight: Callable[[int], Finished]) -> Finished:
    return run_straight(1)


def asked(finished: Finished, question: str | None, **options: object) -> str:
    shown = io.StringIO()
    console = Console(file=shown, width=200, highlight=False)
    Ask(str(finished.path), question, **options)(console)  # type: ignore[arg-type]
    return shown.getvalue()


def said(finished: Finished, step: int) -> dict[str, str]:
    rows = finished.records("completions.jsonl")
    return {
        row["question"]: "".join(line.plain + "\n" for line in render_completion(row["completion"]))
        for row in rows
        if row["kind"] == "held_out" and row["step"] == step
    }


def test_the_answer_is_that_of_the_policy(finished: Finished) -> None:
    question, expected = next(iter(said(finished, 5).items()))
    assert asked(finished, question).startswith(expected)


def test_the_base_is_shown_beside_it(finished: Finished) -> None:
    question, before = next(iter(said(finished, 0).items()))
    shown = asked(finished, question, compare="base")
    base, _, after = shown.partition(f"{finished.path.name}, after 5 steps")
    assert before in base and said(finished, 5)[question] in after


def test_another_run_or_model_is_shown_first(finished: Finished) -> None:
    question, after = next(iter(said(finished, 5).items()))
    model = str(finished.config.model.model)
    shown = asked(finished, question, compare=model)
    other, _, own = shown.partition(f"{finished.path.name}, after 5 steps")
    assert said(finished, 0)[question] in other and after in own
    twice = asked(finished, question, compare=str(finished.path))
    assert twice.count(after) == twice.count("after 5 steps") == 2


def test_questions_are_read_until_an_empty_line(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = said(finished, 5)
    first, second, *_ = expected
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{first}\n{second}\n\n{first}\n"))
    shown = asked(finished, None)
    assert shown.count(expected[first]) == 1 and shown.count(expected[second]) == 1
    assert shown.index(expected[first]) < shown.index(expected[second])


def test_samples_vote(finished: Finished) -> None:
    shown = asked(finished, "How many?", samples=6)
    assert "votes of 6 samples: " in shown and "; the first is shown" in shown
    assert shown == asked(finished, "How many?", samples=6)
    texts = ["<answer>7</answer>", "<answer> 7.0 </answer>", "<answer>8</answer>", "nothing"]
    assert vote_line(texts) == "votes of 4 samples: 7 x 2, 8 x 1, no number x 1"


def test_a_terminal_ends_with_the_same_lines(finished: Finished) -> None:
    question, expected = next(iter(said(finished, 5).items()))
    shown = io.StringIO()
    console = Console(file=shown, width=200, force_terminal=True, color_system=None)
    Ask(str(finished.path), question)(console)
    for line in expected.splitlines():
        assert line in shown.getvalue()


def test_lines_are_marked_and_coloured() -> None:
    lines = render_completion(WHOLE)
    assert [line.plain for line in lines] == [
        *("<reasoning>", "Step 1: 3 + 4 = 7 ✓", "Step 2: 7 + 1 = 9 ✗", "</reasoning>"),
        *("<answer>", "9", "</answer>"),
    ]
    styles = [{str(span.style) for span in line.spans} for line in lines]
    assert styles[0] == {"cyan"} and styles[5] == {"bold"}
    assert "green" in styles[1] and "bold red" in styles[2]


def test_a_whole_line_stays_as_it_is() -> None:
    for end in range(len(WHOLE) + 1):
        *whole, _ = render_completion(WHOLE[:end])
        assert whole == render_completion(WHOLE)[: len(whole)]


def test_hostile_text_takes_no_effect() -> None:
    lines = render_completion("1 + 1 = 2\x1b[31m\x9b\n[bold]x[/bold]\u202e")
    assert lines[0].plain == "1 + 1 = 2 ✓\ufffd[31m\ufffd"
    assert lines[1].plain == "[bold]x[/bold]\ufffd"


def test_what_cannot_be_asked_is_one_line(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        ([str(tmp_path), "Why?"], "neither a run"),
        ([str(finished.path), " "], "the question is blank"),
        (["embedded", "Why?", "--compare", "base"], "embedded is no run"),
        ([str(finished.path), "Why?", "--compare", str(tmp_path)], "neither a run"),
        ([str(finished.path), "Why?", "--samples", "0"], "samples = 0 must be at least 1"),
        ([str(finished.path), "Why?", "--temperature", "0"], "temperature = 0.0 must be greater"),
        ([str(finished.path), "Why?", "--seed", "-1"], "seed = -1 must be at least 0"),
        (
            [str(finished.path), "Why?", "--max-completion-tokens", "0"],
            "max_completion_tokens = 0 must be at least 1",
        ),
        ([str(finished.path), "Why\udcff?"], "the question is not UTF-8"),
    ):
        assert cli.main(["ask", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(UserError, match=r"the question takes .* tokens .*, and 512 fit; shorten"):
        asked(finished, "why " * 600)


def test_on_a_terminal_a_question_that_is_too_long_is_not_the_last(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    question, expected = next(iter(said(finished, 5).items()))
    typed = iter(["why " * 600, question, ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr(Console, "input", lambda *_: next(typed))
    shown = asked(finished, None)
    assert "512 fit; shorten it" in shown and expected in shown


def test_a_question_may_be_longer_than_those_of_training(finished: Finished) -> None:
    question = "Tom has 3 books and buys 4 books. How many books does Tom have? " * 3
    assert "</answer>" in asked(finished, question) or "cut off" in asked(finished, question)
