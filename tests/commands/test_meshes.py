"""A run gives the same on one device and on several."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gemma2_grpo.config import Config
from gemma2_grpo.run import loop
from gemma2_grpo.run.schema import numbers
from gemma2_grpo.runtime.memory import MemoryMonitor

Train = Callable[..., str]

# What depends on the clock, the compiler or the backend.
UNEQUAL = ("seconds", "tokens_per_second", "programs", "memory")


def results(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """What a run sampled, and the metrics of its steps."""
    completions = records(path, "completions.jsonl")
    metrics = records(path, "metrics.jsonl")
    metrics = [numbers(record) for record in metrics]
    names = [name for name in metrics[0] if not any(part in name for part in UNEQUAL)]
    assert {"loss", "kl", "entropy", "grad_norm", "mean_reward"} <= set(names)
    columns = {name: np.array([record[name] for record in metrics]) for name in names}
    return [row["completion"] for row in completions], columns


def records(path: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


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


@pytest.fixture(scope="module")
def on_one_device(run_straight: Callable[[int], Any]) -> Any:
    """Of this scope, since other tests share it: it must not see what a test here changes."""
    return run_straight(1)


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """Programs of a mesh serve these tests alone, and take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compiler")
def test_on_the_flagship_mesh(
    on_one_device: Any,
    make_config: Callable[..., Config],
    quiet_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "MemoryMonitor", partial(MemoryMonitor, [NearlyFull()]))
    config = make_config(grpo={"num_iterations": 1}, model={"mesh_shape": [2, 4]})
    shown = quiet_train(config, tmp_path / "run")
    assert_same(tmp_path / "run", on_one_device.path)

    assert "1 x cpu, mesh 1 fsdp x 1 tp; 7 more are not used" in on_one_device.shown
    assert "8 x cpu, mesh 2 fsdp x 4 tp\n" in re.sub(" +\n", "\n", shown)
    assert shown.count("device memory: 92% of") == 1
    for record in records(tmp_path / "run", "metrics.jsonl"):
        assert (record["memory_bytes"], record["peak_memory_bytes"]) == (600, 920)
        assert record["peak_memory_fraction"] == 0.92


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiler")
def test_of_the_embedded_model_on_any_mesh(
    make_config: Callable[..., Config], quiet_train: Train, tmp_path: Path
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "rollout": {"max_completion_tokens": 24},
        "grpo": {"num_iterations": 2},
        "run": {"max_steps": 3, "eval_every_steps": 0, "eval_samples": 0},
    }
    for shape in ((1, 1), (2, 4), (8, 1), (1, 4)):
        model = {"model": "embedded", "mesh_shape": list(shape)}
        path = tmp_path / "x".join(map(str, shape))
        quiet_train(make_config(**sections, model=model), path)
        assert_same(path, tmp_path / "1x1")
