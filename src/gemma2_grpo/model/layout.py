"""One table of Gemma's weights: names, shapes and transposes in Tunix and on Hugging Face.

Loading, saving, adapters, initialisation and the estimates of costs read it. Axes are letters:
V vocabulary, D width, F MLP units, N query heads, K key and value heads, H the size of a head. On
Hugging Face a linear layer is [outputs, inputs], and all heads of a matrix are one axis.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # Benchmarks read the table without JAX.
    from flax.typing import PathParts

    from gemma2_grpo.model.architecture import Architecture

Index = tuple[slice, ...]
Sizes = Mapping[str, int]
"""Size of each axis, by its letter."""


@dataclass(frozen=True)
class Weight:
    """A variable of Tunix's model, and the tensors on Hugging Face that it is made of."""

    variable: str
    """Path of the variable, within its layer if it belongs to one."""
    tensors: tuple[str, ...]
    """Names of its tensors. Several are stacked along one more axis, which comes first."""
    axes: str
    """Axes of the variable, the stacking one aside."""
    outputs: str
    inputs: str = ""
    """Empty for a vector."""

    def shape(self, sizes: Sizes) -> list[int]:
        """Shape of each of its tensors: [outputs, inputs], or [outputs]."""
        return [math.prod(sizes[axis] for axis in side) for side in self._sides]

    def read(self, take: Callable[[Index], np.ndarray], index: Index, sizes: Sizes) -> np.ndarray:
        """Reads a slice of one of its tensors, in the layout of the variable.

        Args:
            take: Reads a slice of the tensor as it is stored.
            index: The slice of each of `axes`.
            sizes: Size of each axis.
        """
        wanted = dict(zip(self.axes, index, strict=True))
        inner = [[sizes[axis] for axis in side[1:]] for side in self._sides]
        # Whole heads are read, since all heads are one axis in the file, and then cut.
        spans = zip((wanted[side[0]] for side in self._sides), map(math.prod, inner), strict=True)
        values = take(tuple(slice(_times(s.start, n), _times(s.stop, n)) for s, n in spans))
        split: list[int] = []
        for length, within in zip(values.shape, inner, strict=True):
            split += [length // math.prod(within), *within]
        values = values.reshape(split).transpose(self._order)
        is_read = {side[0] for side in self._sides}
        return values[tuple(slice(None) if axis in is_read else wanted[axis] for axis in self.axes)]

    def write(self, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields name and value of each of its tensors, given the variable's value."""
        parts = values if len(self.tensors) > 1 else values[None]
        for name, part in zip(self.tensors, parts, strict=True):
            flat = part.transpose(np.argsort(self._order))
            rows = math.prod(flat.shape[: len(self.outputs)])
            yield name, flat.reshape(rows, -1) if self.inputs else flat

    @property
    def change(self) -> str:
        """Einsum that makes the change of the variable out of the A and B of its adapter."""
        return f"{','.join(self.adapter_axes)}->{self.stacked_axes}"

    @property
    def adapter_axes(self) -> tuple[str, str]:
        """Axes of A, [inputs, r], and of B, [r, outputs], as Qwix has them.

        Stacked matrices share one A, and their B is [r, c, outputs].
        """
        return f"{self.inputs}r", f"r{self._stack}{self.outputs}"

    @property
    def stacked_axes(self) -> str:
        """Axes of the variable, with the stacking one as c."""
        return self._stack + self.axes

    @property
    def _stack(self) -> str:
        return "c" if len(self.tensors) > 1 else ""

    @property
    def _sides(self) -> tuple[str, ...]:
        return (self.outputs, self.inputs) if self.inputs else (self.outputs,)

    @property
    def _order(self) -> list[int]:
        """Place of each of `axes` among those of a tensor."""
        return [(self.outputs + self.inputs).index(axis) for axis in self.axes]


_QUERIES, _KEYS, _VALUES = (f"self_attn.{letter}_proj" for letter in "qkv")
_SEPARATE = (
    Weight("attn/q_einsum/w", (_QUERIES,), "NDH", "NH", "D"),
    Weight("attn/kv_einsum/w", (_KEYS, _VALUES), "KDH", "KH", "D"),
)
# Tunix fuses them where each query head has keys and values of its own.
_FUSED = (Weight("attn/qkv_einsum/w", (_QUERIES, _KEYS, _VALUES), "NDH", "NH", "D"),)
_MATRICES = (
    Weight("attn/attn_vec_einsum/w", ("self_attn.o_proj",), "NHD", "D", "NH"),
    Weight("mlp/gate_proj/kernel", ("mlp.gate_proj",), "DF", "F", "D"),
    Weight("mlp/up_proj/kernel", ("mlp.up_proj",), "DF", "F", "D"),
    Weight("mlp/down_proj/kernel", ("mlp.down_proj",), "FD", "D", "F"),
)
_NORMS = (
    Weight("pre_attention_norm/scale", ("input_layernorm",), "D", "D"),
    Weight("post_attn_norm/scale", ("post_attention_layernorm",), "D", "D"),
    Weight("pre_ffw_norm/scale", ("pre_feedforward_layernorm",), "D", "D"),
    Weight("post_ffw_norm/scale", ("post_feedforward_layernorm",), "D", "D"),
)
_HEAD_NORMS = (
    Weight("attn/q_norm/scale", ("self_attn.q_norm",), "H", "H"),
    Weight("attn/k_norm/scale", ("self_attn.k_norm",), "H", "H"),
)
_OUTSIDE = (
    Weight("embedder/input_embedding", ("model.embed_tokens.weight",), "VD", "V", "D"),
    Weight("final_norm/scale", ("model.norm.weight",), "D", "D"),
)
_MATRICES_BY_VARIABLE = {weight.variable: weight for weight in (*_SEPARATE, *_FUSED, *_MATRICES)}


def axis_sizes(architecture: "Architecture") -> Sizes:
    """Size of each axis of an architecture."""
    a = architecture
    sizes = (a.num_embed, a.embed_dim, a.hidden_dim, a.num_heads, a.num_kv_heads, a.head_dim)
    return dict(zip("VDFNKH", sizes, strict=True))


def layer_matrices(sizes: Sizes) -> tuple[Weight, ...]:
    """Matrices of a layer, which are what adapters are for."""
    return (*(_FUSED if sizes["N"] == sizes["K"] else _SEPARATE), *_MATRICES)


def matrix_at(path: "PathParts") -> Weight:
    """The matrix at a path such as ("layers", 0, "attn", "q_einsum", "w")."""
    return _MATRICES_BY_VARIABLE["/".join(map(str, path[2:]))]


def all_weights(architecture: "Architecture") -> "dict[PathParts, Weight]":
    """All weights of a model by their paths, in the order in which their tensors are stored."""
    layer = (*layer_matrices(axis_sizes(architecture)), *_NORMS)
    if architecture.has_qk_norm:
        layer += _HEAD_NORMS
    found: dict[PathParts, Weight] = {tuple(w.variable.split("/")): w for w in _OUTSIDE}
    for i in range(architecture.num_layers):
        for weight in layer:
            tensors = tuple(f"model.layers.{i}.{name}.weight" for name in weight.tensors)
            path = ("layers", i, *weight.variable.split("/"))
            found[path] = replace(weight, tensors=tensors)
    return found


def tensor_shapes(architecture: "Architecture") -> dict[str, list[int]]:
    """Shapes of the tensors of an architecture, by their names on Hugging Face."""
    sizes = axis_sizes(architecture)
    weights = all_weights(architecture).values()
    return {name: weight.shape(sizes) for weight in weights for name in weight.tensors}


def linear_layers(sizes: Sizes) -> list[tuple[int, int]]:
    """Outputs and inputs of each linear layer of a decoder layer, as Hugging Face has them."""
    shapes = [weight.shape(sizes) for weight in layer_matrices(sizes) for _ in weight.tensors]
    return [(outputs, inputs) for outputs, inputs in shapes]


def adapter_sides(sizes: Sizes) -> list[tuple[str, int]]:
    """Axes and size, for one rank, of each A and B of a layer whose matrices are all adapted."""
    sides: list[tuple[str, int]] = []
    for weight in layer_matrices(sizes):
        outputs, inputs = weight.shape(sizes)
        # Stacked matrices share one A.
        sides += [(weight.inputs, inputs), (weight.outputs, outputs * len(weight.tensors))]
    return sides


def adapter_parameters(architecture: "Architecture", rank: int) -> int:
    """Parameters of a model's adapters, if all matrices of its layers have one."""
    layer = sum(size for _, size in adapter_sides(axis_sizes(architecture)))
    return architecture.num_layers * rank * layer


def _times(bound: int | None, size: int) -> int | None:
    return None if bound is None else bound * size
