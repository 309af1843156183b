"""A run gives the same on one device and on several."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2_grpo.config import Config
from gemma2_grpo.engine.device_memory import MemoryMonitor
from gemma2_grpo.runs import loop

Train = Callable[..., str]

# Two steps of two updates; completions of the embedded model vary in length.
STEPS: dict[str, dict[str, Any]] = {
    "rollout": {"max_completion_tokens": 24},
    "grpo": {"num_iterations": 2},
    "run": {"max_steps": 2, "eval_every_steps": 0, "checkpoint_every_steps": 2, "eval_samples": 0},
}
# What depends on the clock or the compiler.
UNEQUAL = ("_seconds", "tokens_per_second", "seconds_left", "programs", "memory")


def results(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """What a run sampled, and the metrics of its steps."""
    completions, metrics = (
        [json.loads(line) for line in (path / name).read_text().splitlines()]
        for name in ("completions.jsonl", "metrics.jsonl")
    )
    names = [name for name in metrics[0] if not any(part in name for part in UNEQUAL)]
    assert {"loss", "kl", "entropy", "grad_norm", "reward"} <= set(names)
    columns = {name: np.array([record[name] for record in metrics]) for name in names}
    return [row["completion"] for row in completions], columns


def assert_same(path: Path, other: Path) -> None:
    (texts, metrics), (other_texts, other_metrics) = results(path), results(other)
    assert texts == other_texts
    assert metrics.keys() == other_metrics.keys()
    for name, values in metrics.items():
        np.testing.assert_allclose(values, other_metrics[name], rtol=1e-3, atol=1e-6, err_msg=name)
    assert np.all(metrics["loss"] != 0) and np.all(metrics["grad_norm"] > 0)


class NearlyFull:
    """A device of a backend that says how full it is; those at hand do not."""

    def memory_stats(self) -> Mapping[str, int]:
        return {"bytes_in_use": 600, "peak_bytes_in_use": 920, "bytes_limit": 1000}


def test_on_the_flagship_mesh(
    make_config: Callable[..., Config],
    quiet_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet_train(make_config(**STEPS), tmp_path / "one")
    watched = functools.partial(MemoryMonitor, [NearlyFull()])
    monkeypatch.setattr(loop, "MemoryMonitor", watched)
    shown = quiet_train(make_config(**STEPS, model={"mesh_shape": [2, 4]}), tmp_path / "eight")
    assert_same(tmp_path / "eight", tmp_path / "one")

    assert "8 x cpu, mesh 2 fsdp x 4 tp" in shown
    assert shown.count("device memory: 92% of") == 1
    for line in (tmp_path / "eight" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert (record["memory_bytes"], record["peak_memory_bytes"]) == (600, 920)
        assert record["peak_memory_fraction"] == 0.92


@pytest.mark.slow
def test_of_the_embedded_model_on_any_mesh(
    make_config: Callable[..., Config], quiet_train: Train, tmp_path: Path
) -> None:
    for shape in ((1, 1), (2, 4), (8, 1), (1, 4)):
        model = {"model": "embedded", "mesh_shape": list(shape)}
        path = tmp_path / "x".join(map(str, shape))
        quiet_train(make_config(**STEPS, model=model), path)
        assert_same(path, tmp_path / "1x1")
