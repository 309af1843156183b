"""`gemma2-grpo score`: scores the completions of a file, without a model."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TextIO

from tyro.conf import Positional, arg

from gemma2_grpo.commands.options import Flag
from gemma2_grpo.config import RewardConfig
from gemma2_grpo.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from gemma2_grpo.task.rewards import Score as CompletionScore

_MAX_COLUMNS = 80


@dataclass(frozen=True)
class Score:
    """Score the completions of a JSONL file, without a model."""

    file: Annotated[Positional[Path], arg(metavar="FILE.jsonl")]
    """One JSON object a line: `completion`, `answer` (a number or a GSM8K solution) and optionally
    `question`, without which the numbers in the reasoning all count as given, and `truncated`."""
    json: Flag = False
    """Print one JSON object a line instead of a table."""

    def __call__(
        self,
        weights: RewardConfig | None = None,
        output: TextIO | None = None,
    ) -> None:
        """Prints the scores; nothing of a file with an error in it.

        Args:
            weights: Weights of the components; the defaults if None.
            output: Stream to print to; standard output if None.

        Raises:
            UserError: for a file that cannot be read, naming file, line, field and fix.
        """
        from gemma2_grpo.task.rewards import score_completion

        weights = weights or RewardConfig()
        output = sys.stdout if output is None else output
        scores = (
            score_completion(
                row.completion, row.answer, row.question, weights, is_truncated=row.is_truncated
            )
            for row in read_completions(self.file)
        )
        if self.json:
            for score in scores:
                print(json.dumps(as_record(score, weights)), file=output)
        else:
            from rich.console import Console

            _print_table(list(scores), Console(file=output, highlight=False))


class CompletionRow(NamedTuple):
    """One line of a file of completions."""

    completion: str
    answer: str
    question: str | None
    is_truncated: bool = False


def read_completions(path: Path) -> list[CompletionRow]:
    """Reads and checks all lines of a JSONL file; blank ones are left out.

    Raises:
        UserError: for a file that cannot be read, naming file, line, field and fix.
    """
    from gemma2_grpo.task.jsonl import json_object, read_jsonl

    try:
        lines = read_jsonl(path, json_object("completion and answer"))
        rows = [_checked(line.content, line.place) for line in lines]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if not rows:
        raise UserError(f"{path}: empty; write one JSON object a line, with completion and answer")
    return rows


def as_record(score: "CompletionScore", weights: RewardConfig) -> dict[str, object]:
    """A score as JSON has it; components lie in [0, 1], before their weights."""
    from gemma2_grpo.task.rewards import component_weights

    return {
        **score.components,
        "total": score.total,
        "extracted": score.extracted,
        "correct": score.correct,
        "official_correct": score.official_correct,
        "equations": [{"text": e.text, "is_true": e.is_true} for e in score.equations],
        "weights": component_weights(weights),
    }


def _checked(content: dict[str, object], place: str) -> CompletionRow:
    """Checks that an object has the fields, and of the types, that are needed."""
    from gemma2_grpo.task.answers import extract_number, gold_answer

    completion, answer = (_text(content, name, place) for name in ("completion", "answer"))
    if extract_number(gold_answer(answer)) is None:
        raise UserError(
            f"{place}: field 'answer' has no number; write a number, or a solution that ends in "
            "'#### NUMBER'"
        )
    has_question = content.get("question") is not None
    question = _text(content, "question", place) if has_question else None
    is_truncated = content.get("truncated") or False
    if is_truncated not in (True, False):
        raise UserError(f"{place}: field 'truncated' is {is_truncated!r}; write true or false")
    return CompletionRow(completion, answer, question, bool(is_truncated))


def _text(content: dict[str, object], name: str, place: str) -> str:
    """A field's text. As in data sets, an answer may be a JSON number as well."""
    if name not in content:
        raise UserError(f"{place}: field {name!r} is missing; add it")
    value = content[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "answer" and is_number:
        return str(value)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{place}: field {name!r} is {kind}, not text; write it as a string")
    return value


def _print_table(scores: "list[CompletionScore]", console: "Console") -> None:
    """Prints a line for each score, their means and a summary."""
    from rich.table import Table

    from gemma2_grpo.task.rewards import COMPONENTS

    console.width = min(console.width, _MAX_COLUMNS)
    table = Table(box=None, show_footer=True, pad_edge=False)
    table.add_column("", "mean", justify="right")
    for name in (*COMPONENTS, "total"):
        mean = _mean(score.total if name == "total" else score[name] for score in scores)
        heading = name.replace("_", " ").replace("self correction", "self-c.")
        table.add_column(heading, f"{mean:.3f}", justify="right")
    table.add_column("answer", justify="right", no_wrap=True, max_width=12)
    table.add_column("right", f"{_mean(score.correct for score in scores):.1%}", justify="right")
    for number, score in enumerate(scores, 1):
        parts = (*score.components.values(), score.total)
        verdict = "yes" if score.correct else "no"
        numbers = (f"{part:.3f}" for part in parts)
        table.add_row(str(number), *numbers, score.extracted or "none", verdict)
    console.print(table)
    console.print(
        f"{len(scores)} completions: mean total {_mean(s.total for s in scores):.3f}, "
        f"{_mean(s.correct for s in scores):.1%} right, "
        f"{_mean(s.official_correct for s in scores):.1%} by GSM8K's extraction"
    )


def _mean(values: Iterator[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
