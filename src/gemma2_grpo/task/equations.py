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
from itertools import zip_longest
from typing import NamedTuple

from gemma2_grpo.task.answers import NUMBER, SCALES, parse_number

# Far beyond any solution of a word problem; it bounds the time that one text can take.
MAX_CHARS = 16_384
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
    result: Fraction
    """What the text says that the calculation gives."""
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
    place: Fraction = Fraction(0)
    """What a one in the last written place of a number is worth."""
    has_decimals: bool = False
    is_percent: bool = False


class _Side(NamedTuple):
    """An expression that may stand on one side of an equals sign."""

    tokens: list[_Token]
    opens: bool
    """Only a break or an equals sign stands before it."""


# Replaced by as many characters, so that offsets stay those of the text.
_LATEX = re.compile(
    r"\\[dt]?frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}"
    r"|\\(times|cdot|div|approx|left|right|text\w*|mathrm|mathbf|boxed|[^A-Za-z])"
)
_LATEX_MEANING = {"times": "*", "cdot": "*", "div": "/", "approx": "≈"}
_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")

# N number, S attached sign or operator, O operator, W word, P word that changes the number
# after it, V variable, L R brackets, E equals, A about equals, X other mathematics, B break.
# No alternative has two repeated parts that match the same character: the scan is linear.
_LETTER = r"[^\W\d_]"
_BEFORE_NUMBER = r"[ ]?[$€£(.]{0,3}[0-9]"
_TOKEN = re.compile(
    rf"""
    (?P<skip>[^\S\n]+|[$€£¥₹¢°_`{{}}"“”~#]+|[*][*]+)
  | (?P<N>(?:(?P<whole>[0-9]{{1,4}})[ ](?P<top>[0-9]{{1,4}})/(?P<bottom>[0-9]{{1,4}})(?![0-9])
        |(?P<digits>{NUMBER}))
      (?P<scale>[kKM]\b|[ ](?:hundred|thousand|million|billion)\b)?(?P<percent>[ ]?%)?)
  | (?P<P>(?:twice|thrice|half|double|triple|third|quarter|than|by|sum|product|difference)
      (?:[ ]of)?(?:[ ]the)?\b)
  | (?P<S>(?<![\w)%.\]])[-−–](?=[$€£(.]{{0,3}}[0-9]))
  | (?P<O>(?:times|multiplied[ ]by|divided[ ]by|plus|minus|[xX])(?={_BEFORE_NUMBER})
      |(?:(?<=%[ ])|(?<=/[0-9][ ])|(?<=/[0-9][0-9][ ]))of(?={_BEFORE_NUMBER})
      |[-−–](?!>|{_LETTER}{{2}})|/(?![ ]?{_LETTER}{{2}})|[+*×·∙∗÷])
  | (?P<W>(?:-|/[ ]?)?{_LETTER}(?:\w|['’-](?={_LETTER}))*|\([^()\d\n=]{{1,40}}\))
  | (?P<L>[(\[]) | (?P<R>[)\]])
  | (?P<A>≈) | (?P<E>=+(?!>)) | (?P<X>[\^!√|\\]) | (?P<B>\n\s*|[^\n])
    """,
    re.VERBOSE,
)
_OPERATORS = {
    **dict.fromkeys(["+", "plus"], "+"),
    **dict.fromkeys(["-", "−", "–", "minus"], "-"),
    **dict.fromkeys(["/", "÷", "divided by"], "/"),
}
_NOT_VARIABLES = frozenset("aAI")

# An operand has up to five words of unit. Possessive quantifiers: no second thoughts.
_OPERAND = r"(?:S?+L)*+S?+NR*+[WP]{0,5}+R*+"
_PIECE = re.compile(rf"(?P<run>{_OPERAND}(?:[OS]{_OPERAND})*+)|.")

_APPLY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "negate": lambda zero, value: zero - value,
}
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}


def find_equations(text: str) -> list[Equation]:
    """Finds and decides the equations of a text, in their order; repetitions are kept.

    A chain `A = B = C` gives two. GSM8K's annotations (`<<48/2=24>>`) are read on their own, and
    the text around them as if they were not there. A text of more than MAX_CHARS characters
    has none.
    """
    if len(text) > MAX_CHARS:
        return []
    text = _LATEX.sub(_plain_latex, text)
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
        if kind == "skip" or (kind == "O" and opens_line and text[match.end() :][:1] == " "):
            continue  # An operator that opens a line is the mark of a list item.
        if kind in "EA" and tokens and opens_line:
            tokens.pop()
        if kind == "L" and match.start() and text[match.start() - 1] in "0123456789)]":
            tokens.append(_Token("O", "*", match.start(), match.start()))
        if kind == "N":
            tokens.append(_number(match))
        elif kind == "W" and len(word) == 1 and word not in _NOT_VARIABLES:
            tokens.append(_Token("V", word, *match.span()))
        else:
            word = _OPERATORS.get(word, "*") if kind in "OS" else word
            tokens.append(_Token(kind, word, *match.span()))
    return tokens


def _number(match: re.Match[str]) -> _Token:
    """Token of a number, which may be mixed ("1 1/2"), scaled ("2 million") or a percentage."""
    scale = Fraction(SCALES[match["scale"].strip()] if match["scale"] else 1)
    if match["digits"]:
        value = parse_number(match["digits"])
    else:
        whole, top, bottom = (int(match[name]) for name in ("whole", "top", "bottom"))
        value = whole + Fraction(top, bottom) if top < bottom else None
    decimals = len((match["digits"] or "").partition(".")[2])
    return _Token(
        "N",
        match[0],
        *match.span(),
        value=None if value is None else value * scale,
        place=Fraction(0) if value is None else scale / 10**decimals,
        has_decimals=decimals > 0,
        is_percent=match["percent"] is not None,
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
            spoilt |= before in ("P", "X") or after in ("O", "S", "V", "X")
            spoilt |= before == "N" and kind[0] == "L"
            parts.append(None if spoilt else _Side(tokens[start:end], opens))
            opens = False
            continue
        parts.append(kind if kind in "EA" else None)
        opens = kind in "EAB"
        spoilt = not opens and (spoilt or kind in "OSVX")
    return parts


def _decide(left: _Side, sign: str, right: _Side, text: str, offset: int) -> Equation | None:
    """Judges `left sign right`; None if it is no equation, or none that can be judged."""
    sides = _calculation(left.tokens), _calculation(right.tokens)
    bare = [side[-1] if sum(token.kind == "N" for token in side) == 1 else None for side in sides]
    # Of "Day 1 = 5 + 3", "1" is no side; two bare numbers are no calculation.
    if bare[0] and (bare[1] or not left.opens):
        return None
    rounded = bare[1] or bare[0]
    if rounded and not rounded.has_decimals and sign == "E":
        rounded = None
    is_true, first, second, percent = False, None, None, Fraction(1)
    # "10 / 50 = 20%" takes % for a hundredth, "10 / 50 * 100 = 20%" for a unit.
    for percent in _percent_readings(sides):
        first, second = (_evaluate(side, percent) for side in sides)
        if first is None or second is None:
            return None
        tolerance = rounded.place * (percent if rounded.is_percent else 1) / 2 if rounded else 0
        is_true = abs(first - second) <= tolerance
        if is_true:
            break
    return None
