"""Completions to read: which ones, and their written equations marked true or false."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gemma2_grpo.runs.outcome import Pair
from gemma2_grpo.task.equations import Equation, find_equations
from gemma2_grpo.task.prompts import REASONING_START, parse_completion

# A completion may have any length; a page that is read may not.
_MAX_CHARS = 3_000
_MAX_LINES = 50

_TAG = re.compile(r"</?(?:reasoning|answer)>")


@dataclass(frozen=True)
class Group:
    """Pairs of one kind."""

    kind: str
    title: str
    total: int
    """How many there are; `shown` and `folded` have the first of them."""
    shown: Sequence[Pair]
    folded: Sequence[Pair]


# Kind, title where there are two to compare, and how many are shown and folded away.
_KINDS = (
    ("fixed", "Fixed: wrong before, right now", 3, 9),
    ("broken", "Broken: right before, wrong now", 3, 9),
    ("wrong", "Wrong both times", 1, 5),
    ("right", "Right both times", 1, 3),
)


def choose(pairs: Sequence[Pair]) -> list[Group]:
    """The first pairs of each kind in the order of the data, what flipped before what did not."""
    groups = []
    for kind, title, shown, folded in _KINDS:
        own = [pair for pair in pairs if pair.kind == kind]
        if own:
            is_paired = own[0].before is not None and own[0].after is not None
            name = title if is_paired else kind.capitalize()
            rest = own[shown : shown + folded]
            groups.append(Group(kind, name, len(own), own[:shown], rest))
    return groups


@dataclass(frozen=True)
class Piece:
    """A stretch of a completion that is shown in one way."""

    text: str
    kind: str
    """`plain`, `tag`, `true` or `false`; the last two are equations."""


@dataclass(frozen=True)
class Marked:
    """A completion to read."""

    pieces: Sequence[Piece]
    hidden_chars: int
    """What was cut off for the page."""
    true: int
    false: int


def mark(completion: str) -> Marked:
    """Marks the tags and equations of a completion, cut to a length that can be read.

    The equations are those of the reasoning, which the reward looks at; of a completion without
    one, those of the whole text.
    """
    equations = _equations(completion)
    shown = _cut(completion)
    spans = [(tag.start(), tag.end(), "tag") for tag in _TAG.finditer(shown)]
    spans += [(e.start, e.end, "true" if e.is_true else "false") for e in equations]
    true = sum(equation.is_true for equation in equations)
    return Marked(
        pieces=list(_pieces(shown, spans)),
        hidden_chars=len(completion) - len(shown),
        true=true,
        false=len(equations) - true,
    )


def _equations(completion: str) -> list[Equation]:
    """The equations with their offsets in the whole completion."""
    reasoning = parse_completion(completion).reasoning
    if reasoning is None:
        return find_equations(completion)
    # The only tag of its kind, or there would be no reasoning.
    offset = completion.index(REASONING_START) + len(REASONING_START)
    return [
        replace(equation, start=equation.start + offset, end=equation.end + offset)
        for equation in find_equations(reasoning)
    ]


def _cut(text: str) -> str:
    """The beginning of a text, of so many characters and lines."""
    lines = text[:_MAX_CHARS].splitlines(keepends=True)
    return "".join(lines[:_MAX_LINES])


def _pieces(text: str, spans: Iterable[tuple[int, int, str]]) -> Iterator[Piece]:
    """Cuts a text into its spans and what lies between them.

    Equations overlap in a chain, `A = B = C`; each then begins where the one before has ended.
    """
    at = 0
    for start, end, kind in sorted(spans, key=lambda span: span[1]):
        if end > len(text) or end <= at:
            continue
        if start > at:
            yield Piece(text[at:start], "plain")
        yield Piece(text[max(start, at) : end], kind)
        at = end
    if at < len(text):
        yield Piece(text[at:], "plain")
