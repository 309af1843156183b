"""Programs lowered without weights are those of a run: the same arrays in the same places."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from tunix.models.gemma import model as gemma

from gemma2_grpo.config import Config
from gemma2_grpo.model.lora import add_lora
from gemma2_grpo.model.mesh import constrained
from gemma2_grpo.plan.costs import estimate_memory, model_sizes
from gemma2_grpo.plan.footprint import Footprint, Resident, resident
from gemma2_grpo.plan.programs import Programs, abstract_policy


@pytest.fixture(scope="module")
def wide_config(config: Config) -> Config:
    model = dataclasses.replace(config.model, mesh_shape=(2, 4), dtype="bfloat16")
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def programs(wide_base: gemma.Gemma, wide_mesh: Mesh, wide_config: Config) -> Programs:
    return Programs(wide_base.config, wide_config, wide_mesh)


def test_the_abstract_policy_lies_where_the_live_one_does(
    wide_base: gemma.Gemma, wide_mesh: Mesh, config: Config
) -> None:
    live = add_lora(wide_base, config.model, wide_mesh, 0)
    abstract = abstract_policy(wide_base.config, config, wide_mesh)
    expected = dict(nnx.to_flat_state(nnx.state(live)))
    found = dict(nnx.to_flat_state(nnx.state(abstract)))
    assert found.keys() == expected.keys()
    for path, variable in expected.items():
        real, shape = variable.get_value(), found[path].get_value()
        assert (shape.shape, shape.dtype) == (real.shape, real.dtype)
        assert shape.sharding.is_equivalent_to(real.sharding, real.ndim), path


def test_no_large_array_is_whole_on_every_device(programs: Programs) -> None:
    for path, variable in nnx.to_flat_state(nnx.state(programs.policy)):
        x = variable.get_value()
        if x.ndim > 1 and not any("lora" in str(part) for part in path):
            assert np.prod(x.sharding.shard_shape(x.shape)) * 8 == np.prod(x.shape), path


def test_decoding_brings_weights_together_before_its_loop(programs: Programs) -> None:
    text = programs.all()["decode"]().as_text()
    before, _ = text.split("stablehlo.while", 1)
    barrier = before.index("optimization_barrier")
    width, hidden = programs.architecture.embed_dim, programs.architecture.hidden_dim
    gathered = re.findall(rf"sharding_constraint.*tensor<{width}x{hidden}xbf16>", before[:barrier])
    assert len(gathered) == 2 * programs.architecture.num_layers  # Gate and up.


def test_activations_are_laid_out_on_a_cpu_too(wide_mesh: Mesh) -> None:
    def laid(rows: int) -> jax.Array:
        axes = ("fsdp", None, "tp")
        return jax.jit(lambda x: constrained(x, axes, wide_mesh))(np.zeros((rows, 3, 8)))

    assert laid(4).sharding.shard_shape((4, 3, 8)) == (2, 3, 2)
    assert laid(1).sharding.shard_shape((1, 3, 8)) == (1, 3, 2)  # One row cannot be divided.


def test_a_run_keeps_the_base_beside_weights_with_the_adapters_added(
    wide_base: gemma.Gemma, wide_mesh: Mesh, wide_config: Config
) -> None:
    def peaks(dtype: str, merge_lora: str) -> tuple[Resident, dict[str, int]]:
        model = dataclasses.replace(wide_config.model, dtype=dtype)
        rollout = dataclasses.replace(wide_config.rollout, merge_lora=merge_lora)
        config = dataclasses.replace(wide_config, model=model, rollout=rollout)
        kept = resident(Programs(wide_base.config, config, wide_mesh))
        names = ("prefill", "decode", "grow cache", "reference", "update", "optimizer")
        return kept, {name: kept.peak(_program(name, 1000)) for name in names}

    # A program that takes 1000 bytes, of which some are weights, adapters and moments.
    kept, apart = peaks("bfloat16", "auto")
    weights, adapters, moments = kept.weights, kept.adapters, kept.moments
    assert apart == {
        "prefill": 1000 + moments,
        "decode": 1000 + moments,
        "grow cache": 1000 + weights + adapters + moments,
        "reference": 1000 + adapters + moments,
        "update": 1000 + moments,
        "optimizer": 1000 + weights,
    }
    _, sampling = peaks("bfloat16", "always")
    assert sampling == apart | {
        "prefill": 1000 + weights + adapters + moments,
        "decode": 1000 + weights + adapters + moments,
        "grow cache": 1000 + 2 * weights + adapters + moments,
    }
    wide, both = peaks("float32", "auto")
    assert wide.weights == 2 * weights
    assert both["decode"] == 1000 + wide.weights + adapters + moments
    assert both["update"] == 1000 + wide.weights + moments
    assert both["optimizer"] == 1000 + 2 * wide.weights
    assert both["reference"] == 1000 + adapters + moments


def _program(name: str, peak: int) -> Footprint:
    return Footprint(name, 0, 0, peak, True, {}, 0.0, 0.0)


def test_residents_are_estimated_exactly(programs: Programs, wide_config: Config) -> None:
    a, kept = programs.architecture, resident(programs)
    sizes = model_sizes(a, wide_config)
    estimate = estimate_memory(sizes, a, wide_config)
    counters = 21  # Three numbers of steps and of gradients left out, and what came of the last.
    assert kept.adapters + kept.moments - counters == estimate.trained
    norms = (a.num_layers * 4 + 1) * a.embed_dim * 2
    assert estimate.weights < kept.weights <= estimate.weights + norms
