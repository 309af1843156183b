import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from benchmarks.load import write_checkpoint
from benchmarks.workload import PRESETS
from flax import nnx
from safetensors import safe_open

from gemma2_grpo.engine.model import load_weights, make_mesh


def test_the_checkpoint_is_a_sharded_model(tmp_path: Path) -> None:
    sizes = dataclasses.replace(
        PRESETS["gemma2-2b"],
        layers=2,
        vocab=512,
        width=32,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=8,
    )
    written = write_checkpoint(tmp_path, sizes, 3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) == 3
    model = load_weights(tmp_path, "bfloat16", make_mesh((2, 2)))
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.nbytes for leaf in leaves) == written == index["metadata"]["total_size"]
    name = "model.layers.1.mlp.up_proj.weight"
    with safe_open(tmp_path / index["weight_map"][name], framework="numpy") as file:
        stored = file.get_tensor(name)
    assert stored.astype(np.float32).std() > 0.9
    np.testing.assert_array_equal(model.layers[1].mlp.up_proj.kernel.get_value(), stored.T)
