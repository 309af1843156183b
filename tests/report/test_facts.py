"""Tables of a report: times, differences from a preset, and nothing private."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import tomli_w
from tests.fixtures.written_run import write as write_record
from tests.fixtures.written_run import write_lines

from gemma2_grpo.presets import load_config
from gemma2_grpo.report import facts
from gemma2_grpo.report.report import render
from gemma2_grpo.run.files import read_run
from gemma2_grpo.run.schema import RunFacts, Start, StepRecord

Write = Callable[..., Path]


def test_times_add_up_over_steps_and_measurements(write: Write) -> None:
    path = write([True], [True], steps=4)
    evaluations = read_run(path).evaluations
    write_lines(path, [each.model_copy(update={"seconds": 6.0}) for each in evaluations])
    run = read_run(path)
    times = render(run).split('id="time"')[1]
    rows = re.findall(r"<th>(.*?)</th><td class=.number.>(.*?)</td><td .*?>(.*?)<", times)
    assert rows == [
        ("Rollout", "8.0", "33\u00a0%"),
        ("Reward", "0.0", "0\u00a0%"),
        ("Update", "4.0", "17\u00a0%"),
        ("Measuring on held-out problems", "12.0", "50\u00a0%"),
        ("Together", "24.0", ""),
    ]
    assert "50 tokens a second were sampled, 400 in all." in facts.speed(run)
    assert "Peak memory was not recorded." in facts.speed(run)


def test_compiling_counts_every_launch(write: Write) -> None:
    path = write([True], steps=4)
    seconds = [3.0, 5.0, 2.0, 2.5]
    records = [StepRecord(step=i + 1, compile_seconds=s) for i, s in enumerate(seconds)]
    records[1] = records[1].model_copy(update={"peak_memory_bytes": 5_000_000_000})
    write_lines(path, records)
    assert facts.speed(read_run(path)) == (
        "7.5 s of all this, and of loading, went into compiling. Peak memory was 5.00 GB."
    )


def test_differences_are_from_the_nearest_preset(write: Write) -> None:
    path = write([True])
    values = dataclasses.asdict(load_config("gemma2-2b-gpu"))
    values["optimizer"]["learning_rate"] = 0.5
    values = {k: {n: v for n, v in s.items() if v is not None} for k, s in values.items()}
    (path / "config.toml").write_text(tomli_w.dumps(values))
    run = read_run(path)
    assert facts.differences_from_preset(run) == (
        "gemma2-2b-gpu",
        [["learning_rate", str(load_config("gemma2-2b-gpu").optimizer.learning_rate), "0.5"]],
    )
    (path / "config.toml").unlink()
    assert facts.differences_from_preset(read_run(path)) is None


def test_nobodys_home_and_no_token_is_told(write: Write) -> None:
    path = write([True])
    command = ["gemma2-grpo", "train", "--run", "/home/ludwig/runs/x", "hf_abcdefghijklmnop"]
    write_record(path, RunFacts(schema_version=1, starts=(Start(command=tuple(command)),)))
    with (path / "config.toml").open("a") as file:
        file.write('[model]\nmodel = "/Users/ludwig/gemma"\n')
    page = render(read_run(path))
    assert "ludwig" not in page and "hf_abc" not in page
    assert "gemma2-grpo train --run ~/runs/x" in page and "~/gemma" in page


def test_a_run_of_a_notebook_is_reproduced_by_its_configuration(write: Write) -> None:
    path = write([True])
    write_record(path, RunFacts(schema_version=1, starts=(Start(command=()),)))
    [(_, command)] = facts.starts(read_run(path))
    assert command.startswith("# No command was recorded")
    assert command.endswith(f"\ngemma2-grpo train {path}/config.toml --run runs/again")
    (path / "config.toml").unlink()
    assert "gemma2-grpo" not in facts.starts(read_run(path))[0][1]
