"""The programs of a run, lowered ahead of time from abstract weights (shapes and shardings).

They are the project's own, with the shapes of the worst case: prompts and completions that all
reach their limits. Nothing is computed, so that the mesh may be of devices that are not there.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gemma2_grpo.config import Config
from gemma2_grpo.model.architecture import Architecture
from gemma2_grpo.model.lora import add_lora, merge_adapters, samples_merged, updates_merged
from gemma2_grpo.model.mesh import batch_sharding
from gemma2_grpo.model.weights import Model, Weights, forward_of, weights_of
from gemma2_grpo.sampling.decode import decode_until, prefill
from gemma2_grpo.sampling.decoding_batch import (
    DecodingBatch,
    cache_lengths,
    least_rows,
    resize,
)
from gemma2_grpo.sampling.draw import Sampling
from gemma2_grpo.training.optimizer import make_optimizer
from gemma2_grpo.training.packing import Credit, MicroBatch, choose_shapes
from gemma2_grpo.training.programs import UpdatePrograms

Lower = Callable[[], jax.stages.Lowered]
T = TypeVar("T")


def abstract_policy(architecture: Architecture, config: Config, mesh: Mesh) -> Model:
    """The policy as `add_lora` makes it, with shapes, types and shardings in place of arrays."""

    def build() -> Model:
        model = Model(architecture, rngs=nnx.Rngs(0))
        state = jax.tree.map(lambda x: x.astype(config.model.dtype), nnx.state(model))
        nnx.update(model, state)
        return add_lora(model, config.model, mesh, 0)

    return _placed(nnx.eval_shape(build), mesh)


def _placed(module: T, mesh: Mesh) -> T:
    """Puts the shardings that the variables are marked with onto their shapes."""
    graphdef, state = nnx.split(module)
    shardings = nnx.get_named_sharding(state, mesh)
    return nnx.merge(graphdef, jax.tree.map(_array, state, shardings))


def _array(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


class Programs:
    """All programs of a run at the sizes of its worst case, by name, ready to be lowered."""

    def __init__(self, architecture: Architecture, config: Config, mesh: Mesh) -> None:
        """Builds the abstract policy, optimizer and inputs; nothing is compiled yet."""
        self.config, self.mesh, self.architecture = config, mesh, architecture
        rollout = config.rollout
        self.policy = abstract_policy(architecture, config, mesh)
        self.weights = weights_of(self.policy)
        transform = make_optimizer(config.optimizer, 1)
        self.optimizer = _placed(
            nnx.eval_shape(lambda: nnx.Optimizer(self.policy, transform, wrt=nnx.LoRAParam)), mesh
        )
        self.shapes = choose_shapes(
            config,
            rollout.prompts_per_step,
            rollout.max_prompt_tokens,
            rollout.max_completion_tokens,
        )
        self.samples_merged, self.updates_merged = samples_merged(config), updates_merged(config)

    def all(self) -> dict[str, Lower]:
        """Programs in the order in which a step runs them."""
        return self._rollout() | self._update()

    def _rollout(self) -> dict[str, Lower]:
        """Programs of a rollout at its largest: all rows alive, the cache at its full length."""
        config, mesh = self.config.rollout, self.mesh
        prompts, limit = config.prompts_per_step, config.max_completion_tokens
        rows = prompts * config.num_generations
        # Which ids end an answer makes no difference to the memory.
        sampling = Sampling(config.temperature, config.top_p, config.top_k, (1, 2), 0)
        forward, weights = forward_of(self.policy, is_sampling=True), self.weights
        if self.samples_merged:
            weights = Weights(nnx.State({}), weights.base)
        inputs = (
            self._rows((prompts, config.max_prompt_tokens)),
            self._rows((prompts,)),
            self._whole((rows,)),
            jax.eval_shape(lambda: jax.random.key(0)),
            self._whole(()),
        )

        def batch(length: int) -> DecodingBatch:
            start = partial(prefill, forward, length=length, mesh=mesh)
            shapes = jax.eval_shape(start, weights, *inputs)
            return shapes._replace(
                prefix=self._heads(shapes.prefix, "fsdp"), own=self._heads(shapes.own, "fsdp")
            )

        lengths = cache_lengths(limit)
        programs: dict[str, Lower] = {
            "prefill": lambda: prefill.lower(
                forward, weights, *inputs, length=lengths[0], mesh=mesh
            ),
            "decode": lambda: decode_until.lower(
                *(forward, weights, batch(lengths[-1]), self._whole(())),
                sampling=sampling,
                least=least_rows(rows),
                mesh=mesh,
            ),
        }
        if len(lengths) > 1:
            programs["grow cache"] = lambda: resize.lower(
                batch(lengths[-2]),
                self._whole((rows,)),
                shape=(prompts, config.num_generations),
                length=lengths[-1],
                mesh=mesh,
            )
        return programs

    def _update(self) -> dict[str, Lower]:
        """Programs of reference and update: full micro-batches, and all prompts of a step."""
        config, shapes = self.config, self.shapes
        lora, base = self.weights
        reference = Weights(nnx.State({}), base)
        programs = UpdatePrograms(
            forward_of(self.policy, config.model.remat, are_merged=self.updates_merged),
            forward_of(self.policy),
            nnx.split(self.policy, nnx.LoRAParam, ...)[0],
            nnx.split(self.optimizer)[0],
            jax.tree.map(lambda x: x.sharding, lora),
            config,
            self.mesh,
        )
        prompts = self._rows((shapes.prompts, shapes.prompt_tokens))
        prefix = self._heads(jax.eval_shape(programs.reference_prefix, reference, prompts), None)
        size = (shapes.rows, shapes.row_tokens)
        tokens = self._rows(size)
        lengths, ref = self._rows((shapes.prompts,)), self._rows(size, jnp.float32)
        micro = MicroBatch(tokens, tokens, tokens, tokens, self._rows(size[:1]), ref)
        credit = Credit(ref, ref)
        state = nnx.split(self.optimizer)[1]
        found: dict[str, Lower] = {}
        if config.grpo.beta:
            found["reference prompts"] = lambda: programs.reference_prefix.lower(reference, prompts)
            found["reference"] = lambda: programs.reference_logps.lower(
                reference, prefix, lengths, micro
            )
        if self.updates_merged:
            found["merge"] = lambda: merge_adapters.lower(self.weights, config.model.lora_scale)
        return found | {
            "update prompts": lambda: programs.prefix.lower(self.weights, prompts),
            "update": lambda: programs.rows_gradients.lower(
                *((lora, prefix), lora, prefix, base, lengths, micro, credit),
                *(ref if config.grpo.beta else None, ref, self._whole((), jnp.bool)),
            ),
            "update prompts, back": lambda: programs.prompt_gradients.lower(
                lora, prefix, lora, base, prompts
            ),
            "optimizer": lambda: programs.apply.lower(lora, base, state, lora),
        }

    def _rows(self, shape: tuple[int, ...], dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        """An input laid over the devices as `Updater.place` does."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh, shape[0]))

    def _whole(self, shape: tuple[int, ...], dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        """An input on every device."""
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec())
        )

    def _heads(self, arrays: PyTree, rows: str | None) -> PyTree:
        """Keys and values, with their heads over tp."""

        def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            axis = rows if rows and x.shape[0] % self.mesh.shape[rows] == 0 else None
            return _array(x, NamedSharding(self.mesh, PartitionSpec(axis, None, "tp", None)))

        return jax.tree.map(place, arrays)
