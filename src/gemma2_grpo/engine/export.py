"""Weights out: Hugging Face safetensors of a model, and the adapter file of a run."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tunix.models.gemma import model as gemma

from gemma2_grpo.config import ModelConfig, UserError
from gemma2_grpo.engine.forward import weights_of
from gemma2_grpo.engine.lora import merge_adapters

ADAPTER_FILE = "adapter.safetensors"
# One entry of metadata: safetensors writes several in no fixed order.
_DESCRIPTION = "gemma2_grpo"
_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def save_model(model: gemma.Gemma, path: Path, dtype: str, query_scale: float = 1.0) -> None:
    """Writes the base weights of a model as one HF safetensors file.

    Args:
        model: A Gemma 2 without adapters, or whose adapters are left out.
        path: The file.
        dtype: Type to store, `bfloat16` or `float32`.
        query_scale: What `engine.model.query_scale` multiplied the queries by, undone here.
    """
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {
        name: np.ascontiguousarray(value.astype(kind))
        for name, value in _hf_tensors(model, query_scale)
    }
    save_file(tensors, path, metadata={"format": "pt"})


def _hf_tensors(model: gemma.Gemma, query_scale: float) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values as transformers has them; linear layers are [out, in] there."""

    def host(variable: nnx.Variable) -> np.ndarray:
        return np.asarray(jax.device_get(variable.get_value()), np.float32)

    yield "model.embed_tokens.weight", host(model.embedder.input_embedding)
    yield "model.norm.weight", host(model.final_norm.scale)
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}"
        for ours, theirs in _NORMS.items():
            yield f"{prefix}.{theirs}.weight", host(getattr(layer, ours).scale)
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield f"{prefix}.mlp.{name}.weight", host(getattr(layer.mlp, name).kernel).T
        attention = layer.attn
        if attention.use_qkv_einsum:
            query, key, value = host(attention.qkv_einsum.w)
        else:
            query = host(attention.q_einsum.w)
            key, value = host(attention.kv_einsum.w)
        for name, weight in (("q", query / query_scale), ("k", key), ("v", value)):
            heads_first = weight.transpose(0, 2, 1)  # [N, D, H] -> [N, H, D]
            yield f"{prefix}.self_attn.{name}_proj.weight", heads_first.reshape(-1, weight.shape[1])
        output = host(attention.attn_vec_einsum.w)  # [N, H, D]
        yield f"{prefix}.self_attn.o_proj.weight", output.reshape(-1, output.shape[-1]).T


def merge_lora(policy: gemma.Gemma, base: gemma.Gemma, config: ModelConfig) -> gemma.Gemma:
    """A copy of the base with the policy's adapters added into its weights."""
    # Else the copy would share its variables with the base, and change them too.
    merged = nnx.merge(*nnx.split(base), copy=True)
    nnx.update(merged, merge_adapters(weights_of(policy), config.lora_scale))
    return merged


def fingerprint(directory: Path) -> str:
    """A hash that tells one set of weights from another without reading all of them.

    Sizes, and 64 blocks of 64 KiB spread evenly over each safetensors file.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in np.linspace(0, max(size - 65536, 0), 64).astype(int):
                file.seek(int(start))
                digest.update(file.read(65536))
    return digest.hexdigest()


def save_adapter(policy: gemma.Gemma, folder: Path, config: ModelConfig, base_sha256: str) -> Path:
    """Writes the adapters in float32, with what they belong to in the file's metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "/".join(map(str, path)): np.asarray(jax.device_get(variable.get_value()))
        for path, variable in nnx.to_flat_state(nnx.state(policy, nnx.LoRAParam))
    }
    described = {
        "base": config.model,
        "base_sha256": base_sha256,
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_modules": config.lora_modules,
    }
    temporary = folder / f".{ADAPTER_FILE}.tmp"
    save_file(tensors, temporary, metadata={_DESCRIPTION: json.dumps(described)})
    return temporary.rename(folder / ADAPTER_FILE)


def check_adapter(folder: Path, config: ModelConfig, base_sha256: str) -> None:
    """Checks, before any weights load, that a saved adapter fits a base and a configuration.

    Raises:
        UserError: if it is unreadable, belongs to another base, or has another shape.
    """
    path = folder / ADAPTER_FILE
    described = _description(path)
    if described.get("base_sha256") != base_sha256:
        raise UserError(
            f"{path}: made for another base ({described.get('base')}); load it on that one"
        )
    made = {name: value for name, value in described.items() if name.startswith("lora_")}
    ours = {
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_modules": list(config.lora_modules),
    }
    if made != ours:
        told = ", ".join(f"{name} = {value}" for name, value in made.items())
        raise UserError(f"{path}: does not fit; it was made with {told}; set the same")


def adapter_shape(folder: Path) -> dict[str, Any]:
    """Fields of the model's configuration that a saved adapter was made with.

    Raises:
        UserError: if it is unreadable.
    """
    described = _description(folder / ADAPTER_FILE)
    try:
        return {
            "lora_rank": described["lora_rank"],
            "lora_alpha": described["lora_alpha"],
            "lora_modules": tuple(described["lora_modules"]),
        }
    except KeyError:
        raise UserError(
            f"{folder / ADAPTER_FILE}: does not say how it was made; take the adapter of a run"
        ) from None


def _description(path: Path) -> dict[str, Any]:
    """What an adapter belongs to, as `save_adapter` wrote it."""
    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {}).get(_DESCRIPTION, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a readable adapter ({error})") from None


def load_adapter(policy: gemma.Gemma, folder: Path) -> None:
    """Puts a saved adapter, which `check_adapter` let pass, into a policy."""
    with safe_open(folder / ADAPTER_FILE, framework="numpy") as file:
        placed = [
            (
                parts,
                variable.replace(
                    jax.device_put(
                        file.get_tensor("/".join(map(str, parts))), variable.get_value().sharding
                    )
                ),
            )
            for parts, variable in nnx.to_flat_state(nnx.state(policy, nnx.LoRAParam))
        ]
    nnx.update(policy, nnx.from_flat_state(placed))
