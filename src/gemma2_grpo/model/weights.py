"""A model's variables, and what a forward pass has to know besides them."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from tunix.models.gemma import model as gemma

from gemma2_grpo.model.architecture import Architecture
from gemma2_grpo.model.mesh import constrained

Remat = Literal["none", "block", "decoder"]


class Model(gemma.Gemma):
    """Container of a model's variables under Tunix's paths, with or without adapters.

    It is run by `model.gemma.hidden_states`, never by Tunix's layers.
    """

    config: Architecture
    lora_scale: float = 1.0
    """Factor of the adapters."""

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs) -> None:
        """Makes Tunix's modules, and the norms of heads where the architecture has them."""
        super().__init__(architecture, rngs=rngs)
        everywhere = replace(architecture.shd_config, rms_norm_weight=(None,))
        for layer in self.layers if architecture.has_qk_norm else ():
            for name in ("q_norm", "k_norm"):
                norm = gemma.RMSNorm(architecture.head_dim, rngs=rngs, shd_config=everywhere)
                setattr(layer.attn, name, norm)

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Refuses Tunix's forward pass, which would leave the adapters out in silence."""
        raise TypeError("a Model only holds variables: run gemma2_grpo.model.gemma.hidden_states")


class Weights(NamedTuple):
    """Variables of a model, adapters apart; `lora` is empty for the reference."""

    lora: nnx.State
    base: nnx.State

    @property
    def embedding(self) -> Float[Array, "V D"]:
        """Embedding matrix, which is also the output head."""
        return nnx.to_pure_dict(self.base)["embedder"]["input_embedding"]


@dataclass(frozen=True)
class Forward:
    """What a forward pass has to know besides arrays: a static argument of compiled programs."""

    architecture: Architecture
    mesh: Mesh
    """Over which activations are sharded."""
    lora_scale: float
    remat: Remat = "none"
    """What the backward pass recomputes instead of keeping: nothing, attention and MLP, or whole
    layers."""
    are_merged: bool = False
    """The base weights contain the adapters already, which are only there for their gradients."""
    is_sampling: bool = False
    """The residual stream lies whole on every device of a tp group. Of one token a row it is
    small, and an all-gather before each product takes longer than the product."""


def forward_of(
    model: Model, remat: Remat = "none", *, are_merged: bool = False, is_sampling: bool = False
) -> Forward:
    """How to run a model, on the mesh of its weights."""
    sharding = model.embedder.input_embedding.get_value().sharding
    assert isinstance(sharding, NamedSharding), "weights are loaded onto a mesh"
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    return Forward(model.config, mesh, model.lora_scale, remat, are_merged, is_sampling)


def weights_of(model: Model) -> Weights:
    """The variables of a model as they are now."""
    _, lora, base = nnx.split(model, nnx.LoRAParam, ...)
    return Weights(lora, base)


def split_model(model: Model) -> tuple[Forward, Weights]:
    """How to run a model, and its variables."""
    return forward_of(model), weights_of(model)


def gathered_weights(forward: Forward, weights: Weights) -> Weights:
    """Weights gathered over fsdp, for a loop that runs one token a row in each turn.

    What is sharded over fsdp is gathered whenever it is used. For a few rows that takes ten times
    longer than to use it, so a loop does it once, before. The barrier keeps the compiler from
    moving it back into the loop.
    """
    mesh = forward.mesh
    if mesh.shape["fsdp"] == 1:
        return weights

    def gather(x: Array, spec: PartitionSpec) -> Array:
        if "fsdp" not in spec:
            return x
        return constrained(x, tuple(None if axis == "fsdp" else axis for axis in spec), mesh)

    lora = jax.tree.map(lambda x: x.astype(weights.embedding.dtype), weights.lora)
    narrow = Weights(lora, weights.base)
    return jax.lax.optimization_barrier(
        jax.tree.map(gather, narrow, nnx.get_partition_spec(narrow))
    )
