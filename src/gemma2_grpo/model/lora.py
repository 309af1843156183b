"""LoRA adapters on Gemma: adding them, products with them, merging, counting."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import PathParts
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from gemma2_grpo.config import Config, ModelConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.architecture import Architecture
from gemma2_grpo.model.layout import Weight, all_weights, matrix_at
from gemma2_grpo.model.weights import Model, Weights

_INITIALIZERS = {
    # As PEFT's `reset_lora_parameters` calls kaiming_uniform_, with a = sqrt(5): uniform within
    # 1/sqrt(inputs), of variance 1/3 over the inputs.
    "peft": jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    # As Qwix does, of variance 2 over the inputs.
    "qwix": jax.nn.initializers.he_uniform(),
}

Adapter = tuple[Float[Array, "I r"], Float[Array, "r O"]]
"""Matrices A and B, whose product belongs to the weight; B carries LoRA's scale."""


@dataclass(frozen=True)
class AdapterSize:
    """How much of the model is adapted."""

    matrices: int
    """Weight matrices with an adapter; the fused keys and values of a layer count as one."""
    parameters: int


def add_lora(base: Model, config: ModelConfig, mesh: Mesh, seed: int) -> Model:
    """Returns the policy: the base's own weights with trainable float32 adapters.

    Adapters start as no change (B is zero). The base weights are shared, not copied. Names, shapes,
    shardings and random draws are those of Qwix, which has to run a model to find them.

    Args:
        base: The frozen model.
        config: Rank, scale, module patterns and how A is drawn.
        mesh: Mesh on which the base lies.
        seed: Seed of the A matrices.

    Raises:
        UserError: if a pattern matches no weight matrix.
    """
    check_patterns(base.config, config.lora_modules)
    policy = nnx.merge(*nnx.split(base))
    policy.lora_scale = config.lora_scale
    modules, rngs = dict(nnx.iter_modules(policy)), nnx.Rngs(seed)
    pattern = f".*({'|'.join(config.lora_modules)})"
    # The order is that in which the model runs its matrices, and so in which Qwix draws them.
    for path, weight in all_weights(base.config).items():
        if weight.inputs and re.fullmatch(pattern, "/".join(map(str, path[:-1]))):
            _add_adapter(modules[path[:-1]], str(path[-1]), weight, config, mesh, rngs)
    return policy


def _add_adapter(
    module: nnx.Module, name: str, weight: Weight, config: ModelConfig, mesh: Mesh, rngs: nnx.Rngs
) -> None:
    """Adds A and B to a module whose weight has this name, sharded along the axes of the weight."""
    variable: nnx.Param = getattr(module, name)
    value = variable.get_value()
    sizes = {**dict(zip(weight.stacked_axes, value.shape, strict=True)), "r": config.lora_rank}
    mesh_axes = dict(zip(weight.stacked_axes, variable.get_metadata("out_sharding"), strict=True))
    for letter, axes in zip("ab", weight.adapter_axes, strict=True):
        initialise = _INITIALIZERS[config.lora_init] if letter == "a" else jax.nn.initializers.zeros
        # Qwix draws in the type of the base, and takes a key for B too; PEFT draws in float32.
        kind = value.dtype if config.lora_init == "qwix" else jnp.float32
        drawn = initialise(rngs.params(), [sizes[axis] for axis in axes], kind)
        spec = PartitionSpec(*(mesh_axes.get(axis) for axis in axes))
        placed = jax.device_put(drawn.astype(jnp.float32), NamedSharding(mesh, spec))
        setattr(module, f"{name}_lora_{letter}", nnx.LoRAParam(placed, out_sharding=tuple(spec)))


PureState = dict[str, Any]
"""Arrays by the nested names of their variables."""


def adapters_of(policy: Model) -> PureState:
    """The adapters of a policy as nested values, as checkpoints hold them."""
    return nnx.to_pure_dict(nnx.state(policy, nnx.LoRAParam))


def set_adapters(policy: Model, values: PureState) -> None:
    """Puts adapters back that `adapters_of` gave."""
    state = nnx.state(policy, nnx.LoRAParam)
    nnx.replace_by_pure_dict(state, values)
    nnx.update(policy, state)


def check_patterns(architecture: Architecture, patterns: tuple[str, ...]) -> None:
    """Checks, without any weights, that each pattern matches a module that can be adapted.

    Raises:
        UserError: naming the pattern and the modules there are.
    """
    weights = {"/".join(map(str, p[:-1])): w for p, w in all_weights(architecture).items()}
    matrices = {path for path, w in weights.items() if w.inputs and path.startswith("layers/")}
    for pattern in patterns:
        try:
            matched = {path for path in weights if re.fullmatch(f".*({pattern})", path)}
        except re.error as error:
            raise UserError(f"lora_modules: {pattern!r} is not a pattern ({error})") from None
        if matched.isdisjoint(matrices):
            raise UserError(
                f"lora_modules: {pattern!r} matches no weight matrix; those of a layer are "
                f"{', '.join(sorted(p for p in matrices if p.startswith('layers/0/')))}"
            )
        # The head multiplies with the embedding itself.
        if "embedder" in matched:
            raise UserError(
                f"lora_modules: {pattern!r} matches the embedder, which takes no adapter; name "
                "weight matrices of the layers, such as attn/attn_vec_einsum"
            )


def samples_merged(config: Config) -> bool:
    """Whether the adapters are added into a copy of the weights before sampling.

    In bfloat16 a weight keeps 8 bits, so that small changes of it would be rounded away.
    """
    merge = config.rollout.merge_lora
    return merge == "always" or (merge == "auto" and updates_merged(config))


def updates_merged(config: Config) -> bool:
    """Whether they are for an update too: only in a type that keeps small changes."""
    return config.model.dtype == "float32"


def _product(
    x: Float[Array, "... I"],
    weight: Float[Array, "I O"],
    adapter: Adapter | None,
    is_merged: bool,
) -> Float[Array, "... O"]:
    """Multiplies by a matrix with its adapter, with a gradient written by hand.

    Qwix applies adapters with einsums of their own, which come to a third more operations, and to
    transposed copies of all activations in the backward pass.

    Args:
        x: Input.
        weight: The matrix.
        adapter: Its adapter, if it has one.
        is_merged: The weight contains the adapter already, which is then only there for its
            gradient.
    """
    y = x @ weight
    return y if adapter is None or is_merged else y + (x @ adapter[0]) @ adapter[1]


adapted = jax.custom_vjp(_product, nondiff_argnums=(3,))


def _product_forward(
    x: Float[Array, "... I"],
    weight: Float[Array, "I O"],
    adapter: Adapter | None,
    is_merged: bool,
) -> tuple[Float[Array, "... O"], tuple[Array, Array, Adapter | None]]:
    return _product(x, weight, adapter, is_merged), (x, weight, adapter)


def _product_backward(
    is_merged: bool, kept: tuple[Array, Array, Adapter | None], cotangent: Float[Array, "... O"]
) -> tuple[Array, Array, Adapter | None]:
    x, weight, adapter = kept
    x_cotangent = jnp.einsum("...o,io->...i", cotangent, weight)
    # The large operand is the right one, which is then not copied to be transposed.
    rows, row_cotangents = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    # Where the weight is frozen, nobody asks for this and the compiler leaves it out.
    weight_cotangent = jnp.einsum("mi,mo->io", rows, row_cotangents)
    if adapter is None:
        return x_cotangent, weight_cotangent, None
    a, b = adapter
    inner = jnp.einsum("...o,ro->...r", cotangent, b)
    if not is_merged:  # Else the weight has passed it back with its own.
        x_cotangent = x_cotangent + jnp.einsum("...r,ir->...i", inner, a)
    a_cotangent = jnp.einsum("mr,mi->ri", inner.reshape(len(rows), -1), rows).T
    # x @ A is computed again instead of kept: it is small work, and kept it would take memory.
    b_cotangent = jnp.einsum("mr,mo->ro", rows @ a, row_cotangents)
    return x_cotangent, weight_cotangent, (a_cotangent, b_cotangent)


adapted.defvjp(_product_forward, _product_backward)


@partial(jax.jit, static_argnames="scale")
def merge_adapters(weights: Weights, scale: float) -> nnx.State:
    """The base weights with the adapters added, in the type of the base.

    Args:
        weights: Base and adapters of a policy.
        scale: Factor of the adapters, `lora_scale` of the configuration.
    """
    flat = dict(nnx.to_flat_state(weights.base))
    for path, (a, b) in adapter_pairs(weights.lora).items():
        weight = flat[path].get_value()
        change = weight_change(path, a.get_value(), b.get_value())
        merged = weight.astype(jnp.float32) + scale * change
        flat[path] = flat[path].replace(merged.astype(weight.dtype))
    return nnx.from_flat_state(list(flat.items()))


def adapter_pairs(lora: nnx.State) -> dict[PathParts, tuple[nnx.Variable, nnx.Variable]]:
    """A and B of each adapter, by the path of the weight that they change."""
    flat = dict(nnx.to_flat_state(lora))
    pairs = {}
    for path, a in flat.items():
        name, is_a, _ = str(path[-1]).partition("_lora_a")
        if is_a:
            pairs[*path[:-1], name] = (a, flat[*path[:-1], f"{name}_lora_b"])
    return pairs


def weight_change(path: PathParts, a: jax.Array, b: jax.Array) -> jax.Array:
    """The change that an adapter makes to the weight at a path, laid out like that weight."""
    return jnp.einsum(matrix_at(path).change, a, b)


def adapter_size(policy: Model) -> AdapterSize:
    """Counts adapted matrices and adapter parameters."""
    leaves = jax.tree.leaves(nnx.state(policy, nnx.LoRAParam))
    return AdapterSize(len(leaves) // 2, sum(int(np.prod(leaf.shape)) for leaf in leaves))
