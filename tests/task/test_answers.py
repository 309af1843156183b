"""The grader: exactly one number, exactly the right one."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2_grpo.task.answers import (
    extract_number,
    gold_answer,
    is_correct,
    official_answer,
    official_is_correct,
    parse_number,
    printable,
)
from gemma2_grpo.task.prompts import parse_completion, render_solution

GSM8K = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gsm8k"

STATED = {
    "18": 18,
    "  18\n": 18,
    "18.": 18,
    "18.00": 18,
    "018": 18,
    "+18": 18,
    "-18": -18,
    "-0": 0,
    ".5": Fraction(1, 2),
    "0.0001": Fraction(1, 10_000),
    "9" * 30: int("9" * 30),
    # thousands
    "1,080": 1080,
    "$1,080.00": 1080,
    "1,234,567.5": Fraction("1234567.5"),
    # signs
    "−3": -3,
    "–3": -3,
    "\N{NON-BREAKING HYPHEN}3": -3,
    "-$3": -3,
    "$-3.50": Fraction("-3.5"),
    # fractions
    "18/1": 18,
    "1/2": Fraction(1, 2),
    "-1/2": Fraction(-1, 2),
    "1 1/2": Fraction(3, 2),
    "5/6 cup": Fraction(5, 6),
    # currency and units
    "$18": 18,
    "$ 18": 18,
    "€18": 18,
    "18€": 18,
    "US$18": 18,
    "USD 18": 18,
    "Rs.18": 18,
    "72%": 72,
    "72 %": 72,
    "18 dollars": 18,
    "18 dollars per day": 18,
    "18kg": 18,
    "18 km/h": 18,
    "$18/hour": 18,
    "18-inch": 18,
    "18 m²": 18,
    "18 cm^2": 18,
    "18°C": 18,
    "18 times": 18,
    "18 left over": 18,
    "18 more than Tom": 18,
    "18 red or blue hats": 18,
    "18 students did not pass": 18,
    "5 million": 5_000_000,
    "1.5 Million dollars": 1_500_000,
    "18k": 18_000,
    # markup
    "**18**": 18,
    "_18_": 18,
    "`18`": 18,
    "```\n18\n```": 18,
    '"18"': 18,
    "(18)": 18,
    "[18]": 18,
    "####18": 18,
    "$18$": 18,
    "\\boxed{18}": 18,
    "$\\boxed{\\$18}$": 18,
    "\\boxed{18 \\text{ dollars}}": 18,
    "\\(18\\%\\)": 18,
    "\\frac{1}{2}": Fraction(1, 2),
    "<b>18</b>": 18,
    "<strong>18</strong> eggs<br>": 18,
    # LaTeX's commas
    "1{,}080": 1080,
    "\\$1{,}080{,}000": 1_080_000,
    "1\\,080": 1080,
    "\\boxed{1,\\!080}": 1080,
    # fractions in other writings
    "1 / 2": Fraction(1, 2),
    "3/ 4 cup": Fraction(3, 4),
    "\\frac12": Fraction(1, 2),
    "\\dfrac{1}2": Fraction(1, 2),
    "2\\frac{1}{2}": Fraction(5, 2),
    "½": Fraction(1, 2),
    "18½": Fraction(37, 2),
    "⅔ of a cup": Fraction(2, 3),
    # signs in other writings
    "- 18": -18,
    "− 18": -18,
    "= - $18": -18,
    "minus 18": -18,
    "The answer is negative 18.": -18,
    "Answer: - 18": -18,
    # words
    "eighteen": 18,
    "Six hundred": 600,
    "six hundred and twenty-five dollars": 625,
    "two million five hundred thousand": 2_500_000,
    "a dozen eggs": 12,
    "three dozen": 36,
    "zero": 0,
    "minus five": -5,
    "It is twenty.": 20,
    "one": 1,
    "One egg": 1,
    # exclamation
    "18!": 18,
    "**18**!": 18,
    "The answer is 18!!": 18,
    # sentences
    "= 18": 18,
    "x = 18": 18,
    "Answer: 18": 18,
    "The answer is: 18.": 18,
    "She makes $18 every day!": 18,
    "Left over: 18": 18,
    "The difference between them is 18.": 18,
    "about 18": 18,
    "≈ 18": 18,
}

DOUBTFUL = [
    "",
    "none",
    "inf",
    "nan",
    "-inf",
    # words that state no number, or several
    "no one knows",
    "the first one",
    "two three",
    "two or three",
    "two million, five hundred thousand",
    "between one and two",
    "not eighteen",
    "eighteen and a half",
    "at least eighteen",
    "x minus eighteen",
    "eighteen times two",
    # several
    "18 or 20",
    "20, 18",
    "16, 17, 18",
    "16,17,18",
    "(17, 18)",
    "17-18",
    "17 to 18",
    "between 17 and 19",
    "18 18",
    "18\n18",
    "18 eggs and 4 boxes",
    "1 000",
    "3:4",
    "18 of 20",
    # hedged
    "not 18",
    "It isn't 18",
    "18 is not the answer",
    "eighteen or 18",
    "18 or twenty",
    "18 or more",
    "less than 18",
    "more than $18",
    "at least 18",
    "18 at most",
    "up to 18",
    "over 18",
    "nearly 18",
    "> 18",
    "≤18",
    # other numbers than they look
    "18 below zero",
    "18 and a half",
    "18 dollars and fifty cents",
    "half of 18",
    "twice 18",
    "18 squared",
    "18²",
    "√18",
    "\\sqrt{324}",
    "\\pm 18",
    "|18|",
    "--18",
    "—18",
    "-$-18",
    # formulas and names
    "3 + 4 = 7",
    "9 * 2",
    "x + 18",
    "18+",
    "x/18",
    "f(18)",
    "x18",
    "2^3",
    "9**9**9",
    "$9^{9^{9}}$",
    # malformed
    "1,08",
    "1,0800",
    "0,018",
    "1.080,00",
    "1..5",
    "1/0",
    "1/2/3",
    "18 1/1",
    "1_8",
    "1.8e1",
    "0x12",
    "１８",
    "١٨",
    "十八",
    "1" * 31,
    "0." + "0" * 30 + "1",
    "1" * 20_000,
    "18" + " and so on" * 100,
    "<answer>18</answer>",
]


@pytest.mark.parametrize(("text", "value"), STATED.items(), ids=repr)
def test_stated_number(text: str, value: Fraction):
    assert extract_number(text) == value


@pytest.mark.parametrize("text", DOUBTFUL, ids=lambda text: repr(text[:30]))
def test_no_number_in_doubt(text: str):
    assert extract_number(text) is None


@pytest.mark.parametrize(
    ("text", "gold", "correct"),
    [
        ("1,080", "1080", True),
        ("1080", "1,080", True),
        ("80", "1,080", False),
        ("1,08", "1,080", False),
        ("18", "16 - 7 = <<16-7=9>>9\n9 * 2 = 18\n#### 18", True),
        ("9", "16 - 7 = <<16-7=9>>9\n9 * 2 = 18\n#### 18", False),
        ("0.5", "1/2", True),
        ("0.333", "1/3", False),
        ("909", "1000", False),
        ("0.0001", "0", False),
        ("3", "-3", False),
        ("−18", "18", False),
        ("180", "18", False),
        ("17.999999999999999999", "18", False),
        (None, "18", False),
        ("", "18", False),
        ("eighteen", "18", True),
        ("nothing", "nothing", False),
    ],
)
def test_correct_is_exact(text: str | None, gold: str, correct: bool):
    assert is_correct(text, gold) is correct


@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=3, min_value=-(10**20), max_value=10**20
    )
)
def test_a_printed_number_is_read_back(number):
    value = Fraction(number)
    assert extract_number(printable(value)) == value
    assert extract_number(f"The total is **{number:,}** dollars.") == value


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_a_printed_fraction_is_read_back(top: int, bottom: int):
    assert extract_number(printable(Fraction(top, bottom))) == Fraction(top, bottom)


@given(st.text(alphabet="0189.,/-+−$%eE_!()^ ao½١\n\0", max_size=40))
def test_extraction_never_raises(text: str):
    assert extract_number(text) is None or any(c in "0189½" for c in text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (18, "18"),
        (-3, "-3"),
        (10**6, "1000000"),
        (Fraction(1, 8), "0.125"),
        (Fraction(1, 3), "1/3"),
    ],
)
def test_printable(value: Fraction, text: str):
    assert printable(Fraction(value)) == text


@pytest.mark.parametrize("text", ["1,08", "1.2.3", "", ".", "-1", "1e5", "١", "1" * 31, "1" * 9999])
def test_malformed_numbers_have_no_value(text: str):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("9 * 2 = <<9*2=18>>18\n#### 18", "18"),
        ("#### 1,080", "1080"),
        ("#### -3", "-3"),
        ("#### 18.", "18."),
        ("#### 17\n#### 18", "17"),
        ("####18", "[invalid]"),
        ("#### $18", "[invalid]"),
        ("18", "[invalid]"),
    ],
)
def test_official_extraction(text: str, answer: str):
    assert official_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "correct"),
    [("18", True), ("18 dollars", True), ("18 or 20", True), ("$18", False), ("18.0", False)],
)
def test_official_verdict_on_our_form(answer: str, correct: bool):
    assert official_is_correct(render_solution(["9 * 2 = 18"], answer), "18") is correct


def test_official_verdict_on_other_forms():
    assert official_is_correct("9 * 2 = 18\n#### 18", "so 18\n#### 18")
    assert not official_is_correct("The answer is 18.", "18")
    assert not official_is_correct("The answer is unknown.", "unknown")


def test_gold_answer():
    assert gold_answer("9 * 2 = 18\n#### 18 ") == "18"
    assert gold_answer(" 1,080 ") == "1,080"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside the repository")
def test_every_gold_of_gsm8k_passes_both_graders():
    texts = [(GSM8K / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("train", "test")]
    # Not splitlines: two questions contain U+2028.
    lines = [line for text in texts for line in text.split("\n") if line]
    assert len(lines) == 8792
    for solution in (json.loads(line)["answer"] for line in lines):
        rationale, _, gold = solution.rpartition("####")
        completion = render_solution([rationale.strip()], gold.strip())
        parsed = parse_completion(completion)
        assert parsed.format == 1.0
        assert is_correct(parsed.answer, solution)
        assert official_is_correct(completion, solution)
