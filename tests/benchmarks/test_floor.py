import dataclasses

import numpy as np
import pytest
from benchmarks.floor import (
    adapter_parameters,
    attention_flops,
    decode_flops,
    layer_parameters,
    step_floor,
)
from benchmarks.workload import PRESETS, Batch, Sizes

# Two layers of width 4: queries 2 x 2, keys 1 x 2, hidden 8; vocabulary 10; rank 1.
TINY = Sizes(
    layers=2,
    width=4,
    heads=2,
    kv_heads=1,
    head_dim=2,
    hidden=8,
    vocab=10,
    lora_rank=1,
    prompts=1,
    generations=2,
    iterations=3,
)
BATCH = Batch(questions=("p",), prompt_tokens=(3,), limits=(1, 2), rewards=(0.0, 0.0))
N = 2 * (4 * 4 + 4 * 4 + 4 * 2 + 4 * 2 + 3 * 4 * 8)
A = 2 * ((4 + 4) + (4 + 4) + (4 + 2) + (4 + 2) + 3 * (4 + 8))
PER_KEY = 4 * 2 * 2 * 2  # 4 L H h


def test_parameters_are_those_counted_by_hand() -> None:
    assert layer_parameters(TINY) == N == 288
    assert adapter_parameters(TINY) == A == 128


def test_the_model_is_that_of_the_notes() -> None:
    sizes = PRESETS["cpu-30m"]
    assert layer_parameters(sizes) + sizes.width * sizes.vocab == pytest.approx(31.5e6, rel=0.01)
    large = PRESETS["gemma2-2b"]
    assert layer_parameters(large) + large.width * large.vocab == pytest.approx(2.61e9, rel=0.01)
    assert adapter_parameters(large) == pytest.approx(83e6, rel=0.01)


def test_a_window_bounds_every_other_layer() -> None:
    windowed = dataclasses.replace(TINY, window=4)
    assert attention_flops(TINY, np.array([10])) == PER_KEY * 10
    assert attention_flops(windowed, np.array([10])) == PER_KEY / 2 * (4 + 10)


def test_phases_are_those_computed_by_hand() -> None:
    flops, bandwidth = 1000.0, 1e12  # Weights are read at once.
    floor = step_floor(TINY, BATCH, flops, bandwidth)
    # The prompt attends to 1 + 2 + 3 keys; completions to 4 and to 4 + 5.
    prompt, attention = PER_KEY * 6, PER_KEY * (6 + 4 + 9)
    head = 4 * 10
    tokens, completion = 3 + 3, 3
    assert floor.reference == pytest.approx(
        (2 * N * tokens + attention + 2 * head * completion) / flops
    )
    assert floor.update == pytest.approx(
        3 * ((4 * N + 6 * A) * tokens + 3 * attention + 4 * head * completion) / flops
    )
    # One decode step, of the longer completion alone, which attends to the prompt and itself.
    decode = 2 * N + 2 * head + PER_KEY * 4
    np.testing.assert_array_equal(decode_flops(TINY, BATCH), [decode])
    assert floor.rollout == pytest.approx((2 * N * 3 + prompt + 2 * head + decode) / flops)
    assert floor.step == pytest.approx(floor.rollout + floor.reference + floor.update)


def test_reading_the_weights_bounds_each_decode_step() -> None:
    batch = dataclasses.replace(BATCH, limits=(1, 5))
    floor = step_floor(TINY, batch, 1e12, 100.0)
    reads = (N + 4 * 10) * 4 / 100
    assert floor.rollout == pytest.approx(5 * reads)  # The prefill and four decode steps.
    halved = step_floor(dataclasses.replace(TINY, dtype="bfloat16"), batch, 1e12, 100.0)
    assert halved.rollout == pytest.approx(floor.rollout / 2)
