"""A completion for a terminal: coloured by tag, its equations marked true or false."""

import re
from unicodedata import category

from rich.text import Text

from gemma2_grpo.task.equations.find import find_equations
from gemma2_grpo.task.prompts import ANSWER_END, ANSWER_START, REASONING_END, REASONING_START

_STYLES = {REASONING_START: "", REASONING_END: "dim", ANSWER_START: "bold", ANSWER_END: "dim"}
"""Of the text after each tag."""
_TAG = re.compile("|".join(map(re.escape, _STYLES)))
TRUE_MARK, FALSE_MARK = "✓", "✗"


def render_completion(text: str) -> list[Text]:
    """The lines of a completion, each with its marks; hostile text takes no effect.

    A line that is whole is rendered alike however much text follows it.
    """
    marks = {
        equation.end: (TRUE_MARK, "green") if equation.is_true else (FALSE_MARK, "bold red")
        for equation in find_equations(text)
    }
    text = without_controls(text)
    tags = {tag.start(): tag for tag in _TAG.finditer(text)}
    edges = sorted({0, *marks, *tags, *(tag.end() for tag in tags.values())})
    rendered, style = Text(), "dim"
    for start, end in zip(edges, [*edges[1:], len(text)], strict=True):
        if start in marks:
            mark, colour = marks[start]
            rendered.append(f" {mark}", colour)
        tag = tags.get(start)
        rendered.append(text[start:end], "cyan" if tag else style)
        style = _STYLES[tag[0]] if tag else style
    return list(rendered.split("\n", allow_blank=True))


def without_controls(text: str) -> str:
    """Text of the same length without the characters that a terminal would act on."""
    controls = {c: "\ufffd" for c in text if category(c).startswith("C") and c not in "\n\t"}
    return text.translate(str.maketrans(controls))
