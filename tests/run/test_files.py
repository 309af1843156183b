"""A run read back from its directory, whatever is damaged, missing or of another version."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gemma2_grpo.errors import UserError
from gemma2_grpo.report.report import render, write_report
from gemma2_grpo.run.files import read_run

Write = Callable[..., Path]


def test_whatever_is_damaged_the_report_opens(write: Write) -> None:
    path = write([False] * 3, [True] * 3)
    for name in ("metrics.jsonl", "evaluations.jsonl", "completions.jsonl"):
        with (path / name).open("a") as file:
            file.write('{"held_out": \n[1]\nnull\n"held_out"\n{"step": null}\n{"step": "x"}\n')
            file.write('{"step": 11, "kl": 1e999, "grad_norm": "much"}\n' + "[" * 100_000 + "\n")
    (path / "run.json").write_text(
        '{"schema_version": 1, "starts": [1], "devices": 3, "data": "x"}'
    )
    (path / "result.json").write_text("[]")
    (path / "evaluation.json").write_text(
        '{"schema_version": 1, "systems": {"base": {"greedy": 3}}}'
    )
    page = render(read_run(path))
    assert "lines are damaged in metrics.jsonl, and left out" in page
    assert "result.json is damaged: whether the run has finished" in page
    for name in ("metrics.jsonl", "config.toml", "run.json"):
        (path / name).write_bytes(b"\xff\xfe\x00")
    assert "config.toml is missing or damaged" in render(read_run(path))


def test_a_crash_at_step_0(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[run]\nmax_steps = 3\n")
    page = write_report(tmp_path).read_text()
    assert "not finished, 0 of 3 steps" in page
    assert "run.json is missing or damaged" in page
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_a_run_of_an_older_version_is_refused_and_not_misread(write: Write) -> None:
    path = write([True], [True])
    (path / "run.json").write_text('{"starts": [], "data": {"source": "gsm8k", "dropped": 0}}')
    with pytest.raises(UserError) as refusal:
        write_report(path)
    assert str(refusal.value) == (
        f"{path / 'run.json'}: has an older schema, without a version; this gemma2-grpo reads "
        "version 1; train again, or use the version that wrote it"
    )
    assert not (path / "report.html").exists()


def test_an_evaluation_of_an_older_version_is_refused(write: Write) -> None:
    path = write([True], [True])
    (path / "evaluation.json").write_text('{"systems": {"base": {"greedy": {"correct": 3}}}}')
    with pytest.raises(UserError, match="evaluate again with --overwrite"):
        write_report(path)


def test_logs_of_an_older_version_without_run_json_are_empty(write: Write) -> None:
    """Its names are not those of today, so that nothing is taken for something else."""
    path = write([True], [True])
    (path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "correct": 0.25}\n')
    (path / "evaluations.jsonl").write_text('{"step": 0, "problems": 2, "correct": 1}\n')
    page = render(read_run(path))
    assert "1 line is damaged in evaluations.jsonl, and left out" in page
    assert "Reward by component" not in page and "Nothing has been measured" in page
