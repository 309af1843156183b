"""Which steps of a solution count: true ones that start from what is known and are of use."""

import re
from fractions import Fraction
from functools import lru_cache

from gemma2_grpo.task.answers import NUMBER, SCALES, parse_number, plain_fractions
from gemma2_grpo.task.equations.find import Equation, find_equations
from gemma2_grpo.task.number_words import number_phrases

# A solution may bring these along: neutral factors, the calendar, the clock, metric prefixes.
_COMMON = frozenset(map(Fraction, (1, 2, 7, 10, 12, 24, 30, 31, 52, 60, 100, 365, 1000)))
# Words besides the cardinal numbers, each with the number that it brings along.
_WORDS = {
    **dict.fromkeys(["half", "halves", "halved", "twice", "double", "doubled", "doubles"], 2),
    **dict.fromkeys(["couple", "pair"], 2),
    **dict.fromkeys(["third", "thirds", "thrice", "triple", "tripled", "triples"], 3),
    **dict.fromkeys(["fourth", "fourths", "quarter", "quarters", "quadruple"], 4),
    **dict.fromkeys(["fifth", "fifths"], 5),
    **dict.fromkeys(["sixth", "sixths"], 6),
}
_STATED = re.compile(rf"({NUMBER})(?:[ ]?/[ ]?([0-9]{{1,4}}))?(?:[ ]?({'|'.join(SCALES)})\b)?")
# No calculation needs one of them more often.
_MAX_REPEATS = 5


def steps_of(equations: list[Equation], question: str | None) -> list[Equation]:
    """Drops what is no work: equations of the question, and trivial ones.

    "1 x 6 = 6" is a step all the same where an earlier one has found the 1.
    """
    copied = {equation.key for equation in find_equations(question or "")}
    steps: list[Equation] = []
    found: set[Fraction] = set()
    for equation in equations:
        is_idle = equation.is_trivial and found.isdisjoint({0, 1}.intersection(equation.operands))
        if equation.key in copied or (equation.is_true and is_idle):
            continue
        steps.append(equation)
        if equation.is_true:
            found.update(equation.results)
    return steps


def known_shares(
    steps: list[Equation],
    answer: Fraction | None,
    given: frozenset[Fraction] | None,
    *,
    is_strict: bool = False,
) -> list[float]:
    """How much of each true step is known before it; 0 for one of no use after it.

    A step counts by the share of its operands that the question states or an earlier true step
    has found, if its result is the answer or an operand of a later step; else it counts 0. A
    corrected step takes the place of the error.

    Args:
        steps: In their order, false ones as well.
        answer: Number that the completion states.
        given: Numbers of the question; None if there is none, and all numbers count as known.
        is_strict: Only a step of which all is known makes its result known.
    """
    last_use = {operand: i for i, step in enumerate(steps) for operand in step.uses}
    place = {step.expression: i for i, step in reversed(list(enumerate(steps)))}
    known = _Known(given, answer)
    shares: list[float] = []
    for step in steps:
        if not step.is_true:
            known.wrong.update(step.results)
            continue
        share = known.take(step, is_strict=is_strict)
        is_used = answer in step.results or any(
            last_use.get(result, -1) > place[step.expression] for result in step.results
        )
        shares.append(share if is_used else 0.0)
    return shares


class _Known:
    """The numbers that a solution may calculate with, step by step.

    Calendar and metric numbers are welcome as factors, and one of them as an addend of the whole
    solution: with more of them any guess can be reached from any number.
    """

    def __init__(self, given: frozenset[Fraction] | None, answer: Fraction | None):
        """Begins with the numbers of the question."""
        self._all = given is None
        self._answer = answer
        self._numbers = set(given or ())
        self._hollow: set[Fraction] = set()
        self._common_addends = 0
        self.wrong: set[Fraction] = set()
        """Results of false equations."""

    def __contains__(self, number: Fraction) -> bool:
        return number in self._numbers or (self._all and number not in self.wrong)

    def take(self, step: Equation, *, is_strict: bool) -> float:
        """Takes up a true step, and returns the share of its operands that were known before it.

        Common numbers that it may use do not count. Its results are known from now on, unless it
        only goes round the answer: "48 - 48 + 72 = 72", or "72 - 48 = 24" before "48 + 24 = 72".
        """
        unknown = {number for number in step.operands if number not in self}
        common = (_COMMON & unknown) - self.wrong if not step.has_letters else set()
        # An equation in x may end in the answer: "2x = 20" after "x = 10".
        stated = set(step.results) if step.has_letters else set()
        # A term of common numbers alone adds one of them; among others they are factors.
        addends = [term for term in step.terms if term and common.issuperset(term) and term != (1,)]
        self._common_addends += len(addends)
        if (
            step.cancels == "sum"
            or (step.cancels and self._answer != 1 and self._answer in step.operands)
            or self._answer in unknown - common - stated
            or (self._answer,) in addends
            or not unknown.isdisjoint(self._hollow)
            or (addends and self._common_addends > 1)
            or any(step.operands.count(number) > _MAX_REPEATS for number in _COMMON - {1})
        ):
            self._hollow.update(number for number in step.results if number not in self)
            return 0.0
        known = sum(number in self for number in step.operands)
        share = known / (len(step.operands) - len(common)) if known else 0.0
        if share == 1.0 or not is_strict:
            self._numbers.update(step.results, step.rewritten)
            self._hollow.difference_update(step.results)
        return share


@lru_cache(maxsize=4096)
def stated_numbers(question: str) -> frozenset[Fraction]:
    """Numbers that a question states in digits or words, with their hundredths and inverses."""
    stated = {Fraction(phrase.value) for phrase in number_phrases(question)}
    stated.update(
        Fraction(_WORDS[w]) for w in re.findall("[a-z]+", question.lower()) if w in _WORDS
    )
    for digits, divisor, scale in _STATED.findall(plain_fractions(question)):
        number, bottom = parse_number(digits), int(divisor or 1)
        if number is not None:
            stated |= {number, Fraction(bottom), number * SCALES.get(scale, 1)}
            stated |= {number / bottom} if bottom else set()
    stated |= {number / 100 for number in stated}
    return frozenset(stated | {1 / number for number in stated if number})
