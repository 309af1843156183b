"""Problems in files: JSONL or Parquet rows, checked, graded and rendered."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma2_grpo.errors import UserError, first_line
from gemma2_grpo.task.answers import extract_number, gold_answer, printable
from gemma2_grpo.task.jsonl import json_object, read_jsonl
from gemma2_grpo.task.procedural import Split
from gemma2_grpo.task.prompts import render_solution

_SUFFIXES = (".jsonl", ".parquet")
# JSON can escape half of a surrogate pair, which no encoding can write again.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_NEEDED = "it needs files with train and test in their names, .jsonl or .parquet"


_GOLD_MARK = "####"
_STEP = re.compile(r"^Step [0-9]+: ", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """One problem with its gold answer."""

    question: str
    answer: str
    """A single number, without units or thousands commas."""
    solution: str = ""
    """A worked solution in the form the model is taught; empty where the source has none."""

    @property
    def solution_steps(self) -> int | None:
        """Steps of the worked solution; None where there is none."""
        return len(_STEP.findall(self.solution)) or None


@dataclass(frozen=True)
class Row:
    """One problem as its file has it: text, not yet graded or rendered."""

    question: str
    answer: str
    place: str
    """File and line (or row), for error messages."""


Rows = dict[Split, list[Row]]


def find_splits(directory: Path, dataset: str) -> dict[Split, list[Path]]:
    """Finds the files of the train and the test split anywhere under a directory."""
    found: dict[Split, list[Path]] = {"train": [], "test": []}
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        split = _split_in_name(path)
        if split and path.suffix in _SUFFIXES and path.is_file() and not hidden:
            found[split].append(path)
    for split, paths in found.items():
        if not paths:
            raise UserError(f"dataset {dataset}: no {split} file in it; {_NEEDED}")
        # The same split in two folders is one data set in two versions, not one in two parts.
        folders = sorted({str(path.parent) for path in paths})
        if len(folders) > 1:
            raise UserError(
                f"dataset {dataset}: {split} files in {' and in '.join(folders)}; name one of them"
            )
    return found


def _split_in_name(path: Path) -> Split | None:
    """The split that a file name speaks of, if it is exactly one."""
    # By the start of a word: "latest.jsonl" is no test file, "testing_1.jsonl" is.
    words = re.findall(r"[a-z]+", path.stem.lower())
    splits: tuple[Split, ...] = ("train", "test")
    named: list[Split] = [s for s in splits if any(word.startswith(s) for word in words)]
    return named[0] if len(named) == 1 else None


def read_splits(files: dict[Split, list[Path]]) -> Rows:
    """Reads the files of each split."""
    return {split: read_files(paths) for split, paths in files.items()}


def read_files(paths: list[Path]) -> list[Row]:
    """Reads and checks the rows of files, in order."""
    rows: list[Row] = []
    for path in paths:
        read = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(path.suffix)
        if read is None:
            raise UserError(f"dataset {path}: neither .jsonl nor .parquet")
        try:
            found = [checked_row(content, place) for place, content in read(path)]
        except OSError as error:
            raise UserError(f"dataset {path}: cannot be read ({first_line(error)})") from None
        if not found:
            raise UserError(f"dataset {path}: no problems in it")
        rows += found
    return rows


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for line in read_jsonl(path, json_object("question and answer")):
        yield line.place, line.content


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        contents = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"dataset {path}: not valid Parquet ({first_line(error)})") from None
    yield from ((f"{path} row {number}", row) for number, row in enumerate(contents, start=1))


def checked_row(content: dict[str, object], place: str) -> Row:
    """Checks that a row has a question and an answer, both text that is not blank."""
    question, answer = content.get("question"), content.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    for name, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str) or not value.strip() or _HALF_CHARACTER.search(value):
            raise UserError(f"{place}: field {name!r} is missing, blank or not text; fill it in")
    return Row(str(question).strip(), str(answer).strip(), place)


def graded(row: Row) -> Example:
    """Renders a row: a bare number, or GSM8K's rationale that ends in `#### 18`."""
    rationale, mark, _ = row.answer.rpartition(_GOLD_MARK)
    number = extract_number(gold_answer(row.answer))
    if number is None:
        raise UserError(
            f"{row.place}: field 'answer' has no number; write a number, or a solution that ends "
            f"in '{_GOLD_MARK} NUMBER'"
        )
    answer = printable(number)
    return Example(row.question, answer, _tagged(rationale, answer) if mark else "")


def _tagged(rationale: str, answer: str) -> str:
    """GSM8K's rationale in the form the model is taught, calculator annotations removed."""
    lines = (line.strip() for line in re.sub(r"<<[^<>]*>>", "", rationale).splitlines())
    steps = [f"Step {number}: {line}" for number, line in enumerate(filter(None, lines), start=1)]
    return render_solution([*steps, f"Therefore, the answer is {answer}."], answer)
