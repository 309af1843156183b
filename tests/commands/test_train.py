"""Runs from the first measurement to the last: what they write, resuming, stopping, mistakes."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from gemma2_grpo import cli
from gemma2_grpo.errors import UserError
from gemma2_grpo.model import open as opening
from gemma2_grpo.presets import load_config
from gemma2_grpo.run import session as session_module
from gemma2_grpo.run.directory import RunDirectory
from gemma2_grpo.run.results import Measurement, RunResult
from gemma2_grpo.run.schema import RunCompletion, RunFacts, StepRecord, numbers
from gemma2_grpo.runtime.checkpoint import restore_checkpoint
from gemma2_grpo.task.examples import load_splits
from gemma2_grpo.task.scoring import COMPONENTS, Scorer, load_reward
from gemma2_grpo.training import learner as learner_module

METRICS = {
    "step",
    "mean_reward",
    "reward_std",
    "mean_components",
    "correct_fraction",
    "official_correct_fraction",
    "true_equations_fraction",
    "mean_completion_tokens",
    "truncated_fraction",
    "uniform_groups_fraction",
    "num_unscored",
    "kl",
    "loss",
    "entropy",
    "clip_fraction",
    "max_ratio",
    "grad_norm",
    "sampling_kl",
    "num_updates",
    "num_updates_left_out",
    "learning_rate",
    "rollout_seconds",
    "reward_seconds",
    "update_seconds",
    "tokens_per_second",
    "seconds_left",
    "num_compiled_programs",
    "num_cached_programs",
    "compile_seconds",
}
LOGS = ("metrics.jsonl", "completions.jsonl", "evaluations.jsonl")
ADAPTER = "adapter/adapter.safetensors"
Train = Callable[..., str]


def records(path: Path, name: str) -> list[dict[str, Any]]:
    """Records of a log without what the machine did: times, and programs compiled."""
    lines = [json.loads(line) for line in (path / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if not re.search("second|program", k)} for line in lines]


def assert_same_run(path: Path, other: Path) -> None:
    """Bit for bit, times aside."""
    for name in LOGS:
        assert records(path, name) == records(other, name), name
    for name in ("result.json", ADAPTER):
        assert (path / name).read_bytes() == (other / name).read_bytes(), name


def checkpoints(path: Path) -> list[str]:
    return sorted(entry.name for entry in (path / "checkpoints").iterdir())


def rewind(path: Path, steps: int, to: Path) -> Path:
    """A copy of a finished run as if its machine had failed some time after a checkpoint."""
    shutil.copytree(path, to)
    for name in checkpoints(to):
        if int(name.removeprefix("step_")) > steps:
            shutil.rmtree(to / "checkpoints" / name)
    (to / "result.json").unlink()
    shutil.rmtree(to / "adapter")
    return to


# --- What a run writes ---


def test_the_configuration_of_the_run_loads_back(straight_run):
    assert load_config(str(straight_run.path / "config.toml")) == straight_run.config


def test_run_json_says_what_was_run_with_what(straight_run):
    run = json.loads((straight_run.path / "run.json").read_text())
    [start] = run["starts"]
    assert {"python", "jax", "flax", "qwix", "google-tunix"} <= set(start["versions"])
    assert run["data"] == {"source": "procedural", "num_dropped": 0}
    assert run["data_sha256"] == load_splits(straight_run.config.data).sha256
    assert run["devices"] == [str(jax.devices()[0])]
    assert (run["num_adapted_matrices"], len(run["base_sha256"])) == (6, 64)
    reward = straight_run.config.rewards.reward
    assert run["reward_sha256"] == load_reward(reward)[1]
    assert f"reward {reward} (sha256 {run['reward_sha256']}) is run as code" in straight_run.shown


def test_metrics_have_a_line_per_step_of_finite_numbers(straight_run):
    """Stock Tunix counts optimizer updates as steps, and overruns its limit by up to mu - 1."""
    metrics = straight_run.records("metrics.jsonl")
    mu = straight_run.config.grpo.num_iterations
    assert [record["step"] for record in metrics] == [1, 2, 3, 4, 5]
    for record in metrics:
        assert set(record) == METRICS
        assert set(record["mean_components"]) == {*COMPONENTS, "custom"}
        values = [*record.pop("mean_components").values(), *record.values()]
        assert all(math.isfinite(value) for value in values)
        updates = record["num_updates"], record["num_updates_left_out"]
        assert (*updates, record["num_unscored"]) == (mu, 0, 0)
    assert metrics[0]["max_ratio"] == 1 if mu == 1 else metrics[0]["max_ratio"] > 1
    assert any(record["grad_norm"] > 0 for record in metrics)
    assert len({record["loss"] for record in metrics}) == 5
    assert all(record["learning_rate"] > 0 for record in metrics)


def test_the_optimizer_has_counted_every_update(straight_run, session):
    """Stock Tunix's `max_steps` is a number of updates, tested at the end of a step only."""
    restored = restore_checkpoint(straight_run.path / "checkpoints", session.learner.state())
    assert restored is not None and restored[0] == 5
    assert int(restored[1]["optimizer"]["step"]) == 5 * straight_run.config.grpo.num_iterations


def test_completions_are_logged_with_their_scores(straight_run):
    completions = straight_run.records("completions.jsonl")
    trained = [r for r in completions if r["kind"] == "train"]
    assert [r["step"] for r in trained] == [step for step in range(1, 6) for _ in range(8)]
    for step, record in enumerate(straight_run.records("metrics.jsonl"), start=1):
        rows = [r for r in trained if r["step"] == step]
        assert record["mean_reward"] == pytest.approx(np.mean([r["reward"] for r in rows]))
        custom = [r["components"]["custom"] for r in rows]
        assert record["mean_components"]["custom"] == pytest.approx(np.mean(custom))
        assert {(r["question"], r["answer"]) for r in rows} <= {
            (e.question, e.answer) for e in load_splits(straight_run.config.data).train
        }
    held_out = {e.question for e in load_splits(straight_run.config.data).test}
    assert {r["question"] for r in completions if r["kind"] == "held_out"} == held_out


def test_measurements_are_logged_and_the_ends_are_sampled_too(straight_run):
    evaluations = straight_run.records("evaluations.jsonl")
    assert [r["step"] for r in evaluations] == [0, 2, 4, 5]
    assert [bool(r["sampled"]) for r in evaluations] == [True, False, False, True]
    assert all(record.pop("seconds") > 0 for record in evaluations)
    result = json.loads((straight_run.path / "result.json").read_text())
    assert (result["before"], result["after"]) == (evaluations[0], evaluations[-1])
    assert [rise["name"] for rise in result["rises"]] == ["format", "logic", "accuracy"]


@pytest.mark.parametrize("kind", [StepRecord, RunCompletion, Measurement, RunFacts, RunResult])
def test_each_file_is_read_by_the_model_that_wrote_it(kind, run_straight):
    path = run_straight(1).path
    text = (path / kind.FILE).read_text()
    if kind.FILE.endswith(".json"):
        assert kind.read(path).as_json(indent=1) == text
    else:
        assert [line.content.as_json() for line in kind.read_lines(path)] == text.splitlines()


def test_events_checkpoints_and_adapter_are_there(straight_run):
    [events] = (straight_run.path / "tensorboard").iterdir()
    assert b"train/mean_reward" in events.read_bytes()
    assert checkpoints(straight_run.path) == ["step_000002", "step_000004", "step_000005"]
    with safe_open(straight_run.path / ADAPTER, framework="numpy") as file:
        described = str(file.metadata())
    tensors = load_file(straight_run.path / ADAPTER)
    run = json.loads((straight_run.path / "run.json").read_text())
    assert run["base_sha256"] in described
    assert '"lora_rank": 2,' in described
    assert len(tensors) == 2 * run["num_adapted_matrices"]
    assert sum(tensor.size for tensor in tensors.values()) == run["num_adapted_parameters"]
    trained = [tensor for name, tensor in tensors.items() if name.endswith("lora_b")]
    assert len(trained) == run["num_adapted_matrices"]
    assert all(np.abs(tensor).max() > 0 for tensor in trained), "B starts at zero"


def test_what_a_run_shows(straight_run):
    shown, mu = straight_run.shown, straight_run.config.grpo.num_iterations
    updates = "1 update each" if mu == 1 else "3 updates each"
    assert f"5 of 2 prompts x 4 completions, {updates}" in shown
    for text in ("1 x cpu", "LoRA rank 2 on 6 matrices", "procedural: 3 train, 3 test problems"):
        assert text in shown
    places = [shown.index(f"step {step}/5: ") for step in range(1, 6)]
    assert places == sorted(places)
    assert shown.count("╭─ step") == 2
    assert "Right, greedy" in shown and "Right in any of 4 samples (pass@4)" in shown
    assert f"report: {straight_run.path / 'report.html'}\n" in shown


def test_the_report_says_what_was_measured_and_misses_nothing(straight_run):
    page = (straight_run.path / "report.html").read_text().replace("\u00a0", " ")
    result = json.loads((straight_run.path / "result.json").read_text())
    for when in ("before", "after"):
        assert f"<strong>{100 * result[when]['greedy']['correct_fraction']:.1f} %</strong>" in page
    run = json.loads((straight_run.path / "run.json").read_text())
    assert run["data_sha256"] in page and run["base_sha256"] in page
    assert "· finished, 5 of 5 steps</p>" in page and 'class="notice"' not in page
    for name in ("Reward by component", "Accuracy", "KL", "Entropy", "Clip fraction", "Length"):
        assert f"<h3>{name}" in page
    for name in ("Cut off", "Groups", "Gradient norm", "Time of a step", "Speed of the rollout"):
        assert f"<h3>{name}" in page
    assert len(page) < 3_000_000


def test_short_data_cycles_by_epochs(straight_run):
    """Stock Tunix ends in silence when its data do."""
    rows = [r for r in straight_run.records("completions.jsonl") if r["kind"] == "train"]
    drawn = [row["question"] for row in rows[::4]]
    assert len(drawn) == 10
    epochs = [drawn[i : i + 3] for i in range(0, 9, 3)]
    assert all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert all(drawn[i] != drawn[i + 1] for i in range(0, 10, 2)), "no step has a problem twice"


def test_compiled_programs_are_counted_up(straight_run):
    metrics = straight_run.records("metrics.jsonl")
    for name in ("num_compiled_programs", "num_cached_programs", "compile_seconds"):
        values = [record[name] for record in metrics]
        assert values == sorted(values)
    made = [record["num_compiled_programs"] + record["num_cached_programs"] for record in metrics]
    assert made[0] > 0
    assert made[2:] == made[2:3] * 3, "after the first measurement in between all are made"
    said = re.findall(
        r"^compiled (\d+) programs in \d+ s; (\d+) came from the cache at (.+)$",
        straight_run.shown,
        re.MULTILINE,
    )
    assert len(said) == 2, "after the first step, and at the end"
    first = tuple(
        str(metrics[0][name]) for name in ("num_compiled_programs", "num_cached_programs")
    )
    assert said[0] == (*first, os.environ["JAX_COMPILATION_CACHE_DIR"])


def test_completions_are_written_all_at_once(
    make_config, quiet_train: Train, tmp_path, monkeypatch
):
    """Opening the file for each of them takes seconds on a disk that is far away."""
    append, written = RunDirectory.append, []

    def spy(directory: RunDirectory, *records: Any) -> None:
        append(directory, *records)
        written.extend([len(records)] if isinstance(records[0], RunCompletion) else [])

    monkeypatch.setattr(RunDirectory, "append", spy)
    quiet_train(make_config(run={"max_steps": 2}), tmp_path / "run")
    assert written == [3, 8, 8, 3]


# --- Resuming ---


@pytest.mark.parametrize("steps", [2, 5])
def test_a_resumed_run_equals_a_straight_one(steps, straight_run, quiet_train: Train, tmp_path):
    """Stock Tunix loses prompts and half of a batch on resume with mu > 1."""
    path = rewind(straight_run.path, steps, tmp_path / "run")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    shown = quiet_train(straight_run.config, path)
    assert f"{steps} done, resuming" in shown
    assert_same_run(path, straight_run.path)


def test_a_measurement_that_was_cut_short_is_made_again(run_straight, quiet_train: Train, tmp_path):
    straight = run_straight(1)
    path = rewind(straight.path, 4, tmp_path / "run")
    kept = [r for r in straight.records("evaluations.jsonl") if r["step"] < 4]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    quiet_train(straight.config, path)
    assert_same_run(path, straight.path)


def test_a_finished_run_is_left_alone(straight_run, quiet_train: Train, monkeypatch):
    """Stock Tunix trains one step more at each launch of a finished run."""

    def listing() -> dict[str, tuple[int, bytes | None]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in [straight_run.path, *straight_run.path.rglob("*")]
        }

    def fail(*_: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(session_module, "open_session", fail)
    before = listing()
    shown = quiet_train(straight_run.config, straight_run.path)
    assert f"{straight_run.path} is finished; its result:\n" in shown
    assert "Right, greedy" in shown
    assert listing() == before


def test_a_finished_run_goes_on_if_it_is_made_longer(run_straight, quiet_train: Train, tmp_path):
    straight = run_straight(1)
    path = tmp_path / "run"
    shutil.copytree(straight.path, path)
    run = dataclasses.replace(straight.config.run, max_steps=6)
    longer = dataclasses.replace(straight.config, run=run)
    with pytest.raises(UserError, match="was made with max_steps = 5, not 6"):
        quiet_train(longer, path)
    quiet_train(longer, path, allow_config_change=True)
    assert [r["step"] for r in records(path, "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((path / "result.json").read_text())["after"]["step"] == 6
    shorter = dataclasses.replace(straight.config, run=dataclasses.replace(run, max_steps=4))
    (path / "result.json").unlink()
    with pytest.raises(UserError, match="max_steps = 4 is less than the 6 steps that are done"):
        quiet_train(shorter, path, allow_config_change=True)


@pytest.mark.parametrize("name", ["base_sha256", "data_sha256", "reward_sha256"])
def test_a_run_does_not_go_on_with_other_weights_data_or_code(
    name, run_straight, quiet_train: Train, tmp_path, monkeypatch
):
    path = rewind(run_straight(1).path, 2, tmp_path / "run")
    run = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(run | {name: "other"}))
    monkeypatch.setattr(opening, "load_weights", None)
    with pytest.raises(UserError) as refusal:
        quiet_train(run_straight(1).config, path)
    assert str(refusal.value) == (
        f"run directory {path} was made with {name} = other, not {run[name]}; choose another "
        "--run, or resume with --allow-config-change"
    )
    assert checkpoints(path) == ["step_000002"]


def test_a_run_can_start_from_the_adapter_of_another(run_straight, make_config, open_small):
    straight = run_straight(1)
    config = make_config(model={"adapter": str(straight.path / "adapter")})
    started = open_small(config)
    assert started.finished_steps == 0
    state = started.learner.state()["lora"]
    ours = {
        "/".join(str(key.key) for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    saved = load_file(straight.path / ADAPTER)
    assert saved.keys() == ours.keys()
    assert all((saved[name] == ours[name]).all() for name in saved)


# --- Stopping ---

# The reward is called at steps 1, 2, ... as number 3, 4, 6, 7, 9: measuring calls it as well.
CALL_OF_STEP = {1: 3, 3: 6, 4: 7}


def run_and_stop(like: Path, path: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """Runs in a process of its own, which gets a signal in the middle of a step."""
    file = like / "config.toml"
    stop = {"STOP_AT_CALL": str(CALL_OF_STEP[step]), "STOP_SIGNAL": str(int(number))}
    done = subprocess.run(
        [sys.executable, "-m", "gemma2_grpo.cli", "train", str(file), "--run", str(path)],
        env=os.environ | stop,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


def test_sigterm_finishes_the_step_and_saves(run_straight, quiet_train: Train, tmp_path):
    straight, path = run_straight(1), tmp_path / "run"
    status, shown = run_and_stop(straight.path, path, 3, signal.SIGTERM)
    assert status == 143
    assert "stopped after step 3; run again to resume" in shown
    assert [r["step"] for r in records(path, "metrics.jsonl")] == [1, 2, 3]
    assert checkpoints(path) == ["step_000002", "step_000003"]
    assert not (path / "result.json").exists()
    quiet_train(straight.config, path)
    assert_same_run(path, straight.path)


def test_a_killed_run_loses_no_more_than_an_interval(run_straight, quiet_train: Train, tmp_path):
    straight, path = run_straight(3), tmp_path / "run"
    status, _ = run_and_stop(straight.path, path, 4, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert [r["step"] for r in records(path, "metrics.jsonl")] == [1, 2, 3]
    assert checkpoints(path) == ["step_000002"]
    (path / "checkpoints" / ".step_000004.tmp").mkdir()
    assert "2 done, resuming" in quiet_train(straight.config, path)
    assert_same_run(path, straight.path)
    assert checkpoints(path) == checkpoints(straight.path)


def test_ctrl_c_does_the_same(make_config, quiet_train: Train, tmp_path, monkeypatch):
    monkeypatch.setenv("STOP_AT_CALL", str(CALL_OF_STEP[1]))
    monkeypatch.setenv("STOP_SIGNAL", str(int(signal.SIGINT)))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stop:
        quiet_train(make_config(), tmp_path / "run")
    assert stop.value.code == 130
    assert checkpoints(tmp_path / "run") == ["step_000001"]
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert after == before


# --- Rewards ---


def test_shuffled_rewards_are_those_of_the_same_step(open_small, make_config, monkeypatch):
    seen: list[np.ndarray] = []

    def spy(rewards: np.ndarray, **options: bool) -> Any:
        seen.append(rewards.copy())
        return group_advantages(rewards, **options)

    group_advantages = learner_module.group_advantages
    monkeypatch.setattr(learner_module, "group_advantages", spy)
    config = make_config(rewards={"shuffle_rewards": True})
    session = open_small(config)
    scorer = Scorer(config.rewards, load_reward(config.rewards.reward)[0])
    results = [session.learner.step(step, session.train[:2], scorer) for step in (0, 1)]
    orders = []
    for result, used in zip(results, seen, strict=True):
        earned = result.scores["total"]
        assert len(set(earned)) > 4
        assert sorted(used.ravel()) == sorted(earned)
        assert used.ravel().tolist() != earned.tolist()
        # What is logged is what each completion earned.
        expected = scorer(result.examples, result.completions.texts)["total"]
        assert earned.tolist() == expected.tolist()
        orders.append([list(earned).index(value) for value in used.ravel()])
    assert orders[0] != orders[1]


BROKEN = """
calls = 0


def sometimes(questions, completions, answers):
    global calls
    calls += 1
    if calls == 6:
        raise RuntimeError("no connection to the judge")
    scores = [sum(map(ord, text)) % 97 / 97 for text in completions]
    return [None, float("nan"), *scores[2:]]
"""


def test_a_reward_that_gives_nothing_and_then_raises(
    make_config, quiet_train: Train, session, tmp_path
):
    """Stock Tunix takes None and NaN for a reward of 0."""
    file, path = tmp_path / "judge.py", tmp_path / "run"
    file.write_text(BROKEN)
    spec = f"{file}:sometimes"
    with pytest.raises(UserError) as error:
        quiet_train(make_config(rewards={"reward": spec}), path)
    assert str(error.value) == (
        f"reward {spec}: raised RuntimeError: no connection to the judge ({file}:9)"
    )
    metrics = records(path, "metrics.jsonl")
    assert [(r["step"], r["num_unscored"]) for r in metrics] == [(1, 2), (2, 2)]
    assert all(len(numbers(r)) == len(r) + len(r["mean_components"]) - 1 for r in metrics)
    first = [
        r for r in records(path, "completions.jsonl") if (r["kind"], r["step"]) == ("train", 1)
    ]
    assert [r["reward"] is None for r in first] == [True, True] + [False] * 6
    assert metrics[0]["mean_reward"] == pytest.approx(np.mean([r["reward"] for r in first[2:]]))
    restored = restore_checkpoint(path / "checkpoints", session.learner.state())
    assert restored is not None and restored[0] == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored[1]))
    assert not (path / "result.json").exists()


# --- A full disk ---


def test_a_disk_that_fills_up_keeps_the_earlier_checkpoint(
    run_straight, quiet_train: Train, tmp_path, monkeypatch
):
    """Orbax says that it has saved, and finds a full disk only when it is closed."""
    straight, path = run_straight(1), tmp_path / "run"
    finish, saves = ocp.StandardCheckpointer.wait_until_finished, []

    def full(checkpointer: Any) -> None:
        finish(checkpointer)
        if "step_000004" in str([*(path / "checkpoints").iterdir()]):
            saves.append(1)
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointer, "wait_until_finished", full)
        with pytest.raises(UserError) as error:
            quiet_train(straight.config, path)
    assert saves
    assert str(error.value) == (
        f"run directory {path}: checkpoint of step 4 could not be written: [Errno 28] No space "
        "left on device; the checkpoints before it are kept: fix the cause and run again"
    )
    assert checkpoints(path) == ["step_000002"]
    quiet_train(straight.config, path)
    assert_same_run(path, straight.path)


# --- Mistakes, each one line and status 2 before any weights load ---

GOOD = {"question": "Ann has 2 eggs and 3 more. How many?", "answer": "2 + 3 = 5\n#### 5"}


@pytest.fixture
def refused(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., str]:
    """Gives a command that must fail, and returns the one line it says."""

    def run(*options: str) -> str:
        def fail(*_: Any) -> None:
            raise AssertionError("weights are loaded")

        monkeypatch.setattr(opening, "load_weights", fail)
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        command = ["train", "tiny", "--model", str(tiny_model_dir), "--run", str(tmp_path / "run")]
        assert cli.main([*command, *options]) == 2
        assert sorted(tmp_path.rglob("*")) == before, "something half-written is left"
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said.removeprefix("error: ").rstrip("\n")

    return run


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("{'question': 1}", "{0}:3: not valid JSON (Expecting property name enclosed in double "
         "quotes: line 1 column 2 (char 1)); write one object a line"),
        ("[1]", "{0}:3: not a JSON object; write one with question and answer"),
        ({"question": "Who?"}, "{0}:3: field 'answer' is missing, blank or not text; fill it in"),
        (GOOD | {"question": " \n"},
         "{0}:3: field 'question' is missing, blank or not text; fill it in"),
        (GOOD | {"answer": "nobody knows"}, "{0}:3: field 'answer' has no number; write a number, "
         "or a solution that ends in '#### NUMBER'"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(row, fault, refused, tmp_path):
    write_rows(tmp_path / "data" / "test.jsonl", [GOOD])
    file = write_rows(tmp_path / "data" / "train.jsonl", [GOOD, GOOD, row])
    assert refused("--dataset", str(tmp_path / "data")) == fault.format(file)


def test_data_that_are_not_enough_are_refused(refused, tmp_path):
    data = tmp_path / "data"
    few = write_rows(data / "train.jsonl", [GOOD] * 20)
    write_rows(data / "test.jsonl", [])
    assert refused("--dataset", str(data)) == f"dataset {data / 'test.jsonl'}: no problems in it"
    write_rows(data / "test.jsonl", [GOOD])
    sizes = ["--dataset", str(data), "--num-test-samples", "1"]
    assert refused(*sizes) == (
        f"num_train_samples = 4096 is more than the 20 problems of that split in {data}; lower it"
    )
    sizes += ["--num-train-samples", "20", "--max-prompt-tokens", "8"]
    assert refused(*sizes) == (
        "max_prompt_tokens = 8 leaves 0 of 20 problems where 16 are needed; raise it"
    )
    few.unlink()
    assert refused("--dataset", str(data)) == (
        f"dataset {data}: no train file in it; it needs files with train and test in their names, "
        ".jsonl or .parquet"
    )


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("--micro-batch-tokens 50", "micro_batch_tokens = 50 does not hold a sequence of 56 tokens "
         "for each of mesh_shape[0] = 1; raise it to 56"),
        ("--engine vllm", 'engine = "vllm" needs the package vllm; install it, or set '
         'engine = "group"'),
        ("--engine sglang_jax", 'engine = "sglang_jax" needs the package sglang-jax; install it'),
        ("--engine fast", "--engine takes one of group, solutions, vanilla, vllm"),
        ("--kv-cache-tokens 103", "kv_cache_tokens = 103 does not hold max_prompt_tokens + "
         "max_completion_tokens = 104; raise it, or leave it out"),
        ("--mesh-shape 1 16", "mesh_shape = [1, 16] needs 16 devices but 8 (cpu) are present; "
         "meshes that fit: [1, 8], [2, 4], [4, 2], [8, 1]"),
        ("--mesh-shape 2 3", "mesh_shape[1] = 3 does not divide the model's 4 KV heads; "
         "meshes that fit: [2, 4], [4, 2], [8, 1]"),
        ("--model nowhere", "model 'nowhere': no such directory; use embedded, a directory of "
         "safetensors, a Hugging Face id such as google/gemma-2-2b-it, or "
         "kaggle:OWNER/MODEL/FRAMEWORK/VARIATION"),
        ("--dataset nowhere", "dataset 'nowhere': no such file or directory; use procedural, "
         "openai/gsm8k, kaggle:OWNER/NAME, a directory or a JSONL file"),
        ("--lora-modules attn/o_proj", "lora_modules: 'attn/o_proj' matches no weight matrix; "
         "those of a layer are layers/0/attn/"),
        ("--reward nowhere.py:f", "reward = 'nowhere.py:f': no such file; write "
         "path/to/file.py:function"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_weights_load(options, fault, refused):
    assert refused(*options.split()).startswith(fault)


def test_an_adapter_of_another_base_or_shape_is_refused(run_straight, refused):
    straight = run_straight(1)
    adapter = ["--adapter", str(straight.path / "adapter")]
    assert refused(*adapter) == (
        f"{straight.path / ADAPTER}: does not fit; it was made with lora_rank = 2, lora_alpha = "
        f"2.0, lora_modules = {list(straight.config.model.lora_modules)}; set the same"
    )
    same_shape = ["--lora-rank", "2", "--lora-alpha", "2"]
    assert refused(*adapter, *same_shape, "--model", "embedded") == (
        f"{straight.path / ADAPTER}: made for another base ({straight.config.model.model}); "
        "load it on that one"
    )
    assert refused("--adapter", "nowhere").startswith(f"{Path('nowhere')}/adapter.safetensors: ")


def test_a_full_disk_is_refused_before_weights_load(refused, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert refused().startswith(f"run directory {tmp_path / 'run'}: 0 MB are free but checkpoints")


def test_the_run_of_another_configuration_is_refused(run_straight, refused, tmp_path):
    shutil.copytree(run_straight(1).path, tmp_path / "run")
    assert "was made with lora_rank = 2, not 16; choose another --run" in refused()


def test_the_run_of_an_older_version_is_refused(run_straight, refused, tmp_path):
    path = Path(shutil.copytree(run_straight(1).path, tmp_path / "run"))
    facts = json.loads((path / "run.json").read_text())
    del facts["schema_version"]
    (path / "run.json").write_text(json.dumps(facts))
    for option in ("--allow-config-change", "--no-tensorboard"):
        assert refused(option) == (
            f"{path / 'run.json'}: has an older schema, without a version; this gemma2-grpo reads "
            "version 1; choose another --run"
        )


def test_a_directory_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run"
    assert refused("--run", str(path)) == (
        f"run directory {path}: cannot be written (Not a directory); choose another --run"
    )


def test_a_missing_token_is_said_with_the_mend(refused, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "no-input"))
    assert refused("--model", "google/gemma-2-2b-it") == (
        "model google/gemma-2-2b-it: HF_TOKEN is not set; make a token at "
        "huggingface.co/settings/tokens, accept Gemma's licence at "
        "huggingface.co/google/gemma-2-2b-it and export HF_TOKEN, or attach the model on Kaggle"
    )
