"""JSON lines as people and their editors write them, and what is none."""

from pathlib import Path

import pytest

from gemma2_grpo.errors import UserError
from gemma2_grpo.task.jsonl import Line, json_object, read_jsonl, skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_marks_blank_lines_and_line_separators_are_no_fault(file: Path) -> None:
    file.write_bytes('\ufeff{"a": 1}\r\n\n \t\n{"b": "x\u2028y"}'.encode())
    assert list(read_jsonl(file, json_object("a"))) == [
        Line(f"{file}:1", 1, 0, {"a": 1}),
        Line(f"{file}:4", 4, 17, {"b": "x\u2028y"}),
    ]
    file.write_bytes("\ufeff\n{}\n".encode())
    assert list(read_jsonl(file, json_object("a"))) == [Line(f"{file}:2", 2, 4, {})]


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
    rows = read_jsonl(file, json_object("name and age"))
    assert next(rows) == (f"{file}:1", 1, 0, {"a": 1})
    with pytest.raises(UserError) as caught:
        next(rows)
    assert str(caught.value).startswith(f"{file}:3: {fault}")


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(FileNotFoundError):
        next(read_jsonl(file, json_object("a")))


def test_a_damaged_line_is_left_out_of_a_log_and_what_follows_is_not(file: Path) -> None:
    file.write_bytes(b'{"a": 1}\n{"a": \n[2]\n{"a": 3}\n{"a": 4}')
    parse = json_object("a")
    assert [line.content["a"] for line in read_jsonl(file, parse, on_damage=skip)] == [1, 3, 4]
    faults: list[str] = []
    whole = list(read_jsonl(file, parse, on_damage=faults.append, is_log=True))
    # The last line has no end: it may be half of `{"a": 4}`, or is being written.
    assert [(line.number, line.start, line.content["a"]) for line in whole] == [
        (1, 0, 1),
        (4, 20, 3),
    ]
    assert [fault.partition(": ")[0] for fault in faults] == [f"{file}:2", f"{file}:3"]
