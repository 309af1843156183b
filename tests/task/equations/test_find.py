"""Equations as models write them: found with their units, decided exactly, or left alone."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2_grpo.task.equations.find import MAX_EQUALS_SIGNS, find_equations

TRUE = {
    "She eats 3 and 4, so 3 + 4 = 7 eggs are used.": ["3 + 4 = 7"],
    "16-7=9": ["16-7=9"],
    "3 × 4 = 12, 12 ÷ 4 = 3 and 5 − 8 = −3": ["3 × 4 = 12", "12 ÷ 4 = 3", "5 − 8 = −3"],
    "9 x 2 = $18 a day": ["9 x 2 = $18"],
    "3 times 4 = 12": ["3 times 4 = 12"],
    "15 divided by 3 plus 2 = 7": ["15 divided by 3 plus 2 = 7"],
    "$1,000.50 + $200 = $1,200.50": ["1,000.50 + $200 = $1,200.50"],
    "7 = 3 + 4": ["7 = 3 + 4"],
    # precedence, brackets and signs
    "2 + 3 * 4 = 14": ["2 + 3 * 4 = 14"],
    "20 - 8 - 2 = 10": ["20 - 8 - 2 = 10"],
    "48 / 4 / 2 = 6": ["48 / 4 / 2 = 6"],
    "3 * (2 + (4 - 1)) = 15": ["3 * (2 + (4 - 1)) = 15"],
    "[3 + 4] * 2 = 14": ["[3 + 4] * 2 = 14"],
    "2(3 + 4) = 14": ["2(3 + 4) = 14"],
    "(5)(4) = 20": ["(5)(4) = 20"],
    "the rest (16 - 7 = 9) is sold": ["16 - 7 = 9"],
    "-(3 + 4) = -7": ["-(3 + 4) = -7"],
    "18 - -3 = 21": ["18 - -3 = 21"],
    "-5 + 8 = 3": ["-5 + 8 = 3"],
    # units
    "5 snakes/jaguar * 6 jaguars = 30 snakes": ["5 snakes/jaguar * 6 jaguars = 30"],
    "20 total gnomes – 12 gnomes = 8": ["20 total gnomes – 12 gnomes = 8"],
    "3 times a week * 4 weeks = 12 times": ["3 times a week * 4 weeks = 12"],
    "4 (feet) * 3 = 12": ["4 (feet) * 3 = 12"],
    "3 + 4 = 7 eggs and 2 * 7 = 14": ["3 + 4 = 7", "2 * 7 = 14"],
    # fractions and scales
    "1 - 1/2 = 1/2": ["1 - 1/2 = 1/2"],
    "1 1/2 * 4 = 6": ["1 1/2 * 4 = 6"],
    "50 / 1/2 = 100": ["50 / 1/2 = 100"],
    "3/4 of 20 = 15": ["3/4 of 20 = 15"],
    "20% of 50 = 10": ["20% of 50 = 10"],
    "100% - 40% = 60%": ["100% - 40% = 60%"],
    "10 / 50 = 20%": ["10 / 50 = 20%"],
    "10 / 50 * 100 = 20%": ["10 / 50 * 100 = 20%"],
    "2 million / 4 = 500,000": ["2 million / 4 = 500,000"],
    "32 - 28 = 4 million": ["32 - 28 = 4 million"],
    # rounding at the written decimals
    "10 / 3 = 3.33": ["10 / 3 = 3.33"],
    "10 / 3 ≈ 3": ["10 / 3 ≈ 3"],
    "1 / 3 = 33.3%": ["1 / 3 = 33.3%"],
    # layout
    "- 16 - 3 = 13": ["16 - 3 = 13"],
    "* 16 - 3 = 13": ["16 - 3 = 13"],
    "1. 16 - 3 = 13": ["16 - 3 = 13"],
    "**Step 1:** 16 - 3 = **13**": ["16 - 3 = **13"],
    "Total = 3 + 4\n  = 7": ["3 + 4 = 7"],
    r"\frac{1}{2} \times 8 = 4": ["(1/2) * 8 = 4"],
    r"\[ 50 \cdot 20\% = 10 \]": ["50 * 20% = 10"],
    r"1{,}000 \times 8 = 8{,}000": ["1{,}000 * 8 = 8{,}000"],
    r"\frac12 \times 8 = 4": ["(1/2) * 8 = 4"],
    # wording around a calculation
    "reduced by 60 * 20 / 100 = 12": ["60 * 20 / 100 = 12"],
    "is taller by 12 - 7 = 5 cm than": ["12 - 7 = 5"],
    "class B has 30 - 5 = 25 students": ["30 - 5 = 25"],
    "Companies A and B have 180 - 60 = 120": ["180 - 60 = 120"],
    "5 more than 20 cups which is 20 + 5 = 25": ["20 + 5 = 25"],
    "half of 20 cups which is 20 / 2 = 10": ["20 / 2 = 10"],
    "Ann's 12 + Tom's 7 = 19": ["12 + Tom's 7 = 19"],
    "Kris\u2019 60 balloons + 180 from Ann = 240": ["60 balloons + 180 from Ann = 240"],
    "Covid-19 took 5 + 3 = 8 days": ["5 + 3 = 8"],
    "Ann - 5 + 3 = 8": ["5 + 3 = 8"],
    "2 * the 10 boxes that he lost = 20": ["2 * the 10 boxes that he lost = 20"],
    "2 + 1 = 3 $20 bills": ["2 + 1 = 3"],
    "20 / 2 = 10 6-inch pencils": ["20 / 2 = 10"],
    "150 × 4 equals 600": ["150 × 4 equals 600"],
    "14 times 2 is equal to 28": ["14 times 2 is equal to 28"],
    "because20 - 3 = 17": ["20 - 3 = 17"],
    "(1) 12 + 7 = 19": ["12 + 7 = 19"],
    # letters and abbreviations as units
    "200 g + 50 g = 250 g": ["200 g + 50 g = 250"],
    "200g + 50g = 250g": ["200g + 50g = 250"],
    "3 L / .5 L/dose = 6": ["3 L / .5 L/dose = 6"],
    "5 m * 3 m = 15 m^2": ["5 m * 3 m = 15"],
    "3 ft. * 7 ft. = 21 sq. ft.": ["3 ft. * 7 ft. = 21"],
    "3 ft. x 7 ft. = 21 sq. ft.": ["3 ft. x 7 ft. = 21"],
    "5 * 7 = 35 M&Ms.": ["5 * 7 = 35"],
    "2x + 3x = 5x": ["2x + 3x = 5"],
    "8 parts of the very long and winding road to town * 2 = 16": [
        "8 parts of the very long and winding road to town * 2 = 16"
    ],
    # numbers of other writings
    "$400 000 - $282,000 = $118,000": ["400 000 - $282,000 = $118,000"],
    "1 and 1/4 * 12 = 15": ["1 and 1/4 * 12 = 15"],
    "17 / 3 = 5 and (2/3) loads": ["17 / 3 = 5 and (2/3"],
    "½ * 8 = 4 and 2½ * 2 = 5": ["½ * 8 = 4", "2½ * 2 = 5"],
    "15 / 90 * 100% = 16.66...%": ["15 / 90 * 100% = 16.66...%"],
    "3 dozen / 4 = 9": ["3 dozen / 4 = 9"],
    # labels, and signs that are none of the calculation's
    "Step 2 - 150 × 4 = 600": ["150 × 4 = 600"],
    "Step 2 – 150 × 4 = 600": ["150 × 4 = 600"],
    "Day 1 - 5 x 3 = 15": ["5 x 3 = 15"],
    "Step 1:5 + 3 = 8": ["5 + 3 = 8"],
    "After 2 days it is -5 + 3 = -2": ["-5 + 3 = -2"],
    "20 apples -5 apples = 15": ["20 apples -5 apples = 15"],
    "so $50 - 20% = $40 and $50 + 10% = $55": ["50 - 20% = $40", "50 + 10% = $55"],
    # units that change
    "$2.50 - $2.24 = 26 cents": ["2.50 - $2.24 = 26"],
    "50¢ * 4 = $2": ["50¢ * 4 = $2"],
    "1/2 hour = 30 minutes": ["1/2 hour = 30"],
    "2 hours = 120 minutes": ["2 hours = 120"],
    "3 hours + 20 minutes = 200 minutes": ["3 hours + 20 minutes = 200"],
    "8 pounds = 128 ounces and 3 cups = 24 ounces": ["8 pounds = 128", "3 cups = 24"],
    # algebra with its solution
    "x + (12 + 5x) = 108, 6x = 96. x = 16 pens": ["x + (12 + 5x) = 108", "6x = 96"],
    "Let S be it.\nS + 1.5S = 150\nS = 60": ["S + 1.5S = 150"],
    "2(x + 1) = 12, or 5 = x.": ["2(x + 1) = 12"],
    # chains
    "60 * 2 / 3 = 120 / 3 = 40": ["60 * 2 / 3 = 120 / 3", "120 / 3 = 40"],
    "Day 1 = 5 + 3 = 8": ["5 + 3 = 8"],
    "S + 143 = 200 - 16 = 184": ["200 - 16 = 184"],
    "5 hours = 5 * 60 = 300 minutes": ["5 * 60 = 300"],
}

FALSE = {
    "3 + 4 = 8": ["3 + 4 = 8"],
    "2 + 3 * 4 = 20": ["2 + 3 * 4 = 20"],
    "5 + 0 = 6": ["5 + 0 = 6"],
    "10 / 3 = 3": ["10 / 3 = 3"],
    "10 / 3 = 3.34": ["10 / 3 = 3.34"],
    "10 / 3 ≈ 4": ["10 / 3 ≈ 4"],
    "0.1 + 0.2 = 0.31": ["0.1 + 0.2 = 0.31"],
    "20% of 50 = 11": ["20% of 50 = 11"],
    "12 eggs - 3 eggs = 8 eggs": ["12 eggs - 3 eggs = 8"],
    "16 - 3 = 13 - 4 = 9": ["16 - 3 = 13 - 4"],
    "150 × 4 equals 601": ["150 × 4 equals 601"],
    "200g + 50g = 260g": ["200g + 50g = 260"],
    "She had 52 - 8 = 43 bracelets": ["52 - 8 = 43"],
    "She has 10 - 2 + 3 = 5": ["10 - 2 + 3 = 5"],
    "$50 - 20% = $41": ["50 - 20% = $41"],
    "1) 12 + 7 = 18": ["12 + 7 = 18"],
    "2 hours * 60 minutes = 130 minutes": ["2 hours * 60 minutes = 130"],
    "class B has 30 - 5 = 24 students": ["30 - 5 = 24"],
    "100 / 3 = 34...": ["100 / 3 = 34..."],
    "x = 4 and 3 + 4 = 8": ["3 + 4 = 8"],
}

UNJUDGED = [
    "",
    "no equation",
    "= = = = =",
    "7 = 7",
    "x = 5",
    "2x + 3 = 11",
    "7S = 847",
    "S + 30 = 73",
    "30 + S = 73",
    "x + (5 + 3) = 9",
    "5^2 + 3 = 28",
    "2**3 = 8",
    "9**9**9 = 1",
    "twice 4 + 2 = 10",
    "3 more than 4 + 2 = 9",
    "5 times as many as 4 = 20",
    "apples 2 * 3 + pears 4 * 5 = 26",
    "3 + = 3",
    "3 + + 4 = 7",
    "2 * (3 + 4 = 14",
    "2 * 3 = 6) / 2",
    "3 + 4) = 7",
    "1/0 = 3",
    "3 + 4 => 7",
    "3 + 4 <= 7 and 3 + 4 != 8",
    "1 000 + 1 000 = 2 000",
    "9" * 31 + " + 1 = 3",
    "9" * 30 + " * " + "9" * 30 + " * " + "9" * 30 + " = 3",
    # clock times, ratios, remainders
    "6:00 + 3 hours = 9:00",
    "9:15 - 8:45 = 30 minutes",
    "0900 - 0130 = 0730 hours",
    "2:3 * 2 = 4:6",
    "2 : 3 * 2 = 4 : 6",
    "17 / 5 = 3 remainder 2",
    "17 / 5 = 3 R2",
    "17 / 5 = 3 with 2 left over",
    "13 / 6 = 2 full cycles with a remainder of 1",
    # false in one reading, and no other can be told
    "Day 1 - 5 x 3 = 16",
    "Ann - 5 + 3 = 9",
    "by 4 + 2 = 7",
    "2/3 of the tank = 16 gallons",
    "1% is equal to $450 / 90",
    "14, 400 / 80 = 180",
    "16,0000 / 10 = 16",
    "(1/2) 278 + 11 = 150",
    "$2.50 - $2.24 = 27 cents",
    "4 pounds - 6 ounces = 59 ounces",
    "20x + 300 = 40x",
    "1(60 - Losses) - 2(Losses) = -30",
    # algebra without one solution, or that holds for all
    "x + 3 + 3 = x + 6, x = 5",
    "2x + 3 = 14 and x = 5",
    "2x = 10, x = 5, x = 6",
    "x + 5 + 3 = 8",
    "٣ + ٤ = ٧",
    "３ + ４ = ７",
]


def judged(text: str) -> list[tuple[str, bool]]:
    return [(equation.text, equation.is_true) for equation in find_equations(text)]


@pytest.mark.parametrize(("text", "equations"), TRUE.items())
def test_true(text: str, equations: list[str]):
    assert judged(text) == [(equation, True) for equation in equations]


@pytest.mark.parametrize(("text", "equations"), FALSE.items())
def test_false(text: str, equations: list[str]):
    assert [equation for equation, is_true in judged(text) if not is_true] == equations


@pytest.mark.parametrize("text", UNJUDGED, ids=lambda text: repr(text[:20]))
def test_left_alone(text: str):
    assert judged(text) == []


def test_annotations_are_read_on_their_own():
    text = "She sold 48/2 = <<48/2=24>>24 clips, S + 30 = S + <<+30+5=35>>35, $<<4*3=13>>12."
    assert judged(text) == [
        ("48/2 = 24", True),
        ("48/2=24", True),
        ("+30+5=35", True),
        ("4*3=13", False),
    ]


def test_restatements_have_the_same_expression():
    text = "3 hats + 4 hats = 8 hats. Wait: 3+4 = 7. Or 7 = 3 + 4."
    assert {equation.expression for equation in find_equations(text)} == {"3+4"}


def test_fields():
    (equation,) = find_equations("so 10 / 50 = 20% of them")
    assert (equation.left, equation.right) == (equation.results[0], equation.right)
    assert (equation.operands, equation.results[1]) == ((10, 50), 20)
    assert "so 10 / 50 = 20% of them"[equation.start : equation.end] == equation.text
    chain = find_equations("2 * (3 + 4) = 2 * 7")[0]
    assert chain.rewritten == (2, 7)
    assert chain.terms == ((2, 3), (4,))
    assert find_equations("$2.50 - $2.24 = 26 cents")[0].results == (26, 26)


def test_algebra_starts_from_its_numbers_and_arrives_at_the_letter():
    (equation,) = find_equations("3 + 2x = 21, so x = 9")
    assert equation.has_letters
    assert equation.operands == (3, 2, 21)
    assert equation.results == (9, 21, 21)
    assert equation.uses == (3, 2, 21, 9, 21, 21)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("48 - 48 + 72 = 72", "sum"),
        ("(48 - 48) + 72 = 72", "sum"),
        ("72 + 0 * 48 = 72", "sum"),
        ("5 * (7 - 7) + 3 = 3", "sum"),
        ("72 * 48 / 48 = 72", "product"),
        ("48 * 72 / 48 = 72", "product"),
        ("48 / 2 + 48 = 72", ""),
        ("12 + 12 + 12 = 36", ""),
        ("20 / 100 * 100 = 20", ""),
        ("5 - 5 = 0", ""),
    ],
)
def test_numbers_that_cancel(text: str, kind: str):
    assert [equation.cancels for equation in find_equations(text)] == [kind]


@pytest.mark.parametrize(
    ("text", "trivial"),
    [
        ("5 + 0 = 5", True),
        ("0 + 5 = 5", True),
        ("5 - 0 = 5", True),
        ("5 * 1 = 5", True),
        ("0 * 5 = 0", True),
        ("5 / 1 = 5", True),
        ("5 - 5 = 0", False),
        ("1 + 1 = 2", False),
        ("5 / 5 = 1", False),
        ("5 + 3 + 0 = 8", False),
    ],
)
def test_trivial(text: str, trivial: bool):
    assert [equation.is_trivial for equation in find_equations(text)] == [trivial]


def test_more_equals_signs_than_a_solution_has():
    assert len(find_equations("1 + 1 = 2\n" * MAX_EQUALS_SIGNS)) == MAX_EQUALS_SIGNS
    assert find_equations("1 + 1 = 2\n" * (MAX_EQUALS_SIGNS + 1)) == []


@given(st.integers(0, 999), st.integers(0, 999), st.integers(0, 999))
def test_agrees_with_python(a: int, b: int, c: int):
    text = f"{a} + {b} * {c} = {a + b * c} and ({a} - {b}) x {c} = {(a - b) * c}"
    assert [is_true for _, is_true in judged(text)] == [True, True]
    assert judged(f"{a} + {b} = {a + b + 1 + c}") == [(f"{a} + {b} = {a + b + 1 + c}", False)]


@given(st.text(alphabet="0179.,+-*/=()[]x%≈ \n<>$ae^\\{}", max_size=60))
def test_never_raises(text: str):
    for equation in find_equations(text):
        assert "=" in equation.text or "≈" in equation.text


@pytest.mark.parametrize(
    "unit",
    [
        *("1+", "(", "(1", "1)", "-(", "9", "9*", "1 egg ", "1/3+", "<<", "\\frac{1}{", " ", "x"),
        *("1 a -1 ", "x = 1, ", "1 = 1 ", "2x = 2\n", "1:", "step 1 - ", "1 equals 1+", "1 h = "),
    ],
)
def test_time_is_bounded(unit: str):
    text = unit * (7_990 // len(unit)) + "=1"
    # Other work on the machine makes some tries slow, but not all of them.
    for _ in range(20):
        start = time.process_time()
        find_equations(text)
        seconds = time.process_time() - start
        if seconds < 0.05:
            break
    assert seconds < 0.05
