"""Arithmetic as people write it: text to tokens, and the exact value of an expression.

The tokens know units, list marks, percentages, "2 million", mixed numbers and LaTeX, because a
model's working has all of them. Nothing is evaluated but + - * / of bounded fractions.
"""

import operator
import re
from fractions import Fraction
from typing import NamedTuple

from gemma2_grpo.task.answers import NUMBER, SCALES, parse_number

# Longer intermediate values are not judged, so that every operation takes constant time.
_MAX_BITS = 256


class Token(NamedTuple):
    """A piece of a text."""

    kind: str
    """One letter; the comment at _TOKEN explains them."""
    text: str
    """As written; of an operator one of + - * /."""
    start: int
    end: int
    value: Fraction = Fraction(0)
    """What the digits of a number say. This and what follows is filled in by read_number."""
    decimals: int = 0
    scale: Fraction = Fraction(1)
    """A hundredth for %, a million for "million"."""

    def read(self, is_scaled: bool) -> Fraction:
        """Value of a number, with its scale as a factor or as a mere unit."""
        return self.value * self.scale if is_scaled else self.value


# Replaced by as many characters, so that offsets stay those of the text.
_LATEX = re.compile(
    r"\\[dt]?frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}"
    r"|\\(times|cdot|div|approx|left|right|text\w*|mathrm|mathbf|boxed|[^A-Za-z])"
)
_LATEX_MEANING = {"times": "*", "cdot": "*", "div": "/", "approx": "≈", "%": "%"}

# N number, S attached sign or operator, O operator, W word (of a unit), C word that joins
# sentences, P word that changes the number after it, V variable, L R brackets, E equals,
# A about equals, X other mathematics, B break.
# No alternative has two repeated parts that match the same character: the scan is linear.
_LETTER = r"[^\W\d_]"
_BEFORE_NUMBER = r"[ ]?[$€£(.]{0,3}[0-9]"
_TOKEN = re.compile(
    rf"""
    (?P<skip>[^\S\n]+|[$€£¥₹¢°_`{{}}"“”~#&]+|[*][*]+)
  | (?P<N>(?:(?:[0-9]{{1,4}}[ ]|(?<=/[ ]))[0-9]{{1,4}}/[0-9]{{1,4}}(?![0-9])|{NUMBER})
      (?:[ ]?(?:%|hundred\b|thousand\b|million\b|billion\b))?)
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
_NUMBER_PARTS = re.compile(r"([0-9.,/ ]*[0-9])\s*(.*)")
_OPERATORS = {
    **dict.fromkeys(["+", "plus"], "+"),
    **dict.fromkeys(["-", "−", "–", "minus"], "-"),
    **dict.fromkeys(["/", "÷", "divided by"], "/"),
}

_APPLY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "negate": operator.sub,  # from 0
}
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}


def plain_latex(text: str) -> str:
    """Writes LaTeX commands as plain text of the same length, so that offsets stay."""
    return _LATEX.sub(_plain_command, text)


def _plain_command(match: re.Match[str]) -> str:
    """What a LaTeX command means in plain text, padded to its length."""
    plain = f"({match[1]}/{match[2]})" if match[1] else _LATEX_MEANING.get(match[3], "")
    return plain.ljust(len(match[0]))


def tokenise(text: str) -> list[Token]:
    """Cuts a text into tokens. A line that begins with an equals sign continues the last."""
    tokens: list[Token] = []
    for match in _TOKEN.finditer(text):
        kind, word = match.lastgroup or "B", match[0]
        opens_line = not tokens or tokens[-1].text[0] == "\n"
        if kind == "skip" or (kind == "O" and opens_line and text.startswith(" ", match.end())):
            continue  # An operator that opens a line is the mark of a list item.
        if kind in "EA" and tokens and opens_line:
            tokens.pop()
        if kind == "L" and match.start() and text[match.start() - 1] in "0123456789)]":
            tokens.append(Token("O", "*", match.start(), match.start()))
        if kind == "W" and len(word) == 1 and not _is_article(text, match):
            tokens.append(Token("V", word, *match.span()))
        else:
            word = _OPERATORS.get(word, "*") if kind in "OS" else word
            tokens.append(Token(kind, word, *match.span()))
    return tokens


def _is_article(text: str, match: re.Match[str]) -> bool:
    """Whether a single letter is a word ("3 a day"), not a variable ("3a")."""
    return match[0] in "aAI" and not text[max(match.start() - 1, 0)].isdigit()


def read_number(token: Token) -> Token:
    """Fills in what a number says: plain, mixed ("1 1/2"), a divisor ("/ 1/2"), with a scale.

    Raises:
        ArithmeticError: if it has too many digits, or a fraction has no sense.
    """
    digits, scale = _NUMBER_PARTS.findall(token.text)[0]
    *whole, last = digits.split()
    top, _, bottom = last.partition("/")
    value, divisor = parse_number(top), parse_number(bottom or "1")
    if value is None or not divisor or (whole and value >= divisor):
        raise ArithmeticError("no number that can be judged")
    return token._replace(
        value=value / divisor + int(*whole),
        decimals=len(top.partition(".")[2]),
        scale=Fraction(1, 100) if scale == "%" else Fraction(SCALES.get(scale, 1)),
    )


def numbers(tokens: list[Token]) -> list[Token]:
    """The numbers among tokens."""
    return [token for token in tokens if token.kind == "N"]


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
