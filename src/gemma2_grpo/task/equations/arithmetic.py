"""Exact arithmetic on tokens: the value of an expression, its units, and what makes it idle.

Nothing is evaluated but + - * / of bounded fractions.
"""

import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from typing import Literal

from gemma2_grpo.task.equations.tokens import Token, numbers, read_number
from gemma2_grpo.task.equations.units import unit_sizes

# Longer intermediate values are not judged, so that every operation takes constant time.
_MAX_BITS = 256
# A calculation needs three numbers for two to cancel; so many values are tried, to bound the time.
_LEAST_TO_CANCEL, _MAX_REPEATED, _CHANGE = 5, 3, Fraction(1, 7919)
_PERCENT = 100

_APPLY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "negate": operator.sub,  # from 0
}
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}


def without_words(tokens: list[Token], bracket: str) -> list[Token]:
    """Reads numbers and their units, and drops words, and outer brackets closed beyond the sign."""
    kept: list[Token] = []
    for token in tokens:
        if token.kind == "N":
            kept.append(token if token.text.isalpha() else read_number(token))
        elif token.kind not in "WDPU":
            kept.append(token)
        elif kept and kept[-1].kind == "N" and not kept[-1].unit and unit_sizes(token.text):
            kept[-1] = kept[-1]._replace(unit=token.text)
    surplus = sum({"L": 1, "R": -1}.get(token.kind, 0) for token in kept)
    if bracket == "L":
        return kept[max(surplus, 0) :]
    return kept[: len(kept) + min(surplus, 0)]


def split_terms(tokens: list[Token]) -> Iterator[list[Token]]:
    """Parts an expression at each plus and minus, whether in brackets or not."""
    start = 0
    for i, token in enumerate(tokens):
        if token.kind in "OS" and token.text in "+-":
            yield tokens[start:i]
            start = i + 1
    yield tokens[start:]


def evaluate(tokens: list[Token], is_scaled: bool) -> Fraction:
    """Value of an expression, by two stacks.

    Raises:
        ArithmeticError: for a division by zero, unmatched brackets or an unwieldy value.
    """
    values: list[Fraction] = []
    waiting: list[str] = []
    after_operand = False
    for token in tokens:
        if token.kind == "N":
            values.append(token.read(is_scaled))
        elif token.kind == "L":
            waiting.append("(")
        elif token.kind == "R":
            _apply_down_to(0, values, waiting)
            if not waiting:
                raise ArithmeticError("unmatched bracket")
            waiting.pop()
        elif after_operand:
            _apply_down_to(_PRECEDENCE[token.text], values, waiting)
            waiting.append(token.text)
        elif token.text == "-":
            values.append(Fraction(0))
            waiting.append("negate")
        after_operand = token.kind in "NR"
    _apply_down_to(0, values, waiting)
    if waiting:
        raise ArithmeticError("unmatched bracket")
    return values.pop()


def _apply_down_to(precedence: int, values: list[Fraction], waiting: list[str]) -> None:
    """Applies waiting operators that bind at least as tightly, back to an open bracket."""
    while waiting and waiting[-1] != "(" and _PRECEDENCE[waiting[-1]] >= precedence:
        right, left = values.pop(), values.pop()
        value = _APPLY[waiting.pop()](left, right)
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
            raise OverflowError("unwieldy value")
        values.append(value)


def converted(calculation: list[Token], claim: Token) -> Iterator[Fraction]:
    """Values of a calculation in the unit of its result: "$2.50 - $2.24" is 26 in cents.

    Either one unit goes through it ("1/2 hour"), or each number of a sum has one of the same kind
    ("3 hours + 20 minutes").
    """
    is_sum = all(token.text in "+-" for token in calculation if token.kind in "OS")
    for family, size in unit_sizes(claim.unit).items():
        sizes = [unit_sizes(number.unit).get(family) for number in numbers(calculation)]
        known = {one for one in sizes if one}
        if len(known) == 1:
            yield evaluate(calculation, True) * known.pop() / size
        elif known and None not in sizes and is_sum:
            rest = iter(sizes)
            yield evaluate(
                [
                    t._replace(value=t.value * (next(rest) or 0) / size) if t.kind == "N" else t
                    for t in calculation
                ],
                True,
            )


def mixes_units(calculation: list[Token], claim: list[Token]) -> bool:
    """Whether several units of one kind meet, of which only a conversion could make sense.

    A product may have them: "2 hours * 60 minutes = 120 minutes" converts by itself.
    """
    is_product = all(token.text in "*/" for token in calculation if token.kind in "OS")
    own = [unit_sizes(number.unit) for number in numbers(calculation)]
    for sizes in [unit_sizes(number.unit) for number in numbers(claim)] or [{}]:
        for family in {name for units in (sizes, *own) for name in units}:
            met = {units[family] for units in own if family in units}
            is_converted = is_product and sizes.get(family) in met
            if not is_converted and len(met | {sizes.get(family, next(iter(met), 0))}) > 1:
                return True
    return False


def percent_off(tokens: list[Token]) -> Fraction:
    """Value of a calculation that ends in "- 20%", read as 20 % of what precedes it."""
    *before, sign, last = tokens if len(tokens) > 2 else (*tokens, *tokens, *tokens)
    if last.scale != Fraction(1, 100) or sign.text not in ("+", "-"):
        return evaluate(tokens, True)
    factor = last.read(True) if sign.text == "+" else -last.read(True)
    return evaluate(before, True) * (1 + factor)


def is_trivial(tokens: list[Token], a: Fraction, b: Fraction) -> bool:
    """Whether `a op b` holds without calculating: x + 0, x - 0, x * 0, x * 1, x / 1, 0 / x."""
    sign = next(token.text for token in reversed(tokens) if token.kind in "OS")
    return {
        "+": a == 0 or b == 0,
        "-": b == 0,
        "*": not {a, b}.isdisjoint({0, 1}),
        "/": b == 1 or a == 0,
    }[sign]


def cancels(tokens: list[Token], is_scaled: bool) -> Literal["sum", "product", ""]:
    """Where a number that is written twice makes no difference: if it changes, the value stays."""
    counts = Counter(number.value for number in numbers(tokens))
    # "25 / 100 * 100" is a percentage.
    repeated = [n for n, count in counts.items() if (count > 1 or 0 in counts) and n != _PERCENT]
    if len(tokens) < _LEAST_TO_CANCEL or not repeated:
        return ""
    value = evaluate(tokens, is_scaled)
    for number in repeated[:_MAX_REPEATED]:
        changed = [
            token._replace(value=number + _CHANGE)
            if token.kind == "N" and token.value == number
            else token
            for token in tokens
        ]
        with suppress(ArithmeticError):
            if evaluate(changed, is_scaled) == value:
                return "product" if any(token.text == "/" for token in tokens) else "sum"
    return ""
