"""Written equations: finds every `A = B` in a text and decides it exactly.

One letter stands for each token's kind, so that a regular expression over the kinds finds the
expressions with their units ("3 red hats + 2 hats"). What cannot be read as plain arithmetic,
such as algebra or powers, is left unjudged rather than called false.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from gemma2_grpo.task.expressions import (
    Token,
    evaluate,
    numbers,
    plain_latex,
    read_number,
    tokenise,
)

# Far beyond any solution of a word problem (GSM8K's longest has 1,228 characters). They bound
# the time that one text can take.
MAX_CHARS = 8_000
MAX_EQUALS_SIGNS = 100
_MAX_TOKENS = 100


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
    results: tuple[Fraction, ...]
    """What it is said to equal; of "20%" and "2 million" also the 20 and the 2."""
    rewritten: tuple[Fraction, ...]
    """Numbers of the other side where that is a calculation too, as in `2 * (3 + 4) = 2 * 7`."""
    is_trivial: bool
    """Adds or subtracts 0, multiplies by 0 or 1, or divides by 1."""
    start: int
    end: int
    """Offsets in the text."""


class _Side(NamedTuple):
    """An expression that may stand on one side of an equals sign."""

    tokens: list[Token]
    stands_alone: bool
    """Only a break or an equals sign stands before it, and no unit after it."""


_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")

# Over the kinds of tokens. An operand has up to five words of unit. Quantifiers are possessive:
# what was read once is not tried again.
_OPERAND = r"(?:S?+L)*+S?+NR*+[WP]{0,5}+R*+"
_PIECE = re.compile(rf"(?P<run>{_OPERAND}(?:[OS]{_OPERAND})*+)|(?:S?+L)++|.")


def find_equations(text: str) -> list[Equation]:
    """Finds and decides the equations of a text, in their order; repetitions are kept.

    A chain `A = B = C` gives two. GSM8K's annotations (`<<48/2=24>>`) are read on their own, and
    the text around them as if they were not there. A text of more than MAX_CHARS characters or
    MAX_EQUALS_SIGNS is no solution and has none.
    """
    if len(text) > MAX_CHARS:
        return []
    text = plain_latex(text)
    if text.count("=") + text.count("≈") > MAX_EQUALS_SIGNS:
        return []
    found = _find(_ANNOTATION.sub(lambda match: " " * len(match[0]), text), 0)
    for match in _ANNOTATION.finditer(text):
        found += _find(match[1], match.start(1))
    return sorted(found, key=lambda equation: equation.start)


def _find(text: str, offset: int) -> list[Equation]:
    """Equations of a text that stands at `offset` of the whole."""
    if not re.search("[=≈]", text):
        return []
    parts = _split(tokenise(text))
    found: list[Equation | None] = []
    for left, sign, right in zip(parts, parts[1:], parts[2:], strict=False):
        if isinstance(left, _Side) and isinstance(sign, str) and isinstance(right, _Side):
            # Unmatched brackets, a division by zero or unwieldy numbers decide nothing.
            with suppress(ArithmeticError):
                found.append(_decide(left, sign, right, text, offset))
    return [equation for equation in found if equation]


def _split(tokens: list[Token]) -> list[_Side | str | None]:
    """Expressions, equals signs ("E", "A") and None for all that cannot be judged."""
    kinds = "".join(token.kind for token in tokens)
    parts: list[_Side | str | None] = []
    opens, spoilt = True, False
    for piece in _PIECE.finditer(kinds):
        kind, (start, end) = piece[0], piece.span()
        if piece["run"]:
            before, after = kinds[start - 1 : start], kinds[end : end + 1]
            # Half of an expression, such as the "3" of "x + 3", must not be judged.
            spoilt |= before in ("N", "P", "X") or after in ("O", "S", "V", "X")
            spoilt |= kind[-1] + after == "NN" or len(kind) > _MAX_TOKENS
            parts.append(None if spoilt else _Side(tokens[start:end], opens and kind[-1] != "W"))
            opens = False
            continue
        parts.append(kind if kind in "EA" else None)
        opens = kind in "EAB"
        spoilt = not opens and (spoilt or kind[0] in "OSVX")
    return parts


def _decide(left: _Side, sign: str, right: _Side, text: str, offset: int) -> Equation | None:
    """Judges `left sign right`; None if neither side is a calculation.

    Raises:
        ArithmeticError: if a side has no value.
    """
    sides = _calculation(left.tokens, "L"), _calculation(right.tokens, "R")
    left_is_bare, right_is_bare = (len(numbers(side)) == 1 for side in sides)
    # Two bare numbers calculate nothing, and "Day 1 = 5 + 3" does not say that 1 is 8.
    if left_is_bare and (right_is_bare or not left.stands_alone):
        return None
    calculation, claim = reversed(sides) if left_is_bare else sides
    value, result, is_true, is_scaled = _compare(calculation, claim, sign)
    operands = tuple(number.read(is_scaled) for number in numbers(calculation))
    claimed = tuple(number.read(is_scaled) for number in numbers(claim))
    scale = numbers(claim)[-1].scale if len(claimed) == 1 else 1
    start, end = sides[0][0].start, sides[1][-1].end
    return Equation(
        text=" ".join(text[start:end].split()),
        left=result if left_is_bare else value,
        right=value if left_is_bare else result,
        is_true=is_true,
        expression="".join(
            str(token.value) if token.kind == "N" else token.text for token in calculation
        ),
        operands=operands,
        results=(result, result / scale if is_scaled else result * scale),
        rewritten=claimed if len(claimed) > 1 else (),
        is_trivial=len(operands) == 2 and _is_trivial(calculation, *operands),
        start=offset + start,
        end=offset + end,
    )


def _compare(
    calculation: list[Token], claim: list[Token], sign: str
) -> tuple[Fraction, Fraction, bool, bool]:
    """Values of both sides, whether they agree, and whether scales were read as factors.

    "10 / 50 = 20%" takes % for a hundredth and "10 / 50 * 100 = 20%" for a unit: either will do.
    A single number may be rounded to its decimals; one without only after "about equal".
    """
    *others, stated = numbers(claim)
    may_round = not others and (sign == "A" or stated.decimals > 0)
    half = Fraction(may_round, 2 * 10**stated.decimals)
    has_scale = any(number.scale != 1 for number in numbers(calculation + claim))
    value, result = evaluate(calculation, True), evaluate(claim, True)
    is_true = abs(value - result) <= half * stated.scale
    if is_true or not has_scale:
        return value, result, is_true, True
    value, result = evaluate(calculation, False), evaluate(claim, False)
    return value, result, abs(value - result) <= half, False


def _calculation(tokens: list[Token], bracket: str) -> list[Token]:
    """Reads the numbers, drops the units, and outer brackets closed beyond the equals sign."""
    kept = (token for token in tokens if token.kind not in "WP")
    tokens = [read_number(token) if token.kind == "N" else token for token in kept]
    surplus = sum({"L": 1, "R": -1}.get(token.kind, 0) for token in tokens)
    if bracket == "L":
        return tokens[max(surplus, 0) :]
    return tokens[: len(tokens) + min(surplus, 0)]


def _is_trivial(tokens: list[Token], a: Fraction, b: Fraction) -> bool:
    """Whether `a op b` holds without calculating: x + 0, x - 0, x * 0, x * 1, x / 1, 0 / x."""
    sign = next(token.text for token in reversed(tokens) if token.kind in "OS")
    return {
        "+": a == 0 or b == 0,
        "-": b == 0,
        "*": not {a, b}.isdisjoint({0, 1}),
        "/": b == 1 or a == 0,
    }[sign]
