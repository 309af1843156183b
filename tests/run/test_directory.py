"""A run directory belongs to one configuration and one process, and survives a kill."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.fixtures.written_run import answers, finished, measured

from gemma2_grpo.config import Config
from gemma2_grpo.errors import ConfigError, UserError
from gemma2_grpo.presets import load_config
from gemma2_grpo.run.directory import RunDirectory, check_free_space
from gemma2_grpo.run.results import Measurement
from gemma2_grpo.run.schema import RunCompletion, RunFacts, Start, StepRecord

CONFIG = load_config("tiny")
CHANGES = [
    ("rollout", "num_generations", 4),
    ("rollout", "prompts_per_step", 8),
    ("optimizer", "learning_rate", 2e-3),
    ("data", "dataset", "other"),
    ("data", "data_seed", 1),
    ("grpo", "epsilon_high", 0.3),
    ("model", "mesh_shape", (1, 2)),
    ("run", "seed", 1),
    ("run", "max_steps", 50),
    ("rewards", "shuffle_rewards", True),
]
FREE = [
    ("checkpoint_every_steps", 7),
    ("eval_every_steps", 7),
    ("keep_checkpoints", 7),
    ("sample_every_steps", 7),
    ("tensorboard", False),
]


def changed(section: str, name: str, value: Any) -> Config:
    part = dataclasses.replace(getattr(CONFIG, section), **{name: value})
    return dataclasses.replace(CONFIG, **{section: part})


@contextmanager
def opened(path: Path, config: Config = CONFIG, *, allow: bool = False) -> Iterator[RunDirectory]:
    directory = RunDirectory(path, config, allow_config_change=allow)
    try:
        yield directory
    finally:
        directory.close()


def message(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has been started."""
    with opened(tmp_path / "run") as directory:
        directory.describe(RunFacts(data_sha256="d", base_sha256="b"))
    return tmp_path / "run"


def json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- One configuration ---


def test_the_resolved_configuration_loads_back(tmp_path):
    for section, name, value in CHANGES:
        config, path = changed(section, name, value), tmp_path / name
        with opened(path, config) as directory:
            directory.describe(RunFacts())
        assert load_config(str(path / "config.toml")) == config


def test_the_same_configuration_resumes(run):
    with opened(run) as directory:
        directory.check_same("data_sha256", "d")
        directory.describe(RunFacts())
    assert not (run / "changes.jsonl").exists()


@pytest.mark.parametrize(("section", "name", "value"), CHANGES)
def test_another_configuration_is_refused_by_field(section, name, value, run):
    before = getattr(getattr(CONFIG, section), name)
    assert message(RunDirectory, run, changed(section, name, value)) == (
        f"run directory {run} was made with {name} = {before!r}, not {value!r}; choose another "
        "--run, or resume with --allow-config-change"
    )
    assert load_config(str(run / "config.toml")) == CONFIG
    with opened(run):
        pass  # The refusal left no lock.


def test_an_allowed_change_is_recorded_and_becomes_the_configuration(run):
    config = changed("optimizer", "learning_rate", 2e-3)
    with opened(run, config, allow=True) as directory:
        directory.describe(RunFacts())
    [record] = json_lines(run / "changes.jsonl")
    assert record["changed"] == ["learning_rate = 0.0025, not 0.002"]
    with opened(run, config) as directory:
        directory.describe(RunFacts())
    assert len(json_lines(run / "changes.jsonl")) == 1
    with pytest.raises(ConfigError):
        RunDirectory(run, CONFIG)


@pytest.mark.parametrize(("name", "value"), FREE)
def test_what_changes_no_result_is_free(name, value, run):
    with opened(run, changed("run", name, value)):
        pass


@pytest.mark.parametrize("name", ["data_sha256", "base_sha256"])
def test_other_data_or_weights_are_refused(name, run):
    with opened(run) as directory:
        assert message(directory.check_same, name, "x") == (
            f"run directory {run} was made with {name} = {name[0]}, not x; choose another --run, "
            "or resume with --allow-config-change"
        )
    with opened(run, allow=True) as directory:
        directory.check_same(name, "x")
        directory.describe(RunFacts(**{name: "x"}))
    [record] = json_lines(run / "changes.jsonl")
    assert record["changed"] == [f"{name} = {name[0]}, not x"]


def test_run_json_holds_versions_and_facts(run):
    described = json.loads((run / "run.json").read_text())
    [start] = described["starts"]
    assert start["versions"]["python"] == sys.version.split()[0]
    assert {"google-tunix", "qwix", "jax", "flax"} <= set(start["versions"])
    assert {"started", "command", "machine"} <= set(start)
    assert described["data_sha256"] == "d"


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("/usr/bin/gemma2-grpo", ["gemma2-grpo", "train", "tiny"]),
        ("/src/gemma2_grpo/cli.py", ["gemma2-grpo", "train", "tiny"]),
        ("/site-packages/ipykernel_launcher.py", []),
        ("-c", []),
    ],
)
def test_a_command_is_recorded_and_the_words_of_a_kernel_are_not(
    program: str, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "train", "tiny"])
    assert list(Start.now().command) == command


def test_run_json_keeps_every_start(run):
    with opened(run) as directory:
        directory.describe(RunFacts(data_sha256="d", devices=("cpu:0",)))
    described = json.loads((run / "run.json").read_text())
    assert len(described["starts"]) == 2
    assert described["devices"] == ["cpu:0"]


# --- One process ---

HOLD = """
import sys
from pathlib import Path
from gemma2_grpo.presets import load_config
from gemma2_grpo.run.directory import RunDirectory
directory = RunDirectory(Path(sys.argv[1]), load_config("tiny"))
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_within_two_seconds(tmp_path):
    path = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        started = time.perf_counter()
        assert message(RunDirectory, path, CONFIG) == (
            f"run directory {path}: another process is writing to it; choose another --run"
        )
        assert time.perf_counter() - started < 2
        second = subprocess.run(command, input="", capture_output=True, text=True)
        assert second.returncode == 1
        assert "another process is writing to it" in second.stderr
        holder.kill()  # No lock outlives its process, however that ended.
    with opened(path):
        pass


# --- What cannot be written ---


def test_a_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run"
    assert message(RunDirectory, path, CONFIG) == (
        f"run directory {path}: cannot be written (Not a directory); choose another --run"
    )
    assert message(RunDirectory, path.parent, CONFIG) == (
        f"run directory {path.parent}: cannot be written (Not a directory); choose another --run"
    )


def test_a_read_only_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    path = tmp_path / "run"
    expected = f"run directory {path}: cannot be written (Read-only file system); choose "
    expected += "another --run"
    assert message(RunDirectory, path, CONFIG) == expected


def test_a_full_disk_is_one_line_and_keeps_what_was_there(run, monkeypatch):
    with opened(run) as directory:
        before = {path.name: path.read_bytes() for path in run.iterdir()}

        def full(path: Path, text: str, **_: Any) -> None:
            with open(path, "w") as file:  # noqa: PTH123 (Path is what fails here)
                file.write(text[:5])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        assert message(directory.write, finished(1)) == (
            f"run directory {run}: result.json cannot be written (No space left on device); fix "
            "that and run the same command again to resume"
        )
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
        assert directory.result is None

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "open", refuse)
        assert message(directory.append, StepRecord(step=1)) == (
            f"run directory {run}: metrics.jsonl cannot be written (No space left on device); "
            "fix that and run the same command again to resume"
        )


def test_too_little_space_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_000_000))
    check_free_space(tmp_path, 3_000_000)
    assert message(check_free_space, tmp_path, 5_000_000) == (
        f"run directory {tmp_path}: 3 MB are free but checkpoints and logs need about 5 MB; "
        "free some space or choose another --run"
    )


def test_a_run_that_never_started_leaves_nothing(tmp_path):
    with opened(tmp_path / "run"):
        assert (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with opened(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists(), "a directory that was there before is not ours to remove"


# --- Killed at any point ---


def test_files_are_replaced_as_a_whole(run, monkeypatch):
    with opened(run) as directory:
        directory.write(finished(1))

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            directory.write(finished(2))
        assert directory.result == finished(1)


@pytest.mark.parametrize("content", ["", '{"after": {"st', "[" * 5])
def test_a_broken_result_is_no_result(content, run):
    (run / "result.json").write_text(content)
    with opened(run) as directory:
        assert directory.result is None


def completion(step: int, kind: Literal["train", "held_out"], text: str = "") -> RunCompletion:
    [record] = answers(RunCompletion, [True], step=step, kind=kind)
    return record.model_copy(update={"completion": text})


def test_a_last_line_that_was_cut_off_is_left_out(run):
    whole = [completion(1, "train", "naïve 😀"), completion(2, "train", "[bold]\u2028\r\n")]
    with opened(run) as directory:
        for record in whole:
            directory.append(record)
        assert list(directory.records(RunCompletion)) == whole
        file = run / "completions.jsonl"
        complete = file.read_bytes()
        directory.append(completion(3, "train", "naïve 😀"))
        longer = file.read_bytes()
        for end in range(len(complete), len(longer)):  # Also within a character.
            file.write_bytes(longer[:end])
            assert list(directory.records(RunCompletion)) == whole
        assert list(directory.records(StepRecord)) == []


def test_what_is_no_number_becomes_null(run):
    """Python writes NaN and Infinity, which no other reader of JSON takes."""
    with opened(run) as directory:
        directory.append(StepRecord(step=1, loss=float("nan"), kl=float("inf")))
        assert json_lines(run / "metrics.jsonl") == [{"step": 1, "loss": None, "kl": None}]


def test_what_is_done_again_is_forgotten(run):
    with opened(run) as directory:
        for step in (0, 2, 4):
            directory.append(measured(step))
        for step in range(1, 6):
            directory.append(StepRecord(step=step))
            directory.append(completion(step, "train"))
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "rew')
        directory.forget_after(3)
        assert [r.step for r in directory.records(StepRecord)] == [1, 2, 3]
        assert [r.step for r in directory.records(RunCompletion)] == [1, 2, 3]
        assert [r.step for r in directory.records(Measurement)] == [0, 2]
        directory.append(StepRecord(step=4))
        assert len(json_lines(run / "metrics.jsonl")) == 4


def test_a_measurement_that_was_cut_off_is_forgotten(run):
    with opened(run) as directory:
        directory.append(measured(0))
        directory.append(
            completion(0, "held_out"), completion(2, "train"), completion(2, "held_out")
        )
        directory.forget_after(2)
        kept = [(r.step, r.kind) for r in directory.records(RunCompletion)]
        assert kept == [(0, "held_out"), (2, "train")]


def test_nothing_after_a_damaged_line_is_lost_and_what_is_kept_is_not_rewritten(run):
    with opened(run) as directory:
        directory.append(*(completion(step, "train") for step in range(1, 6)))
        file = run / "completions.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        lines[1] = b'{"step": 2, "ki\x00\n'
        file.write_bytes(b"".join(lines))
        directory.forget_after(5)
        assert file.read_bytes() == b"".join(lines)
        assert [r.step for r in directory.records(RunCompletion)] == [1, 3, 4, 5]
        directory.forget_after(3)
        assert file.read_bytes() == b"".join(lines[:3])


def test_a_damaged_measurement_costs_none_of_the_completions_after_it(run):
    with opened(run) as directory:
        directory.append(measured(0), measured(2))
        kinds = ((0, "held_out"), (1, "train"), (2, "train"), (2, "held_out"), (3, "train"))
        directory.append(*(completion(*place) for place in kinds))
        file = run / "evaluations.jsonl"
        file.write_bytes(b"\x00" + file.read_bytes()[1:])
        directory.forget_after(2)
        kept = [(r.step, r.kind) for r in directory.records(RunCompletion)]
        assert kept == list(kinds[:4])


def test_a_process_that_does_not_write_leaves_no_trace(tmp_path):
    directory = RunDirectory(tmp_path / "unseen", CONFIG, writes=False)
    directory.check_same("data_sha256", "x")
    directory.describe(RunFacts(data_sha256="x"))
    directory.append(StepRecord(step=1))
    directory.write(finished(1))
    directory.forget_after(0)
    assert directory.result is None and list(directory.records(StepRecord)) == []
    directory.close()
    assert list(tmp_path.iterdir()) == []


# --- Other versions ---


@pytest.mark.parametrize(
    ("version", "said"), [(None, "an older schema, without a version"), (99, "schema version 99")]
)
def test_logs_of_another_version_are_not_resumed(version: int | None, said: str, run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    del facts["schema_version"]
    (run / "run.json").write_text(
        json.dumps(facts | ({"schema_version": version} if version else {}))
    )
    for allow in (False, True):
        assert message(
            lambda allow=allow: RunDirectory(run, CONFIG, allow_config_change=allow)
        ) == (
            f"{run / 'run.json'}: has {said}; this gemma2-grpo reads version 1; choose another "
            "--run"
        )
    with opened(run.with_name("other")):
        pass
