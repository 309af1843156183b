"""Whether a run made the model better, in one sentence and with its flips."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.fixtures.written_run import write_evaluation

from gemma2_grpo.report.report import render
from gemma2_grpo.run.files import read_run
from gemma2_grpo.run.outcome import by_evaluation, during_run, headline

Write = Callable[..., Path]


def said(path: Path) -> str:
    run = read_run(path)
    return headline(during_run(run), is_control=run.is_control).replace("\u00a0", " ")


def test_a_rise_is_said_with_its_flips(write: Write) -> None:
    path = write([False] * 12 + [True] * 8, [True] * 10 + [False] * 2 + [True] * 7 + [False])
    assert said(path) == (
        "Accuracy rose from 40.0 % to 85.0 % on 20 held-out problems; 10 fixed, 1 broken."
    )
    outcome = during_run(read_run(path))
    assert outcome and outcome.paired
    assert (outcome.paired.num_both_right, outcome.paired.num_both_wrong) == (7, 2)
    # 2 (C(11, 0) + C(11, 1)) / 2^11
    assert outcome.paired.p_value == pytest.approx(24 / 2048)


def test_a_fall_is_said(write: Write) -> None:
    path = write([True] * 20, [True] * 8 + [False] * 12)
    assert said(path).startswith("Accuracy fell from 100.0 % to 40.0 %")


def test_what_chance_explains_is_no_rise(write: Write) -> None:
    path = write([False] * 5 + [True] * 15, [True] * 20)
    assert said(path) == (
        "No significant difference: accuracy went from 75.0 % to 100.0 % on 20 "
        "held-out problems; 5 fixed, 0 broken."
    ), "p = 1/16"


def test_a_control_is_named(write: Write) -> None:
    path = write([True] * 4, [True] * 4, shuffle=True)
    assert said(path).startswith("Control run with shuffled rewards, which can teach nothing. No")


def test_a_run_that_has_only_begun(write: Write) -> None:
    assert said(write([True, False])) == (
        "50.0 % of 2 held-out problems are right before training; there is nothing yet to compare "
        "that with."
    )


def test_without_completions_intervals_decide(write: Write) -> None:
    path = write([False] * 20, [True] * 20)
    (path / "completions.jsonl").unlink()
    assert said(path) == "Accuracy rose from 0.0 % to 100.0 % on 20 held-out problems."
    near = write([False] * 12 + [True] * 8, [True] * 12 + [False] * 8, name="near")
    (near / "completions.jsonl").unlink()
    assert said(near).startswith("No significant difference")


def test_counts_that_cannot_be_are_left_out(write: Write) -> None:
    path = write([True, False])
    [line] = (path / "evaluations.jsonl").read_text().splitlines()
    (path / "evaluations.jsonl").write_text(line.replace('"num_correct":1', '"num_correct":3'))
    with (path / "evaluations.jsonl").open("a") as file:
        file.write("\n")
    assert said(path) == "Nothing has been measured yet, so that nothing can be said."
    assert "Nothing has been measured yet" in render(read_run(path))


def test_an_evaluation_comes_first(write: Write) -> None:
    path = write([True] * 4, [True] * 4)
    write_evaluation(path, [False] * 9, [True] * 9)
    run = read_run(path)
    outcome = by_evaluation(run)
    assert outcome and outcome.paired and outcome.before
    assert (outcome.paired.num_fixed, outcome.paired.num_broken) == (9, 0)
    page = render(run).replace("\u00a0", " ")
    assert "<h1>Accuracy rose from 0.0 % to 100.0 % on 9 gsm8k test problems; 9 fixed" in page
    assert outcome.after and outcome.after.system.sampled
    assert outcome.after.system.sampled.pass_at_k[2] == 1
    assert ">Right in any of 2 samples (pass@2)</th>" in page and ">100.0 %</td>" in page
    # Five problems with two steps, four with three; by Wilson's interval.
    assert ">2 steps</th>" in page and ">100.0 %, 57 to 100</td>" in page
    assert ">3 steps</th>" in page and ">100.0 %, 51 to 100</td>" in page
    assert "Evaluated 2026-01-02 03:04:05 UTC" in page and "c0ffee" in page
    assert page.index("By gemma2-grpo evaluate") < page.index("measured by the run")
