"""The adapter file of a run, and what tells one base from another."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gemma2_grpo.config import ModelConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.config_json import JsonObject
from gemma2_grpo.model.weights import Model
from gemma2_grpo.runtime.atomic import whole_file

ADAPTER_FILE = "adapter.safetensors"
# One entry of metadata: safetensors writes several in no fixed order.
_DESCRIPTION = "gemma2_grpo"


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


def save_adapter(policy: Model, folder: Path, config: ModelConfig, base_sha256: str) -> Path:
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
    with whole_file(folder / ADAPTER_FILE) as file:
        save_file(tensors, file, metadata={_DESCRIPTION: json.dumps(described)})
    return folder / ADAPTER_FILE


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


def adapter_shape(folder: Path) -> JsonObject:
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


def adapter_base(folder: Path) -> str:
    """The model that a saved adapter was made on, as it was recorded; empty if it was not.

    Raises:
        UserError: if it is unreadable.
    """
    return str(_description(folder / ADAPTER_FILE).get("base", ""))


def _description(path: Path) -> JsonObject:
    """What an adapter belongs to, as `save_adapter` wrote it."""
    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {}).get(_DESCRIPTION, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error
        raise UserError(
            f"{path}: not a readable adapter ({why}); give the directory `adapter` of a run"
        ) from None


def load_adapter(policy: Model, folder: Path) -> None:
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
