"""Mathematics as people write it, cut into tokens.

The tokens know units, list marks, percentages, "2 million", mixed numbers and LaTeX, because a
model's working has all of them.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from gemma2_grpo.task.answers import (
    MAX_DIGITS,
    NUMBER,
    SCALES,
    VULGAR_FRACTIONS,
    parse_number,
    plain_fractions,
)


class Token(NamedTuple):
    """A piece of a text."""

    kind: str
    """One letter; the comment at _TOKEN explains them."""
    text: str
    """As written; of an operator one of + - * /."""
    start: int
    end: int
    unit: str = ""
    """The sign or word next to a number that `unit_sizes` knows."""
    value: Fraction = Fraction(0)
    """Value of the digits of a number. This and the fields below are filled in by read_number."""
    decimals: int = 0
    is_cut: bool = False
    """Dots follow its decimals, as in "16.66..."."""
    scale: Fraction = Fraction(1)
    """A hundredth for %, a million for "million"."""

    def read(self, is_scaled: bool) -> Fraction:
        """Value of a number, with its scale as a factor or as a mere unit."""
        return self.value * self.scale if is_scaled else self.value


# Replaced by as many characters, so that offsets stay those of the text. "\," and "\!" between
# digits part thousands; numbers know them.
_LATEX = re.compile(
    r"\\[dt]?frac(?:\{([0-9]{1,9})\}|([0-9]))(?:\{([0-9]{1,9})\}|([0-9]))"
    r"|\\(times|cdot|div|approx|left|right|text\w*|mathrm|mathbf|boxed|[,!](?![0-9]{3})|[^A-Za-z,!])"
)
_LATEX_MEANING = {"times": "*", "cdot": "*", "div": "/", "approx": "≈", "%": "%"}

# N number, S attached sign or operator, O operator, W word (of a unit), D word that may stand
# before a number ("* the 10 boxes"), C word that joins sentences, P word that changes the number
# after it, U letter after a number (a unit or a
# variable), V other letter, L R brackets, E equals, A about equals, X other mathematics, B break.
# No alternative has two repeated parts that match the same character: the scan is linear.
_LETTER = r"[^\W\d_]"
_BEFORE_NUMBER = r"[ ]?[$€£(.]{0,3}[0-9]"
# Numbers that are written in several parts: "1 1/2", "1 and 1/2", a divisor as in "50 / 1/2",
# "1½"; and thousands parted by spaces, where a currency says that they are one number.
_MIXED = r"(?:[0-9]{1,4}[ ](?:and[ ][(]?)?|(?<=/[ ]))[0-9]{1,4}/[0-9]{1,4}(?![0-9])"
_VULGAR = f"[0-9]{{0,4}}[{''.join(VULGAR_FRACTIONS)}]"
_SPACED = r"(?<=[$€£¥₹])[1-9][0-9]{0,2}(?:[ ][0-9]{3})+(?![0-9])"
_TOKEN = re.compile(
    rf"""
    (?P<skip>[^\S\n]+|[$€£¥₹¢°_`{{}}"“”~#&]+|[*][*]+)
  | (?P<N>(?:{_SPACED}|{_MIXED}|{_VULGAR}|(?!0[0-9])(?:{NUMBER})(?![0-9]|,[0-9]))
      (?:\.{{2,3}}|…)?(?:[ ]?(?:%|hundred\b|thousand\b|million\b|billion\b|dozen\b))?)
  | (?P<C>(?:because|since|so|if|thus|then|therefore)(?!{_LETTER}))
  | (?P<P>(?:twice|thrice|half|double|triple|third|quarter|than|by)(?:[ ]of)?(?:[ ]the)?\b)
  | (?P<S>(?<![\w)%.\]])[-−–+](?=[$€£(.]{{0,3}}[0-9]))
  | (?P<O>(?:times|multiplied[ ]by|divided[ ]by|plus|minus|[xX])(?={_BEFORE_NUMBER})
      |[xX](?=[ ]the\b)
      |(?:(?<=%[ ])|(?<=/[0-9][ ])|(?<=/[0-9][0-9][ ]))of(?={_BEFORE_NUMBER})
      |[-−–](?!>|{_LETTER}{{2}})|/(?![ ]?{_LETTER}{{2}}|(?<={_LETTER}/){_LETTER}\b)
      |[+*×·∙∗÷])
  | (?P<E>=+(?!>)|equals\b|(?:is|are)[ ]equal[ ]to\b)
  | (?P<W>(?:sq|cu)\.
      |(?:-|/[ ]?)?{_LETTER}(?:\w|['’&-](?={_LETTER}))*(?:['’](?!\w)|\^[23](?![0-9]))?
      (?:\.(?=[ ]?[-−–+*×÷/=≈)]|[ ][xX][ ]))?
      |\([^()\d\n=]{{1,40}}\))
  | (?P<L>[(\[]) | (?P<R>[)\]])
  | (?P<A>≈)
  | (?P<X>[\^√|\\]|[0-9][0-9,]*|(?<=[0-9]):(?=[0-9])|(?<=[0-9][ ]):(?=[ ][0-9]))
  | (?P<B>\n\s*|[^\n])
    """,
    re.VERBOSE,
)
_NUMBER_PARTS = re.compile(r"^([^A-Za-z%…]*[0-9])\s*(\.{2,3}|…|)\s*(%|[a-z]*)")
# Words before a number that it only names: "Step 2 - 150 × 4 = 600".
_LABELS = frozenset(
    """answer apartment box case chapter class day equation example game grade group hour item
    level line month number option page part person phase plan player point problem question room
    round row scenario stage step store table task team test trip version week year""".split()
)
_OPERATORS = {
    **dict.fromkeys(["+", "plus"], "+"),
    **dict.fromkeys(["-", "−", "–", "minus"], "-"),
    **dict.fromkeys(["/", "÷", "divided by"], "/"),
}


def plain_latex(text: str) -> str:
    """Writes LaTeX commands as plain text of the same length, so that offsets stay."""
    return _LATEX.sub(_plain_command, text)


def _plain_command(match: re.Match[str]) -> str:
    """A LaTeX command in plain text, padded to its length."""
    top, bottom = match[1] or match[2], match[3] or match[4]
    plain = f"({top}/{bottom})" if top else _LATEX_MEANING.get(match[5], "")
    return plain.ljust(len(match[0]))


def tokenise(text: str) -> list[Token]:
    """Cuts a text into tokens. A line that begins with an equals sign continues the last."""
    tokens: list[Token] = []
    sign = ""  # The last character that was skipped, right before a token.
    for match in _TOKEN.finditer(text):
        kind, word = match.lastgroup or "B", match[0]
        if kind == "skip":
            sign = word[-1]
            if word[0] == "¢" and tokens and tokens[-1].kind == "N":
                tokens[-1] = tokens[-1]._replace(unit="¢")
            continue
        start, end = match.span()
        if kind in "OEA" and (not tokens or tokens[-1].text[0] == "\n"):
            if kind == "O" and text.startswith(" ", end):
                continue  # An operator that opens a line is the mark of a list item.
            if kind != "O" and tokens:
                tokens.pop()
        elif kind == "L" and start and text[start - 1] in "0123456789)]":
            tokens.append(Token("O", "*", start, start))
        elif kind == "W":
            kind = _kind_of_word(match, tokens)
        elif word == ":" and kind == "X" and len(tokens) > 1 and is_label(tokens[-2]):
            kind = "B"  # "Step 1:5 + 3" is no ratio.
        if kind in "OS":
            word = _OPERATORS.get(word, "*")
        tokens.append(Token(kind, word, start, end, "$" if kind == "N" and sign == "$" else ""))
        sign = ""
    return tokens


# Words that may part an operator from its number.
_DETERMINERS = frozenset("a all an another both her his its my other our the their those".split())


def is_label(token: Token) -> bool:
    """Whether a token announces a number or a letter that is only a name."""
    word = token.text.lower()
    return word in _LABELS or word.removesuffix("s") in _LABELS


def _kind_of_word(match: re.Match[str], before: list[Token]) -> str:
    """W or D for a word, U for a letter that may be a number's unit, V for a variable."""
    word = match[0].lower()
    if word in _DETERMINERS and word != "a":
        return "D"
    letter = match[0].removesuffix("^2").removesuffix("^3").strip("./ ")
    if len(letter) > 1:
        return "D" if word.endswith(("'s", "’s", "'", "’")) else "W"
    is_after_number = bool(before) and before[-1].kind == "N"
    if letter in "aAI" and not (is_after_number and before[-1].end == match.start()):
        return "D"  # An article ("3 a day"), not a variable ("3a").
    if before and is_label(before[-1]):
        return "W"
    return "U" if is_after_number or match[0][0] == "/" else "V"


def read_number(token: Token) -> Token:
    """Fills in what a number says: plain, mixed ("1 1/2"), a divisor ("/ 1/2"), with a scale.

    Raises:
        ArithmeticError: if it has too many digits, or a fraction has no sense.
    """
    if token.text.isdigit() and len(token.text) <= MAX_DIGITS:  # Most numbers.
        return token._replace(value=Fraction(int(token.text)))
    digits, dots, scale = _NUMBER_PARTS.findall(
        plain_fractions(token.text).replace("and ", "").replace("(", "")
    )[0]
    *whole, last = digits.split()
    if whole and "/" not in last:
        whole, last = [], digits.replace(" ", "")
    top, _, bottom = last.partition("/")
    value, divisor = parse_number(top), parse_number(bottom or "1")
    if value is None or not divisor or (whole and value >= divisor):
        raise ArithmeticError("no number that can be judged")
    return token._replace(
        value=value / divisor + int(*whole),
        decimals=len(top.partition(".")[2]),
        is_cut=bool(dots),
        scale=Fraction(1, 100) if scale == "%" else Fraction(SCALES.get(scale, 1)),
    )


def numbers(tokens: list[Token]) -> list[Token]:
    """The numbers among tokens."""
    return [token for token in tokens if token.kind == "N"]
