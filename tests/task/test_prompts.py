"""The form of prompts and completions: one parser, no backtracking, no leniency."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2_grpo.task.prompts import (
    INSTRUCTION,
    Completion,
    parse_completion,
    render_prompt,
    render_solution,
)

R, A = "<reasoning>3 + 4 = 7</reasoning>", "<answer>7</answer>"


def test_prompt_is_gemmas_chat_template():
    assert render_prompt("  How many?\n") == (
        f"<bos><start_of_turn>user\n{INSTRUCTION}\n\nHow many?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_rendered_solution_has_perfect_form():
    text = render_solution(["3 + 4 = 7", "So 7."], "7")
    assert parse_completion(text) == Completion("\n3 + 4 = 7\nSo 7.\n", "\n7\n", 1.0)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (R + A, 1.0),
        (f"\n {R}\r\n\t{A} \n", 1.0),
        (f"<reasoning>7 < 16 and 9 > 0, so <b>7</b></reasoning>{A}", 1.0),
        (f"<reasoning>The answers: 7 <reason></reasoning>{A}", 1.0),
        (f"{R}{A}<end_of_turn>", 1.0),
        (f"{R}{A}\n<end_of_turn>\n<eos><eos> ", 1.0),
        (f"Sure!\n{R}{A}", 0.6),
        (f"{R}\nTherefore:\n{A}", 0.6),
        (f"{R}{A}\nHope that helps.", 0.6),
        (f"```\n{R}{A}\n```", 0.6),
        (f"<bos>{R}{A}", 0.6),
        (f"{R}{A}<eos>more", 0.6),
        (f"{A}{R}", 0.3),
        (f"First {A} then {R}", 0.3),
        (A, 0.2),
        (f"It is {A}.", 0.2),
        ("", 0.0),
        (" \n ", 0.0),
        ("The answer is 7.", 0.0),
        (R, 0.0),
        (f"{R}<answer>7", 0.0),
        (f"{R}<answer>7</ans", 0.0),
        (f"{R}7</answer>", 0.0),
        (f"<reasoning>3 + 4 = 7{A}", 0.0),
        (f"{R}{A}{A}", 0.0),
        (f"{R}{R}{A}", 0.0),
        (f"{R}{A}Question: and now?{R}{A}", 0.0),
        ("<reasoning></reasoning><answer>7</answer>", 0.0),
        ("<reasoning> \n</reasoning><answer>7</answer>", 0.0),
        (f"{R}<answer></answer>", 0.0),
        (f"{R}<answer>\n</answer>", 0.0),
        ("<answer> </answer>", 0.0),
        (f"<reasoning>3 + 4 = 7 {A}</reasoning>", 0.0),
        (f"<reasoning>in <answer> tags</reasoning>{A}", 0.0),
        (f"{R}<answer><answer>7</answer></answer>", 0.0),
        (f"</reasoning>{R}{A}", 0.0),
        (f"{R.upper()}{A.upper()}", 0.0),
        (f"{R}<Answer>7</Answer>", 0.0),
        (f'{R}<answer unit="kg">7</answer>', 0.0),
        (f"{R}< answer >7</answer>", 0.0),
        (f"{R}<answer>7</answer >", 0.0),
        (f"{R}<answer/>7", 0.0),
        (f"{R}<ANSWER>8</ANSWER>{A}", 0.0),
    ],
)
def test_format(text: str, score: float):
    assert parse_completion(text).format == score


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        (R + A, "3 + 4 = 7", "7"),
        (A + R, "3 + 4 = 7", "7"),
        (f"{R}{R}{A}", None, "7"),
        (f"{R}{A}{A}", "3 + 4 = 7", None),
        (f"{R}<answer>7", "3 + 4 = 7", None),
        (f"{R}<answer>8</answer><ANSWER>7</ANSWER>", "3 + 4 = 7", None),
        (f"{R}</answer>7<answer>", "3 + 4 = 7", None),
        (f"<reasoning>x {A}</reasoning>", None, "7"),
        (f"{R}<answer>7<eos></answer>", "3 + 4 = 7", "7<eos>"),
        ("7", None, None),
    ],
)
def test_blocks_are_unique_or_none(text: str, reasoning: str | None, answer: str | None):
    found = parse_completion(text)
    assert (found.reasoning, found.answer) == (reasoning, answer)


PIECES = [
    "<reasoning>",
    "</reasoning>",
    "<answer>",
    "</answer>",
    "<eos>",
    "<Answer>",
    "<",
    " ",
    "7",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join))
def test_any_text_has_a_form(text: str):
    found = parse_completion(text)
    assert found.format in (0.0, 0.2, 0.3, 0.6, 1.0)
    if found.format in (0.3, 0.6, 1.0):
        assert found.reasoning
        assert found.reasoning.strip()
    if found.format:
        assert found.answer
        assert found.answer.strip()
    assert parse_completion(text + "<end_of_turn>") == found


@pytest.mark.parametrize(
    "unit",
    ["<", "< ", "<reasoning>", "</answer>", "<reasoning", "<eos>\n", " ", "<answer  ", "\n<"],
)
@pytest.mark.parametrize("start", ["", "<", "</"])
def test_time_is_linear(start: str, unit: str):
    text = start + unit * (100_000 // len(unit))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        parse_completion(text)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


def test_the_form_of_a_truncated_completion_is_not_perfect():
    text = render_solution(["1 + 1 = 2"], "2")
    assert parse_completion(text, is_truncated=True).format == 0.6
    assert parse_completion(f"Sure! {text}", is_truncated=True).format == 0.6
    assert parse_completion("<answer>2</answer>", is_truncated=True).format == 0.2


def test_blank_matter_after_the_answer_is_stray_text():
    text = render_solution(["1 + 1 = 2"], "2")
    assert parse_completion(f"\n\n {text}\n \n<end_of_turn>").format == 1.0
    for stray in ("\n" * 300, " " * 300, "<pad>" * 3):
        assert parse_completion(f"{text}{stray}<end_of_turn>").format == 0.6
        assert parse_completion(f"{stray}{text}").format == 0.6
