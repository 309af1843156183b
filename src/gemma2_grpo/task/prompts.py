"""The prompt (instruction and chat template) and the form that the answer must have."""

import re
from dataclasses import dataclass

REASONING_START, REASONING_END = "<reasoning>", "</reasoning>"
ANSWER_START, ANSWER_END = "<answer>", "</answer>"

INSTRUCTION = (
    "Solve the problem step by step. Write your reasoning between "
    f"{REASONING_START} and {REASONING_END}, one step a line, with every calculation as an "
    f"equation. Then write the final answer, a single number, between {ANSWER_START} and "
    f"{ANSWER_END}."
)

# Generation ends at either; Gemma's chat turns end with the first.
STOP_TOKENS = ("<end_of_turn>", "<eos>")


def render_prompt(question: str) -> str:
    """Renders Gemma's chat template for one question, up to where the model answers.

    Source: the chat template of google/gemma-2-2b-it, which has no system turn.
    """
    return (
        f"<bos><start_of_turn>user\n{INSTRUCTION}\n\n{question.strip()}<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def render_solution(steps: list[str], answer: str) -> str:
    """Renders a worked solution in the form the model is taught."""
    reasoning = "\n".join(steps)
    return (
        f"{REASONING_START}\n{reasoning}\n{REASONING_END}\n{ANSWER_START}\n{answer}\n{ANSWER_END}"
    )


# Misspelt tags (upper case, attributes, spaces) are found too, so that they break the form
# instead of passing for text. No class here can run past the next "<": the scan is linear.
_TAG = re.compile(r"<\s*+/?\s*+(?P<block>reasoning|answer)\b[^<>]*>", re.IGNORECASE)
# A run of stop tokens, each read once.
_STOPS = re.compile(rf"(?:(?:{'|'.join(map(re.escape, STOP_TOKENS))})\s*+)++", re.IGNORECASE)
_FORM_OF_TRUNCATED = 0.6
# More white space outside of the blocks is text as well: it costs time and says nothing.
_MAX_BLANKS = 40
_REASONING_TAGS = (REASONING_START, REASONING_END)
_ANSWER_TAGS = (ANSWER_START, ANSWER_END)


@dataclass(frozen=True)
class Completion:
    """One completion, parsed."""

    reasoning: str | None
    """Text of the only reasoning block; None if there is none, or more than one."""
    answer: str | None
    """Text of the only answer block; None if there is none, or more than one."""
    format: float
    """1.0 both blocks in order and nothing else; 0.6 with other text outside, or if it was cut
    off; 0.3 in the wrong order; 0.2 an answer block alone; 0 otherwise: a repeated, stray or
    misspelt tag, or an empty block."""


def parse_completion(text: str, *, is_truncated: bool = False) -> Completion:
    """Splits a completion into its blocks and judges its form, in one scan over the tags.

    Stop tokens at the end are not part of the completion. Tags count only as INSTRUCTION
    writes them; a block holds no other tag.

    Args:
        text: The completion.
        is_truncated: It did not end with a stop token. Then its form is not perfect, whatever it
            holds: a model that never ends its turn costs its user every token up to the limit.
    """
    end = _end_without_stops(text)
    tags = list(_TAG.finditer(text, 0, end))
    reasoning = _only_block(text, tags, _REASONING_TAGS)
    answer = _only_block(text, tags, _ANSWER_TAGS)
    form = _judge_form(text[:end], tags, reasoning, answer)
    form = min(form, _FORM_OF_TRUNCATED) if is_truncated else form
    return Completion(reasoning=reasoning, answer=answer, format=form)


def _end_without_stops(text: str) -> int:
    """Offset at which a completion ends, trailing stop tokens excluded."""
    end = len(text)
    for stops in _STOPS.finditer(text):
        end = stops.start() if stops.end() == len(text) else len(text)
    return end


def _only_block(text: str, tags: list[re.Match[str]], pair: tuple[str, str]) -> str | None:
    """Text between the two tags of `pair` if they are the only ones of their kind, side by side."""
    name = pair[0].strip("<>")
    found = [i for i, tag in enumerate(tags) if tag["block"].lower() == name]
    if len(found) != 2 or found[1] != found[0] + 1:
        return None
    start, end = tags[found[0]], tags[found[1]]
    return text[start.end() : end.start()] if (start[0], end[0]) == pair else None


def _judge_form(
    text: str, tags: list[re.Match[str]], reasoning: str | None, answer: str | None
) -> float:
    """Format score of a completion whose trailing stop tokens are gone."""
    sequence = tuple(tag[0] for tag in tags)
    blocks = (answer,) if sequence == _ANSWER_TAGS else (reasoning, answer)
    if not all(block and block.strip() for block in blocks):
        return 0.0
    if sequence == _ANSWER_TAGS:
        return 0.2
    if sequence == _ANSWER_TAGS + _REASONING_TAGS:
        return 0.3
    if sequence != _REASONING_TAGS + _ANSWER_TAGS:
        return 0.0
    edges = [0, *(edge for tag in tags for edge in tag.span()), len(text)]
    # Edges 0-1, 4-5 and 8-9 bound the text before, between and after the blocks.
    outside = "".join(text[edges[i] : edges[i + 1]] for i in (0, 4, 8))
    return 0.6 if outside.strip() or len(outside) > _MAX_BLANKS else 1.0
