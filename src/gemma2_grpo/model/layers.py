"""Gemma's layers as Tunix has them, with the same variables, run for speed.

Tunix's attention knows one key per row and slot, so that a prompt has to be copied, or computed
again, for each of its completions, and its sliding window compares positions with slots. Adapters
that Qwix runs beside each matrix come to a third more operations, and to transposed copies of
all activations in the backward pass.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.models.gemma import model as gemma

from gemma2_grpo.model.attention import KeyValues, LayerCache, Visible, attend

Remat = Literal["none", "block", "decoder"]


class SharedPrefixAttention(gemma.Attention):
    """Tunix's attention for `LayerCache` and `Visible`."""

    are_merged: bool
    mesh: Mesh | None
    activations: gemma.ShardingConfig

    def block(self, x: Any, segment_pos: Any, cache: Any, attn_mask: Any) -> Any:
        """Runs one attention block; named and called as Tunix does.

        Args:
            x: Input [R, T, D].
            segment_pos: Positions [R, T].
            cache: A `LayerCache`.
            attn_mask: A `Visible`.

        Returns:
            Keys and values of the rows, with the new ones, and the output [R, T, D].
        """
        seen, cache = cast(Visible, attn_mask), cast(LayerCache, cache)
        queries, own = self._project(x, segment_pos)
        if cache.own is not None:
            start = (0, seen.slot, 0, 0)
            own = KeyValues(
                jax.lax.dynamic_update_slice(cache.own.keys, own.keys, start),
                jax.lax.dynamic_update_slice(cache.own.values, own.values, start),
            )
        kind = int(self.attn_type == gemma.AttentionType.LOCAL_SLIDING)
        parts, masks = (own,), (seen.own[kind],)
        if cache.prefix is not None and seen.prefix is not None:
            parts, masks = (*parts, cache.prefix), (*masks, seen.prefix[kind])
        encoded = cast(jax.Array, attend(queries, parts, masks, self.attn_logits_soft_cap))
        weight = self.attn_vec_einsum.w.get_value()
        output = adapted(
            encoded.reshape(*x.shape[:2], -1),
            weight.reshape(-1, weight.shape[-1]),
            _adapter(self.attn_vec_einsum, "w"),
            self.are_merged,
        )
        return own, constrained(output, self.activations.act_btd, self.mesh)

    def _project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, KeyValues]:
        """Rotated and scaled queries [R, T, N, H], rotated keys and values [R, T, K, H]."""
        if self.use_qkv_einsum:
            queries, keys, values = self._heads(x, self.qkv_einsum)
        else:
            [queries] = self._heads(x, self.q_einsum)
            keys, values = self._heads(x, self.kv_einsum)
        queries, keys, values = (
            constrained(each, self.activations.act_btnh, self.mesh)
            for each in (queries, keys, values)
        )
        queries = gemma.apply_rope(queries, positions, head_dim=self.head_dim)
        keys = gemma.apply_rope(keys, positions, head_dim=self.head_dim)
        return queries * self.head_dim**-0.5, KeyValues(keys, values)

    def _heads(self, x: jax.Array, module: Any) -> list[jax.Array]:
        """Projections of [R, T, D] by one weight [..., N, D, H], as a list of [R, T, N, H].

        Heads come first among the columns: they lie over tp, and columns in another order would
        have to be brought together on every device.
        """
        weight, adapter = module.w.get_value(), _adapter(module, "w")
        heads, width, size = weight.shape[-3:]
        parts = weight.reshape(-1, heads, width, size)
        if adapter is not None:
            a, b = adapter
            b = b.reshape(len(b), len(parts), heads, size).swapaxes(1, 2).reshape(len(b), -1)
            adapter = a, b
        flat = parts.transpose(2, 1, 0, 3).reshape(width, -1)
        output = adapted(x, flat, adapter, self.are_merged)
        output = output.reshape(*x.shape[:2], heads, len(parts), size)
        return [output[:, :, :, i] for i in range(len(parts))]


class AdaptedFeedForward(gemma.FeedForward):
    """Tunix's feed-forward block."""

    are_merged: bool
    mesh: Mesh | None
    activations: gemma.ShardingConfig

    def block(self, x: Any) -> Any:
        """Runs one block on [R, T, D]; named and called as Tunix does."""
        gate, up = self._times(x, self.gate_proj), self._times(x, self.up_proj)
        axes = self.activations.act_btf
        activations = constrained(nnx.gelu(gate) * up, axes, self.mesh)
        output = self._times(activations, self.down_proj)
        return constrained(output, self.activations.act_btd, self.mesh)

    def _times(self, x: jax.Array, module: Any) -> jax.Array:
        return adapted(x, module.kernel.get_value(), _adapter(module, "kernel"), self.are_merged)


class ShardedEmbedder(gemma.Embedder):
    """Tunix's embedder."""

    are_merged: bool
    mesh: Mesh | None
    activations: gemma.ShardingConfig

    def encode(self, x: Any) -> Any:
        """Embeds token ids [R, T] as [R, T, D]; named and called as Tunix does."""
        rows = self.input_embedding.get_value()[x]
        rows = rows * jnp.sqrt(rows.shape[-1]).astype(rows.dtype)
        return constrained(rows, self.activations.act_btd, self.mesh)


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


def with_float32_norms(model: gemma.Gemma) -> gemma.Gemma:
    """Swaps the norms of a model for norms in float32, in place."""
    for _, module in nnx.iter_graph(model):
        if type(module) is gemma.RMSNorm:
            # Past nnx, which would record the class as one more attribute.
            object.__setattr__(module, "__class__", _Float32RMSNorm)
    return model


_FASTER = {
    gemma.Attention: SharedPrefixAttention,
    gemma.Embedder: ShardedEmbedder,
    gemma.FeedForward: AdaptedFeedForward,
}


def constrained(x: jax.Array, axes: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    """Lays activations over a mesh; without one, they stay as they are.

    Tunix's own does nothing where the default device is a CPU, so that programs for a CPU, and
    those that are compiled there for another machine, would not be laid out; and it refuses sizes
    that do not divide, such as a single row over two devices.

    Args:
        x: Activations.
        axes: Axis of the mesh for each dimension, or None.
        mesh: Mesh of the weights.
    """
    if mesh is None:
        return x
    spec = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def faster(
    model: gemma.Gemma,
    remat: Remat,
    *,
    are_merged: bool,
    is_sampling: bool,
    mesh: Mesh | None,
) -> gemma.Gemma:
    """The same variables in a graph of the layers above.

    Args:
        model: A model of Tunix's own layers, which stays as it is.
        remat: What the backward pass recomputes instead of keeping.
        are_merged: The base weights that the graph will be run with contain the adapters
            already; these are then only there for their gradients.
        is_sampling: The residual stream lies whole on every device of a tp group. Of one token
            a row it is small, and to bring it together before each product takes longer than
            the product.
        mesh: Over which activations are laid.
    """
    copy = with_remat(model, remat)
    shardings = gemma.ShardingConfig.get_default_sharding(is_sampling)
    for _, module in nnx.iter_graph(copy):
        if type(module) in _FASTER:
            # Past nnx, which would record the class as one more attribute.
            object.__setattr__(module, "__class__", _FASTER[type(module)])
            module.are_merged, module.mesh, module.activations = are_merged, mesh, shardings
    return copy


def with_remat(model: gemma.Gemma, remat: Remat) -> gemma.Gemma:
    """The same variables in a graph that recomputes activations as named.

    Tunix fixes this when the model is built, but its remat cannot be traced while decoding, so
    sampling and training need two graphs over one set of weights.
    """
    kind = gemma.RematConfig[remat.upper()]
    copy = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_graph(copy):
        if isinstance(module, gemma.Attention):
            module.remat_config = kind
        elif isinstance(module, gemma.Gemma | gemma.DecoderLayer | gemma.FeedForward):
            module.config = dataclasses.replace(module.config, remat_config=kind)
    return copy


def _adapter(module: Any, name: str) -> tuple[jax.Array, jax.Array] | None:
    """Matrices [I, r] and [r, O] of a module's adapter, if it has one."""
    a = getattr(module, f"{name}_lora_a", None)
    if a is None:
        return None
    a, b = a.get_value(), getattr(module, f"{name}_lora_b").get_value()
    return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1) * module.lora_scale


def adapted(
    x: jax.Array,
    weight: jax.Array,
    adapter: tuple[jax.Array, jax.Array] | None,
    is_merged: bool,
) -> jax.Array:
    """Multiplies by a matrix with its adapter.

    Args:
        x: [..., I].
        weight: [I, O].
        adapter: Matrices [I, r] and [r, O] whose product belongs to the weight.
        is_merged: The weight contains the product already.
    """
    return cast(jax.Array, _adapted(x, weight, adapter, is_merged))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _adapted(x: Any, weight: Any, adapter: Any, is_merged: bool) -> jax.Array:
    y = x @ weight
    return y if adapter is None or is_merged else y + (x @ adapter[0]) @ adapter[1]


def _adapted_forward(x: Any, weight: Any, adapter: Any, is_merged: bool) -> tuple[jax.Array, Any]:
    return _adapted(x, weight, adapter, is_merged), (x, weight, adapter)


def _adapted_backward(is_merged: bool, kept: Any, slope: jax.Array) -> Any:
    x, weight, adapter = kept
    back = jnp.einsum("...o,io->...i", slope, weight)
    # The large operand is the right one, which is then not copied to be transposed.
    flat, flat_slope = x.reshape(-1, x.shape[-1]), slope.reshape(-1, slope.shape[-1])
    # Where the weight is frozen, nobody asks for this and the compiler leaves it out.
    weight_slope = jnp.einsum("mi,mo->io", flat, flat_slope)
    if adapter is None:
        return back, weight_slope, None
    a, b = adapter
    inner = jnp.einsum("...o,ro->...r", slope, b)
    if not is_merged:
        back = back + jnp.einsum("...r,ir->...i", inner, a)
    a_slope = jnp.einsum("mr,mi->ri", inner.reshape(len(flat), -1), flat).T
    b_slope = jnp.einsum("mr,mo->ro", flat @ a, flat_slope)
    return back, weight_slope, (a_slope, b_slope)


_adapted.defvjp(_adapted_forward, _adapted_backward)
