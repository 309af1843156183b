"""Pretrained weights: Hugging Face safetensors, read slice by slice in the layout of Tunix."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import psutil
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open
from tunix.models.gemma import model as gemma

from gemma2_grpo.errors import UserError
from gemma2_grpo.model.find import read_index

NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Norms of a layer, as Tunix and as transformers name them."""

_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}

VariablePath = tuple[Any, ...]
Index = tuple[slice, ...]
Tensors = Mapping[str, Any]
"""Tensors by their names in transformers, mapped from their files; indexing reads a slice."""


@contextmanager
def open_tensors(directory: Path) -> Iterator[Tensors]:
    """Maps the tensors of a directory, without reading any.

    Where there is a `model.safetensors.index.json` it says which file has which tensor, and other
    files are left alone.

    Raises:
        UserError: for files that are missing or unreadable, and for a tensor that two files have.
    """
    index = read_index(directory)
    files = {path.name for path in directory.glob("*.safetensors")}
    found, owners = {}, {}
    with ExitStack() as stack:
        for file in sorted(files if index is None else set(index.values())):
            path = directory / file
            try:
                tensors = stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a readable safetensors file ({error})") from None
            for name in list(tensors.keys()):
                if index is not None and index.get(name) != file:
                    continue
                if name in found:
                    raise UserError(
                        f"{directory}: {owners[name]} and {file} both have {name}; keep one of them"
                    )
                found[name], owners[name] = tensors.get_slice(name), file
        yield found


def check_tensors(directory: Path, tensors: Tensors, architecture: gemma.ModelConfig) -> None:
    """Compares names, shapes and types of the tensors with what the architecture needs.

    Raises:
        UserError: for the first difference.
    """
    needed = tensor_shapes(architecture)
    missing = sorted(needed.keys() - tensors.keys())
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} tensors are missing, such as {missing[0]}; "
            "a shard may not have been downloaded"
        )
    for name, shape in needed.items():
        present, kind = tensors[name].get_shape(), tensors[name].get_dtype()
        if present != shape:
            raise UserError(
                f"{directory}: {name} has the shape {present}, but config.json means {shape}"
            )
        if kind not in _ITEM_BYTES:
            raise UserError(
                f"{directory}: {name} has the type {kind}; only {', '.join(_ITEM_BYTES)} are read"
            )


def stored_dtype(directory: Path) -> str:
    """Type in which a model's weights are stored: `bfloat16`, or `float32` for any other.

    Raises:
        UserError: for files that are missing or unreadable.
    """
    with open_tensors(directory) as tensors:
        kinds = {part.get_dtype() for part in tensors.values()}
    return "bfloat16" if kinds == {"BF16"} else "float32"


def tensor_shapes(architecture: gemma.ModelConfig) -> dict[str, list[int]]:
    """Tensors of the architecture as transformers names them; linear layers are [out, in]."""
    width, hidden = architecture.embed_dim, architecture.hidden_dim
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    layer = {
        "self_attn.q_proj": [queries, width],
        "self_attn.k_proj": [keys, width],
        "self_attn.v_proj": [keys, width],
        "self_attn.o_proj": [width, queries],
        "mlp.gate_proj": [hidden, width],
        "mlp.up_proj": [hidden, width],
        "mlp.down_proj": [width, hidden],
        **{name: [width] for name in NORMS.values()},
    }
    shapes = {
        "model.embed_tokens.weight": [architecture.num_embed, width],
        "model.norm.weight": [width],
    }
    for i in range(architecture.num_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


@dataclass(frozen=True)
class Pretrained:
    """The variables of Tunix's Gemma, of which each device is given its shard and nothing else."""

    tensors: Tensors
    head_dim: int
    query_scale: float
    """What the query weights are multiplied by, in float32."""

    def place(self, path: VariablePath, like: jax.ShapeDtypeStruct) -> jax.Array:
        """Puts a variable on its devices, for each of which only its own shard is read.

        Args:
            path: Of the variable within the model.
            like: Its shape, type and sharding.
        """
        value = jax.make_array_from_callback(
            like.shape,
            cast(Sharding, like.sharding),
            lambda index: self.read(path, cast(Index, index), like.dtype),
            dtype=like.dtype,
        )
        # Else the host would hold whatever has not been transferred yet.
        return value.block_until_ready()

    def read(self, path: VariablePath, index: Index, dtype: Any) -> np.ndarray:
        """Reads a slice of a variable and casts it.

        A linear layer is [out, in] in the file and [in, out] here. Queries, keys and values are
        [N * H, D] there and [N, D, H] here, several of them stacked; the attention's output is
        [D, N * H] there and [N, H, D] here.

        Args:
            path: Of the variable within the model.
            index: One slice for each of its dimensions.
            dtype: What to cast to.
        """
        match path:
            case ("embedder", *_):
                values = self._take("model.embed_tokens", index)
            case ("final_norm", *_):
                values = self._take("model.norm", index)
            case ("layers", i, "attn", "attn_vec_einsum", _):
                heads, within, width = index
                values = self._take(f"{_layer(i)}.self_attn.o_proj", (width, self._span(heads)))
                values = values.reshape(len(values), -1, self.head_dim).transpose(1, 2, 0)
                values = values[:, within]
            case ("layers", i, "attn", "q_einsum", _):
                values = self._heads(i, "q", index)
            case ("layers", i, "attn", name, _):  # kv_einsum or qkv_einsum
                letters = name.removesuffix("_einsum")[index[0]]
                heads = [self._heads(i, letter, index[1:]) for letter in letters]
                values = np.stack([part.astype(dtype, copy=False) for part in heads])
            case ("layers", i, "mlp", name, _):
                values = self._take(f"{_layer(i)}.mlp.{name}", index[::-1]).T
            case ("layers", i, norm, _):
                values = self._take(f"{_layer(i)}.{NORMS[norm]}", index)
            case _:
                raise ValueError(f"no such variable: {path}")
        return values.astype(dtype, copy=False)

    def _heads(self, layer: int, letter: str, index: Index) -> np.ndarray:
        """Reads query, key or value weights [N, D, H] from [N * H, D]."""
        heads, width, within = index
        name = f"{_layer(layer)}.self_attn.{letter}_proj"
        rows = self._take(name, (self._span(heads), width))
        if letter == "q" and self.query_scale != 1.0:
            rows = rows.astype(np.float32) * np.float32(self.query_scale)
        return rows.reshape(-1, self.head_dim, rows.shape[1]).transpose(0, 2, 1)[:, :, within]

    def _span(self, heads: slice) -> slice:
        """Rows or columns of some heads, where all heads lie one after the other."""
        bounds = (heads.start, heads.stop)
        return slice(*(x if x is None else x * self.head_dim for x in bounds))

    def _take(self, name: str, index: Index) -> np.ndarray:
        return self.tensors[f"{name}.weight"][index]


def _layer(number: int) -> str:
    return f"model.layers.{number}"


def check_host_memory(
    directory: Path, tensors: Tensors, variables: Sequence[jax.ShapeDtypeStruct]
) -> None:
    """Refuses to begin what the host has no memory to finish.

    Beside the mapping of the files, which the system takes back as it needs, loading holds one
    tensor at a time; where the devices are CPUs, their shards as well.

    Args:
        directory: Of the model, for the message.
        tensors: What is going to be read.
        variables: Shape, type and sharding of each variable.

    Raises:
        UserError: saying how much is needed and how much there is.
    """
    resident, largest, dtype = 0, 0, np.dtype(variables[0].dtype)
    for like in variables:
        sharding = cast(Sharding, like.sharding)
        devices = sharding.addressable_devices
        local = math.prod(sharding.shard_shape(like.shape)) * len(devices)
        largest = max(largest, local)
        if any(device.platform == "cpu" for device in devices):
            resident += local * dtype.itemsize
    # The embedding is the largest tensor. It is read in its own type, and then converted.
    stored = _ITEM_BYTES[tensors["model.embed_tokens.weight"].get_dtype()]
    copy = stored + (dtype.itemsize if stored != dtype.itemsize else 0)
    needed, free = resident + largest * copy, available_bytes()
    if needed > free:
        raise UserError(
            f"{directory}: loading it in {dtype} takes {needed / 1e9:.1f} GB of host memory, but "
            f"{free / 1e9:.1f} GB are free; free some, or take a machine with more"
        )


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process can still take, by the machine and by its container's limit."""
    machine = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text(encoding="utf-8"))
        used = dict(
            line.split()
            for line in (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines()
        )
        return min(machine, limit - int(used["anon"]))
    except (OSError, ValueError, LookupError):  # Another system, or no limit.
        return machine
