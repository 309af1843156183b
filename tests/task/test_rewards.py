"""What a completion earns: every component, and what must never pay."""

import json
import re
import statistics
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2_grpo.config import RewardConfig
from gemma2_grpo.task.equations.find import find_equations
from gemma2_grpo.task.equations.steps import stated_numbers
from gemma2_grpo.task.prompts import render_solution
from gemma2_grpo.task.rewards import Score, score_completion

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
COMPONENTS = ("format", "logic", "accuracy", "self_correction", "length")

QUESTION = (
    "A baker bakes 12 rolls in the morning and 7 in the afternoon, on each of 4 days. "
    "How many rolls does he bake?"
)
GOOD = ["Step 1: 12 + 7 = 19", "Step 2: 19 x 4 = 76", "Therefore, the answer is 76."]


def score(steps: list[str], answer: str = "76", question: str | None = QUESTION) -> Score:
    return score_completion(render_solution(steps, answer), "76", question)


def test_a_good_solution_earns_everything_but_the_bonus_for_corrections():
    found = score(GOOD)
    assert (
        found["format"],
        found["logic"],
        found["accuracy"],
    ) == (1.0, 1.0, 1.0)
    assert (found["self_correction"], found["length"]) == (
        0.0,
        0.95,
    )  # 19 words
    assert found.total == pytest.approx(0.25 + 0.30 + 0.45 + 0.05 * 0.95)
    assert (found.extracted, found.correct, found.official_correct) == ("76", True, True)
    equations = [(e.text, e.left, e.right, e.is_true) for e in found.equations]
    assert equations == [("12 + 7 = 19", 19, 19, True), ("19 x 4 = 76", 76, 76, True)]


def test_weights_are_the_callers():
    completion = render_solution(GOOD, "76")
    weights = RewardConfig(
        format_weight=1,
        logic_weight=2,
        accuracy_weight=4,
        self_correction_weight=8,
        length_weight=0,
    )
    assert score_completion(completion, "76", QUESTION, weights).total == 7


def test_extracted_is_printable():
    assert score(GOOD, "$1,080.50").extracted == "1080.5"
    assert score(GOOD, "75 or 76").extracted is None


LOGIC = {
    "terse": (["12 + 7 = 19", "19 x 4 = 76"], 0.95, 0.95),
    "prose around": (["First, 12 rolls + 7 rolls = 19 rolls a day, so 19 * 4 = 76."], 1, 1),
    "one equation": (["So (12 + 7) * 4 = 76."], 1, 1),
    "another way": (["12 * 4 = 48", "7 * 4 = 28", "So 48 + 28 = 76"], 1, 1),
    "rewritten on the way": (["So (12 + 7) * 4 = 19 * 4 = 76."], 1, 1),
    "annotated": (["So 12 + 7 = <<12+7=19>>19, 19 * 4 = <<19*4=76>>76."], 1, 1),
    "empty": ([""], 0, 0),
    "one word": (["Obviously."], 0, 0),
    "prose alone": (["He bakes nineteen rolls a day, therefore seventy-six."], 0, 0),
    "equals signs": (["= = = = = ="], 0, 0),
    "false first step": (["12 + 7 = 18", "19 x 4 = 76", "Therefore 76."], 0.2, 0.6),
    "false last step": (["12 + 7 = 19", "18 x 4 = 76", "Therefore 76."], 0, 0.6),
    "irrelevant step": (["12 + 7 = 19", "5 + 6 = 11", "So 19 x 4 = 76"], 0.7, 0.8),
    "irrelevant steps": (["2 + 2 = 4", "3 + 3 = 6", "5 + 5 = 10", "So 76."], 0, 0),
    "trivial": (["76 + 0 = 76", "76 * 1 = 76", "So 76."], 0, 0),
    "invented numbers": (["So 38 + 38 = 76."], 0, 0),
    "half invented": (["So 304 / 4 = 76."], 0.6, 0.65),
    "answer from nowhere": (["12 + 7 = 19", "19 x 3 = 57", "So 76."], 0, 0.5),
    "same sentence again": ([*GOOD, *GOOD], 0.5, 0.5),
    "same step renumbered": (["Step 1: (12 + 7) x 4 = 76", "Step 2: (12 + 7) x 4 = 76"], 0.5, 0.5),
}


@pytest.mark.parametrize(("steps", "low", "high"), LOGIC.values(), ids=LOGIC)
def test_logic(steps: list[str], low: float, high: float):
    assert low <= score(steps)["logic"] <= high


CLIPS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May?"
)
VACUOUS = {
    "cancelling sum": ["48 - 48 + 72 = 72"],
    "cancelling sum in brackets": ["(48 - 48) + 72 = 72"],
    "nothing of it": ["72 + 0 * 48 = 72"],
    "cancelling product": ["72 * 48 / 48 = 72"],
    "cancelling product, another order": ["48 * 72 / 48 = 72"],
    "there and back": ["72 - 48 = 24", "48 + 24 = 72"],
    "there and back by another way": ["72 + 48 = 120", "120 - 48 = 72"],
    "a common number again and again": [f"48{' + 2' * 12} = 72"],
    "several common numbers": ["48 + 12 + 10 + 2 = 72"],
}


@pytest.mark.parametrize("steps", VACUOUS.values(), ids=VACUOUS)
def test_equations_around_a_guess_are_no_work(steps: list[str]):
    found = score_completion(render_solution(steps, "72"), "72", CLIPS)
    guess = score_completion(render_solution(["So 72."], "72"), "72", CLIPS)
    assert all(equation.is_true for equation in found.equations)
    assert found["logic"] == guess["logic"] == 0.0


def test_common_numbers_one_by_one_are_no_full_work():
    two, three = "48 + 12 = 60, 60 + 12 = 72", "48 + 10 = 58, 58 + 12 = 70, 70 + 2 = 72"
    for steps in (two, three):
        assert 0 < score_completion(render_solution([steps], "72"), "72", CLIPS)["logic"] < 0.6


def test_what_a_question_states_may_be_the_answer():
    question = "Ann had 20 pens, bought 5 and lost 5. How many pens has she now?"
    text = render_solution(["20 + 5 = 25", "25 - 5 = 20"], "20")
    assert score_completion(text, "20", question)["logic"] == 0.95


APPLES = "There are 22 apples. 15 are eaten, and the rest is sold at $3 each. How much is it?"
WRONG_WAYS = {
    "no work": (["It is so."], "30", 0.0),
    "words for work": (["Therefore, it is so."], "30", 0.0),
    "a false result that is common": (["22 - 15 = 10", "10 x 3 = 30"], "30", 0.0),
    "a false result that is not": (["22 - 15 = 9", "9 x 3 = 27"], "27", 0.0),
    "the same, further": (["22 - 15 = 9", "9 x 3 = 27", "27 + 3 = 30"], "30", 0.0),
    "the same, repeated": (["22 - 15 = 9", "9 x 3 = 27", "So 9 x 3 = 27"], "27", 0.0),
    "one sound step": (["22 - 15 = 7", "7 x 3 = 24"], "24", 0.25),
    "one sound step, in other words": (["First, 22 - 15 = 7.", "Then 7 x 3 = 24."], "24", 0.25),
    "a sound step of no use": (["22 - 15 = 7", "8 x 3 = 24"], "24", 0.0),
    "two sound steps": (["22 - 15 = 7", "7 + 3 = 10"], "10", 0.5),
    "three sound steps": (["22 - 15 = 7", "7 + 3 = 10", "10 + 15 = 25"], "25", 0.5),
    "around a guess": (["30 - 22 = 8", "22 + 8 = 30"], "30", 0.0),
}


@pytest.mark.parametrize(("steps", "answer", "logic"), WRONG_WAYS.values(), ids=WRONG_WAYS)
def test_wrong_answers_differ_by_their_sound_steps_alone(
    steps: list[str], answer: str, logic: float
):
    found = score_completion(render_solution(steps, answer), "21", APPLES)
    assert found["logic"] == logic
    assert found.total == pytest.approx(0.25 + 0.30 * logic)


def test_a_false_result_is_not_known_without_the_question_either():
    for steps, logic in ((["22 - 15 = 10", "10 x 3 = 30"], 0.0), (["22 - 15 = 7"], 0.0)):
        assert score_completion(render_solution(steps, "30"), "21")["logic"] == logic
    assert (
        score_completion(render_solution(["5 + 5 = 10", "10 x 3 = 30"], "30"), "21")["logic"] == 0.5
    )


def test_algebra_counts_as_work():
    question = "Twice a number of books and 3 more are 21. How many books are there?"
    steps = ["Let x be the number of books.", "3 + 2x = 21", "2x = 18", "So x = 9."]
    assert score_completion(render_solution(steps, "9"), "9", question)["logic"] > 0.7


@pytest.mark.parametrize(
    ("question", "stated"),
    [
        ("He has twenty-five cows.", [25]),
        ("She drives three hundred and fifty miles.", [350]),
        ("It costs $2 million and two thousand five hundred dollars.", [2_000_000, 2_500, 2]),
        ("A 280k house, 1.5 million people", [280_000, 1_500_000]),
        ("Two dozen eggs, 3 dozen rolls", [24, 36]),
        ("Three-quarters of 3/4 and 1½", [3, 4, Fraction(3, 4), Fraction(1, 2)]),
        ("20% off twice", [20, Fraction(1, 5), 2]),
    ],
)
def test_numbers_that_a_question_states(question: str, stated: list):
    assert stated_numbers(question).issuperset(map(Fraction, stated))


def test_a_truncated_completion_is_not_perfect():
    text = render_solution(GOOD, "76")
    whole, cut = (
        score_completion(text, "76", QUESTION, is_truncated=is_cut) for is_cut in (False, True)
    )
    assert (whole["format"], cut["format"]) == (1.0, 0.6)
    assert (cut["logic"], cut["accuracy"], cut["length"]) == (
        whole["logic"],
        1.0,
        0.0,
    )
    assert score_completion("no tags", "76", is_truncated=True)["format"] == 0.0


def test_logic_is_halved_for_a_wrong_answer():
    assert score(GOOD, "77")["logic"] < 0.5
    wrong = score_completion(render_solution(GOOD, "76"), "77", QUESTION)
    assert wrong["logic"] == 0.5


def test_logic_without_the_question_takes_all_numbers_as_given():
    assert score(["So 38 + 38 = 76."], question=None)["logic"] == 1.0
    assert score(["2 + 2 = 4", "3 + 3 = 6", "So 76."], question=None)["logic"] == 0.0


def test_an_equation_copied_from_the_question_is_no_work():
    question = f"{QUESTION} Note that 12 + 7 = 19."
    assert score(["So 12 + 7 = 19.", "The answer is 76."], question=question)["logic"] == 0.0


def test_one_found_before_makes_no_trivial_step():
    question = "Of 7 toys in each of 6 boxes 6 are broken. How many are not?"
    text = render_solution(["Step 1: 7 - 6 = 1", "Step 2: 1 x 6 = 6"], "6")
    assert score_completion(text, "6", question)["logic"] == 1.0


def test_the_clock_is_given():
    question = "How many minutes are 3 hours and 20 minutes?"
    text = render_solution(["So 3 * 60 = 180", "180 + 20 = 200"], "200")
    assert score_completion(text, "200", question)["logic"] == 1.0


def test_numbers_in_words_are_given():
    question = "Ann bakes twelve rolls, Ben half as many. How many does she bake in two weeks?"
    text = render_solution(["So 12 * 1/2 = 6, 12 + 6 = 18.", "Then 18 * 2 = 36."], "36")
    assert score_completion(text, "36", question)["logic"] == 1.0


FIX = "Step 1: 12 + 7 = 18. Wait, that is wrong: 12 + 7 = 19."
CORRECTIONS = {
    "genuine": ([FIX, *GOOD[1:]], True),
    "late": (["12 + 7 = 18. So 19 x 4 = 76. Wait, it should be 12 + 7 = 19."], True),
    "of the last step": ([GOOD[0], "19 x 4 = 78. Let me recheck: 19 x 4 = 76."], True),
    "two": (["12 + 7 = 18. Oops, 12 + 7 = 19.", "19 x 4 = 78. Actually, 19 x 4 = 76."], True),
    "none needed": (GOOD, False),
    "no error": (["12 + 7 = 19. Wait, actually 12 + 7 = 19.", *GOOD[1:]], False),
    "no cue": (["12 + 7 = 18. 12 + 7 = 19.", *GOOD[1:]], False),
    "cue inside a word": (["12 + 7 = 18. The waiters: 12 + 7 = 19.", *GOOD[1:]], False),
    "cue before the error": (["Wait: 12 + 7 = 18. 12 + 7 = 19.", *GOOD[1:]], False),
    "another left side": (["12 + 7 = 18. Wait, 13 + 6 = 19.", *GOOD[1:]], False),
    "still false": (["12 + 7 = 18. Wait, 12 + 7 = 17.", *GOOD[1:]], False),
    "right to wrong": (["12 + 7 = 19. Wait, 12 + 7 = 18.", *GOOD[1:]], False),
    "planted aside": (["1 + 1 = 3. Wait, correction: 1 + 1 = 2.", *GOOD], False),
    "one error stays": ([FIX, "4 + 4 = 9.", *GOOD[1:]], False),
    "many": ([f"{n} + {n} = {n}. Wait, {n} + {n} = {2 * n}." for n in (1, 2, 4, 8)] + GOOD, False),
}


@pytest.mark.parametrize(("steps", "pays"), CORRECTIONS.values(), ids=CORRECTIONS)
def test_self_correction(steps: list[str], pays: bool):
    found = score(steps)
    assert found.correct
    assert (found["self_correction"] > 0) is pays


def test_a_correction_of_a_wrong_answer_pays_nothing():
    assert score([FIX, *GOOD[1:]], "77")["self_correction"] == 0.0


@pytest.mark.parametrize(
    ("words", "length"), [(5, 0.25), (10, 0.5), (20, 1), (110, 1), (200, 1), (250, 0.5), (300, 0)]
)
def test_length(words: int, length: float):
    text = " ".join(["(12+7)*4", "=", "76", *(f"word{n}" for n in range(words - 3))])
    assert score([text])["length"] == pytest.approx(length)


def test_length_pays_only_for_perfect_form_a_right_answer_and_working():
    good = render_solution(GOOD, "76")
    assert score_completion(good, "76", QUESTION)["length"] > 0
    assert score_completion(f"Sure! {good}", "76", QUESTION)["length"] == 0
    assert score(GOOD, "77")["length"] == 0
    assert score(["word"] * 30)["length"] == 0
    assert score([f"It is known{n} so" for n in range(9)])["length"] == 0


SOUP = "therefore because since so thus hence first second then next finally step"
STUFFING = {
    "keywords": [SOUP],
    "cues": ["wait actually correction wait actually recheck"],
    "a keyword a line": SOUP.split(),
    "a word again and again": ["ok " * 30],
    "a true equation again": ["12 + 7 = 19"] * 3,
    "everything again": GOOD,
    "a planted error": ["1 + 1 = 3. Wait, correction: 1 + 1 = 2."],
    "a planted error in the working": [FIX],
    "many planted errors": [f"{n} + 1 = {n}. Wait, {n} + 1 = {n + 1}." for n in range(9)],
}
IRRELEVANT = {
    "true equations": ["1 + 1 = 2", "2 + 3 = 5", "10 * 10 = 100"],
    "true equations with given numbers": ["12 + 4 = 16", "7 * 4 = 28"],
    "trivial equations": ["76 + 0 = 76", "19 * 1 = 19"],
    "words": ["The baker has a lovely shop at the corner."],
}
LONG = [*GOOD[:2], "That is what he bakes in these 4 days.", GOOD[2]]  # long enough for the bonus


def padded(steps: list[str], padding: list[str]) -> list[float]:
    """Totals with the padding before, within and after the steps."""
    places = (0, 1, len(steps))
    return [score([*steps[:place], *padding, *steps[place:]]).total for place in places]


@pytest.mark.parametrize("padding", STUFFING.values(), ids=STUFFING)
def test_stuffing_gains_nothing(padding: list[str]):
    assert max(padded(GOOD, padding)) <= score(GOOD).total
    assert max(padded(LONG, padding)) <= score(LONG).total


@pytest.mark.parametrize("padding", IRRELEVANT.values(), ids=IRRELEVANT)
def test_irrelevant_matter_gains_nothing_beyond_an_appropriate_length(padding: list[str]):
    assert max(padded(LONG, padding)) <= score(LONG).total


@pytest.mark.parametrize(
    "padding", [SOUP, "wait actually correction " * 5, "= = = = =", "so " * 40]
)
def test_padding_without_working_gains_nothing(padding: str):
    for answer in ("76", "77"):
        assert score([padding], answer).total == score(["Well."], answer).total


def test_an_error_costs_more_than_its_correction_pays():
    clean, uncorrected = score(GOOD), score(["12 + 7 = 18", *GOOD[1:]])
    corrected = score([FIX, *GOOD[1:]])
    assert uncorrected.total < corrected.total < clean.total


LINES = st.lists(
    st.sampled_from(
        [*GOOD, FIX, SOUP, "12 * 4 = 48", "7 * 4 = 28", "48 + 28 = 76", "1 + 1 = 3", "w "]
    )
    | st.text(alphabet="0149 +-*/=x()%.\n<>so", max_size=20),
    max_size=10,
)


@given(LINES, LINES, st.sampled_from(["77", "none", "75 or 76", "-76"]))
def test_no_wrong_answer_outranks_a_right_one(right: list[str], wrong: list[str], answer: str):
    good, bad = score(right), score(wrong, answer)
    assert good.correct or good["format"] < 1
    assert not bad.correct
    if good.correct and good["format"] == bad["format"]:
        assert bad.total < good.total


@given(LINES, st.sampled_from(["76", "77", "none", "75 or 76"]), st.booleans(), st.booleans())
def test_bounds_of_right_and_wrong(lines: list[str], answer: str, asks: bool, is_cut: bool):
    found = score_completion(
        render_solution(lines, answer), "76", QUESTION if asks else None, is_truncated=is_cut
    )
    if not found.correct:
        assert found.total <= 0.40 + 1e-9
    elif found["format"] == 1:
        assert found.total >= 0.70 - 1e-9


TEXT = st.lists(
    st.sampled_from(["<reasoning>", "</reasoning>", "<answer>", "</answer>", "76", *GOOD, FIX])
    | st.text(max_size=8),
    max_size=12,
).map("\n".join)


@given(TEXT, st.text(max_size=8) | st.just("76"), st.none() | st.text(max_size=30))
def test_any_text_has_a_score(text: str, gold: str, question: str | None):
    found = score_completion(text, gold, question)
    parts = {name: found[name] for name in COMPONENTS}
    assert all(0 <= part <= 1 for part in parts.values())
    assert 0 <= found.total <= 1.1 + 1e-9
    assert found["accuracy"] == found.correct
    assert found == score_completion(text, gold, question)


HOSTILE = [
    "<reasoning><answer>",
    "</answer>",
    "<",
    "<eos>",
    "9",
    "9**9**9",
    "٣",
    "1+",
    "(",
    "((1",
    "1+1=2 ",
    "1=",
    "1+1=3 wait 1+1=2\n",
    "so ",
    "1,000",
    "<<1+1=2>>",
    " ",
    "\n",
    "'",
    "A. ",
]


@pytest.mark.parametrize("size", [7_900, 100_000])
@pytest.mark.parametrize("unit", HOSTILE)
def test_time_is_bounded(unit: str, size: int):
    text = unit * (size // len(unit))
    for completion in (text, render_solution([text], "76"), render_solution(GOOD, text)):
        # Other work on the machine makes some tries slow, but not all of them.
        for _ in range(20):
            start = time.process_time()
            score_completion(completion, "76", QUESTION)
            seconds = time.process_time() - start
            if seconds < 0.05:
                break
        assert seconds < 0.05


JANET = ["3 + 4 = 7 eggs are used.", "16 - 7 = 9 are left.", "So she makes 9 * 2 = $18."]
# Reasoning, answer, gold; accepted or not; the kinds of completion that judges were shown.
JUDGED = [
    (JANET, "18", "18", True),
    (JANET, "$18.00", "18", True),
    (JANET, "She makes **$18** a day.", "18", True),
    (["3 + 4 = 7 eggs.", "16 − 7 = 9.", "9 × 2 = 18."], "18 dollars", "18", True),
    (["25 * 40 = 1,000 pens"], "1,000", "1000", True),
    (["5 - 8 = -3"], "−3", "-3", True),
    (["1 - 3/4 = 1/4"], "1/4", "0.25", True),
    (["5 - 5 = 0"], "-0.0", "0", True),
    (["so therefore wait step"], "18", "18", True),
    ([""], "18", "18", True),
    (JANET, "17", "18", False),
    (JANET, "19.8", "18", False),
    (JANET, "(18, 19)", "18", False),
    (JANET, "18 or 17", "18", False),
    (JANET, "not 17 but 18", "18", False),
    (JANET, "nan", "18", False),
    (JANET, "\\infty", "18", False),
    (JANET, "9" * 400, "18", False),
    (["5 - 8 = -3"], "3", "-3", False),
    (["about this much"], "95", "100", False),
]


@pytest.mark.parametrize(("steps", "answer", "gold", "accepted"), JUDGED)
def test_judged_answers(steps: list[str], answer: str, gold: str, accepted: bool):
    found = score_completion(render_solution(steps, answer), gold)
    assert found.correct is accepted
    assert found["accuracy"] == float(accepted)


CASES = SHARED / "rewards" / "cases.jsonl"


@pytest.mark.skipif(not CASES.is_file(), reason="the judged cases are not beside the repository")
def test_shared_cases():
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").split("\n") if line]
    assert len(cases) == 58
    for case in cases:
        found = score_completion(case["completion"], case["gold"], case["question"])
        accepted = {"accept": True, "reject": False}.get(case["accuracy_policy"], found.correct)
        assert found.correct is accepted, case["id"]
        # "ok" is the perfect form and nothing else; "not_ok" earns less, but may earn something.
        perfect = {"ok": True, "not_ok": False}.get(case["format_policy"], found["format"] == 1)
        assert (found["format"] == 1) is perfect, case["id"]
        assert (found["self_correction"] > 0) is case["genuine_correction"], case["id"]
        if case["reasoning_sound"] is False:
            assert found["logic"] < 0.7, case["id"]


GSM8K = SHARED / "gsm8k"
_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside the repository")
@pytest.mark.parametrize(
    ("splits", "count"),
    [(("test",), 1319), pytest.param(("train", "test"), 8792, marks=pytest.mark.slow)],
)
def test_gold_rationales_are_sound_whatever_their_wording(splits: tuple[str, ...], count: int):
    """Without GSM8K's annotations, which say how many equations there should be."""
    texts = [(GSM8K / f"{name}.jsonl").read_text(encoding="utf-8") for name in splits]
    rows = [json.loads(line) for text in texts for line in text.split("\n") if line]
    assert len(rows) == count
    annotated = lost = without_logic = with_false = 0
    sound: list[float] = []
    for row in rows:
        rationale, _, gold = row["answer"].rpartition("####")
        text = render_solution([_ANNOTATION.sub("", rationale)], gold.strip())
        found = score_completion(text, gold, row["question"])
        results = {result for e in found.equations if e.is_true for result in e.results}
        for match in _ANNOTATION.finditer(rationale):
            for equation in find_equations(match[1]):
                annotated += equation.is_true
                lost += equation.is_true and results.isdisjoint(equation.results)
        is_false = any(not equation.is_true for equation in found.equations)
        without_logic += found["logic"] == 0
        with_false += is_false
        assert found["format"] == found["accuracy"] == 1.0
        if found.equations and not is_false:
            sound.append(found["logic"])
    assert annotated > 3 * count
    assert lost / annotated < 0.005
    assert without_logic / len(rows) < 0.01
    # Most of these are false in GSM8K itself; docs/rewards.md counts the kinds.
    assert with_false / len(rows) < 0.005
    assert statistics.mean(sound) > 0.93
    assert statistics.quantiles(sound, n=10)[0] > 0.8


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside the repository")
def test_the_rationale_of_another_problem_is_not_sound():
    lines = (GSM8K / "test.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line][:400]
    swapped: list[float] = []
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        gold = row["answer"].rpartition("####")[2]
        text = render_solution([other["answer"].rpartition("####")[0]], gold)
        swapped.append(score_completion(text, gold, row["question"])["logic"])
    assert statistics.mean(swapped) < 0.2


def test_scores_are_values():
    found = score(GOOD)
    assert replace(found, total=0.0) != found
