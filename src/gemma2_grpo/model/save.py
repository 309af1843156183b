"""A model directory as transformers reads it: weights, configuration, tokenizer."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file
from tunix.models.gemma import model as gemma

from gemma2_grpo.errors import UserError
from gemma2_grpo.model.architecture import GENERATION_FIELDS, read_config
from gemma2_grpo.model.chat_template import write_chat_template
from gemma2_grpo.model.lora import weight_change
from gemma2_grpo.model.pretrained import NORMS, open_tensors, tensor_shapes
from gemma2_grpo.model.tokenizer import Tokenizer, load_tokenizer, read_tokenizer

MAX_SHARD_BYTES = 5_000_000_000
# Of a base that has none; else transformers would take Gemma's class, which reads less of the file.
_TOKENIZER_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
}
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json")


def host_dtype(name: str) -> np.dtype:
    """The NumPy type of `bfloat16` or `float32`."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def write_settings(folder: Path, source: Path, dtype: str) -> str:
    """Writes what a model directory has beside weights that are stored in another type.

    Args:
        folder: Where the model is written.
        source: Directory of the model it was made from.
        dtype: Type of the weights in `folder`.

    Returns:
        What `write_tokenizer` returns.
    """
    config = read_config(source)
    for name in (*GENERATION_FIELDS, "_name_or_path"):
        config.pop(name, None)
    # transformers 5 writes `dtype`, and reads what the versions before it wrote.
    names = [name for name in ("dtype", "torch_dtype") if name in config]
    config |= dict.fromkeys(names or ["torch_dtype"], dtype)
    write_json(folder / "config.json", config | _token_ids(load_tokenizer(source)))
    return write_tokenizer(folder, source)


def write_tokenizer(folder: Path, source: Path) -> str:
    """Writes the tokenizer as it was trained with, its chat template, and where answers end.

    Nothing else of the base's generation_config.json is kept: how it is sampled is for whoever
    samples it.

    Returns:
        What to tell about the chat template; empty if it is the base's.
    """
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, folder)
    if not (folder / "tokenizer_config.json").exists():
        write_json(folder / "tokenizer_config.json", _TOKENIZER_SETTINGS)
    (folder / "tokenizer.json").write_text(read_tokenizer(source), encoding="utf-8")
    write_json(folder / "generation_config.json", _token_ids(load_tokenizer(source)))
    return write_chat_template(folder, source)


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Special tokens as transformers has them; a run stops at either of the stop tokens."""
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad,
    }


def save_model(
    model: gemma.Gemma,
    folder: Path,
    dtype: str,
    *,
    query_scale: float = 1.0,
    lora_scale: float = 0.0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> float:
    """Writes the weights of a model as HF safetensors, adapters added into them in float32.

    The host holds one shard at a time.

    Args:
        model: A Gemma 2, with or without adapters.
        folder: Existing directory; it gets model.safetensors, or shards and their index.
        dtype: Type to store, `bfloat16` or `float32`.
        query_scale: What `load_weights` multiplied the queries by, undone here.
        lora_scale: Factor of the adapters, `lora_scale` of the configuration; 0 leaves them out.
        max_shard_bytes: Largest size of a file, unless one tensor alone is larger.

    Returns:
        How far rounding to `dtype` moved the adapted weights, as a part of how far the adapters
        did (both are Euclidean norms over all of them); 0 where nothing is adapted.
    """
    kind, reader = host_dtype(dtype), _Reader(host_dtype(dtype), lora_scale)
    split = split_state_dict_into_shards_factory(
        tensor_shapes(model.config),
        get_storage_size=lambda shape: math.prod(shape) * kind.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    shard: dict[str, np.ndarray] = {}
    for name, value in _hf_tensors(model, query_scale, reader):
        shard[name] = np.ascontiguousarray(value.astype(kind))
        file = split.tensor_to_filename[name]
        if shard.keys() == set(split.filename_to_tensors[file]):
            save_file(shard, folder / file, metadata={"format": "pt"})
            shard.clear()
    assert not shard, "tensors come in the order of tensor_shapes"
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return reader.rounding


def check_written(folder: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Reads back what was written: every tensor is there, in its shape, with finite values.

    Raises:
        UserError: naming the first that is not.
    """
    with open_tensors(folder) as tensors:
        for name, shape in shapes.items():
            if name not in tensors or tensors[name].get_shape() != list(shape):
                raise UserError(f"{name} is not on the disk as it was written; export again")
            if not np.isfinite(tensors[name][:].astype(np.float32)).all():
                raise UserError(f"{name} has values that are not finite; export an earlier run")


@dataclass
class _Reader:
    """Brings weights to the host in float32, and counts what storing them loses."""

    kind: np.dtype
    """Type that they will be stored in."""
    lora_scale: float
    adapted: float = 0.0
    """Sum of squares of what the adapters add."""
    rounded: float = 0.0
    """Sum of squares of what is then rounded away."""

    @property
    def rounding(self) -> float:
        return math.sqrt(self.rounded / self.adapted) if self.adapted else 0.0

    def __call__(self, module: nnx.Module, kind: str, name: str) -> np.ndarray:
        """The weight `name` of a module, which its layer has as `kind`."""
        weight = to_host(getattr(module, name))
        if not self.lora_scale or not hasattr(module, f"{name}_lora_a"):
            return weight
        a, b = (getattr(module, f"{name}_lora_{end}").get_value() for end in "ab")
        with jax.default_matmul_precision("highest"):  # A TPU would multiply in bfloat16.
            change = self.lora_scale * np.asarray(weight_change(kind, a, b)).reshape(weight.shape)
        merged = weight + change
        lost = merged - merged.astype(self.kind).astype(np.float32)
        self.adapted += float(np.sum(np.square(change), dtype=np.float64))
        self.rounded += float(np.sum(np.square(lost), dtype=np.float64))
        return merged


def to_host(variable: nnx.Variable) -> np.ndarray:
    """The value of a variable in float32, whole and on the host."""
    return np.asarray(jax.device_get(variable.get_value()), np.float32)


def _hf_tensors(
    model: gemma.Gemma, query_scale: float, read: _Reader
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values as transformers has them, in the order of `tensor_shapes`."""
    yield "model.embed_tokens.weight", to_host(model.embedder.input_embedding)
    yield "model.norm.weight", to_host(model.final_norm.scale)
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}"
        attention = layer.attn
        if attention.use_qkv_einsum:
            query, key, value = read(attention.qkv_einsum, "qkv_einsum", "w")
        else:
            query = read(attention.q_einsum, "q_einsum", "w")
            key, value = read(attention.kv_einsum, "kv_einsum", "w")
        for name, weight in (("q", query / query_scale), ("k", key), ("v", value)):
            heads_first = weight.transpose(0, 2, 1)  # [N, D, H] -> [N, H, D]
            yield f"{prefix}.self_attn.{name}_proj.weight", heads_first.reshape(-1, weight.shape[1])
        output = read(attention.attn_vec_einsum, "attn_vec_einsum", "w")  # [N, H, D]
        yield f"{prefix}.self_attn.o_proj.weight", output.reshape(-1, output.shape[-1]).T
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield f"{prefix}.mlp.{name}.weight", read(getattr(layer.mlp, name), name, "kernel").T
        for ours, theirs in NORMS.items():
            yield f"{prefix}.{theirs}.weight", to_host(getattr(layer, ours).scale)


def write_json(path: Path, values: Any) -> None:
    """Writes an object as transformers lays its files out."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
