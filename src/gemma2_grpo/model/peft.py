"""The adapters of a policy as PEFT keeps them, to be loaded onto the base in transformers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tunix.models.gemma import model as gemma

from gemma2_grpo.config import ModelConfig
from gemma2_grpo.model.save import host_dtype, to_host, write_json

# Tunix's modules, and the linear layers of transformers that each is made of.
_LINEAR = {
    "q_einsum": ("self_attn.q_proj",),
    "kv_einsum": ("self_attn.k_proj", "self_attn.v_proj"),
    "qkv_einsum": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_vec_einsum": ("self_attn.o_proj",),
    "gate_proj": ("mlp.gate_proj",),
    "up_proj": ("mlp.up_proj",),
    "down_proj": ("mlp.down_proj",),
}


def save_peft(
    policy: gemma.Gemma,
    folder: Path,
    config: ModelConfig,
    dtype: str,
    *,
    base: str,
    query_scale: float = 1.0,
) -> dict[str, tuple[int, ...]]:
    """Writes adapter_model.safetensors and adapter_config.json.

    Args:
        policy: A Gemma 2 with adapters.
        folder: Existing directory.
        config: What the adapters were made with.
        dtype: Type to store, `bfloat16` or `float32`.
        base: Hugging Face id or directory of the base, from which PEFT loads it.
        query_scale: What `load_weights` multiplied the queries by.

    Returns:
        Shapes of what was written, by name.
    """
    tensors: dict[str, np.ndarray] = {}
    adapted: list[str] = []
    for module, a, b in linear_adapters(policy, query_scale):
        adapted.append(module)
        for name, value in (("lora_A", a), ("lora_B", b)):
            stored = np.ascontiguousarray(value.astype(host_dtype(dtype)))
            tensors[f"base_model.model.model.{module}.{name}.weight"] = stored
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        # Most have a whole number here, and some readers expect one.
        "lora_alpha": int(alpha) if (alpha := config.lora_alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(adapted, policy.config.num_layers),
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", described)
    return {name: value.shape for name, value in tensors.items()}


def linear_adapters(
    policy: gemma.Gemma, query_scale: float
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each adapted linear layer of transformers, with its A [r, in] and B [out, r] in float32.

    Qwix keeps the rank last in A and first in B, and gives the fused queries, keys and values one
    A; PEFT adapts each by itself, so that A is written once for each. Tunix's attention expects
    queries multiplied by `query_scale`, which transformers does by itself; so B is divided by it.
    """
    adapters = dict(nnx.to_flat_state(nnx.state(policy, nnx.LoRAParam)))
    for path, variable in adapters.items():
        if not str(path[-1]).endswith("_lora_a"):
            continue
        a = to_host(variable)  # [..., r]
        b = to_host(adapters[(*path[:-1], str(path[-1]).removesuffix("a") + "b")])  # [r, ...]
        names, rank = _LINEAR[str(path[-2])], a.shape[-1]
        parts = b.reshape(rank, len(names), -1)
        for i, name in enumerate(names):
            scale = query_scale if name.endswith("q_proj") else 1.0
            module = f"layers.{path[1]}.{name}"
            yield module, a.reshape(-1, rank).T, parts[:, i].T / scale


def _targets(adapted: list[str], layers: int) -> list[str]:
    """Names of modules as PEFT looks for them: short where all layers have them."""
    counts: dict[str, int] = {}
    for module in adapted:
        name = module.rpartition(".")[2]
        counts[name] = counts.get(name, 0) + 1
    if all(count == layers for count in counts.values()):
        return sorted(counts)
    return sorted(adapted)
