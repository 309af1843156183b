"""Gemma 2 on Tunix: architecture, mesh, weights from safetensors or at random."""

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from tunix.models.gemma import model as gemma
from tunix.models.gemma import params_safetensors

from gemma2_grpo.config import UserError
from gemma2_grpo.engine.forward import Network, network_of

MESH_AXES = ("fsdp", "tp")
_SIZES = (
    "num_hidden_layers vocab_size hidden_size intermediate_size num_attention_heads head_dim "
    "num_key_value_heads final_logit_softcapping attn_logit_softcapping sliding_window"
).split()


def make_mesh(shape: tuple[int, int]) -> Mesh:
    """Lays the first `fsdp x tp` devices out as a mesh with those axes.

    Raises:
        UserError: if there are fewer devices.
    """
    needed, present = shape[0] * shape[1], jax.device_count()
    if needed > present:
        raise UserError(
            f"mesh_shape = {list(shape)} needs {needed} devices but {present} "
            f"({jax.default_backend()}) are present; choose a mesh of at most {present}"
        )
    return Mesh(np.asarray(jax.devices()[:needed]).reshape(shape), MESH_AXES)


def mesh_shape_at_hand(wanted: tuple[int, int], architecture: gemma.ModelConfig) -> tuple[int, int]:
    """The wanted mesh where there are devices for it, else one of all devices there are.

    As many of them as the KV heads allow go along tp, since a smaller cache is a faster decoder.
    """
    present = jax.local_device_count()
    if wanted[0] * wanted[1] <= present:
        return wanted
    tp = math.gcd(present, architecture.num_kv_heads, architecture.num_heads)
    return present // tp, tp


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Rows over the fsdp axis where they divide, else on every device."""
    divides = rows % mesh.shape["fsdp"] == 0
    return NamedSharding(mesh, PartitionSpec("fsdp") if divides else PartitionSpec())


@contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Tells Tunix's models over which mesh to shard their activations.

    They read it from where only this way of entering a mesh puts it. JAX deprecates the way, but
    under `jax.set_mesh` activations would not be sharded at all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        mesh.__enter__()
    try:
        yield
    finally:
        mesh.__exit__(None, None, None)


def read_architecture(directory: Path) -> gemma.ModelConfig:
    """Reads the architecture of a Gemma 2 of any size from its Hugging Face config.json.

    Raises:
        UserError: if the file is missing, or describes what Tunix's Gemma does not compute.
    """
    values = _read_config(directory)
    fixed: dict[str, Any] = {
        "model_type": "gemma2",
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }
    for name, only in fixed.items():
        if values.get(name, only) != only:
            raise UserError(
                f"{directory / 'config.json'}: {name} = {values[name]!r} is not supported; "
                f"only {only!r} is"
            )
    missing = [name for name in _SIZES if name not in values]
    if missing:
        raise UserError(
            f"{directory / 'config.json'}: lacks {', '.join(missing)}; is it a Gemma 2?"
        )
    # Written flat up to transformers 4, nested from 5 on.
    theta = values.get("rope_theta") or values.get("rope_parameters", {}).get("rope_theta", 10_000)
    if theta != 10_000:
        raise UserError(f"{directory / 'config.json'}: rope_theta = {theta} is not supported")
    layers = values["num_hidden_layers"]
    kinds = (gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL)
    return gemma.ModelConfig(
        num_layers=layers,
        num_embed=values["vocab_size"],
        embed_dim=values["hidden_size"],
        hidden_dim=values["intermediate_size"],
        num_heads=values["num_attention_heads"],
        head_dim=values["head_dim"],
        num_kv_heads=values["num_key_value_heads"],
        final_logit_softcap=values["final_logit_softcapping"],
        attn_logits_soft_cap=values["attn_logit_softcapping"],
        sliding_window_size=values["sliding_window"],
        attention_types=tuple(kinds[i % 2] for i in range(layers)),
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable model configuration ({error})") from None
    return values


def query_scale(directory: Path) -> float:
    """Factor on the query weights that makes Tunix's attention scale the model's own.

    Tunix divides by sqrt(head_dim); Gemma 2 by sqrt(query_pre_attn_scalar), which is the same
    number for 2B and 9B but not for 27B.
    """
    values = _read_config(directory)
    scalar = values.get("query_pre_attn_scalar", values["head_dim"])
    return float(np.sqrt(values["head_dim"] / scalar))


def load_weights(directory: Path, dtype: str, mesh: Mesh) -> gemma.Gemma:
    """Loads a directory of HF safetensors, in one file or many, onto the mesh.

    Tensors are mapped from the files into host memory, cast there and then placed on their
    shards, so that no chip ever holds the whole model.

    Raises:
        UserError: if files or tensors are missing or unreadable.
    """
    architecture = read_architecture(directory)
    check_heads(architecture, mesh)
    check_tensors(directory, architecture)
    model = params_safetensors.create_model_from_safe_tensors(
        str(directory), architecture, mesh, jnp.dtype(dtype)
    )
    return _prepare(model, query_scale(directory))


def random_weights(
    architecture: gemma.ModelConfig, dtype: str, mesh: Mesh, seed: int
) -> gemma.Gemma:
    """Builds a Gemma 2 with random weights, on its shards from the start.

    Tunix initialises the MLP kernels to zero, with which nothing could be learned, and the rest
    with a fixed deviation; here every matrix is drawn with the deviation 1/sqrt(fan-in), and the
    embedding, which is scaled by sqrt(width) on the way in, with 0.02.
    """
    check_heads(architecture, mesh)
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: gemma.Gemma(architecture, rngs=nnx.Rngs(0)))
    )
    shardings = dict(nnx.to_flat_state(nnx.get_named_sharding(abstract, mesh)))

    def draw(index: int, path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        shape, scale = variable.get_value().shape, _initial_scale(path, variable.get_value().shape)
        key = jax.random.fold_in(jax.random.key(seed), index)
        return variable.replace(_normal(shape, scale, dtype, shardings[path].get_value())(key))

    flat = nnx.to_flat_state(abstract)
    drawn = [(path, draw(i, path, variable)) for i, (path, variable) in enumerate(flat)]
    return _prepare(nnx.merge(graphdef, nnx.from_flat_state(drawn)), 1.0)


@cache
def _normal(
    shape: tuple[int, ...], scale: float, dtype: str, sharding: jax.sharding.Sharding
) -> Callable[[jax.Array], jax.Array]:
    """Program that draws a matrix, compiled once for all layers."""
    return jax.jit(
        lambda key: (scale * jax.random.normal(key, shape)).astype(dtype), out_shardings=sharding
    )


def _initial_scale(path: tuple[Any, ...], shape: tuple[int, ...]) -> float:
    if "scale" in path:  # RMSNorm multiplies by 1 + scale.
        return 0.0
    if "input_embedding" in path:
        return 0.02
    if "attn_vec_einsum" in path:
        return float(np.prod(shape[:2])) ** -0.5
    return float(shape[-2]) ** -0.5


def check_heads(architecture: gemma.ModelConfig, mesh: Mesh) -> None:
    """Refuses a mesh over which the heads do not divide.

    Raises:
        UserError: naming the head counts and the tensor-parallel sizes that divide them.
    """
    tp, kv = mesh.shape["tp"], architecture.num_kv_heads
    if kv % tp or architecture.num_heads % tp:
        sizes = [n for n in range(1, kv + 1) if kv % n == 0 and architecture.num_heads % n == 0]
        raise UserError(
            f"mesh_shape[1] = {tp} does not divide the {kv} KV heads and "
            f"{architecture.num_heads} query heads; use one of {sizes}"
        )


def stored_dtype(directory: Path) -> str:
    """Type in which a model's weights are stored: `bfloat16`, or `float32` for any other.

    Raises:
        UserError: if the first file cannot be read.
    """
    path = min(directory.glob("*.safetensors"))
    try:
        with safe_open(path, framework="numpy") as tensors:
            kind = tensors.get_slice(next(iter(tensors.keys()))).get_dtype()
    except (SafetensorError, OSError, StopIteration) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    return "bfloat16" if kind == "BF16" else "float32"


def check_tensors(directory: Path, architecture: gemma.ModelConfig) -> None:
    """Compares names, shapes and types of the tensors with what the architecture needs.

    Raises:
        UserError: naming the first that is missing or has another shape.
    """
    present: dict[str, list[int]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as tensors:
                slices = {name: tensors.get_slice(name) for name in list(tensors.keys())}
                present |= {name: part.get_shape() for name, part in slices.items()}
                kinds = {part.get_dtype() for part in slices.values()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        if len(kinds) > 1:  # Tunix's reader takes the type of the first tensor for all.
            raise UserError(f"{path}: mixed tensor types {sorted(kinds)}; convert it to one type")
    needed = tensor_shapes(architecture)
    missing = sorted(needed.keys() - present.keys())
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} tensors are missing, such as {missing[0]}; "
            "a shard may not have been downloaded"
        )
    for name, shape in needed.items():
        if present[name] != shape:
            raise UserError(
                f"{directory}: {name} has the shape {present[name]}, but config.json means {shape}"
            )


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
        "input_layernorm": [width],
        "post_attention_layernorm": [width],
        "pre_feedforward_layernorm": [width],
        "post_feedforward_layernorm": [width],
    }
    shapes = {
        "model.embed_tokens.weight": [architecture.num_embed, width],
        "model.norm.weight": [width],
    }
    for i in range(architecture.num_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


class _Float32RMSNorm(gemma.RMSNorm):
    """RMSNorm computed in float32, as Gemma 2 was trained.

    Tunix's runs in the type of the activations; in bfloat16 that loses what the norm is for.
    Source: Gemma2RMSNorm in transformers, which casts to float32, adds 1 to the scale there, and
    casts back.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
        scale = 1 + self.scale.get_value().astype(jnp.float32)
        return (wide * inverse * scale).astype(x.dtype)


def _prepare(model: gemma.Gemma, scale: float) -> gemma.Gemma:
    for _, module in nnx.iter_graph(model):
        if type(module) is gemma.RMSNorm:
            # Past nnx, which would record the class as one more attribute.
            object.__setattr__(module, "__class__", _Float32RMSNorm)
        elif isinstance(module, gemma.Attention) and scale != 1.0:
            name = "qkv_einsum" if module.use_qkv_einsum else "q_einsum"
            weight = getattr(module, name).w
            factor = jnp.array([scale, 1.0, 1.0]).reshape(3, 1, 1, 1) if "kv" in name else scale
            weight.set_value((weight.get_value() * factor).astype(weight.get_value().dtype))
    return model


def plain_network(architecture: gemma.ModelConfig) -> Network:
    """The static half of a model without adapters, made without any weights."""
    model = nnx.eval_shape(lambda: gemma.Gemma(architecture, rngs=nnx.Rngs(0)))
    return network_of(_prepare(model, 1.0))
