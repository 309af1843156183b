"""Formulas against numbers worked out by hand, and against XLA's own count."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tunix.models.gemma import model as gemma

from gemma2_grpo.model.architecture import known_architecture
from gemma2_grpo.plan.costs import estimate_memory, model_sizes, moved_bytes, step_work
from gemma2_grpo.plan.footprint import collectives, compile_program
from gemma2_grpo.presets import load_config
from gemma2_grpo.runtime.chips import TARGETS, find_target

FLAGSHIP = load_config("gemma2-2b-v5e8")
GEMMA = known_architecture("google/gemma-2-2b-it")


def test_sizes_of_gemma_2_2b() -> None:
    assert GEMMA is not None
    sizes = model_sizes(GEMMA, FLAGSHIP)
    # The published model has 2,614,341,888 parameters, of which the norms are 241,920 less.
    assert sizes.decoder + sizes.head + (26 * 4 + 1) * 2304 == 2_614_341_888
    assert sizes.adapters == 79_233_024
    assert sizes.cache_bytes_per_token == 26 * 2 * 4 * 256 * 2 == 106_496
    assert sizes.weight_bytes == 2 * (sizes.decoder + sizes.head)


def test_work_by_hand() -> None:
    assert GEMMA is not None
    sizes = model_sizes(GEMMA, FLAGSHIP)
    prefill, decode, reference, update = step_work(sizes, FLAGSHIP, 100)
    per_token = 2 * (2_024_275_968 + 79_233_024)
    assert prefill.operations == 8 * 256 * (per_token + 4 * 53_248 * 128)
    tokens = 128 * 100
    assert decode.operations == tokens * (per_token + 2 * 589_824_000 + 4 * 53_248 * (256 + 50))
    # Weights are read by each of two halves of the mesh for each of 768 tokens; the caches of
    # completions up to where they are written, and that of a prompt once for its group.
    cache = 106_496 * (tokens * 50 + 8 * 256 * 100)
    assert decode.bytes == 2 * sizes.weight_bytes * 768 + cache
    saved = 2 * 79_233_024 * (tokens + 2048)
    assert reference.operations == prefill.operations + decode.operations - saved
    # Completions: three passes through the layers, two products with the head, and of attention
    # the two products of two forward passes and five of the backward pass. Prompts: once more.
    gradients = 2 * 79_233_024 * (tokens + 2048)
    layers = (3 * tokens + 4 * 2048) * per_token
    attention = 2 * 53_248 * (9 * tokens * (256 + 50) + 11 * 2048 * 128)
    assert update.operations == 3 * (layers + 2 * tokens * 2 * 589_824_000 + attention + gradients)
    # 12,800 tokens are two micro-batches of 12,288, each of which reads all weights.
    layer_bytes, head_bytes = 2 * 2 * 2_024_275_968, 2 * 2 * 589_824_000
    assert prefill.bytes == layer_bytes
    assert reference.bytes == 3 * layer_bytes + 2 * head_bytes
    assert update.bytes == 3 * (10 * layer_bytes + 4 * head_bytes)


def test_without_a_penalty_there_is_no_reference() -> None:
    assert GEMMA is not None
    config = dataclasses.replace(FLAGSHIP, grpo=dataclasses.replace(FLAGSHIP.grpo, beta=0.0))
    names = [work.name for work in step_work(model_sizes(GEMMA, config), config, 100)]
    assert names == ["prefill", "decode", "update"]


def test_seconds_are_those_of_what_takes_longer() -> None:
    assert GEMMA is not None
    v5e = find_target("v5e-8")
    prefill, decode, *_ = step_work(model_sizes(GEMMA, FLAGSHIP), FLAGSHIP, 200)
    assert prefill.seconds(v5e, 8, "bfloat16") == prefill.operations / (197e12 * 8)
    assert decode.seconds(v5e, 8, "bfloat16") == decode.bytes / (819e9 * 8)


def test_memory_halves_with_the_mesh() -> None:
    assert GEMMA is not None
    sizes = model_sizes(GEMMA, FLAGSHIP)
    one = dataclasses.replace(FLAGSHIP.model, mesh_shape=(1, 1))
    alone = estimate_memory(sizes, GEMMA, dataclasses.replace(FLAGSHIP, model=one))
    eight = estimate_memory(sizes, GEMMA, FLAGSHIP)
    assert alone.weights == 8 * eight.weights == sizes.weight_bytes
    cache = 106_496 * (128 * 768 + 8 * 256)
    assert alone.caches["decode"] == 8 * eight.caches["decode"] == cache
    # While it grows, the cache of 512 slots is there as well.
    assert alone.caches["grow cache"] == cache + 106_496 * (128 * 512 + 8 * 256)
    # Sampling brings the weights together over fsdp, of which a chip then has a quarter.
    assert (alone.gathered, eight.gathered) == (0, sizes.weight_bytes / 4)
    assert eight.decode == eight.weights + eight.trained + eight.gathered + eight.caches["decode"]
    assert alone.decode == alone.weights + alone.trained + alone.caches["grow cache"]
    # Adapters lie over one axis each: six sides of 2,304 over fsdp; 6,144 and 3 x 9,216 over tp.
    assert alone.trained == 12 * sizes.adapters
    assert eight.trained == 12 * 26 * 64 * (6 * 2304 / 2 + (6144 + 3 * 9216) / 4)


def test_float32_keeps_the_weights_twice() -> None:
    assert GEMMA is not None
    model = dataclasses.replace(FLAGSHIP.model, dtype="float32")
    config = dataclasses.replace(FLAGSHIP, model=model)
    sizes = model_sizes(GEMMA, config)
    wide = estimate_memory(sizes, GEMMA, config)
    assert wide.sampling_copy == wide.update_copy == wide.weights == sizes.weight_bytes / 8
    used = wide.gathered + wide.caches["decode"]
    assert wide.decode == 2 * wide.weights + wide.trained + used
    kept = 2 * wide.weights + wide.trained * 4 / 3
    assert wide.update == kept + wide.logits + wide.activations
    narrow = estimate_memory(model_sizes(GEMMA, FLAGSHIP), GEMMA, FLAGSHIP)
    assert narrow.sampling_copy == narrow.update_copy == 0


def test_moved_bytes_count_every_run_of_a_program() -> None:
    assert GEMMA is not None
    programs: list[dict[str, Any]] = [
        {"name": name, "collectives": {"all-gather": (1, 10)}}
        for name in ("prefill", "reference", "update", "update prompts", "optimizer")
    ]
    # 128 x 200 tokens are three micro-batches, three times over.
    of_programs = 10 * (1 + 3 + 9 + 3 + 3)
    in_the_loop = 2 * 26 * 768 * 64 * 2304 * 2
    assert moved_bytes(GEMMA, FLAGSHIP, 200, programs) == of_programs + in_the_loop


def test_operations_are_those_that_xla_counts() -> None:
    a = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    b = jax.ShapeDtypeStruct((128, 256), jnp.float32)
    found = compile_program("product", jax.jit(jnp.dot).lower(a, b))
    assert found.operations == 2 * 64 * 128 * 256
    assert found.fits and found.arguments == 4 * (64 * 128 + 128 * 256)
    assert found.collectives == {}


def test_collectives_may_be_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: jax.stages.Compiled) -> str:
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update should have 1 operands")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", fail)
    found = compile_program("product", jax.jit(jnp.dot).lower(jnp.ones(8), jnp.ones(8)))
    assert found.fits and found.collectives is None and found.peak > 0


def test_collectives_are_read_from_compiled_text() -> None:
    text = """
      %all-gather.1 = bf16[2304,2304]{1,0:T(8,128)(2,1)} all-gather(%x), dimensions={1}
      ROOT %ar = (f32[8]{0}, f32[4]{0}) all-reduce-start(%y, %z), to_apply=%add
      %done = f32[8]{0} all-reduce-done(%ar)
      %cp = pred[10]{0} collective-permute(%p), channel_id=7
      %again = pred[10]{0} collective-permute(%p), channel_id=7
    """
    assert collectives(text) == {
        "all-gather": (1, 2304 * 2304 * 2),
        "all-reduce": (1, 32),
        "collective-permute": (1, 10),
    }


def test_targets_are_named_as_people_name_them() -> None:
    assert {"v5e-1", "v5e-4", "v5e-8", "v6e-8", "v4-8", "v5p-8", "cpu"} <= set(TARGETS)
    assert {"h100", "a100", "l4", "t4"} <= set(TARGETS)
    assert known_architecture("/models/mine") is None
    nine = known_architecture("google/gemma-2-9b-it")
    assert nine is not None and isinstance(nine, gemma.ModelConfig) and nine.num_layers == 42
