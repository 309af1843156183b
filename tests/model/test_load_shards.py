"""Reading safetensors: what Tunix's loader gives, slice by slice, and what it cannot read."""

import gc
import json
import tracemalloc
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import psutil
import pytest
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file
from tunix.models.gemma import model as gemma
from tunix.models.gemma import params_safetensors

from gemma2_grpo.model.architecture import read_architecture
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.mesh import make_mesh
from gemma2_grpo.runtime.memory import available_bytes

EMBEDDED = Path(str(resources.files("gemma2_grpo") / "assets" / "tiny-gemma2"))
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def variables(model: gemma.Gemma) -> dict[str, jax.Array]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def assert_same(model: gemma.Gemma, other: gemma.Gemma) -> None:
    expected = variables(other)
    actual = variables(model)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        assert value.sharding.is_equivalent_to(expected[name].sharding, value.ndim), name
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def tunix_loads(directory: Path, dtype: str, mesh: Mesh) -> gemma.Gemma:
    return params_safetensors.create_model_from_safe_tensors(
        str(directory), read_architecture(directory), mesh, jnp.dtype(dtype)
    )


@pytest.fixture
def directory(goldens: ModuleType, tmp_path: Path) -> Path:
    """A model in one file, with fewer key heads than query heads."""
    return goldens.write_model(tmp_path / "model", goldens.SMALL, seed=0)


def rewrite(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def shard(directory: Path, count: int) -> dict[str, str]:
    """Cuts a model in one file into shards with an index, which is returned."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    where = {
        name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    for file in set(where.values()):
        chosen = {name: value for name, value in tensors.items() if where[name] == file}
        save_file(chosen, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": where}))
    return where


class TestValues:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("shape", [(1, 1), (2, 4), (8, 1)])
    def test_are_those_of_tunix_loader(self, shape: tuple[int, int], dtype: str) -> None:
        mesh = make_mesh(shape)
        assert_same(load_weights(EMBEDDED, dtype, mesh), tunix_loads(EMBEDDED, dtype, mesh))

    def test_are_those_of_tunix_loader_for_as_many_keys_as_queries(
        self, goldens: ModuleType, tmp_path: Path
    ) -> None:
        values = goldens.SMALL | {"num_key_value_heads": 4}
        directory, mesh = goldens.write_model(tmp_path, values, seed=0), make_mesh((2, 4))
        for dtype in ("float32", "bfloat16"):
            assert_same(load_weights(directory, dtype, mesh), tunix_loads(directory, dtype, mesh))

    @pytest.mark.parametrize("heads", [2, 4])
    def test_of_scaled_queries_are_the_stored_ones(
        self, heads: int, goldens: ModuleType, mesh: Mesh, tmp_path: Path
    ) -> None:
        """The scale belongs to attention; in the weights it would be rounded to bfloat16."""
        values = goldens.SMALL | {"query_pre_attn_scalar": 9, "num_key_value_heads": heads}
        directory = goldens.write_model(tmp_path, values, seed=0)
        attention = load_weights(directory, "bfloat16", mesh).layers[1].attn
        query = attention.qkv_einsum.w[0] if heads == 4 else attention.q_einsum.w.get_value()
        stored = load_file(directory / "model.safetensors")
        by_head = stored["model.layers.1.self_attn.q_proj.weight"].reshape(4, 8, 32)
        expected = by_head.transpose(0, 2, 1).astype(query.dtype)
        np.testing.assert_array_equal(query, expected)

    def test_of_mixed_types_are_cast_one_by_one(self, directory: Path, mesh: Mesh) -> None:
        """Tunix's reader takes the type of a file's first tensor for all of them."""
        before = load_weights(directory, "float32", mesh)
        stored = load_file(directory / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"

        def mix(tensors: dict[str, np.ndarray]) -> None:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
            tensors[NORM] = tensors[NORM].astype(np.float64)

        rewrite(directory, mix)
        after = load_weights(directory, "float32", mesh)
        up = after.layers[1].mlp.up_proj.kernel
        rounded = stored[name].astype(ml_dtypes.bfloat16).astype(np.float32).T
        np.testing.assert_array_equal(up.get_value(), rounded)
        up.set_value(before.layers[1].mlp.up_proj.kernel.get_value())
        assert_same(after, before)

    # Tunix leaves the file open when it fails.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_of_mixed_types_are_not_read_by_stock_tunix(self, directory: Path, mesh: Mesh) -> None:
        rewrite(directory, lambda tensors: tensors.update({NORM: np.ones(32, np.float16)}))
        with pytest.raises(ValueError, match="cannot reshape"):
            tunix_loads(directory, "float32", mesh)
        gc.collect()

    def test_lie_whole_on_the_first_device_in_stock_tunix(
        self, wide_mesh: Mesh, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Keys and values; those of Gemma 2 2B are 245 MB, until they are sharded."""
        stack, stacked = jnp.stack, []
        monkeypatch.setattr(
            jnp, "stack", lambda *a, **b: stacked.append(stack(*a, **b)) or stacked[-1]
        )
        model = tunix_loads(EMBEDDED, "float32", wide_mesh)
        assert len(stacked) == len(model.layers) == 3
        assert {device for whole in stacked for device in whole.devices()} == {jax.devices()[0]}
        stacked.clear()
        load_weights(EMBEDDED, "float32", wide_mesh)
        assert not stacked

    def test_do_not_take_in_the_output_head(self, directory: Path, mesh: Mesh) -> None:
        before = load_weights(directory, "float32", mesh)
        rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": np.ones((64, 32))}))
        assert_same(load_weights(directory, "float32", mesh), before)


class TestShards:
    def test_give_what_one_file_gives(self, directory: Path, mesh: Mesh) -> None:
        meshes = (mesh, make_mesh((4, 2)))
        whole = [load_weights(directory, "bfloat16", where) for where in meshes]
        shard(directory, 3)
        assert len(list(directory.glob("*.safetensors"))) == 3
        for model, where in zip(whole, meshes, strict=True):
            assert_same(load_weights(directory, "bfloat16", where), model)

    def test_are_those_that_the_index_names(self, directory: Path, mesh: Mesh) -> None:
        before = load_weights(directory, "float32", mesh)
        shard(directory, 2)
        # What another download left here, and a tensor that is in both shards.
        save_file({NORM: np.ones(32, np.float32)}, directory / "consolidated.safetensors")
        assert_same(load_weights(directory, "float32", mesh), before)

    def test_one_that_is_missing_is_named(
        self, directory: Path, mesh: Mesh, refusal: Callable[..., str]
    ) -> None:
        shard(directory, 3)
        (directory / "model-00002-of-00003.safetensors").unlink()
        assert refusal(load_weights, directory, "float32", mesh) == (
            f"{directory}: 1 of 3 shards are missing, such as model-00002-of-00003.safetensors; "
            "download the model again"
        )

    def test_one_without_a_tensor_that_the_index_promises(
        self, directory: Path, mesh: Mesh, refusal: Callable[..., str]
    ) -> None:
        where = shard(directory, 2)
        other = next(file for file in where.values() if file != where[NORM])
        (directory / INDEX).write_text(json.dumps({"weight_map": where | {NORM: other}}))
        assert refusal(load_weights, directory, "float32", mesh) == (
            f"{directory}: 1 tensors are missing, such as {NORM}; "
            "a shard may not have been downloaded"
        )

    def test_without_an_index(
        self, directory: Path, mesh: Mesh, refusal: Callable[..., str]
    ) -> None:
        before = load_weights(directory, "float32", mesh)
        shard(directory, 2)
        (directory / INDEX).unlink()
        assert_same(load_weights(directory, "float32", mesh), before)
        save_file({NORM: np.ones(32, np.float32)}, directory / "another.safetensors")
        message = refusal(load_weights, directory, "float32", mesh)
        assert message.startswith(f"{directory}: another.safetensors and model-0000")
        assert message.endswith(f" both have {NORM}; keep one of them")
        (directory / "another.safetensors").unlink()
        (directory / "model-00001-of-00002.safetensors").unlink()
        assert refusal(load_weights, directory, "float32", mesh) == (
            f"{directory}: 23 tensors are missing, such as model.embed_tokens.weight; "
            "a shard may not have been downloaded"
        )


class TestMemory:
    def test_of_the_host_holds_one_tensor_at_a_time(
        self, goldens: ModuleType, tmp_path: Path
    ) -> None:
        """By Python's own account, in which slices are and most arrays of JAX are not."""
        values = goldens.SMALL | {"vocab_size": 8192, "hidden_size": 128, "intermediate_size": 4096}
        directory, mesh = goldens.write_model(tmp_path, values, seed=0), make_mesh((4, 2))
        largest, total = 4 * 8192 * 128, (directory / "model.safetensors").stat().st_size
        load_weights(directory, "float32", mesh)  # What is traced and cached once is not counted.
        tracemalloc.start()
        try:
            model = load_weights(directory, "float32", mesh)
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert total > 6 * largest
        # A slice that happens to be aligned as XLA wants it becomes the array, and is kept.
        assert peak - kept < 1.1 * largest
        assert model.embedder.input_embedding.get_value().nbytes == largest

    def test_that_is_short_is_said_before_anything_is_read(
        self, directory: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mesh = make_mesh((4, 2))
        parameters = sum(
            value.size for value in load_file(directory / "model.safetensors").values()
        )
        # On CPU devices the weights, on each of their fsdp rows the norms again, and the embedding.
        needed = 2 * (parameters + 3 * 17 * 32) + (4 + 2) * 64 * 32
        memory = psutil.virtual_memory()
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=needed))
        load_weights(directory, "bfloat16", mesh)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=needed - 1))
        monkeypatch.setattr(jax, "make_array_from_callback", None)
        assert refusal(load_weights, directory, "bfloat16", mesh) == (
            f"{directory}: loading it in bfloat16 takes 0.0 GB of host memory, but 0.0 GB are "
            "free; free some, or take a machine with more"
        )

    def test_that_is_free_ends_at_the_limit_of_a_container(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory = psutil.virtual_memory()._replace(available=5000)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        assert available_bytes(tmp_path) == 5000
        (tmp_path / "memory.stat").write_text("anon 700\nfile 900\n")
        for limit, free in (("max", 5000), ("9000", 5000), ("1000", 300)):
            (tmp_path / "memory.max").write_text(f"{limit}\n")
            assert available_bytes(tmp_path) == free


class TestBadInput:
    def test_a_missing_tensor(
        self, directory: Path, mesh: Mesh, refusal: Callable[..., str]
    ) -> None:
        rewrite(directory, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
        assert refusal(load_weights, directory, "float32", mesh) == (
            f"{directory}: 1 tensors are missing, such as model.layers.2.mlp.up_proj.weight; "
            "a shard may not have been downloaded"
        )

    def test_a_type_that_holds_no_weights(
        self, directory: Path, mesh: Mesh, refusal: Callable[..., str]
    ) -> None:
        rewrite(directory, lambda tensors: tensors.update({NORM: np.ones(32, np.int8)}))
        assert refusal(load_weights, directory, "float32", mesh) == (
            f"{directory}: {NORM} has the type I8; only BF16, F16, F32, F64 are read"
        )

    @pytest.mark.parametrize("kept_bytes", [0, 4, 100, 5000, -4])
    def test_a_truncated_file(
        self, kept_bytes: int, directory: Path, mesh: Mesh, refusal: Callable[..., str]
    ) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept_bytes])
        message = refusal(load_weights, directory, "float32", mesh)
        assert message.startswith(f"{path}: not a readable safetensors file (")

    @pytest.mark.parametrize(
        ("name", "value", "problem"),
        [
            (
                "hidden_size",
                64,
                "model.embed_tokens.weight has the shape [64, 32], but config.json means [64, 64]",
            ),
            (
                "head_dim",
                16,
                "model.layers.0.self_attn.q_proj.weight has the shape [32, 32], "
                "but config.json means [64, 32]",
            ),
        ],
    )
    def test_weights_of_another_size(
        self,
        name: str,
        value: int,
        problem: str,
        goldens: ModuleType,
        directory: Path,
        mesh: Mesh,
        refusal: Callable[..., str],
    ) -> None:
        (directory / "config.json").write_text(json.dumps(goldens.SMALL | {name: value}))
        assert refusal(load_weights, directory, "float32", mesh) == f"{directory}: {problem}"
