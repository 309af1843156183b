"""The grader: which number an answer block states, and whether it is the right one.

Model output is untrusted. It is read by regular expressions that run in linear time, numbers
have at most 30 digits, and nothing is evaluated but one division.
"""

import re
import unicodedata
from decimal import Context, Decimal
from fractions import Fraction
from itertools import islice

from gemma2_grpo.task.number_words import (
    NUMBER_WORDS,
    SCALE_WORDS,
    NumberPhrase,
    number_phrases,
)
from gemma2_grpo.task.prompts import parse_completion

MAX_DIGITS = 30
# A block that needs more room does not state one number; it also bounds the time.
_MAX_ANSWER_CHARS = 500

# ASCII digits only: Python would read other scripts' digits as well, but a reader of a
# benchmark would not. A comma must part whole thousands; LaTeX writes it in three more ways.
_COMMA = r"(?:,|\{,\}|\\,|,\\!)"
NUMBER = rf"(?:[1-9][0-9]{{0,2}}(?:{_COMMA}[0-9]{{3}})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
SCALES = SCALE_WORDS | {"hundred": 100, "k": 10**3, "K": 10**3, "M": 10**6}
VULGAR_FRACTIONS = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"

# Everything that looks like a number, well formed or not, with what belongs to it.
_CURRENCY = r"(?:\b[A-Z]{1,2}\$|\b(?i:usd|eur|gbp|rs\.?)|\\?\$|[€£¥₹])\s?"
# In place of a minus sign people write hyphens and dashes of many kinds, but no em dash.
_DASH = r"[-‐‑‒–−﹣－]"
_DIGITS = r"(?:(?<![A-Za-z])\.)?[0-9][0-9.,]*"
# A sign that a space parts from its number, or a word for it, opens the statement.
_OPENING = r"(?:\A|(?<=[=:(*$])|(?<=[=:] )|(?<=\bis ))"
_CANDIDATE = re.compile(
    rf"(?P<sign>{_OPENING}(?:{_DASH}\s|(?i:minus|negative)\s)|{_DASH}|\+|)"
    rf"(?:{_CURRENCY})?(?P<inner>{_DASH}?)"
    r"(?:(?P<whole>[0-9]{1,4})[ ](?=[0-9]{1,4}/[0-9]))?"
    rf"(?P<top>{_DIGITS})(?:/(?P<bottom>{_DIGITS}))?"
    r"(?P<scale>[kKM]\b|\s+(?i:hundred|thousand|million|billion)\b)?"
)
_LATEX_FRACTION = re.compile(
    r"\\[dt]?frac(?:\{([0-9]{1,30})\}|([0-9]))(?:\{([0-9]{1,30})\}|([0-9]))"
)
_LATEX_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|\\,|,\\!)(?=[0-9]{3})")
_SPACED_SLASH = re.compile(r"(?<=[0-9]) ?/ ?(?=[0-9])")
_VULGAR = re.compile(f"[{VULGAR_FRACTIONS}]")
_HTML = re.compile(
    r"</?(?:b|big|code|em|font|i|mark|p|small|span|strong|u)>|<br ?/?>", re.IGNORECASE
)
_AREA_OR_VOLUME = re.compile(r"(?:(?<=[A-Za-z][A-Za-z])|(?<= m))(?:[²³]|\^[23])")
_LATEX = re.compile(r"\\([A-Za-z]+)")
_LATEX_MARKUP = frozenset(
    "approx boxed bf dollars left mathbf mathrm quad right rm text textbf textrm".split()
)

_SIGN_IN_WORDS = re.compile(rf"{_OPENING}(?:minus|negative|{_DASH})\s*\Z", re.IGNORECASE)

# Context in which the one number is not the answer. NUL stands for the number.
_ANY_WORD = "|".join(NUMBER_WORDS | SCALES)
_HEDGE = re.compile(
    rf"""
    (?:\b(?:not|never|cannot|neither)|n['’]t)\b.*\0                        # denied
    | \0.*\bis(?:\ not|n['’]t)\ (?:the|right|correct|it)\b
    | \bor\W{{0,4}}\0 | \0\W{{0,4}}or\b | \b(?:{_ANY_WORD})\ or\b           # an alternative
    | \bor\ (?:so|more|less|fewer|maybe|perhaps|{_ANY_WORD})\b
    | \bat\ (?:least|most)\b | \b(?<!left\ )over\W{{0,4}}\0                 # a bound
    | \b(?:than|up\ to|under|below|above|nearly|almost|between)\W{{0,4}}\0
    | \b(?:minus|negative|plus|below\ zero|factorial|squared|cubed)\b       # a term of a formula
    | \b(?:half|third|quarter|twice|double|triple|times|root|sqrt|log)\ (?:of\ )?\W{{0,4}}\0
    | \band\ (?:an?\ )?(?:half|third|quarter|{_ANY_WORD})\b
    | [+^<>≤≥≠±×÷·√∞|] | != | \s\*\s | /(?![A-Za-z])
    | (?<![A-Za-z\0]){_DASH} | {_DASH}(?![A-Za-z]) | —\0     # a dash, neither sign nor hyphen
    | [A-Za-z]\(?\0                                         # part of a name, or an argument
    """,
    re.DOTALL | re.IGNORECASE | re.VERBOSE,
)

# Source: openai/grade-school-math, grade_school_math/dataset.py.
_OFFICIAL = re.compile(r"#### (\-?[0-9\.\,]+)")
OFFICIAL_INVALID = "[invalid]"


def extract_number(text: str) -> Fraction | None:
    """Reads the one number that an answer block states, in digits or in words.

    Currency, percent (72% is 72), units, markdown, HTML and LaTeX markup, thousands commas, a/b,
    "1 1/2", "½", "5 million", "six hundred", "minus 5" and a sentence around it are allowed,
    "about 18" too. A doubt gives None: no number or several, a malformed one ("1,08"), more than
    30 digits, non-ASCII digits, a formula, a negation, an alternative or a bound ("not 18", "18
    or 20", "less than 18").
    """
    text = text.strip()
    if len(text) > _MAX_ANSWER_CHARS:
        return None
    text = _plain(text)
    found = list(islice(_CANDIDATE.finditer(text), 2))
    phrases = [] if found else list(islice(number_phrases(text), 2))
    if len(found) + len(phrases) != 1 or _has_foreign_number(text):
        return None
    if not _LATEX_MARKUP.issuperset(_LATEX.findall(text)):
        return None
    if phrases:
        return _value_in_words(text, phrases[0])
    start, end = found[0].span()
    return None if _is_doubtful(text, start, end) else _value(found[0])


def _plain(text: str) -> str:
    """Writes fractions as a/b, and drops markup that says nothing of the number."""
    text = _LATEX_FRACTION.sub(
        lambda match: f" {match[1] or match[2]}/{match[3] or match[4]}", _HTML.sub(" ", text)
    )
    text = _SPACED_SLASH.sub("/", _LATEX_COMMA.sub(",", plain_fractions(text)))
    return _AREA_OR_VOLUME.sub("", text).strip()


def plain_fractions(text: str) -> str:
    """Writes "½" as "1/2" and "1½" as "1 1/2"."""
    return _VULGAR.sub(
        lambda match: (
            " " * (text[match.start() - 1 : match.start()].isdigit())
            + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/")
        ),
        text,
    )


def _is_doubtful(text: str, start: int, end: int) -> bool:
    """Whether what surrounds the only number makes it something else than the answer."""
    return _HEDGE.search(f"{text[:start]}\0{text[end:]}") is not None


def _value_in_words(text: str, phrase: NumberPhrase) -> Fraction | None:
    """Value of a number in words, which a sign in words may precede."""
    sign = _SIGN_IN_WORDS.search(text, 0, phrase.start)
    start = sign.start() if sign else phrase.start
    # "One" is a pronoun unless the statement begins with it: "no one knows", "the first one".
    if (phrase.value == 1 and start > 0) or _is_doubtful(text, start, phrase.end):
        return None
    return Fraction(-phrase.value if sign else phrase.value)


def parse_number(text: str) -> Fraction | None:
    """Value of a number written with ASCII digits; None if malformed or over 30 digits."""
    if len(text) > 2 * MAX_DIGITS or not re.fullmatch(NUMBER, text):
        return None
    whole, _, decimals = re.sub(r"[^0-9.]", "", text).partition(".")
    digits = whole + decimals
    return Fraction(int(digits), 10 ** len(decimals)) if len(digits) <= MAX_DIGITS else None


def printable(value: Fraction) -> str:
    """Writes a number as a decimal where that is exact, else as a fraction."""
    context = Context(prec=3 * MAX_DIGITS)
    decimal = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    return f"{decimal.normalize(context):f}" if Fraction(decimal) == value else str(value)


def gold_answer(solution: str) -> str:
    """The final answer of a GSM8K solution, what follows `####`; a bare answer is kept."""
    return solution.rpartition("####")[2].strip()


def is_correct(answer_text: str | None, gold: str) -> bool:
    """Whether the answer block states exactly the number that `gold` holds.

    Args:
        answer_text: Text of the answer block; None if there is none.
        gold: A number ("1,080") or a GSM8K solution. Without a number in it nothing is right.
    """
    if answer_text is None:
        return False
    value = extract_number(answer_text)
    return value is not None and value == extract_number(gold_answer(gold))


def official_answer(text: str) -> str:
    """The official GSM8K extraction: the first number after `#### `, without its commas.

    Source: `extract_answer` in openai/grade-school-math, grade_school_math/dataset.py.
    """
    match = _OFFICIAL.search(text)
    return match[1].strip().replace(",", "") if match else OFFICIAL_INVALID


def official_is_correct(completion_text: str, gold: str) -> bool:
    """Whether the official extraction of completion and gold gives the same characters.

    Our form has no `####`. Without one in the completion, its answer block is read as if it
    came after `#### `; no other leniency is added, so "$18" is invalid and "18.0" is not "18".
    """
    if "####" not in completion_text:
        completion_text = f"#### {(parse_completion(completion_text).answer or '').strip()}"
    answer = official_answer(completion_text)
    return answer != OFFICIAL_INVALID and answer == official_answer(f"#### {gold_answer(gold)}")


def _has_foreign_number(text: str) -> bool:
    """Whether a character other than 0-9 is a number, such as "½" or "١"."""
    return any(c.isnumeric() and not c.isascii() for c in text)


def _value(match: re.Match[str]) -> Fraction | None:
    """Value of a candidate, which may be mixed ("1 1/2"); None where it is malformed."""
    top = parse_number(match["top"].rstrip(".,"))
    bottom = parse_number((match["bottom"] or "1").rstrip(".,"))
    if top is None or not bottom or (match["sign"] and match["inner"]):
        return None
    value = top / bottom
    if match["whole"]:
        if value >= 1:
            return None
        value += int(match["whole"])
    scale = match["scale"] or ""
    value *= SCALES.get(scale, SCALES.get(scale.strip().lower(), 1))
    return value if (match["sign"] or match["inner"] or "+") == "+" else -value
