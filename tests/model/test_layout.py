"""The table of weights: what it reads is what it writes, and its sizes are those of the model."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from tunix.models.gemma import model as gemma

from gemma2_grpo.model.architecture import Architecture
from gemma2_grpo.model.layout import (
    Weight,
    adapter_parameters,
    all_weights,
    axis_sizes,
    layer_matrices,
    matrix_at,
    tensor_shapes,
)

GROUPED = {"V": 11, "D": 6, "F": 10, "N": 4, "K": 2, "H": 3}
FUSED = GROUPED | {"K": 4}
MATRICES = [(sizes, weight) for sizes in (GROUPED, FUSED) for weight in layer_matrices(sizes)]


def architecture(sizes: dict[str, int]) -> Architecture:
    return dataclasses.replace(
        Architecture.gemma2_2b(),
        num_layers=2,
        num_embed=sizes["V"],
        embed_dim=sizes["D"],
        hidden_dim=sizes["F"],
        num_heads=sizes["N"],
        num_kv_heads=sizes["K"],
        head_dim=sizes["H"],
    )


def drawn(sizes: dict[str, int], weight: Weight) -> np.ndarray:
    stacked = [len(weight.tensors)] if len(weight.tensors) > 1 else []
    shape = stacked + [sizes[axis] for axis in weight.axes]
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize(("sizes", "weight"), MATRICES)
def test_a_slice_of_what_was_written_is_the_slice(sizes: dict[str, int], weight: Weight) -> None:
    values = drawn(sizes, weight)
    index = tuple(slice(1, sizes[axis] - 1) for axis in weight.axes)
    written = dict(weight.write(values))
    assert tuple(written) == weight.tensors
    for part, (name, tensor) in enumerate(written.items()):
        assert list(tensor.shape) == weight.shape(sizes), name
        whole = values[part] if len(written) > 1 else values
        read = weight.read(tensor.__getitem__, index, sizes)
        np.testing.assert_array_equal(read, whole[index])


def test_the_rows_of_a_tensor_are_heads_one_after_the_other() -> None:
    [weight] = [w for w in layer_matrices(GROUPED) if w.variable == "attn/kv_einsum/w"]
    values = drawn(GROUPED, weight)  # [2, K, D, H]
    keys, _ = dict(weight.write(values)).values()
    np.testing.assert_array_equal(keys[3 * 1 + 2], values[0, 1, :, 2])


@pytest.mark.parametrize(("sizes", "weight"), MATRICES)
def test_the_change_of_a_weight_is_b_times_a(sizes: dict[str, int], weight: Weight) -> None:
    random = np.random.default_rng(1)
    stacked = [len(weight.tensors)] if len(weight.tensors) > 1 else []
    a = random.standard_normal([*(sizes[axis] for axis in weight.inputs), 2])
    b = random.standard_normal([2, *stacked, *(sizes[axis] for axis in weight.outputs)])
    change = np.einsum(weight.change, a, b)
    flat_a, flat_b = a.reshape(-1, 2), b.reshape(2, len(weight.tensors), -1)
    for part, (_, tensor) in enumerate(weight.write(change)):
        np.testing.assert_allclose(tensor, (flat_a @ flat_b[:, part]).T)


@pytest.mark.parametrize("sizes", [GROUPED, FUSED], ids=["grouped", "fused"])
def test_paths_and_shapes_are_those_of_the_model(sizes: dict[str, int]) -> None:
    config = architecture(sizes)
    assert axis_sizes(config) == sizes
    model = nnx.eval_shape(lambda: gemma.Gemma(config, rngs=nnx.Rngs(0)))
    found = {path: v.get_value().shape for path, v in nnx.to_flat_state(nnx.state(model))}
    weights = all_weights(config)
    assert found == {path: drawn(sizes, weight).shape for path, weight in weights.items()}
    entries = sum(np.prod(shape) for shape in tensor_shapes(config).values())
    assert entries == sum(np.prod(shape) for shape in found.values())
    path = next(path for path in weights if path[:2] == ("layers", 1))
    assert matrix_at(path).axes == weights[path].axes == "NDH"


def test_adapters_counted_by_hand() -> None:
    # Queries 6 + 12, keys and values 6 + 2 x 6, output 12 + 6, MLP 3 x (6 + 10).
    assert adapter_parameters(architecture(GROUPED), 5) == 2 * 5 * (18 + 18 + 18 + 48)
    # Fused: 6 + 3 x 12.
    assert adapter_parameters(architecture(FUSED), 5) == 2 * 5 * (42 + 18 + 48)
