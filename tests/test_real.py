"""Real pretrained weights keep working: GEMMA3_270M=DIR pytest -m real.

DIR is Gemma 3 270M as safetensors: Google's, or what transformers makes of a GGUF file.
"""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

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
