"""Completions to read: which ones, and their written equations marked true or false."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gemma2_grpo.run.outcome import Pair
from gemma2_grpo.task.equations.find import find_equations
from gemma2_grpo.task.prompts import REASONING_START, parse_completion

# A completion may have any length; a page that is read may not.
_MAX_CHARS = 3_000
_MAX_LINES = 50

_TAG = re.compile(r"</?(?:reasoning|answer)>")

# How many are shown, and how many folded away, of each kind of pair.
_COUNTS = {"fixed": (3, 9), "broken": (3, 9), "wrong": (1, 5), "right": (1, 3)}
BEFORE_AND_AFTER = {
    "fixed": "Fixed: wrong before, right now",
    "broken": "Broken: right before, wrong now",
    "wrong": "Wrong both times",
    "right": "Right both times",
}


@dataclass(frozen=True)
class Group:
    """Pairs of one kind."""

    title: str
    total: int
    """Number of all answers; `shown` and `folded` have the first of them."""
    shown: Sequence[Pair]
    folded: Sequence[Pair]


def choose(pairs: Sequence[Pair], titles: Mapping[str, str] = BEFORE_AND_AFTER) -> list[Group]:
    """The first pairs of each kind in the order of the data, what flipped before what did not.

    Args:
        pairs: All pairs of answers.
        titles: Heading of each kind.
    """
    groups = []
    for kind, (shown, folded) in _COUNTS.items():
        own = [pair for pair in pairs if pair.kind == kind]
        if own:
            is_paired = own[0].before is not None and own[0].after is not None
            title = titles[kind] if is_paired else kind.capitalize()
            groups.append(Group(title, len(own), own[:shown], own[shown : shown + folded]))
    return groups


class Piece(NamedTuple):
    """A stretch of a completion that is shown in one way."""

    text: str
    kind: str
    """`plain`, `tag`, `true` or `false`; the last two are equations."""


def mark(completion: str) -> list[Piece]:
    """Marks the tags and equations of a completion, cut to a length that can be read.

    The equations are those of the reasoning, which the reward looks at; of a completion without
    one, those of the whole text.
    """
    shown = "".join(completion[:_MAX_CHARS].splitlines(keepends=True)[:_MAX_LINES])
    reasoning, offset = parse_completion(completion).reasoning, 0
    if reasoning is not None:
        # The only tag of its kind, or there would be no reasoning.
        offset = completion.index(REASONING_START) + len(REASONING_START)
    spans = [(*tag.span(), "tag") for tag in _TAG.finditer(shown)]
    spans += [
        (offset + equation.start, offset + equation.end, "true" if equation.is_true else "false")
        for equation in find_equations(completion if reasoning is None else reasoning)
    ]
    return list(_pieces(shown, spans))


def _pieces(text: str, spans: Sequence[tuple[int, int, str]]) -> Iterator[Piece]:
    """Cuts a text into its spans and the text between them.

    Equations overlap in a chain, `A = B = C`; each then begins where the one before has ended.
    """
    at = 0
    for start, end, kind in sorted(spans, key=lambda span: span[1]):
        if at < end <= len(text):
            if at < start:
                yield Piece(text[at:start], "plain")
            yield Piece(text[max(start, at) : end], kind)
            at = end
    if at < len(text):
        yield Piece(text[at:], "plain")
