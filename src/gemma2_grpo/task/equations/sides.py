"""The expressions on both sides of the equals signs of a text.

One letter encodes each token's kind, so that a regular expression over the kinds finds the
expressions with their units ("3 red hats + 2 hats").
"""

import re
from typing import NamedTuple

from gemma2_grpo.task.equations.tokens import Token, is_label
from gemma2_grpo.task.equations.units import unit_sizes

# Both bound the time.
_MAX_TOKENS, _MAX_READINGS = 100, 2

# Over the kinds of tokens. An operand has up to twelve words of unit, and up to three before it.
# Quantifiers are possessive: what was read once is not tried again.
_OPERAND = r"(?:S?+L)*+S?+NR*+[WDPU]{0,12}+R*+"
_PIECE = re.compile(
    rf"(?P<run>{_OPERAND}(?:[OS](?:D[WD]{{0,2}}(?=[SLN]))?{_OPERAND})*+)|(?:S?+L)++|."
)


class Side(NamedTuple):
    """An expression that may stand on one side of an equals sign."""

    tokens: list[Token]
    stands_alone: bool
    """Only a break or an equals sign precedes it, and no unit follows it."""
    is_certain: bool
    """Nothing around it allows another reading: what is false here is called false."""
    cuts: tuple[int, ...]
    """Index at which the tokens may begin instead, as after the dash of "Step 2 - 5 + 3"."""
    claim_ends: tuple[int, ...]
    """Index at which the tokens may end instead, as before the word of "= 20 times 2 people"."""


def split_sides(tokens: list[Token]) -> list[Side | Token | None]:
    """Expressions, equals signs and None for all that cannot be judged."""
    kinds = "".join(token.kind for token in tokens)
    parts: list[Side | Token | None] = []
    opens, is_clear = True, True
    reaching = ""  # The kind of an operator or variable that reaches into what follows.
    for piece in _PIECE.finditer(kinds):
        kind, (start, end) = piece[0], piece.span()
        if piece["run"]:
            # Half of an expression, such as the "3" of "x + 3", must not be judged.
            is_half = reaching or kinds[start - 1 : start] in ("N", "X") or len(kind) > _MAX_TOKENS
            is_half = is_half or kinds[end - 1 : end + 1] == "UL"
            is_half = is_half or kinds[end : end + 1] in ("O", "S", "X")
            # Only what an equals sign touches is looked at further.
            is_side = not is_half and (
                kinds[end : end + 1] in ("E", "A") or kinds[start - 1 : start] in ("E", "A")
            )
            parts.append(_side(tokens, start, end, kinds, opens, is_clear) if is_side else None)
            opens, reaching, is_clear = False, "", is_clear and not is_half
            continue
        parts.append(tokens[start] if kind in "EA" else None)
        opens = kind in "EABC"
        if opens and (kind != "B" or reaching not in ("O", "S") or tokens[start].text[0] == "\n"):
            reaching, is_clear = "", True
        elif kind[0] in "OS":
            # The dash of "Ann - 5 + 3" is no minus sign, unless it proves to be one.
            is_dash = tokens[start].text == "-" and kinds[start - 1 : start] in ("W", "D")
            reaching, is_clear = ("", False) if is_dash and not reaching else (kind[0], is_clear)
        elif kind == "X" or (kind == "V" and _is_variable(kinds, start)):
            reaching = kind
        elif kind in "WDPUV" and reaching not in ("O", "S"):
            reaching, is_clear = "", is_clear and not (reaching or kind == "V")
    return parts


def _is_variable(kinds: str, place: int) -> bool:
    """Whether a single letter calculates, as in "x + 3", and does not name, as in "class B has"."""
    before, after = kinds[place - 1 : place], kinds[place + 1 : place + 2]
    return before in tuple("OSLUX") or after in tuple("OSRX")


def _side(
    tokens: list[Token], start: int, end: int, kinds: str, opens: bool, is_clear: bool
) -> Side:
    """An expression and how certain it is that it begins and ends there."""
    run, before, after = tokens[start:end], kinds[start - 1 : start], kinds[end : end + 1]
    names_first = start > 0 and is_label(tokens[start - 1])
    second = kinds.find("N", start + 1) - start
    cuts = tuple(
        i + (token.kind == "O")
        for i, token in enumerate(run)
        # A dash after a name, or a sign across words: "After 2 days it is -5 + 3".
        if (names_first and token.text == "-" and i < second)
        or (token.kind == "S" and i and run[i - 1].kind in "WDPU")
    )[:_MAX_READINGS]
    ends = (i for i, t in enumerate(run) if i and t.kind == "O" and t.end - t.start > 1)
    doubts = (
        not is_clear,
        names_first or cuts,
        "OD" in kinds[start:end] or "SD" in kinds[start:end],
        # "14, 400" may be one number.
        start > 1 and kinds[start - 2 : start] == "NB" and tokens[start - 1].text == ",",
        before in ("P", "V") or after in ("N", "V"),
        _goes_on(tokens, kinds, start),
    )
    stands_alone = opens and kinds[end - 1] not in "WDU"
    return Side(run, stands_alone, not any(doubts), cuts, tuple(ends)[:1])


def _goes_on(tokens: list[Token], kinds: str, start: int) -> bool:
    """Whether an expression may belong to the number before: "(1/2) 278", "5 ft 6 in"."""
    if kinds[start - 1 : start] == "R":
        bracket = kinds.rfind("L", 0, start)
        return start - 3 > bracket > max(kinds.rfind("B", 0, start), kinds.rfind("E", 0, start))
    is_measure = kinds[max(start - 2, 0) : start] == "NW" and unit_sizes(tokens[start - 1].text)
    return bool(is_measure)
