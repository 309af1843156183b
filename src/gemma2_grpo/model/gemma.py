"""Gemma's forward pass, from tokens to hidden states; the output head is in `logprobs`.

There is one, for sampling, updates, the reference, prefill and supervised training. Tunix's model
only holds the variables: its attention knows one key per row and slot, so that a prompt has to be
copied, or computed again, for each of its completions, and its sliding window compares positions
with slots.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemma2_grpo.model.architecture import Architecture
from gemma2_grpo.model.attention import KeyValues, LayerCache, Visible, attend, visible
from gemma2_grpo.model.lora import Adapter, adapted
from gemma2_grpo.model.mesh import constrained
from gemma2_grpo.model.weights import Forward, Remat, Weights

Stream = Float[Array, "R T D"]
"""The residual stream, or what a layer reads of it and adds to it."""

Prefix = tuple[KeyValues, ...]
"""KV cache of prompts, one [B, P, K, H] per layer."""

Variables = Mapping[str, Array]
"""Variables by the names that they have in `layout`, such as "attn/q_einsum/w", next to those of
their adapters, "attn/q_einsum/w_lora_a" and "..._b"."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def run_from_start(
    forward: Forward, weights: Weights, tokens: Int[Array, "R T"]
) -> tuple[Stream, Prefix]:
    """Hidden states and KV cache of right-padded rows that begin at position 0.

    Padding comes last, so that no real token ever sees it.
    """
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    causal = jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))
    window = forward.architecture.sliding_window_size
    seen = Visible(positions, own=visible(causal, positions, positions, window))
    nothing = [LayerCache()] * forward.architecture.num_layers
    return hidden_states(forward, weights, tokens, seen, nothing)


def hidden_states(
    forward: Forward,
    weights: Weights,
    tokens: Int[Array, "R T"],
    seen: Visible,
    caches: Sequence[LayerCache],
) -> tuple[Stream, Prefix]:
    """Runs the model up to its final norm.

    Args:
        forward: How it is run.
        weights: Its variables.
        tokens: Token ids.
        seen: Position of each token, and what it may attend to.
        caches: Keys and values from before, by layer.

    Returns:
        Hidden states after the final norm, and each layer's keys and values of the rows.
    """
    outside, layers = _named_variables(forward.architecture, weights)
    embedding = outside["embedder/input_embedding"]
    # Gemma scales embeddings, which are also the output head, by a sqrt(D) that is rounded to
    # their type.
    x = embedding[tokens] * jnp.sqrt(embedding.shape[-1]).astype(embedding.dtype)
    x = _stream(forward, x)
    kept = []
    kinds = forward.architecture.is_sliding
    for layer, is_sliding, cache in zip(layers, kinds, caches, strict=True):
        run = _recomputed(forward, "decoder", partial(_decoder_layer, forward, is_sliding))
        x, own = run(layer, x, seen, cache)
        kept.append(own)
    return rms_norm(x, outside["final_norm/scale"]), tuple(kept)


def _named_variables(
    architecture: Architecture, weights: Weights
) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """Variables outside of the layers, and those of each layer, by name."""
    outside: dict[str, Array] = {}
    layers: list[dict[str, Array]] = [{} for _ in range(architecture.num_layers)]
    # Adapters are kept in float32. In that type they would promote the whole residual stream of a
    # bfloat16 model, so they are cast where they are used.
    lora = jax.tree.map(lambda x: x.astype(weights.embedding.dtype), weights.lora)
    for state in (weights.base, lora):
        for path, variable in nnx.to_flat_state(state):
            name, into = "/".join(map(str, path)), outside
            if name.startswith("layers/"):
                _, i, name = name.split("/", 2)
                into = layers[int(i)]
            into[name] = variable.get_value()
    return outside, layers


def _recomputed(forward: Forward, remat: Remat, function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, recomputed in the backward pass if that is what is asked for."""
    return jax.checkpoint(function) if forward.remat == remat else function


def _decoder_layer(
    forward: Forward,
    is_sliding: bool,
    layer: Variables,
    x: Stream,
    seen: Visible,
    cache: LayerCache,
) -> tuple[Stream, KeyValues]:
    """Attention and MLP, each between two norms and added to the residual stream."""
    attention = _recomputed(forward, "block", partial(_attention, forward, is_sliding))
    mlp = _recomputed(forward, "block", partial(_mlp, forward))
    y = rms_norm(x, layer["pre_attention_norm/scale"])
    y, own = attention(layer, y, seen, cache)
    x = rms_norm(y, layer["post_attn_norm/scale"]) + x
    y = mlp(layer, rms_norm(x, layer["pre_ffw_norm/scale"]))
    return rms_norm(y, layer["post_ffw_norm/scale"]) + x, own


def _attention(
    forward: Forward,
    is_sliding: bool,
    layer: Variables,
    x: Stream,
    seen: Visible,
    cache: LayerCache,
) -> tuple[Stream, KeyValues]:
    """Attention to the rows' own tokens and to the prompts that they share."""
    rope = forward.architecture.sliding_rope if is_sliding else forward.architecture.global_rope
    queries, own = _project(forward, layer, x, seen.positions, rope)
    if cache.own is not None:
        start = (0, seen.slot, 0, 0)
        own = KeyValues(
            jax.lax.dynamic_update_slice(cache.own.keys, own.keys, start),
            jax.lax.dynamic_update_slice(cache.own.values, own.values, start),
        )
    parts, masks = (own,), (seen.own[is_sliding],)
    if cache.prefix is not None and seen.prefix is not None:
        parts, masks = (*parts, cache.prefix), (*masks, seen.prefix[is_sliding])
    encoded = attend(queries, parts, masks, forward.architecture.attn_logits_soft_cap)
    output = _product(forward, layer, "attn/attn_vec_einsum/w", encoded.reshape(*x.shape[:2], -1))
    return _stream(forward, output), own


def _project(
    forward: Forward,
    layer: Variables,
    x: Stream,
    positions: Int[Array, "R T"],
    rope: tuple[float, float],
) -> tuple[Float[Array, "R T N H"], KeyValues]:
    """Rotated and scaled queries, rotated keys, and values."""
    if "attn/qkv_einsum/w" in layer:
        queries, keys, values = _heads(forward, layer, "attn/qkv_einsum/w", x)
    else:
        [queries] = _heads(forward, layer, "attn/q_einsum/w", x)
        keys, values = _heads(forward, layer, "attn/kv_einsum/w", x)
    queries, keys, values = (
        constrained(each, ("fsdp", None, "tp", None), forward.mesh)
        for each in (queries, keys, values)
    )
    if forward.architecture.has_qk_norm:
        queries = rms_norm(queries, layer["attn/q_norm/scale"])
        keys = rms_norm(keys, layer["attn/k_norm/scale"])
    queries, keys = rotated(queries, positions, *rope), rotated(keys, positions, *rope)
    return queries * forward.architecture.query_scalar**-0.5, KeyValues(keys, values)


def _heads(
    forward: Forward, layer: Variables, name: str, x: Stream
) -> list[Float[Array, "R T N H"]]:
    """Projections by one weight [N, D, H], or by several that are stacked along a first axis.

    Heads come first among the columns: they lie over tp, and columns in another order would
    have to be gathered on every device.
    """
    weight, adapter = layer[name], _adapter(forward, layer, name)
    heads, width, size = weight.shape[-3:]
    parts = weight.reshape(-1, heads, width, size)
    if adapter is not None:
        a, b = adapter
        b = b.reshape(len(b), len(parts), heads, size).swapaxes(1, 2).reshape(len(b), -1)
        adapter = a, b
    columns = parts.transpose(2, 1, 0, 3).reshape(width, -1)
    output = adapted(x, columns, adapter, forward.are_merged)
    output = output.reshape(*x.shape[:2], heads, len(parts), size)
    return [output[:, :, :, i] for i in range(len(parts))]


def _mlp(forward: Forward, layer: Variables, x: Stream) -> Stream:
    """Gated MLP (GeGLU, arXiv:2002.05202), with the tanh approximation of GELU."""
    gate = _product(forward, layer, "mlp/gate_proj/kernel", x)
    up = _product(forward, layer, "mlp/up_proj/kernel", x)
    activations = constrained(jax.nn.gelu(gate) * up, ("fsdp", None, "tp"), forward.mesh)
    return _stream(forward, _product(forward, layer, "mlp/down_proj/kernel", activations))


def _product(
    forward: Forward, layer: Variables, name: str, x: Float[Array, "R T I"]
) -> Float[Array, "R T O"]:
    """Multiplies by a weight [..., O], whose other axes are the inputs, with its adapter."""
    weight = layer[name].reshape(-1, layer[name].shape[-1])
    return adapted(x, weight, _adapter(forward, layer, name), forward.are_merged)


def _adapter(forward: Forward, layer: Variables, name: str) -> Adapter | None:
    """The adapter of a weight, if it has one."""
    if f"{name}_lora_a" not in layer:
        return None
    a, b = layer[f"{name}_lora_a"], layer[f"{name}_lora_b"]
    return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1) * forward.lora_scale


def _stream(forward: Forward, x: Stream) -> Stream:
    """Shards what is added to the residual stream."""
    return constrained(x, ("fsdp", None, None if forward.is_sampling else "tp"), forward.mesh)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"]) -> Float[Array, "... D"]:
    """RMSNorm computed in float32, as Gemma was trained.

    Source: Gemma2RMSNorm in transformers, which casts to float32, adds 1 to the scale there, and
    casts back. In bfloat16, as in Tunix's layers, the norm would lose what it is for.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * inverse * (1 + scale.astype(jnp.float32))).astype(x.dtype)


def rotated(
    x: Float[Array, "R T N H"], positions: Int[Array, "R T"], theta: float, factor: float
) -> Float[Array, "R T N H"]:
    """Rotary position embedding (RoPE, arXiv:2104.09864), on halves instead of neighbours.

    Args:
        x: Queries or keys.
        positions: Position of each token.
        theta: Base of the wavelengths.
        factor: Positions are divided by it (linear interpolation, arXiv:2306.15595).
    """
    size = x.shape[-1]
    wavelengths = factor * theta ** (2 * jnp.arange(size // 2) / size)
    angles = positions[:, :, None, None] / wavelengths
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
