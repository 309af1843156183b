"""Several processes train as one would, and stop together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma2_grpo.config import Config
from gemma2_grpo.errors import UserError
from gemma2_grpo.presets import to_toml
from gemma2_grpo.runtime.cluster import Cluster, find_cluster

# Runs the command as a person would, and tells how many completions this process sampled.
RUN = """
import sys
from gemma2_grpo import cli
from gemma2_grpo.sampling import rollout

complete, sampled = rollout.complete, 0

def counted(*args, **kwargs):
    global sampled
    done = complete(*args, **kwargs)
    sampled += len(done.lengths)
    return done

rollout.complete = counted
status = cli.main(sys.argv[1:])
print("SAMPLED", sampled)
sys.exit(status)
"""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(config: Path, run: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, "train", str(config), "--run", str(run), *options],
        env={**os.environ, "XLA_FLAGS": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_pair(
    config: Path, run: Path, *options: str, environments: Any = None
) -> list[subprocess.Popen[str]]:
    """Two processes; the second one is told of a directory that it must not need."""
    address = f"127.0.0.1:{free_port()}"
    return [
        start(
            config,
            run if number == 0 else run.with_name("unseen"),
            *options,
            *("--coordinator", address, "--num-processes", "2", "--process-id", str(number)),
            **(environments or ({}, {}))[number],
        )
        for number in (0, 1)
    ]


def ended(process: subprocess.Popen[str], seconds: float = 400) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    # Gloo prints to the standard output.
    lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
    return process.returncode, "\n".join(lines), err


@pytest.fixture
def write_config(make_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Path]:
    def write(name: str = "config", **changes: Any) -> Path:
        changes.setdefault("grpo", {}).setdefault("num_iterations", 2)
        config = make_config(**changes)
        path = tmp_path / f"{name}.toml"
        path.write_text(to_toml(config))
        return path

    return write


STEPS = {"max_steps": 3, "eval_every_steps": 0, "eval_samples": 0, "checkpoint_every_steps": 1}


def sampled_by(out: str) -> int:
    return int(out.rpartition("SAMPLED ")[2])


def check_same_adapters(run: Path, other: Path) -> None:
    one, two = (load_file(path / "adapter/adapter.safetensors") for path in (run, other))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def records(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_two_processes_train_as_one(write_config: Callable[..., Path], tmp_path: Path) -> None:
    # Two batches to measure, one for each process.
    config = write_config(data={"num_test_samples": 8}, run=STEPS | {"eval_batch_prompts": 4})
    status, out, err = ended(start(config, tmp_path / "one"))
    assert status == 0, err
    alone = sampled_by(out)
    pair = [ended(process) for process in start_pair(config, tmp_path / "two")]
    assert [status for status, *_ in pair] == [0, 0], pair
    assert [sampled_by(out) for _, out, _ in pair] == [alone // 2, alone // 2]
    # Only process 0 writes and prints.
    assert "held-out problems" in pair[0][1] and len(pair[1][1].splitlines()) == 1
    assert not (tmp_path / "unseen").exists()

    check_same_adapters(tmp_path / "one", tmp_path / "two")
    for name in ("completions.jsonl", "evaluations.jsonl"):
        one, two = (records(tmp_path / run, name) for run in ("one", "two"))
        assert [r | {"seconds": 0} for r in one] == [r | {"seconds": 0} for r in two]
    for one, two in zip(
        *(records(tmp_path / name, "metrics.jsonl") for name in ("one", "two")), strict=True
    ):
        names = ("mean_reward", "kl", "loss", "entropy", "grad_norm", "clip_fraction")
        for name in (*names, "truncated_fraction"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_all_resume(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(run=STEPS)
    assert ended(start(config, tmp_path / "one"))[0] == 0
    # Process 1 scores no measurement: there is one batch, and it is process 0's.
    stopping = {"STOP_AT_CALL": "2", "STOP_SIGNAL": str(int(signal.SIGTERM))}
    pair = start_pair(config, tmp_path / "two", environments=({}, stopping))
    results = [ended(process) for process in pair]
    assert [status for status, *_ in results] == [143, 143], results
    assert "stopped after step 2" in results[0][1]
    assert len(records(tmp_path / "two", "metrics.jsonl")) == 2
    results = [ended(process) for process in start_pair(config, tmp_path / "two")]
    assert [status for status, *_ in results] == [0, 0], results
    assert "2 done, resuming" in results[0][1]
    check_same_adapters(tmp_path / "one", tmp_path / "two")
    # A checkpoint of two processes is one for any number.
    status, out, err = ended(
        start(config, tmp_path / "two", "--max-steps", "4", "--allow-config-change")
    )
    assert status == 0, err
    assert "3 done, resuming" in out


# One of the problems teaches nothing, and one completion in five has no score.
UNEVEN = """
def reward(questions, completions, answers):
    values = [sum(map(ord, text)) % 97 for text in completions]
    return [
        0.5 if "62 toys" in question else None if value % 5 == 0 else value / 97
        for question, value in zip(questions, values)
    ]
"""


@pytest.mark.slow
def test_a_process_with_nothing_to_learn_and_unscored_completions(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """The loss is a mean over what all have; one has no gradient, and a mesh of two devices."""
    (tmp_path / "uneven.py").write_text(UNEVEN)
    ours = ("format", "logic", "accuracy", "self_correction", "length")
    config = write_config(
        model={"mesh_shape": [1, 2]},
        grpo={"beta": 0.0, "loss_type": "token_mean"},
        rewards={f"{name}_weight": 0.0 for name in ours}
        | {"reward": f"{tmp_path / 'uneven.py'}:reward"},
        run=STEPS | {"max_steps": 5},
    )
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    assert ended(start(config, tmp_path / "one", **two))[0] == 0
    pair = start_pair(config, tmp_path / "two", environments=(two, two))
    assert [ended(process)[0] for process in pair] == [0, 0]
    check_same_adapters(tmp_path / "one", tmp_path / "two")
    metrics = records(tmp_path / "two", "metrics.jsonl")
    assert {record["uniform_groups_fraction"] for record in metrics} == {0.0, 0.5}
    assert sum(record["num_unscored"] for record in metrics) > 0
    assert all(record["num_updates"] == 2 for record in metrics)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_other_within_a_minute(
    victim: int, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(run=STEPS | {"max_steps": 500})
    # What they compute does not matter here, only that they do it soon.
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environments = [quickly, quickly]
    environments[victim] = quickly | {"STOP_AT_CALL": "3", "STOP_SIGNAL": str(int(signal.SIGKILL))}
    pair = start_pair(config, tmp_path / "run", environments=environments)
    assert pair[victim].wait(120) == -signal.SIGKILL
    killed = time.monotonic()
    status, _, err = ended(pair[1 - victim], 60)
    assert time.monotonic() - killed < 60
    pair[victim].communicate()
    assert status == 1
    assert err.splitlines()[-1].startswith("error: another process stopped, see its own output")


def test_an_error_in_one_ends_all_with_its_words(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(run=STEPS)
    other = write_config("other", run=STEPS, optimizer={"learning_rate": 0.5})
    address = f"127.0.0.1:{free_port()}"
    pair = [
        start(
            path,
            tmp_path / "run",
            *("--coordinator", address, "--num-processes", "2", "--process-id", str(number)),
        )
        for number, path in enumerate((config, other))
    ]
    for status, _, err in map(ended, pair):
        assert status == 2
        assert "process 1 has learning_rate = 0.5, but process 0 has 0.01" in err


def test_a_mistake_of_one_ends_the_others_with_its_words(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Only process 0 has a run directory; the other one waits for it when it is refused."""
    (tmp_path / "run").write_text("a file in its place")
    first, other = map(ended, start_pair(write_config(run=STEPS), tmp_path / "run"))
    line = f"run directory {tmp_path / 'run'}: cannot be written (Not a directory)"
    assert (first[0], other[0]) == (2, 2)
    assert first[2].splitlines()[-1].startswith(f"error: {line}")
    assert other[2].splitlines()[-1].startswith(f"error: process 0: {line}")


@pytest.mark.parametrize("number", [0, 1])
def test_a_device_that_one_lacks_ends_all_with_its_words(
    number: int, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """The other one waits for it in JAX, for minutes, unless it is told."""
    environments = [{"JAX_PLATFORMS": "cud" if each == number else "cpu"} for each in (0, 1)]
    pair = start_pair(write_config(run=STEPS), tmp_path / "run", environments=environments)
    outcomes = [ended(process) for process in pair]
    line = "JAX_PLATFORMS = cud: JAX knows no backend 'cud'; did you mean cuda?"
    assert [status for status, _, _ in outcomes] == [2, 2]
    assert outcomes[number][2].splitlines()[-1] == f"error: {line}"
    assert outcomes[1 - number][2].splitlines()[-1] == f"error: process {number}: {line}"


JOINED = """
import os, signal, sys, time
from gemma2_grpo.runtime.farewell import joined
from gemma2_grpo.runtime.processes import gather
with joined(sys.argv[1], 2, int(sys.argv[2])):
    gather(0)  # Both have joined.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
"""


def test_a_signal_ends_processes_that_do_not_train_yet() -> None:
    """JAX would take SIGTERM for itself, and a job would wait until it is killed."""
    address = f"127.0.0.1:{free_port()}"
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED, address, number],
            env={**os.environ, "XLA_FLAGS": ""},
            stderr=subprocess.DEVNULL,
        )
        for number in "01"
    ]
    assert [process.wait(60) for process in pair] == [-signal.SIGTERM] * 2


# In process 1 alone, at its second call.
FAILING = """
import os

calls = 0


def reward(questions, completions, answers):
    global calls
    calls += 1
    if calls == 2 and os.environ.get("FAIL"):
        raise SystemExit("enough")
    return [0.1 * len(text) for text in completions]
"""


@pytest.mark.slow
def test_a_reward_that_fails_in_one_ends_the_others_in_the_middle_of_a_run(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    config = write_config(
        rewards={"reward": f"{tmp_path / 'failing.py'}:reward"}, run=STEPS | {"max_steps": 50}
    )
    pair = start_pair(config, tmp_path / "run", environments=({}, {"FAIL": "yes"}))
    (status, _, err), (other_status, _, other_err) = map(ended, pair)
    assert (status, other_status) == (2, 2)
    words = f"reward {tmp_path / 'failing.py'}:reward: raised SystemExit: enough"
    assert err.splitlines()[-1].startswith(f"error: process 1: {words}")
    assert other_err.splitlines()[-1].startswith(f"error: {words}")
    assert len(records(tmp_path / "run", "metrics.jsonl")) == 1


class TestCluster:
    def test_alone_unless_told_otherwise(self) -> None:
        assert find_cluster(None, None, None, {}) is None
        assert find_cluster(None, 1, None, {"JAX_COORDINATOR_ADDRESS": "a:1"}) is None
        # A job of Slurm without srun, and a single task.
        assert find_cluster(None, None, None, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) is None

    def test_options_come_before_variables(self) -> None:
        variables = {
            "JAX_COORDINATOR_ADDRESS": "a:1",
            "JAX_NUM_PROCESSES": "4",
            "JAX_PROCESS_ID": "3",
        }
        assert find_cluster(None, None, None, variables) == Cluster("a:1", 4, 3)
        assert find_cluster("b:2", None, 0, variables) == Cluster("b:2", 4, 0)

    def test_clusters_are_seen(self) -> None:
        slurm = dict.fromkeys(("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID"), "x")
        slurm |= {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
        assert find_cluster(None, None, None, slurm) == Cluster()
        assert find_cluster(None, None, None, {"TPU_WORKER_HOSTNAMES": "a,b"}) == Cluster()
        assert find_cluster(None, None, None, {"TPU_WORKER_HOSTNAMES": "a"}) is None
        assert find_cluster("auto", None, None, {}) == Cluster()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (("a:1", None, None), "--num-processes and --process-id is missing"),
            ((None, 2, 0), "--coordinator is missing"),
            (("a", 2, 0), "takes HOST:PORT"),
            (("a:1", 2, 2), "none of the processes from 0 to 1"),
            (("a:1", 0, 0), "must be at least 1"),
            (("auto", 2, None), "finds the processes itself"),
        ],
    )
    def test_contradictions_are_refused(self, given: tuple[Any, ...], message: str) -> None:
        with pytest.raises(UserError, match=message):
            find_cluster(*given, {})
