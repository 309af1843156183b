"""Numbers written in English words: "twenty-five", "six hundred and two", "two dozen"."""

import re
from collections.abc import Iterator
from typing import NamedTuple

_ONES = "one two three four five six seven eight nine".split()
_TEENS = """ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBER_WORDS = {word: value for value, word in enumerate(["zero", *_ONES, *_TEENS])} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}
SCALE_WORDS = {"dozen": 12, "thousand": 10**3, "million": 10**6, "billion": 10**9}

# The grammar of a number; no part can match what the part after it begins with.
_ONE, _TEN = "|".join(_ONES), "|".join(_TENS)
_SMALL = rf"(?:(?:{_TEN})(?:[ -](?:{_ONE})\b)?|(?:zero|{'|'.join(_TEENS)}|{_ONE})\b)"
_GROUP = rf"(?:(?:{_SMALL}[ -])?hundreds?\b(?:(?:[ ]and)?[ -]{_SMALL}(?![ -]hundred))?|{_SMALL})"
_SCALED = rf"(?:(?:{_GROUP}[ -])?(?:{'|'.join(SCALE_WORDS)})s?\b)"
_NUMBER = re.compile(
    # Not the word of "2 million", which belongs to its digits.
    rf"(?<![0-9][ -])\b{_SCALED}(?:(?:[ ]and)?[ ]{_SCALED})*(?:(?:[ ]and)?[ ]{_GROUP})?\b"
    rf"|\b{_GROUP}\b",
    re.IGNORECASE,
)
_WORD = re.compile("[a-z]+")


class NumberPhrase(NamedTuple):
    """One number in words."""

    value: int
    start: int
    end: int
    """Character offsets in the text."""


def number_phrases(text: str) -> Iterator[NumberPhrase]:
    """Finds the numbers that a text states in words, in their order and in linear time.

    Words that make no number together are numbers of their own: "two three" gives 2 and 3.
    """
    for match in _NUMBER.finditer(text):
        yield NumberPhrase(_value(match[0].lower()), *match.span())


def _value(phrase: str) -> int:
    """Value of words that the grammar accepts: hundreds multiply a group, scales end it."""
    total, group = 0, 0
    for written in _WORD.findall(phrase):
        word = written if written in NUMBER_WORDS else written.removesuffix("s")
        if word == "hundred":
            group = max(group, 1) * 100
        elif word in SCALE_WORDS:
            total, group = total + max(group, 1) * SCALE_WORDS[word], 0
        else:
            group += NUMBER_WORDS.get(word, 0)
    return total + group
