"""Makes tests/golden/*.npz: logits of random Gemma 2 and 3 models, computed by transformers.

    python tests/oracle/make_goldens.py

Only tokens and logits are stored. The weights come from a NumPy seed, through `write_model`, which
the tests use as well, so that they compare with transformers where it is not installed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parents[1] / "golden"

# Soft caps and windows are small enough to bind in a sequence of 20 tokens.
SMALL: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "sliding_window": 6,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
# The rotation of global layers is slow, so that positions are told apart by sliding ones.
SMALL3: dict[str, Any] = SMALL | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window_pattern": 3,
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped": SMALL,
    "fused": SMALL | {"num_key_value_heads": 4, "query_pre_attn_scalar": 12},
    "gemma3": SMALL3,
}
LENGTHS = (20, 13)


def write_model(directory: Path, values: dict[str, Any], seed: int) -> Path:
    """Writes config.json and one float32 safetensors file with random weights.

    Matrices have the deviation 1/sqrt(fan-in), and no norm is left at its initial value. A small
    embedding and a large final norm make distributions over tokens that are far from uniform and
    depend on more than the last token.
    """
    random = np.random.default_rng(seed)

    def normal(scale: float, *shape: int) -> np.ndarray:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    def linear(width_out: int, width_in: int) -> np.ndarray:
        return normal(width_in**-0.5, width_out, width_in)

    width, hidden, head = values["hidden_size"], values["intermediate_size"], values["head_dim"]
    queries, keys = values["num_attention_heads"] * head, values["num_key_value_heads"] * head
    tensors = {
        "model.embed_tokens.weight": normal(0.05, values["vocab_size"], width),
        "model.norm.weight": 8 + normal(1.0, width),
    }
    for i in range(values["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": linear(queries, width),
            "self_attn.k_proj": linear(keys, width),
            "self_attn.v_proj": linear(keys, width),
            "self_attn.o_proj": linear(width, queries),
            "mlp.gate_proj": linear(hidden, width),
            "mlp.up_proj": linear(hidden, width),
            "mlp.down_proj": linear(width, hidden),
            "input_layernorm": normal(0.3, width),
            "post_attention_layernorm": normal(0.3, width),
            "pre_feedforward_layernorm": normal(0.3, width),
            "post_feedforward_layernorm": normal(0.3, width),
        }
        if values["model_type"] == "gemma3_text":
            layer |= {f"self_attn.{name}_norm": normal(0.3, head) for name in "qk"}
        tensors |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    return directory


def padded_tokens(vocabulary: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows of random tokens of the lengths above, and the mask of real ones."""
    tokens = np.random.default_rng(seed).integers(3, vocabulary, (len(LENGTHS), max(LENGTHS)))
    is_real = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return np.where(is_real, tokens, 0).astype(np.int32), is_real


def transformers_logits(
    directory: Path, tokens: np.ndarray, is_real: np.ndarray, dtype: str = "float32"
) -> np.ndarray:
    """Logits of transformers' model of a directory, with eager attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=getattr(torch, dtype)
    ).eval()
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(is_real, dtype=torch.long),
        )
    return output.logits.float().numpy()


def peft_gradients(
    directory: Path, adapter: Path, prompts: list[list[int]], targets: list[list[int]]
) -> dict[str, np.ndarray]:
    """Of the mean loss on the targets after their prompts, in the adapters of a PEFT directory.

    Returns:
        Gradients by module and matrix (`model.layers.0.mlp.up_proj.lora_A`), and `loss`.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    losses = []
    for prompt, target in zip(prompts, targets, strict=True):
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0]
        own = logits[len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(own, torch.tensor(target), reduction="sum"))
    loss = torch.stack(losses).sum() / sum(map(len, targets))
    loss.backward()
    found = {"loss": loss.detach().numpy()}
    for name, value in model.named_parameters():
        if value.grad is not None:
            module, matrix = name.removeprefix("base_model.model.").split(".lora_")
            found[f"{module}.lora_{matrix[0]}"] = value.grad.numpy()
    return found


def main() -> None:
    """Writes every file but gemma3_gradients.npz.

    That one has what `peft_gradients` returns in tests/model/test_gemma3_training.py.
    """
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, values) in enumerate(MODELS.items()):
        tokens, is_real = padded_tokens(values["vocab_size"], seed)
        with tempfile.TemporaryDirectory() as directory:
            model = write_model(Path(directory), values, seed)
            logits = transformers_logits(model, tokens, is_real)
        np.savez_compressed(GOLDEN / f"{name}.npz", seed=seed, tokens=tokens, logits=logits)


if __name__ == "__main__":
    main()
