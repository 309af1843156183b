"""LoRA adapters on Gemma through Qwix: adding, counting, splitting the policy's state."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from flax.typing import PathParts
from jax.sharding import Mesh
from tunix.models.gemma import model as gemma

from gemma2_grpo.config import Config, ModelConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.gemma import Weights
from gemma2_grpo.model.layout import all_weights, matrix_at
from gemma2_grpo.model.mesh import on_mesh

_KAIMING_UNIFORM = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class AdapterSize:
    """How much of the model is adapted."""

    matrices: int
    """Weight matrices with an adapter; the fused keys and values of a layer count as one."""
    parameters: int


def add_lora(base: gemma.Gemma, config: ModelConfig, mesh: Mesh, seed: int) -> gemma.Gemma:
    """Returns the policy: the base's own weights with trainable float32 adapters.

    Adapters start as no change (B is zero). The base weights are shared, not copied.

    Args:
        base: The frozen model.
        config: Rank, scale, module patterns and how A is drawn.
        mesh: Mesh on which the base lies.
        seed: Seed of the A matrices.

    Raises:
        UserError: if a pattern matches no weight matrix; Qwix would pass over it in silence.
    """
    check_patterns(base.config, config.lora_modules)
    initializer: dict[str, Any] = {}
    if config.lora_init == "peft":
        initializer["lora_a_initializer"] = _like_peft
    provider = qwix.LoraProvider(
        module_path=".*(" + "|".join(config.lora_modules) + ")",
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        **initializer,
    )
    with on_mesh(mesh):
        # Qwix runs the model once to see its shapes; Tunix's example has two rows, too few for a
        # larger fsdp axis.
        example: dict[str, Any] = {
            name: value if value is None else jnp.repeat(value, mesh.shape["fsdp"], axis=0)
            for name, value in base.get_model_input().items()
        }
        policy = qwix.apply_lora_to_model(base, provider, **example, rngs=nnx.Rngs(seed))
    nnx.update(policy, _as_float32(nnx.state(policy, nnx.LoRAParam)))
    for _, module in nnx.iter_graph(policy):
        if isinstance(module, gemma.Einsum | nnx.Linear):
            # Qwix keeps it to itself, and our layers apply the adapters without Qwix.
            cast(Any, module).lora_scale = config.lora_scale
    return cast(gemma.Gemma, policy)


def _like_peft(key: jax.Array, shape: tuple[int, ...], _: Any = None) -> jax.Array:
    """Draws A as PEFT does: uniform within 1/sqrt(inputs), in float32.

    Source: `reset_lora_parameters` of PEFT, which calls kaiming_uniform_ with a = sqrt(5); its
    variance is 1/3 over the inputs. Qwix draws with he_uniform, in the type of the base, whose
    variance is 2 over the inputs.

    Args:
        key: Key of this matrix.
        shape: [I, r], or [N, H, r], which has N * H inputs.
    """
    return _KAIMING_UNIFORM(key, shape, jnp.float32)


def adapters_of(policy: gemma.Gemma) -> dict[str, Any]:
    """The adapters of a policy as nested values, as checkpoints hold them."""
    return nnx.to_pure_dict(nnx.state(policy, nnx.LoRAParam))


def set_adapters(policy: gemma.Gemma, values: dict[str, Any]) -> None:
    """Puts adapters back that `adapters_of` gave."""
    state = nnx.state(policy, nnx.LoRAParam)
    nnx.replace_by_pure_dict(state, values)
    nnx.update(policy, state)


def check_patterns(architecture: gemma.ModelConfig, patterns: tuple[str, ...]) -> None:
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
        # Qwix would adapt it too, but the head multiplies with the embedding itself.
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


def _as_float32(state: nnx.State) -> nnx.State:
    return jax.tree.map(lambda x: x.astype(jnp.float32), state)


def adapter_size(policy: gemma.Gemma) -> AdapterSize:
    """Counts adapted matrices and adapter parameters."""
    leaves = jax.tree.leaves(nnx.state(policy, nnx.LoRAParam))
    return AdapterSize(len(leaves) // 2, sum(int(np.prod(leaf.shape)) for leaf in leaves))
