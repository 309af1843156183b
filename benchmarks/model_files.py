"""The shared model: random weights as Hugging Face safetensors, so that all systems load the same.

JAX is imported late, because the parent process never needs it.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.workload import Sizes

_SHARPNESS = 7.0


def model_config(sizes: Sizes) -> dict[str, Any]:
    """The architecture as config.json has it."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "query_pre_attn_scalar": sizes.head_dim,
        "attn_logit_softcapping": sizes.attention_softcap,
        "final_logit_softcapping": sizes.final_softcap,
        "sliding_window": sizes.window,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "dtype": sizes.dtype,
    }


def write_config(directory: Path, sizes: Sizes) -> None:
    """Writes config.json."""
    (directory / "config.json").write_text(json.dumps(model_config(sizes)), encoding="utf-8")


def write_weights(directory: Path, sizes: Sizes, seed: int) -> None:
    """Writes model.safetensors with random weights."""
    from gemma2_grpo.model.architecture import read_architecture
    from gemma2_grpo.model.load import random_weights
    from gemma2_grpo.model.mesh import make_mesh
    from gemma2_grpo.model.save import save_model

    model = random_weights(read_architecture(directory), "float32", make_mesh((1, 1)), seed)
    # Distributions that are far from uniform: else models that differ would look alike.
    scale = model.final_norm.scale
    scale.set_value(scale.get_value() + _SHARPNESS)
    save_model(model, directory, sizes.dtype)
