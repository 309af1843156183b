"""The reward of a completion: components in [0, 1], one table of them, and their weighted sum."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import groupby

from gemma2_grpo.config import RewardConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.task.answers import (
    extract_number,
    is_correct,
    official_is_correct,
    printable,
)
from gemma2_grpo.task.equations.find import Equation, find_equations
from gemma2_grpo.task.equations.steps import known_shares, stated_numbers, steps_of
from gemma2_grpo.task.prompts import parse_completion

DEFAULT_WEIGHTS = RewardConfig()

# Parts of the logic score.
_RELEVANCE, _FOLLOWS, _TRANSITIONS = 0.75, 0.20, 0.05
# What one false equation leaves of it. A share of the equations could be diluted by writing
# more of them; a fixed price cannot.
_AFTER_ERROR = 0.7
# With a wrong answer, so many sound steps earn all that logic can.
_ENOUGH_STEPS = 2
# The answer must be the result of one of so many last equations.
_LAST_EQUATIONS = 3

_TRANSITION_WORDS = frozenset(
    """altogether because finally first hence next now second since so step then therefore third
    thus""".split()
)
_CUE_WORDS = frozenset("actually correction mistake oops recheck wait".split())
_CUE = re.compile(
    rf"\b(?:{'|'.join(sorted(_CUE_WORDS))}|correcting|mistaken|error|wrong|incorrect|not right|fix"
    r"|re-?(?:check|do|calculate|compute|examine)|double[- ]check|check again|hold on|hmm"
    r"|on second thought|should (?:be|have been)|let me (?:check|correct))\b",
    re.IGNORECASE,
)
_KEYWORDS = _TRANSITION_WORDS | _CUE_WORDS
# So many keywords, or equal words, side by side are no sentence.
_STUFFING_RUN = 4
# More corrected errors than this are a habit, not slips.
_MAX_SLIPS = 3

_WORDS_FROM, _WORDS_TO, _WORDS_END = 20, 200, 300

_STEP_LABEL = re.compile(r"^\W*(?:step\s*)?[0-9]{0,3}[.:)]\s*")
_SENTENCE_END = re.compile(r"\n|(?<=[.!?;])\s")


@dataclass(frozen=True)
class Solution:
    """A completion taken apart, as the components of the reward judge it."""

    question: str | None
    """The problem; None where it is not known."""
    reasoning: str
    """Text of the reasoning block; empty if there is not exactly one."""
    format: float
    """Format score in [0, 1]: how many of the form's requirements are met."""
    answer: Fraction | None
    """The number of the answer block; None if it does not state exactly one."""
    correct: bool
    equations: list[Equation]
    """The distinct equations of the reasoning."""

    @cached_property
    def logic(self) -> float:
        """Whether the equations are true, start from what is given and lead to the answer."""
        return _judge_logic(self)


@dataclass(frozen=True)
class Component:
    """One part of the reward."""

    score: Callable[[Solution], float]
    """Gives a number in [0, 1]."""
    weight: float
    """Weight in the total, unless the configuration sets another."""
    rises: bool = False
    """Whether a run reports when it rose."""


@dataclass(frozen=True)
class Score:
    """Reward of a completion, with its components."""

    components: Mapping[str, float]
    """Each in [0, 1], before its weight, by its name in COMPONENTS."""
    total: float
    """Weighted sum of the components."""
    extracted: str | None
    """The number of the answer block; None if it does not state exactly one."""
    correct: bool
    official_correct: bool
    """By the official GSM8K extraction, to report next to `correct`."""
    equations: tuple[Equation, ...]
    """The distinct equations of the reasoning."""

    def __getitem__(self, component: str) -> float:
        """Score of a component, before its weight."""
        return self.components[component]


def score_completion(
    completion: str,
    answer: str,
    question: str | None = None,
    weights: RewardConfig = DEFAULT_WEIGHTS,
    *,
    is_truncated: bool = False,
) -> Score:
    """Scores one completion. Never raises, whatever the model wrote, and takes linear time.

    Args:
        completion: Generated text, with or without its stop token.
        answer: The right answer: a number, or a GSM8K solution.
        question: The problem, to see where numbers come from; without it all count as given.
        weights: Weights of the components.
        is_truncated: The completion ran into the limit instead of ending its turn.
    """
    parsed = parse_completion(completion, is_truncated=is_truncated)
    reasoning = parsed.reasoning or ""
    solution = Solution(
        question=question,
        reasoning=reasoning,
        format=parsed.format,
        answer=extract_number(parsed.answer or ""),
        correct=is_correct(parsed.answer, answer),
        equations=_distinct(find_equations(reasoning)),
    )
    components = {name: component.score(solution) for name, component in COMPONENTS.items()}
    shares = component_weights(weights)
    return Score(
        components=components,
        total=sum(shares[name] * part for name, part in components.items()),
        extracted=None if solution.answer is None else printable(solution.answer),
        correct=solution.correct,
        official_correct=official_is_correct(completion, answer),
        equations=tuple(solution.equations),
    )


def component_weights(config: RewardConfig) -> dict[str, float]:
    """Weight of each component: from `weights`, from a field of its own, or from COMPONENTS.

    Raises:
        UserError: for a weight of a component that there is not, or below 0.
    """
    for name, weight in config.weights.items():
        if name not in COMPONENTS:
            raise UserError(f"weights: no component {name!r}; there are {', '.join(COMPONENTS)}")
        if not 0 <= weight < math.inf:
            raise UserError(f"weights: {name} = {weight} must be at least 0")
    fields = {
        name: getattr(config, f"{name}_weight", component.weight)
        for name, component in COMPONENTS.items()
    }
    return fields | config.weights


def _distinct(equations: Iterable[Equation]) -> list[Equation]:
    """Drops repetitions, such as a calculation that a GSM8K annotation repeats."""
    first: dict[tuple[str, Fraction], Equation] = {}
    for equation in equations:
        first.setdefault(equation.key, equation)
    return list(first.values())


def _judge_logic(solution: Solution) -> float:
    """Whether the written equations are true, start from what is given and lead to the answer.

    Nothing is paid without one true step that counts. Halved if the answer does not follow. With
    a wrong answer only the number of sound steps counts: GRPO would blow up any other difference
    within a group that has no right answer.
    """
    question, answer = solution.question, solution.answer
    steps = steps_of(solution.equations, question)
    given = None if question is None else stated_numbers(question)
    if not solution.correct:
        sound = known_shares(steps, answer, given, is_strict=True).count(1.0)
        return 0.5 * min(1.0, sound / _ENOUGH_STEPS)
    shares = known_shares(steps, answer, given)
    if not any(shares):
        return 0.0
    follows = any(answer in step.results for step in steps[-_LAST_EQUATIONS:])
    quality = (
        _RELEVANCE * sum(shares) / len(shares)
        + _FOLLOWS * follows
        + _TRANSITIONS * _has_transition(solution.reasoning)
    )
    errors = sum(not step.is_true for step in steps)
    halved = 1.0 if follows else 0.5
    return quality * _AFTER_ERROR**errors * halved * _distinct_share(solution.reasoning)


def _is_corrected(reasoning: str, equations: list[Equation], answer: Fraction | None) -> bool:
    """Whether there are false equations, and each was noticed, restated truly and made use of."""
    errors = [equation for equation in equations if not equation.is_true]
    return 0 < len(errors) <= _MAX_SLIPS and all(
        any(
            other.is_true
            and other.expression == error.expression
            and other.start > error.end
            and _CUE.search(reasoning, error.end, other.start)
            and _is_used(other, error, equations, answer)
            for other in equations
        )
        for error in errors
    )


def _is_used(
    fix: Equation, error: Equation, equations: list[Equation], answer: Fraction | None
) -> bool:
    """Whether what came out in place of an error is the answer, or calculated with after it."""
    return answer in fix.results or any(
        not set(fix.results).isdisjoint(other.operands) and other.expression != fix.expression
        for other in equations
        if other.start > error.end
    )


def _has_transition(reasoning: str) -> bool:
    """Whether transition words join the steps, as opposed to being heaped up."""
    words = _words(reasoning)
    return not _TRANSITION_WORDS.isdisjoint(words) and not _is_stuffed(words)


def _words(text: str) -> list[str]:
    return [word.strip(".,:;!?*()") for word in text.lower().split()]


def _is_stuffed(words: list[str]) -> bool:
    """Whether keywords, or one word again and again, stand side by side."""
    keywords = (run for is_key, run in groupby(words, _KEYWORDS.__contains__) if is_key)
    repeats = (run for _, run in groupby(words))
    return any(len(list(run)) >= _STUFFING_RUN for runs in (keywords, repeats) for run in runs)


def _distinct_share(reasoning: str) -> float:
    """Share of the sentences that repeat no other, step numbers aside."""
    sentences = (_STEP_LABEL.sub("", part.lower()) for part in _SENTENCE_END.split(reasoning))
    normal = [" ".join(sentence.split()) for sentence in sentences]
    normal = [sentence for sentence in normal if sentence]
    return len(set(normal)) / len(normal) if normal else 0.0


def _length_share(reasoning: str) -> float:
    """1 from 20 to 200 words, rising to it from none and falling to 0 at 300.

    Repeated sentences and heaps of words earn nothing, or padding would pay.
    """
    words = _words(reasoning)
    if _is_stuffed(words):
        return 0.0
    falling = (_WORDS_END - len(words)) / (_WORDS_END - _WORDS_TO)
    return max(0.0, min(1.0, len(words) / _WORDS_FROM, falling)) * _distinct_share(reasoning)


def _accuracy(solution: Solution) -> float:
    return float(solution.correct)


def _self_correction(solution: Solution) -> float:
    # A share of logic, from which the error took a larger one: planting errors cannot pay.
    reasoning, equations, answer = solution.reasoning, solution.equations, solution.answer
    is_earned = solution.correct and _is_corrected(reasoning, equations, answer)
    return solution.logic if is_earned else 0.0


def _length(solution: Solution) -> float:
    is_earned = solution.correct and solution.format == 1.0 and solution.logic > 0
    return _length_share(solution.reasoning) if is_earned else 0.0


# A new component is one entry here: it is logged, charted and shown from then on. Its weight can
# be set as `[rewards.weights]`; these five have fields of their own as well.
COMPONENTS = {
    "format": Component(lambda solution: solution.format, RewardConfig.format_weight, rises=True),
    "logic": Component(lambda solution: solution.logic, RewardConfig.logic_weight, rises=True),
    "accuracy": Component(_accuracy, RewardConfig.accuracy_weight, rises=True),
    "self_correction": Component(_self_correction, RewardConfig.self_correction_weight),
    "length": Component(_length, RewardConfig.length_weight),
}
RISING = tuple(name for name, component in COMPONENTS.items() if component.rises)
