"""Real pretrained weights keep working: GEMMA3_270M=DIR pytest -m real.

DIR is Gemma 3 270M as safetensors: Google's, or what transformers makes of a GGUF file.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_grpo.commands.export import Export
from gemma2_grpo.config import Config
from gemma2_grpo.model.gemma import run_from_start
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.logprobs import output_logits
from gemma2_grpo.model.mesh import make_mesh
from gemma2_grpo.model.tokenizer import load_tokenizer
from gemma2_grpo.model.weights import split_model

TEXT = "<bos>The capital of France is Paris, and 12 + 30 = 42. The capital of Italy is"
GOLDEN = Path(__file__).parent / "golden" / "gemma3_270m.json"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif("GEMMA3_270M" not in os.environ, reason="GEMMA3_270M=DIR is not set"),
]


@pytest.fixture(scope="module")
def directory() -> Path:
    return Path(os.environ["GEMMA3_270M"])


def test_logits_are_those_of_transformers(directory: Path) -> None:
    """The golden values are of a 4-bit quantisation, so that Google's own are only close."""
    golden = json.loads(GOLDEN.read_text())
    ids = load_tokenizer(directory).encode(TEXT)
    assert ids == golden["ids"]
    forward, weights = split_model(load_weights(directory, "float32", make_mesh((1, 1))))
    hidden, _ = run_from_start(forward, weights, jnp.array([ids]))
    logits = np.asarray(output_logits(forward, weights, hidden)[0])
    assert logits.argmax(axis=1).tolist() == golden["likeliest"]
    for name, expected in golden["logits"].items():
        np.testing.assert_allclose(logits[:, int(name)], expected, atol=2e-3)


@pytest.fixture(scope="module")
def run(
    directory: Path, quiet_train: Any, make_config: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config: Config = make_config(
        model={"model": str(directory), "lora_rank": 8, "lora_alpha": 8.0},
        data={"num_train_samples": 4, "num_test_samples": 2},
        rollout={"max_prompt_tokens": 128, "max_completion_tokens": 16},
        run={"max_steps": 1, "eval_samples": 0, "eval_every_steps": 0},
    )
    path = tmp_path_factory.mktemp("real") / "run"
    quiet_train(config, path)
    return path


def test_a_step_of_grpo_has_ratio_1(run: Path) -> None:
    [line] = (run / "metrics.jsonl").read_text().splitlines()
    record: Mapping[str, float] = json.loads(line)
    assert record["max_ratio"] == 1.0 and record["num_updates"] == 1
    assert record["sampling_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["merged", "peft"])
def test_exports_load(kind: Any, run: Path, directory: Path, tmp_path: Path) -> None:
    """With the extra `oracle`, they are compared with the policy in transformers as well."""
    Export(str(run), tmp_path / kind, format=kind)()
    if kind == "merged":
        forward, _ = split_model(load_weights(tmp_path / kind, "bfloat16", make_mesh((1, 1))))
        base, _ = split_model(load_weights(directory, "bfloat16", make_mesh((1, 1))))
        assert forward.architecture == base.architecture
