"""Written equations: finds every `A = B` in a text and decides it exactly.

A text is cut into tokens once. One letter stands for each token's kind, so that a regular
expression over the kinds finds the expressions with their units ("3 red hats + 2 hats").
What cannot be read as plain arithmetic, such as algebra or powers, is left unjudged rather
than called false.
"""

import operator
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from gemma2_grpo.task.answers import NUMBER, SCALES, parse_number

# Far beyond any solution of a word problem (GSM8K's longest has 1,228 characters). They bound
# the time that one text can take.
MAX_CHARS = 10_000
MAX_EQUALS_SIGNS = 100
_MAX_TOKENS = 100
# Longer intermediate values are not judged, so that every operation takes constant time.
_MAX_BITS = 256


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


class _Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int
    value: Fraction | None = None
    """Of a number as its digits say; None if it is too long to judge."""
    decimals: int = 0
    scale: Fraction = Fraction(1)
    """A hundredth for %, a million for "million"."""


class _Side(NamedTuple):
    """An expression that may stand on one side of an equals sign."""

    tokens: list[_Token]
    stands_alone: bool
    """Only a break or an equals sign stands before it, and no unit after it."""


# Replaced by as many characters, so that offsets stay those of the text.
_LATEX = re.compile(
    r"\\[dt]?frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}"
    r"|\\(times|cdot|div|approx|left|right|text\w*|mathrm|mathbf|boxed|[^A-Za-z])"
)
_LATEX_MEANING = {"times": "*", "cdot": "*", "div": "/", "approx": "≈", "%": "%"}
_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")

# N number, S attached sign or operator, O operator, W word (of a unit), C word that joins
# sentences, P word that changes the number after it, V variable, L R brackets, E equals,
# A about equals, X other mathematics, B break.
# No alternative has two repeated parts that match the same character: the scan is linear.
_LETTER = r"[^\W\d_]"
_BEFORE_NUMBER = r"[ ]?[$€£(.]{0,3}[0-9]"
_TOKEN = re.compile(
    rf"""
    (?P<skip>[^\S\n]+|[$€£¥₹¢°_`{{}}"“”~#&]+|[*][*]+)
  | (?P<N>(?:(?:(?P<whole>[0-9]{{1,4}})[ ]|(?<=/[ ]))
            (?P<top>[0-9]{{1,4}})/(?P<bottom>[0-9]{{1,4}})(?![0-9])
        |(?P<digits>{NUMBER}))
      (?P<scale>[ ]?(?:%|hundred\b|thousand\b|million\b|billion\b))?)
  | (?P<C>(?:because|since|so|if|thus|then|therefore)\b)
  | (?P<P>(?:twice|thrice|half|double|triple|third|quarter|than|by)(?:[ ]of)?(?:[ ]the)?\b)
  | (?P<S>(?<![\w)%.\]])[-−–+](?=[$€£(.]{{0,3}}[0-9]))
  | (?P<O>(?:times|multiplied[ ]by|divided[ ]by|plus|minus|[xX])(?={_BEFORE_NUMBER})
      |(?:(?<=%[ ])|(?<=/[0-9][ ])|(?<=/[0-9][0-9][ ]))of(?={_BEFORE_NUMBER})
      |[-−–](?!>|{_LETTER}{{2}})|/(?![ ]?{_LETTER}{{2}})|[+*×·∙∗÷])
  | (?P<W>(?:-|/[ ]?)?{_LETTER}(?:\w|['’-](?={_LETTER}))*|\([^()\d\n=]{{1,40}}\))
  | (?P<L>[(\[]) | (?P<R>[)\]])
  | (?P<A>≈) | (?P<E>=+(?!>)) | (?P<X>[\^√|\\]) | (?P<B>\n\s*|[^\n])
    """,
    re.VERBOSE,
)
_OPERATORS = {
    **dict.fromkeys(["+", "plus"], "+"),
    **dict.fromkeys(["-", "−", "–", "minus"], "-"),
    **dict.fromkeys(["/", "÷", "divided by"], "/"),
}

# An operand has up to five words of unit. Possessive quantifiers: no second thoughts.
_OPERAND = r"(?:S?+L)*+S?+NR*+[WP]{0,5}+R*+"
_PIECE = re.compile(rf"(?P<run>{_OPERAND}(?:[OS]{_OPERAND})*+)|(?:S?+L)++|.")

_APPLY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "negate": operator.sub,  # from 0
}
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}


def find_equations(text: str) -> list[Equation]:
    """Finds and decides the equations of a text, in their order; repetitions are kept.

    A chain `A = B = C` gives two. GSM8K's annotations (`<<48/2=24>>`) are read on their own, and
    the text around them as if they were not there. A text of more than MAX_CHARS characters or
    MAX_EQUALS_SIGNS is no solution and has none.
    """
    if len(text) > MAX_CHARS:
        return []
    text = _LATEX.sub(_plain_latex, text)
    if text.count("=") + text.count("≈") > MAX_EQUALS_SIGNS:
        return []
    found = _find(_ANNOTATION.sub(lambda match: " " * len(match[0]), text), 0)
    for match in _ANNOTATION.finditer(text):
        found += _find(match[1], match.start(1))
    return sorted(found, key=lambda equation: equation.start)


def _plain_latex(match: re.Match[str]) -> str:
    """What a LaTeX command means in plain text, padded to its length."""
    plain = f"({match[1]}/{match[2]})" if match[1] else _LATEX_MEANING.get(match[3], "")
    return plain.ljust(len(match[0]))


def _find(text: str, offset: int) -> list[Equation]:
    """Equations of a text that stands at `offset` of the whole."""
    if not re.search("[=≈]", text):
        return []
    parts = _split(_tokenise(text))
    equations = []
    for left, sign, right in zip(parts, parts[1:], parts[2:], strict=False):
        if isinstance(left, _Side) and isinstance(sign, str) and isinstance(right, _Side):
            equations.append(_decide(left, sign, right, text, offset))
    return [equation for equation in equations if equation]


def _tokenise(text: str) -> list[_Token]:
    """Cuts a text into tokens. A line that begins with an equals sign continues the last."""
    tokens: list[_Token] = []
    for match in _TOKEN.finditer(text):
        kind, word = match.lastgroup or "B", match[0]
        opens_line = not tokens or tokens[-1].text[0] == "\n"
        if kind == "skip" or (kind == "O" and opens_line and text.startswith(" ", match.end())):
            continue  # An operator that opens a line is the mark of a list item.
        if kind in "EA" and tokens and opens_line:
            tokens.pop()
        if kind == "L" and match.start() and text[match.start() - 1] in "0123456789)]":
            tokens.append(_Token("O", "*", match.start(), match.start()))
        if kind == "N":
            tokens.append(_number(match))
        elif kind == "W" and len(word) == 1 and not _is_article(text, match):
            tokens.append(_Token("V", word, *match.span()))
        else:
            word = _OPERATORS.get(word, "*") if kind in "OS" else word
            tokens.append(_Token(kind, word, *match.span()))
    return tokens


def _is_article(text: str, match: re.Match[str]) -> bool:
    """Whether a single letter is a word ("3 a day"), not a variable ("3a")."""
    return match[0] in "aAI" and not text[max(match.start() - 1, 0)].isdigit()


def _number(match: re.Match[str]) -> _Token:
    """Token of a number: plain, mixed ("1 1/2"), a divisor ("/ 1/2"), scaled, a percentage."""
    digits, scale = match["digits"], (match["scale"] or "").strip()
    if digits:
        value = parse_number(digits)
    else:
        whole, top, bottom = (int(match[name] or 0) for name in ("whole", "top", "bottom"))
        value = whole + Fraction(top, bottom) if top < bottom else None
    return _Token(
        "N",
        match[0],
        *match.span(),
        value=value,
        decimals=len(digits.partition(".")[2]) if digits else 0,
        scale=Fraction(1, 100) if scale == "%" else Fraction(SCALES.get(scale, 1)),
    )


def _split(tokens: list[_Token]) -> list[_Side | str | None]:
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
    """Judges `left sign right`; None if it is no equation, or none that can be judged."""
    sides = _calculation(left.tokens, "L"), _calculation(right.tokens, "R")
    left_is_bare, right_is_bare = (len(_numbers(side)) == 1 for side in sides)
    # Two bare numbers calculate nothing, and "Day 1 = 5 + 3" does not say that 1 is 8.
    if left_is_bare and (right_is_bare or not left.stands_alone):
        return None
    calculation, claim = reversed(sides) if left_is_bare else sides
    try:
        value, result, is_true, is_scaled = _compare(calculation, claim, sign)
    except ArithmeticError:
        return None
    operands = tuple(_value(number, is_scaled) for number in _numbers(calculation))
    claimed = tuple(_value(number, is_scaled) for number in _numbers(claim))
    scale = _numbers(claim)[-1].scale if len(claimed) == 1 else 1
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
    calculation: list[_Token], claim: list[_Token], sign: str
) -> tuple[Fraction, Fraction, bool, bool]:
    """Values of both sides, whether they agree, and whether scales were read as factors.

    "10 / 50 = 20%" takes % for a hundredth and "10 / 50 * 100 = 20%" for a unit: either will do.
    A single number may be rounded to its decimals; one without only after "about equal".
    """
    numbers = _numbers(calculation), _numbers(claim)
    stated = numbers[1][-1]
    may_round = len(numbers[1]) == 1 and (sign == "A" or stated.decimals > 0)
    half = Fraction(may_round, 2 * 10**stated.decimals)
    has_scale = any(number.scale != 1 for side in numbers for number in side)
    value, result = _evaluate(calculation, True), _evaluate(claim, True)
    is_true = abs(value - result) <= half * stated.scale
    if is_true or not has_scale:
        return value, result, is_true, True
    value, result = _evaluate(calculation, False), _evaluate(claim, False)
    return value, result, abs(value - result) <= half, False


def _calculation(tokens: list[_Token], bracket: str) -> list[_Token]:
    """Drops the units, and outer brackets whose partner stands beyond the equals sign."""
    tokens = [token for token in tokens if token.kind not in "WP"]
    surplus = sum({"L": 1, "R": -1}.get(token.kind, 0) for token in tokens)
    if bracket == "L":
        return tokens[max(surplus, 0) :]
    return tokens[: len(tokens) + min(surplus, 0)]


def _numbers(tokens: list[_Token]) -> list[_Token]:
    """The numbers among tokens; a side with one number is bare, with more a calculation."""
    return [token for token in tokens if token.kind == "N"]


def _is_trivial(tokens: list[_Token], a: Fraction, b: Fraction) -> bool:
    """Whether `a op b` holds without calculating: x + 0, x - 0, x * 0, x * 1, x / 1, 0 / x."""
    sign = next(token.text for token in reversed(tokens) if token.kind in "OS")
    return {
        "+": a == 0 or b == 0,
        "-": b == 0,
        "*": not {a, b}.isdisjoint({0, 1}),
        "/": b == 1 or a == 0,
    }[sign]


def _evaluate(tokens: list[_Token], is_scaled: bool) -> Fraction:
    """Value of an expression, by two stacks.

    Raises:
        ArithmeticError: for a division by zero, unmatched brackets or an unwieldy value.
    """
    values: list[Fraction] = []
    waiting: list[str] = []
    after_operand = False
    for token in tokens:
        if token.kind == "N":
            values.append(_value(token, is_scaled))
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


def _value(number: _Token, is_scaled: bool) -> Fraction:
    """Value of a number, with its percent sign or "million" as a factor or as a mere unit."""
    if number.value is None:
        raise OverflowError("too many digits")
    return number.value * number.scale if is_scaled else number.value


def _apply_down_to(precedence: int, values: list[Fraction], waiting: list[str]) -> None:
    """Applies waiting operators that bind at least as tightly, back to an open bracket."""
    while waiting and waiting[-1] != "(" and _PRECEDENCE[waiting[-1]] >= precedence:
        right, left = values.pop(), values.pop()
        value = _APPLY[waiting.pop()](left, right)
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
            raise OverflowError
        values.append(value)
