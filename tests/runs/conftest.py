"""A small random model, small configurations, and runs that several tests look at."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from gemma2_grpo.config import Config, check
from gemma2_grpo.presets import from_mapping
from gemma2_grpo.runs.display import Display
from gemma2_grpo.runs.run_directory import RunDirectory
from gemma2_grpo.runs.session import Session, open_session
from gemma2_grpo.runs.train import train
from gemma2_grpo.task.data import load_splits

EMBEDDED = Path(str(resources.files("gemma2_grpo") / "assets" / "tiny-gemma2"))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

# Gives each completion another reward, and stops its process in the middle of a call if told to.
REWARD = """
import os
import signal

calls = 0


def reward(questions, completions, answers):
    global calls
    calls += 1
    if os.environ.get("STOP_AT_CALL") == str(calls):
        os.kill(os.getpid(), int(os.environ["STOP_SIGNAL"]))
    return [sum(map(ord, text)) % 97 / 97 for text in completions]
"""

SMALL: dict[str, dict[str, Any]] = {
    "model": {"dtype": "float32", "lora_rank": 2, "lora_alpha": 2.0, "mesh_shape": [1, 1]},
    "data": {"dataset": "procedural", "num_train_samples": 3, "num_test_samples": 3},
    "rollout": {
        "num_generations": 4,
        "prompts_per_step": 2,
        "max_prompt_tokens": 56,
        "max_completion_tokens": 8,
    },
    "grpo": {"num_iterations": 1},
    "optimizer": {"learning_rate": 1e-2, "max_grad_norm": 1.0},
    "run": {
        "max_steps": 5,
        "eval_every_steps": 2,
        "eval_samples": 4,  # So that measuring and training share a program.
        "eval_batch_prompts": 8,
        "checkpoint_every_steps": 2,
        "keep_checkpoints": 5,
        "sample_every_steps": 2,
    },
}


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """Writes a Gemma 2 with random weights as a Hugging Face directory, without using our code."""

    def write(folder: Path, *, dtype: str = "float32", shards: int = 1, **sizes: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads((EMBEDDED / "config.json").read_text()) | sizes
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [kinds[i % 2] for i in range(config["num_hidden_layers"])]
        config["query_pre_attn_scalar"] = config["head_dim"]
        (folder / "config.json").write_text(json.dumps(config))
        for name in TOKENIZER_FILES:
            shutil.copy(EMBEDDED / name, folder)
        kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
        _save_shards(folder, _random_tensors(config, kind), shards)
        return folder

    return write


def _random_tensors(config: dict[str, Any], kind: np.dtype) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int, deviation: float | None = None) -> np.ndarray:
        values = rng.standard_normal((rows, columns), np.float32)
        return (values * (deviation or columns**-0.5)).astype(kind)

    # Small beside what the layers add, or the likeliest token is always the one before.
    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], width, 0.05)}
    for i in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        for name, shape in shapes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = matrix(*shape)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            tensors[f"model.layers.{i}.{name}_layernorm.weight"] = np.zeros(width, kind)
    tensors["model.norm.weight"] = np.zeros(width, kind)
    return tensors


def _save_shards(folder: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {name: i * shards // len(tensors) + 1 for i, name in enumerate(tensors)}
    files = {name: f"model-{at:05d}-of-{shards:05d}.safetensors" for name, at in where.items()}
    for file in set(files.values()):
        chosen = {name: value for name, value in tensors.items() if files[name] == file}
        save_file(chosen, folder / file, metadata={"format": "pt"})
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def tiny_model_dir(
    write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random Gemma 2 of one layer with the embedded tokenizer."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}
    return write_model(tmp_path_factory.mktemp("models") / "tiny", **sizes)


@pytest.fixture(scope="session")
def reward_spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward under which even a random model has something to learn."""
    file = tmp_path_factory.mktemp("rewards") / "varied.py"
    file.write_text(REWARD)
    return f"{file}:reward"


@pytest.fixture(scope="session")
def make_config(tiny_model_dir: Path, reward_spec: str) -> Callable[..., Config]:
    """Makes a configuration of seconds on the random model; sections override its fields."""

    def make(**changes: dict[str, Any]) -> Config:
        values = {name: dict(section) for name, section in SMALL.items()}
        values["model"]["model"] = str(tiny_model_dir)
        values["rewards"] = {"reward": reward_spec}
        for name, section in changes.items():
            values.setdefault(name, {}).update(section)
        return check(from_mapping(Config, values, "test"))

    return make


@pytest.fixture(scope="session")
def quiet_train() -> Callable[..., str]:
    """Runs or resumes a training run in this process, and returns what it showed."""

    def run(config: Config, folder: Path, **options: bool) -> str:
        shown = io.StringIO()
        display = Display(Console(file=shown, width=100, highlight=False))
        train(config, folder, "test", display=display, **options)
        return shown.getvalue()

    return run


@dataclass(frozen=True)
class Finished:
    """A run that has come to its end."""

    config: Config
    path: Path
    shown: str

    def records(self, name: str) -> list[dict[str, Any]]:
        """The records of a log."""
        return [json.loads(line) for line in (self.path / name).read_text().splitlines()]


@pytest.fixture(scope="session")
def run_straight(
    make_config: Callable[..., Config],
    quiet_train: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int], Finished]:
    """Runs to the end without interruption; once for each number of updates per step."""

    @cache
    def run(num_iterations: int) -> Finished:
        config = make_config(grpo={"num_iterations": num_iterations})
        path = tmp_path_factory.mktemp("runs") / "straight"
        return Finished(config, path, quiet_train(config, path))

    return run


@pytest.fixture(params=[1, 3], ids=["mu=1", "mu=3"])
def straight_run(
    request: pytest.FixtureRequest, run_straight: Callable[[int], Finished]
) -> Finished:
    """A finished run, with one and with three updates per step. To look at, not to change."""
    return run_straight(request.param)


@pytest.fixture(scope="session")
def open_small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Session]:
    """Opens a policy with its data, in a run directory of its own."""

    def opened(config: Config) -> Session:
        directory = RunDirectory(tmp_path_factory.mktemp("opened"), config)
        try:
            return open_session(config, load_splits(config.data), directory)
        finally:
            directory.close()

    return opened


@pytest.fixture(scope="session")
def session(open_small: Callable[[Config], Session], make_config: Callable[..., Config]) -> Session:
    """A policy that has not been trained; tests only sample from it."""
    return open_small(make_config())
