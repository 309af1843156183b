"""What other tools load: a model directory for transformers, and adapters for PEFT."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from flax.typing import PathParts
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from gemma2_grpo.config import ModelConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.chat_template import write_chat_template
from gemma2_grpo.model.config_json import GENERATION_FIELDS, JsonObject, read_config
from gemma2_grpo.model.layout import all_weights, tensor_shapes
from gemma2_grpo.model.load import open_tensors
from gemma2_grpo.model.lora import adapter_pairs, weight_change
from gemma2_grpo.model.tokenizer import Tokenizer, load_tokenizer, read_tokenizer
from gemma2_grpo.model.weights import Model

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


def _token_ids(tokenizer: Tokenizer) -> JsonObject:
    """Special tokens as transformers has them; a run stops at either of the stop tokens."""
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad,
    }


def save_model(
    model: Model,
    folder: Path,
    dtype: str,
    *,
    lora_scale: float = 0.0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> float:
    """Writes the weights of a model as HF safetensors, adapters added into them in float32.

    The host holds one shard at a time.

    Args:
        model: A Gemma, with or without adapters.
        folder: Existing directory; it gets model.safetensors, or shards and their index.
        dtype: Type to store, `bfloat16` or `float32`.
        lora_scale: Factor of the adapters, `lora_scale` of the configuration; 0 leaves them out.
        max_shard_bytes: Largest size of a file, unless one tensor alone is larger.

    Returns:
        How far rounding to `dtype` moved the adapted weights, as a part of how far the adapters
        did (both are Euclidean norms over all of them); 0 where nothing is adapted.
    """
    kind = host_dtype(dtype)
    split = split_state_dict_into_shards_factory(
        tensor_shapes(model.config),
        get_storage_size=lambda shape: math.prod(shape) * kind.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    merged = _Merged(model, kind, lora_scale)
    shard: dict[str, np.ndarray] = {}
    for path, weight in all_weights(model.config).items():
        for name, value in weight.write(merged.read(path)):
            shard[name] = np.ascontiguousarray(value.astype(kind))
            file = split.tensor_to_filename[name]
            if shard.keys() == set(split.filename_to_tensors[file]):
                save_file(shard, folder / file, metadata={"format": "pt"})
                shard.clear()
    assert not shard, "weights come in the order of their tensors"
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return merged.rounding


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


class _Merged:
    """Weights on the host in float32 with the adapters added; counts what storing them loses."""

    def __init__(self, model: Model, kind: np.dtype, lora_scale: float) -> None:
        """Takes a model, the type its weights will be stored in, and the factor of its adapters."""
        _, lora, base = nnx.split(model, nnx.LoRAParam, ...)
        self._base = dict(nnx.to_flat_state(base))
        self._adapters = adapter_pairs(lora) if lora_scale else {}
        self._kind, self._lora_scale = kind, lora_scale
        # Sums of squares of what the adapters add, and of what is then rounded away.
        self._added = self._lost = 0.0

    @property
    def rounding(self) -> float:
        """What was rounded away, as a part of what the adapters added."""
        return math.sqrt(self._lost / self._added) if self._added else 0.0

    def read(self, path: PathParts) -> np.ndarray:
        """The weight at a path."""
        weight = _to_host(self._base[path])
        if path not in self._adapters:
            return weight
        a, b = (variable.get_value() for variable in self._adapters[path])
        with jax.default_matmul_precision("highest"):  # A TPU would multiply in bfloat16.
            change = self._lora_scale * np.asarray(weight_change(path, a, b))
        merged = weight + change
        lost = merged - merged.astype(self._kind).astype(np.float32)
        self._added += float(np.sum(np.square(change), dtype=np.float64))
        self._lost += float(np.sum(np.square(lost), dtype=np.float64))
        return merged


def _to_host(variable: nnx.Variable) -> np.ndarray:
    """The value of a variable in float32, whole and on the host."""
    return np.asarray(jax.device_get(variable.get_value()), np.float32)


def write_json(path: Path, values: object) -> None:
    """Writes an object as transformers lays its files out."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def save_peft(
    policy: Model,
    folder: Path,
    config: ModelConfig,
    dtype: str,
    *,
    base: str,
) -> dict[str, tuple[int, ...]]:
    """Writes adapter_model.safetensors and adapter_config.json.

    Args:
        policy: A Gemma with adapters.
        folder: Existing directory.
        config: What the adapters were made with.
        dtype: Type to store, `bfloat16` or `float32`.
        base: Hugging Face id or directory of the base, from which PEFT loads it.

    Returns:
        Shapes of what was written, by name.
    """
    tensors: dict[str, np.ndarray] = {}
    adapted: list[str] = []
    for module, a, b in linear_adapters(policy):
        adapted.append(module)
        for name, value in (("lora_A", a), ("lora_B", b)):
            stored = np.ascontiguousarray(value.astype(host_dtype(dtype)))
            tensors[f"base_model.model.{module}.{name}.weight"] = stored
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


def linear_adapters(policy: Model) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each adapted linear layer of transformers, with its A [r, in] and B [out, r] in float32.

    Qwix keeps the rank last in A and first in B, and gives the fused queries, keys and values one
    A; PEFT adapts each by itself, so that A is written once for each.
    """
    weights = all_weights(policy.config)
    for path, pair in adapter_pairs(nnx.state(policy, nnx.LoRAParam)).items():
        a, b = map(_to_host, pair)  # [..., r], [r, ...]
        tensors, rank = weights[path].tensors, a.shape[-1]
        parts = b.reshape(rank, len(tensors), -1)
        for i, tensor in enumerate(tensors):
            yield tensor.removesuffix(".weight"), a.reshape(-1, rank).T, parts[:, i].T


def _targets(adapted: list[str], layers: int) -> list[str]:
    """Names of modules as PEFT looks for them: short where all layers have them."""
    counts: dict[str, int] = {}
    for module in adapted:
        name = module.rpartition(".")[2]
        counts[name] = counts.get(name, 0) + 1
    if all(count == layers for count in counts.values()):
        return sorted(counts)
    return sorted(module.removeprefix("model.") for module in adapted)
