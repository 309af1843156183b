"""JSON lines as people and their editors write them, and what is none."""

from pathlib import Path

import pytest

from gemma2_grpo.errors import UserError
from gemma2_grpo.task.jsonl import read_jsonl


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_marks_blank_lines_and_line_separators_are_no_fault(file: Path) -> None:
    file.write_bytes('\ufeff{"a": 1}\r\n\n \t\n{"b": "x\u2028y"}'.encode())
    assert list(read_jsonl(file, "a")) == [
        (f"{file}:1", {"a": 1}),
        (f"{file}:4", {"b": "x\u2028y"}),
    ]
    file.write_bytes("\ufeff\n{}\n".encode())
    assert list(read_jsonl(file, "a")) == [(f"{file}:2", {})]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{", "not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2"
         " (char 1)); write one object a line"),
        (b"[" * 100_000, "not valid JSON (maximum recursion depth exceeded"),
        (b'{"n": ' + b"9" * 5_000 + b"}", "not valid JSON (Exceeds the limit"),
        (b"[1]", "not a JSON object; write one with name and age"),
        (b'{"x": "\xff"}', "not UTF-8; save the file as UTF-8"),
    ],
    ids=["no JSON", "too deep", "too long", "no object", "not UTF-8"],
)  # fmt: skip
def test_a_fault_is_named_where_it_is_reached(line: bytes, fault: str, file: Path) -> None:
    file.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    rows = read_jsonl(file, "name and age")
    assert next(rows) == (f"{file}:1", {"a": 1})
    with pytest.raises(UserError) as caught:
        next(rows)
    assert str(caught.value).startswith(f"{file}:3: {fault}")


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(FileNotFoundError):
        next(read_jsonl(file, "a"))
