"""Exports in both formats compute what the policy computes: in NumPy, transformers and PEFT."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file
from tunix.models.gemma import model as gemma

from gemma2_grpo.config import ModelConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.gemma import run_from_start
from gemma2_grpo.model.layout import tensor_shapes
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.logprobs import output_logits
from gemma2_grpo.model.lora import add_lora
from gemma2_grpo.model.save import check_written, save_model, save_peft
from gemma2_grpo.model.weights import split_model

# A query scale other than that of head_dim, as Gemma 2 27B has.
SCALED = {"query_pre_attn_scalar": 12}
MODELS: dict[str, dict[str, Any]] = {
    "grouped": SCALED,
    "fused": SCALED | {"num_key_value_heads": 4},
}
SOME = ("layers/1/attn/qkv_einsum", "mlp/down_proj")
LORA = ModelConfig(dtype="float32", lora_rank=3, lora_alpha=6.0, mesh_shape=(1, 1))


@dataclasses.dataclass(frozen=True)
class Case:
    """A policy, and where its base lies."""

    policy: gemma.Gemma
    base: Path
    config: ModelConfig


@pytest.fixture(scope="module", params=[("grouped", None), ("fused", None), ("fused", SOME)])
def case(
    request: pytest.FixtureRequest,
    goldens: ModuleType,
    mesh: Mesh,
    fill_adapters: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    name, modules = request.param
    folder = tmp_path_factory.mktemp("base")
    base = goldens.write_model(folder, goldens.SMALL | MODELS[name], seed=5)
    config = dataclasses.replace(LORA, lora_modules=modules or LORA.lora_modules)
    policy = add_lora(load_weights(base, "float32", mesh), config, mesh, 0)
    fill_adapters(policy, 1, 0.1)
    return Case(policy, base, config)


@pytest.fixture
def peft(case: Case, tmp_path: Path) -> Path:
    save_peft(case.policy, tmp_path, case.config, "float32", base=str(case.base))
    return tmp_path


def merge(case: Case, folder: Path, dtype: str = "float32", **options: Any) -> float:
    folder.mkdir(exist_ok=True)
    return save_model(case.policy, folder, dtype, lora_scale=case.config.lora_scale, **options)


@jax.jit(static_argnames="forward")
def _logits(forward: Any, weights: Any, tokens: jax.Array) -> jax.Array:
    return output_logits(forward, weights, run_from_start(forward, weights, tokens)[0])


def policy_logits(case: Case, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_logits(*split_model(case.policy), jnp.asarray(tokens)))


def test_merged_weights_are_the_base_and_the_product_of_the_peft_adapters(
    case: Case, peft: Path, tmp_path: Path
) -> None:
    assert merge(case, tmp_path / "merged") == 0.0
    base, merged = (
        load_file(folder / "model.safetensors") for folder in (case.base, tmp_path / "merged")
    )
    adapters = load_file(peft / "adapter_model.safetensors")
    prefix = "base_model.model."
    assert all(name.startswith(prefix) for name in adapters)
    changed = 0
    for name, weight in base.items():
        module = prefix + name.removesuffix(".weight")
        expected = weight
        if f"{module}.lora_A.weight" in adapters:
            a, b = adapters[f"{module}.lora_A.weight"], adapters[f"{module}.lora_B.weight"]
            assert a.shape == (3, weight.shape[1]) and b.shape == (weight.shape[0], 3)
            expected = weight + 6 / 3 * b @ a
            changed += 1
            assert abs(expected - weight).max() > 0.01
        np.testing.assert_allclose(merged[name], expected, atol=1e-6, err_msg=name)
    assert changed == len(adapters) // 2
    # Some: queries, keys and values of one layer, and an MLP matrix of four.
    assert changed == (4 * 7 if case.config.lora_modules == LORA.lora_modules else 3 + 4)


def test_keys_and_values_have_the_same_a(peft: Path) -> None:
    adapters = load_file(peft / "adapter_model.safetensors")
    for name, key in adapters.items():
        if "k_proj.lora_A" in name:
            np.testing.assert_array_equal(key, adapters[name.replace("k_proj", "v_proj")])


def test_targets_are_short_where_all_layers_have_them(case: Case, peft: Path) -> None:
    described = json.loads((peft / "adapter_config.json").read_text())
    attention = ["k_proj", "q_proj", "v_proj"]
    if case.config.lora_modules == LORA.lora_modules:
        mlp = ["down_proj", "gate_proj", "up_proj"]
        expected = [*attention, "o_proj", *mlp]
    else:
        downs = [f"layers.{i}.mlp.down_proj" for i in range(4)]
        expected = [*downs, *(f"layers.1.self_attn.{name}" for name in attention)]
    assert sorted(described.pop("target_modules")) == sorted(expected)
    assert described == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(case.base),
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


@pytest.mark.oracle
def test_transformers_computes_with_merged_weights_what_the_policy_does(
    case: Case, goldens: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    merge(case, tmp_path, max_shard_bytes=20_000)
    (tmp_path / "config.json").write_bytes((case.base / "config.json").read_bytes())
    tokens, is_real = goldens.padded_tokens(64, seed=1)
    theirs = goldens.transformers_logits(tmp_path, tokens, is_real)[is_real]
    before = goldens.transformers_logits(case.base, tokens, is_real)[is_real]
    assert abs(theirs - before).max() > 0.5
    np.testing.assert_allclose(theirs, policy_logits(case, tokens)[is_real], atol=1e-4)


@pytest.mark.oracle
def test_peft_computes_what_the_policy_does(case: Case, peft: Path, goldens: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.Gemma2ForCausalLM.from_pretrained(
        case.base, attn_implementation="eager", dtype=torch.float32
    )
    # Warnings, such as of missing keys, are errors in tests.
    model = library.PeftModel.from_pretrained(base, str(peft)).eval()
    tokens, is_real = goldens.padded_tokens(64, seed=1)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    ours = policy_logits(case, tokens)
    np.testing.assert_allclose(theirs[is_real], ours[is_real], atol=1e-4)
    loaded = {n for n, x in model.named_parameters() if "lora_B" in n and bool(x.any())}
    assert len(loaded) == len(load_file(peft / "adapter_model.safetensors")) // 2


class TestShards:
    def test_they_hold_what_one_file_holds(self, case: Case, tmp_path: Path) -> None:
        merge(case, tmp_path / "one")
        merge(case, tmp_path / "many", max_shard_bytes=20_000)
        assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
        whole = load_file(tmp_path / "one" / "model.safetensors")
        index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
        files = sorted((tmp_path / "many").glob("*.safetensors"))
        count = len(files)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        assert [file.name for file in files] == names and count > 3
        parts = {name: load_file(tmp_path / "many" / name) for name in names}
        assert all(sum(x.nbytes for x in part.values()) <= 20_000 for part in parts.values())
        assert index["weight_map"] == {name: file for file in names for name in parts[file]}
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
        for name, value in whole.items():
            np.testing.assert_array_equal(parts[index["weight_map"][name]][name], value)

    def test_what_is_not_as_it_was_written_is_noticed(self, case: Case, tmp_path: Path) -> None:
        merge(case, tmp_path)
        shapes = tensor_shapes(case.policy.config)
        check_written(tmp_path, shapes)
        with pytest.raises(UserError, match=r"model\.norm\.weight is not on the disk as it was"):
            check_written(tmp_path, shapes | {"model.norm.weight": [31]})
        case.policy.final_norm.scale.set_value(case.policy.final_norm.scale.get_value() * jnp.nan)
        merge(case, tmp_path / "nan")
        case.policy.final_norm.scale.set_value(
            jnp.asarray(load_file(case.base / "model.safetensors")["model.norm.weight"])
        )
        with pytest.raises(UserError, match=r"model\.norm\.weight has values that are not finite"):
            check_written(tmp_path / "nan", shapes)


def test_rounding_is_told_beside_the_change(case: Case, tmp_path: Path) -> None:
    share = merge(case, tmp_path / "rounded", "bfloat16")
    merge(case, tmp_path / "exact")
    base, exact = (
        load_file(folder / "model.safetensors") for folder in (case.base, tmp_path / "exact")
    )
    adapted = [name for name in exact if abs(exact[name] - base[name]).max() > 1e-3]
    change = sum(float(((exact[n] - base[n]) ** 2).sum()) for n in adapted)
    lost = sum(
        float(((exact[n] - exact[n].astype(ml_dtypes.bfloat16).astype(np.float32)) ** 2).sum())
        for n in adapted
    )
    # Measured before the query scale is undone, and over whole fused matrices.
    assert share == pytest.approx((lost / change) ** 0.5, rel=0.1)
    assert 0.001 < share < 0.1
    rounded = load_file(tmp_path / "rounded" / "model.safetensors")
    for name, value in exact.items():
        np.testing.assert_array_equal(rounded[name], value.astype(ml_dtypes.bfloat16))
