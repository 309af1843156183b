"""`gemma2-grpo score`: every line scored, and a faulty file named before anything is printed."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from gemma2_grpo.commands.score import Score, read_completions
from gemma2_grpo.config import RewardConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.task.prompts import render_solution
from gemma2_grpo.task.rewards import score_completion

QUESTION = "A baker bakes 12 rolls and 7 rolls on each of 4 days. How many are there?"
RIGHT = render_solution(["Step 1: 12 + 7 = 19", "Step 2: 19 x 4 = 76", "So it is 76."], "76")
WRONG = render_solution(["12 + 7 = 18"], "18 or 19")
ROWS: list[dict[str, Any]] = [
    {"completion": RIGHT, "answer": "76", "question": QUESTION},
    {"completion": RIGHT, "answer": "19 * 4 = <<19*4=76>>76\n#### 76", "question": None},
    {"completion": WRONG, "answer": 76, "source": "ignored"},
]


def write(path: Path, *lines: str | bytes | dict[str, Any]) -> Path:
    """Writes lines, objects among them as JSON."""
    texts = (json.dumps(line) if isinstance(line, dict) else line for line in lines)
    path.write_bytes(b"\n".join(t if isinstance(t, bytes) else t.encode() for t in texts))
    return path


def scored(path: Path, *, as_json: bool, weights: RewardConfig | None = None) -> str:
    output = io.StringIO()
    Score(path, as_json)(weights, output)
    return output.getvalue()


def test_a_completion_that_was_cut_off_may_say_so(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", {**ROWS[0], "truncated": True}, ROWS[0])
    first, second = map(json.loads, scored(path, as_json=True).splitlines())
    assert (first["format"], second["format"]) == (0.6, 1.0)
    path = write(tmp_path / "faulty.jsonl", {**ROWS[0], "truncated": "yes"})
    with pytest.raises(UserError, match=r":1: field 'truncated' is 'yes'; write true or false"):
        read_completions(path)


def test_json_has_every_component_before_its_weight(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", *ROWS)
    weights = RewardConfig(format_weight=0.5)
    first, second, third = map(json.loads, scored(path, as_json=True, weights=weights).splitlines())
    expected = score_completion(RIGHT, "76", QUESTION, weights)
    assert first == {
        "format": 1.0,
        "logic": 1.0,
        "accuracy": 1.0,
        "self_correction": 0.0,
        "length": 0.9,
        "total": expected.total,
        "extracted": "76",
        "correct": True,
        "official_correct": True,
        "equations": [
            {"text": "12 + 7 = 19", "is_true": True},
            {"text": "19 x 4 = 76", "is_true": True},
        ],
        "weights": {
            "format": 0.5,
            "logic": 0.30,
            "accuracy": 0.45,
            "self_correction": 0.05,
            "length": 0.05,
        },
    }
    assert second == first
    assert (third["extracted"], third["correct"], third["logic"]) == (None, False, 0.0)
    assert third["equations"] == [{"text": "12 + 7 = 18", "is_true": False}]


def test_total_is_the_weighted_sum(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", *ROWS)
    for record in map(json.loads, scored(path, as_json=True).splitlines()):
        parts = (weight * record[name] for name, weight in record["weights"].items())
        assert record["total"] == pytest.approx(sum(parts))


def test_table_fits_80_columns_and_ends_with_the_means(tmp_path: Path):
    long = {"completion": render_solution(["so"], "9" * 30), "answer": "76"}
    lines = scored(write(tmp_path / "rows.jsonl", *ROWS[:2], long), as_json=False).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 1 + 3 + 1 + 1
    assert [len(line.split()) for line in lines[1:4]] == [9] * 3
    assert lines[4].split() == ["mean", *"1.000 0.667 0.667 0.000 0.600 0.780 66.7%".split()]
    assert lines[5] == "3 completions: mean total 0.780, 66.7% right, 66.7% by GSM8K's extraction"


def test_standard_output_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Score(write(tmp_path / "rows.jsonl", *ROWS), True)()
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_blank_lines_bom_and_line_separators_are_no_fault(tmp_path: Path):
    row = json.dumps({"completion": "one\u2028line", "answer": "76"}, ensure_ascii=False)
    path = write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + row.encode(), "", "  \r", row, "")
    assert list(read_completions(path)) == [("one\u2028line", "76", None, False)] * 2


def test_half_characters_are_printable(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", r'{"completion": "\ud800 (\ud800)", "answer": "76"}')
    assert json.loads(scored(path, as_json=True))["format"] == 0.0


GOOD_LINE = ROWS[0]
FAULTS = {
    "no JSON": ("{", "not valid JSON"),
    "cut off": ('{"completion": "x", "ans', "not valid JSON"),
    "too deep": ("[" * 100_000, "not valid JSON"),
    "too long a number": ('{"answer": ' + "9" * 5_000 + "}", "not valid JSON"),
    "an array": ("[1]", "not a JSON object"),
    "a string": ('"x"', "not a JSON object"),
    "not UTF-8": (b'{"completion": "\xff"}', "not UTF-8"),
    "no completion": ({"answer": "76"}, "field 'completion' is missing; add it"),
    "no answer": ({"completion": RIGHT}, "field 'answer' is missing; add it"),
    "gold": ({"completion": RIGHT, "gold": "76"}, "field 'answer' is missing; add it"),
    "null completion": ({"completion": None, "answer": "76"}, "field 'completion' is null"),
    "number": ({"completion": 76, "answer": "76"}, "field 'completion' is int, not text"),
    "list": ({"completion": RIGHT, "answer": ["76"]}, "field 'answer' is list, not text"),
    "boolean": ({"completion": RIGHT, "answer": True}, "field 'answer' is bool, not text"),
    "question": ({**GOOD_LINE, "question": 3}, "field 'question' is int, not text"),
    "no number": ({"completion": RIGHT, "answer": "many"}, "field 'answer' has no number"),
    "blank": ({"completion": RIGHT, "answer": " "}, "field 'answer' has no number"),
}


@pytest.mark.parametrize(("line", "fault"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("as_json", [True, False])
def test_a_fault_is_named_before_anything_is_printed(
    tmp_path: Path, line: str | bytes | dict[str, Any], fault: str, as_json: bool
):
    path = write(tmp_path / "rows.jsonl", GOOD_LINE, "", line, GOOD_LINE)
    output = io.StringIO()
    with pytest.raises(UserError) as raised:
        Score(path, as_json)(output=output)
    message = str(raised.value)
    assert message.startswith(f"{path}:3: {fault}")
    assert ";" in message  # the mend
    assert output.getvalue() == ""


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_a_fault(tmp_path: Path, content: str):
    path = write(tmp_path / "rows.jsonl", content)
    with pytest.raises(UserError, match="empty; write one JSON object a line"):
        Score(path, True)()


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path: Path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"{path}: cannot be read"):
            Score(path, True)()
