"""Written equations: finds every `A = B` in a text and decides it exactly.

What is true in one reading is true: "Step 2 - 150 × 4 = 600" says nothing of 2. What is false is
called so only where no other reading is left; algebra, powers, clock times, ratios and remainders
are left unjudged.
"""

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple

from gemma2_grpo.task.equations.algebra import stated_values, substitute
from gemma2_grpo.task.equations.arithmetic import (
    cancels,
    converted,
    evaluate,
    is_trivial,
    mixes_units,
    percent_off,
    split_terms,
    without_words,
)
from gemma2_grpo.task.equations.sides import Side, split_sides
from gemma2_grpo.task.equations.tokens import Token, numbers, plain_latex, tokenise

# Far beyond any solution of a word problem (GSM8K's longest has 1,228 characters). They bound
# the time that one text can take.
MAX_CHARS = 8_000
MAX_EQUALS_SIGNS = 100


@dataclass(frozen=True)
class Equation:
    """One written `A = B`, in which at least one side is a calculation."""

    text: str
    left: Fraction
    right: Fraction
    is_true: bool
    """Equal exactly, or after rounding to the decimals that are written."""
    expression: str
    """The calculation without units and spaces, the same for every restatement."""
    operands: tuple[Fraction, ...]
    """Numbers that the calculation starts from."""
    terms: tuple[tuple[Fraction, ...], ...]
    """The same, parted at each plus and minus."""
    results: tuple[Fraction, ...]
    """What it is said to equal; of "20%" and "2 million" also the 20 and the 2."""
    rewritten: tuple[Fraction, ...]
    """Numbers of the other side where that is a calculation too, as in `2 * (3 + 4) = 2 * 7`."""
    is_trivial: bool
    """Adds or subtracts 0, multiplies by 0 or 1, or divides by 1."""
    cancels: Literal["sum", "product", ""]
    """A number of it makes no difference: in "48 - 48 + 72" or "72 * 48 / 48"."""
    start: int
    end: int
    """Offsets in the text."""
    has_letters: bool
    """Letters stand for numbers of it; then their values are among the results."""

    @property
    def key(self) -> tuple[str, Fraction]:
        """Key that is equal for equal equations."""
        return self.expression, self.results[0]

    @property
    def uses(self) -> tuple[Fraction, ...]:
        """Numbers that it calculates with: its operands, and the values of its letters."""
        return (*self.operands, *self.results) if self.has_letters else self.operands


_EQUALS = re.compile("[=≈]|equal")
# No expression is longer; what is further from all equals signs is not looked at.
_REACH = 1_500
_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")

# After a quotient, such words say that it was cut to a whole number.
_REST = re.compile(
    r"[^\n=]{0,40}?\b(?:r ?[0-9]|rem(?:ainder)?\b|remaining|left|round)", re.IGNORECASE
)
# Letters that are units as long as nothing says that they are variables.
_UNIT_LETTERS = frozenset("cdghjklmpstwyABCFJKLMNVW")


def find_equations(text: str) -> list[Equation]:
    """Finds and decides the equations of a text, in their order; repetitions are kept.

    A chain `A = B = C` gives two. GSM8K's annotations (`<<48/2=24>>`) are read on their own, and
    the text around them as if they were not there. A text of more than MAX_CHARS characters or
    MAX_EQUALS_SIGNS is no solution and has none.
    """
    if len(text) > MAX_CHARS:
        return []
    text = plain_latex(text)
    if len(_EQUALS.findall(text)) > MAX_EQUALS_SIGNS:
        return []
    found = _find(_ANNOTATION.sub(lambda match: " " * len(match[0]), text), 0)
    for match in _ANNOTATION.finditer(text):
        found += _find(match[1], match.start(1))
    return sorted(found, key=lambda equation: equation.start)


def _find(text: str, offset: int) -> list[Equation]:
    """Equations of a part of the text that begins at `offset`."""
    signs = list(_EQUALS.finditer(text))
    if not signs:
        return []
    start = max(signs[0].start() - _REACH, 0)
    text = text[start : signs[-1].end() + _REACH]
    tokens = tokenise(text)
    return [
        replace(e, start=e.start + offset + start, end=e.end + offset + start)
        for e in _judge_all(tokens, text) + _solved(tokens, text)
    ]


def _judge_all(tokens: list[Token], text: str) -> list[Equation]:
    """Equations between neighbouring expressions."""
    parts = split_sides(tokens)
    found: list[Equation | None] = []
    for left, sign, right in zip(parts, parts[1:], parts[2:], strict=False):
        if isinstance(left, Side) and isinstance(sign, Token) and isinstance(right, Side):
            # Unmatched brackets, a division by zero or unwieldy numbers decide nothing.
            with suppress(ArithmeticError):
                found.append(_decide(left, sign, right, text))
    return [equation for equation in found if equation]


def _solved(tokens: list[Token], text: str) -> list[Equation]:
    """Equations with letters that the values which the text states for them make true.

    Nothing is called false: the text may state other things about the letter. What holds for
    other values as well, such as "x + 3 + 3 = x + 6", says nothing about it.
    """
    with suppress(ArithmeticError):
        values = stated_values(tokens)
        if values:
            others = {letter: value + 1 for letter, value in values.items()}
            always = {e.start for e in _judge_all(substitute(tokens, others), text) if e.is_true}
            found = _judge_all(substitute(tokens, values), text)
            return [e for e in found if e.is_true and e.has_letters and e.start not in always]
    return []


def _decide(left: Side, sign: Token, right: Side, text: str) -> Equation | None:
    """Judges `left sign right` in each reading; what is false in the whole one may be excused.

    Raises:
        ArithmeticError: if a side has no value.
    """
    whole = None
    for start in (0, *left.cuts):
        for end in (len(right.tokens), *right.claim_ends):
            reading = left._replace(tokens=left.tokens[start:]), right.tokens[:end]
            equation = _judge(*reading, sign, text)
            if equation and equation.is_true:
                return equation
            whole = equation if (start, end) == (0, len(right.tokens)) else whole
    is_certain = left.is_certain and right.is_certain
    return None if not is_certain or _is_excused(left.tokens, sign, right.tokens, text) else whole


def _judge(left: Side, right: list[Token], sign: Token, text: str) -> Equation | None:
    """Judges one reading; None if neither side is a calculation.

    Raises:
        ArithmeticError: if a side has no value.
    """
    if _has_variable(left.tokens, right):
        return None
    sides = without_words(left.tokens, "L"), without_words(right, "R")
    left_is_bare, right_is_bare = (len(numbers(side)) == 1 for side in sides)
    # Two bare numbers calculate nothing but a change of units ("2 hours = 120 minutes"), and
    # "Day 1 = 5 + 3" does not say that 1 is 8.
    is_change = left_is_bare and right_is_bare
    if left_is_bare and not (is_change or left.stands_alone):
        return None
    is_swapped = left_is_bare and not is_change
    calculation, claim = reversed(sides) if is_swapped else sides
    found = _compare(calculation, claim, sign)
    if is_change and not (found.is_true and found.is_converted):
        return None
    start, end = sides[0][0].start, sides[1][-1].end
    values = (found.result, found.value) if is_swapped else (found.value, found.result)
    return Equation(
        text=" ".join(text[start:end].split()),
        left=values[0],
        right=values[1],
        is_true=found.is_true,
        start=start,
        end=end,
        **_numbers_of(calculation, claim, found),
    )


def _numbers_of(
    calculation: list[Token], claim: list[Token], found: "_Comparison"
) -> dict[str, Any]:
    """Operands and results of an equation, as fields of `Equation`."""
    letters = {n.text: n.value for n in numbers(calculation + claim) if n.text.isalpha()}
    terms = tuple(
        tuple(n.read(found.is_scaled) for n in numbers(term) if n.text not in letters)
        for side in ((calculation, claim) if letters else (calculation,))
        for term in split_terms(side)
    )
    operands = tuple(chain.from_iterable(terms))
    claimed = tuple(number.read(found.is_scaled) for number in numbers(claim))
    scale = numbers(claim)[-1].scale if len(claimed) == 1 else 1
    other = found.result / scale if found.is_scaled else found.result * scale
    return {
        "expression": "".join(
            str(token.value) if token.kind == "N" else token.text for token in calculation
        ),
        "has_letters": bool(letters),
        "operands": operands,
        "terms": terms,
        "results": (*letters.values(), found.result, other),
        "rewritten": claimed if len(claimed) > 1 else (),
        "is_trivial": len(operands) == 2 and not letters and is_trivial(calculation, *operands),
        "cancels": "" if letters else cancels(calculation, found.is_scaled),
    }


class _Comparison(NamedTuple):
    """Comparison of two sides in one reading of their scales and units."""

    value: Fraction
    """Value of the calculation."""
    result: Fraction
    """Value of the claimed result."""
    is_true: bool
    is_scaled: bool
    """Scales were read as factors."""
    is_converted: bool = False
    """The calculation was brought to the unit of the claim."""


def _compare(calculation: list[Token], claim: list[Token], sign: Token) -> _Comparison:
    """Compares two sides in the first reading that holds, or else in the last plain one.

    "10 / 50 = 20%" takes % for a hundredth and "10 / 50 * 100 = 20%" for a unit: either will do.
    A single number may be rounded to its decimals; one without only after "about equal".
    """
    *others, stated = numbers(claim)
    may_round = not others and (sign.kind == "A" or stated.decimals > 0)
    half = Fraction(may_round, 2 * 10**stated.decimals)

    def compared(value: Fraction, is_scaled: bool, is_converted: bool = False) -> _Comparison:
        result = evaluate(claim, is_scaled)
        unit = stated.scale if is_scaled else 1
        is_true = abs(value - result) <= half * unit
        if stated.is_cut and not others:  # "16.66..." may continue with any digits.
            is_true |= 0 <= (abs(value) - abs(result)) / unit < Fraction(1, 10**stated.decimals)
        return _Comparison(value, result, is_true, is_scaled, is_converted)

    plain = compared(evaluate(calculation, True), True)
    if plain.is_true and len(calculation) > 1:
        return plain
    if any(number.scale != 1 for number in numbers(calculation + claim)):
        plain = compared(evaluate(calculation, False), False)
        if plain.is_true:
            return plain
        off = compared(percent_off(calculation), True)
        if off.is_true and stated.scale == 1:
            return off
    if not others:
        for value in converted(calculation, stated):
            change = compared(value, True, True)
            if change.is_true:
                return change
    return plain


def _has_variable(left: list[Token], right: list[Token]) -> bool:
    """Whether a letter after a number is no unit, as in "2x + 3 = 11"; "2x + 3x = 5x" is plain."""
    return bool((_letters(left) ^ _letters(right)) - _UNIT_LETTERS)


def _letters(tokens: list[Token]) -> frozenset[str]:
    """Single letters that stand after numbers."""
    return frozenset(token.text.strip("/ ")[0] for token in tokens if token.kind == "U")


def _is_excused(left: list[Token], sign: Token, right: list[Token], text: str) -> bool:
    """Whether an equation that is false as numbers may be true as it is meant."""
    sides = without_words(left, "L"), without_words(right, "R")
    return (
        _may_have_variable(left + right)
        or _names_a_part(left, sides[0], sign)
        or (any(t.text == "/" for t in left + right) and bool(_REST.match(text, right[-1].start)))
        or mixes_units(*sides)
    )


def _may_have_variable(tokens: list[Token]) -> bool:
    """Whether a letter or a word in brackets right after a number may be a variable.

    Where every number has a letter, as in "200g + 50g = 260g", they are units.
    """
    glued = [b for a, b in pairwise(tokens) if a.kind == "N" and a.end == b.start]
    units = [token for token in tokens if token.kind == "U"]
    return any(token.text[0] == "(" for token in glued) or (
        any(token.kind == "U" for token in glued) and len(units) < len(numbers(tokens))
    )


def _names_a_part(tokens: list[Token], calculation: list[Token], sign: Token) -> bool:
    """Whether a fraction is a part of something: "2/3 of the tank = 16 gallons".

    "is equal to" says so of numbers and percentages as well: "1% is equal to $450 / 90".
    """
    *parts, last = calculation
    is_fraction = [token.text for token in parts[1:]] == ["/"] and last.value > parts[0].value
    in_words = sign.text[0] in "eai"
    return (is_fraction and (in_words or tokens[-1].kind in "WDP")) or (in_words and not parts)
