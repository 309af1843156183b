"""An evaluation says what its completions say, and goes on where it was stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma2_grpo import cli
from gemma2_grpo.runs.evaluation_folder import EvaluationFolder

from .conftest import Finished

WORDS = ["--samples", "2", "--limit", "5", "--batch-prompts", "4"]


@pytest.fixture(scope="module")
def run(run_straight: Callable[[int], Finished], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was evaluated."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(run_straight(1).path, path)
    assert cli.main(["evaluate", str(path), *WORDS]) == 0
    return path


def result_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "evaluation.json").read_text())


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k not in ("seconds", "started", "command")}


def test_every_completion_is_written_and_counted(run: Path) -> None:
    records = [
        json.loads(line) for line in (run / "evaluation_completions.jsonl").read_text().splitlines()
    ]
    assert [(r["system"], r["index"], r["sample"]) for r in records] == [
        key
        for system in ("base", "adapter")
        for key in [
            *((system, i, None) for i in range(5)),
            *((system, i, k) for i in range(5) for k in range(2)),
        ]
    ]
    result = result_of(run)
    assert result["data"]["problems"] == 5 and result["steps"] == 5
    for system, numbers in result["systems"].items():
        greedy = [r for r in records if r["system"] == system and r["sample"] is None]
        assert numbers["greedy"]["correct"] == sum(r["correct"] for r in greedy)
        assert numbers["greedy"]["mean_tokens"] == sum(r["tokens"] for r in greedy) / 5
        assert numbers["sampled"]["samples"] == 2
    assert (
        sum(result["comparison"][k] for k in ("both_right", "both_wrong", "fixed", "broken")) == 5
    )
    # The run's own measurement of the same problems says the same.
    measured = [
        json.loads(line)
        for line in (run / "completions.jsonl").read_text().splitlines()
        if '"held_out"' in line
    ]
    for system, step in (("base", 0), ("adapter", 5)):
        before = {r["question"]: r["completion"] for r in measured if r["step"] == step}
        now = {
            r["question"]: r["completion"]
            for r in records
            if r["system"] == system and r["sample"] is None
        }
        assert before.items() <= now.items()


def test_a_finished_one_is_shown_and_not_made_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "evaluation.json").stat().st_mtime_ns
    assert cli.main(["evaluate", str(run), *WORDS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result_of(run)
    assert (run / "evaluation.json").stat().st_mtime_ns == before
    assert cli.main(["evaluate", str(run), *WORDS]) == 0
    shown = capsys.readouterr().out
    assert "pass@2" in shown and "McNemar" in shown
    assert all(len(line) <= 80 for line in shown.splitlines()[1:-1])


def test_the_report_shows_it(run: Path) -> None:
    assert "gemma2-grpo evaluate" in (run / "report.html").read_text()


def test_a_stopped_one_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, calls = EvaluationFolder.add, 0

    def stopping(self: EvaluationFolder, records: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        add(self, records)

    to = tmp_path / "again"
    monkeypatch.setattr(EvaluationFolder, "add", stopping)
    assert cli.main(["evaluate", str(run), *WORDS, "--to", str(to)]) == 130
    assert not (to / "evaluation.json").exists()
    with (to / "evaluation_completions.jsonl").open("a") as file:
        file.write('{"system": "base", "ind')  # As a killed process leaves it.
    # With other settings it is refused, and nothing is lost.
    assert cli.main(["evaluate", str(run), *WORDS, "--to", str(to), "--seed", "9"]) == 2
    assert cli.main(["evaluate", str(run), *WORDS, "--to", str(to)]) == 0
    assert calls == 4 + 7
    assert without_times(result_of(to)) == without_times(result_of(run))
    name = "evaluation_completions.jsonl"
    assert (to / name).read_text() == (run / name).read_text()


def test_a_model_has_no_comparison(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--data procedural --limit 3 --max-completion-tokens 8 --to {tmp_path / 'e'}".split()
    assert cli.main(["evaluate", str(tiny_model_dir), *words]) == 0
    result = result_of(tmp_path / "e")
    assert list(result["systems"]) == ["base"] and result["comparison"] is None
    assert result["systems"]["base"]["sampled"] is None
    assert "3 test problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no such directory"),
        (["{run}", "--limit", "0"], "limit = 0 must be at least 1"),
        (["{run}", "--samples", "-1"], "samples = -1 must be at least 0"),
        (["{run}", *WORDS, "--samples", "3"], "was made with samples = 2"),
        (["{run}", "--data", "{empty}", "--overwrite", "--to", "{to}"], "no problems in it"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    run: Path,
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    names = {"run": run, "empty": tmp_path / "empty.jsonl", "to": tmp_path / "to"}
    assert cli.main(["evaluate", *(word.format(**names) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "to").exists()
