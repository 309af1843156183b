"""Algebra with a stated solution: "2x + 3 = 21 ... x = 9" is checked by putting 9 in for x."""

import re
from collections.abc import Mapping
from fractions import Fraction

from gemma2_grpo.task.equations.tokens import Token, read_number

# Over the kinds of tokens: "x =" with a value after it, or "= x" with one before it.
_LETTER = re.compile(r"(?<![NOSLRX])(?P<first>V)(?=[EA])|(?<=[EBCWD]N[EA])V(?=[BCWD])")
# Tokens from a letter to its value, as in "P = 36 / 12 = 3".
_MAX_CHAIN = 40


def stated_values(tokens: list[Token]) -> dict[str, Fraction]:
    """Values of the letters that a text solves for; a letter with two values has none.

    Raises:
        ArithmeticError: if a value has too many digits.
    """
    kinds = f"B{''.join(token.kind for token in tokens)}B"
    found: dict[str, set[Fraction]] = {}
    for match in _LETTER.finditer(kinds):
        place = match.start() - 1
        is_first = match["first"] is not None
        chain = (
            tokens[place + 2 : place + 2 + _MAX_CHAIN]
            if is_first
            else tokens[place - 2 : place - 1]
        )
        value = _end_of_chain(chain)
        if value is not None and len(tokens[place].text) == 1:
            found.setdefault(tokens[place].text, set()).add(value)
    return {letter: values.pop() for letter, values in found.items() if len(values) == 1}


def _end_of_chain(tokens: list[Token]) -> Fraction | None:
    """The number, with or without a unit, that ends `3 * 4 = 12 cups`."""
    kinds = "".join(token.kind for token in tokens)
    end = next((i for i, kind in enumerate(kinds) if kind in "BC"), len(kinds))
    start = max(kinds.rfind("E", 0, end), kinds.rfind("A", 0, end)) + 1
    last = kinds[start:end].rstrip("WDPU")
    if last not in ("N", "SN"):
        return None
    number = read_number(tokens[start + len(last) - 1])
    return -number.value if last == "SN" and tokens[start].text == "-" else number.value


def substitute(tokens: list[Token], values: Mapping[str, Fraction]) -> list[Token]:
    """Puts the values in for their letters, as numbers whose text is the letter."""
    result: list[Token] = []
    for token in tokens:
        is_factor = token.kind == "U" and bool(result) and result[-1].end == token.start
        if token.text not in values or not (is_factor or token.kind == "V"):
            if result and result[-1].text in values and token.kind == "L":
                result.append(Token("O", "*", token.start, token.start))  # x(3 + 4)
            result.append(token)
            continue
        if is_factor or (result and result[-1].kind == "R"):
            result.append(Token("O", "*", token.start, token.start))
        result.append(token._replace(kind="N", value=values[token.text]))
    return result
