"""Products with adapters are those of plain formulas, with gradients written by hand."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_grpo.model.lora import adapted


@pytest.mark.parametrize("is_merged", [False, True])
def test_the_gradient_of_an_adapted_matrix(is_merged: bool) -> None:
    """That of the plain product, and a merged weight gives the same for the adapter."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    x, weight, into = normal(2, 5, 6), normal(6, 7), normal(2, 5, 7)
    adapter = (normal(6, 3), normal(3, 7))
    given = weight + adapter[0] @ adapter[1] if is_merged else weight

    def plain(x: Any, weight: Any, adapter: Any) -> jax.Array:
        return x @ (weight + adapter[0] @ adapter[1])

    np.testing.assert_allclose(
        adapted(x, given, adapter, is_merged), plain(x, weight, adapter), rtol=1e-5, atol=1e-5
    )

    def summed(function: Any, *args: Any) -> jax.Array:
        return jnp.sum(into * function(*args))

    ours = partial(summed, lambda *args: adapted(*args, is_merged))
    actual = jax.jit(jax.grad(ours, (0, 1, 2)))(x, given, adapter)
    expected = jax.jit(jax.grad(partial(summed, plain), (0, 1, 2)))(x, weight, adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), actual, expected)


def test_a_matrix_without_an_adapter_is_a_matrix() -> None:
    x, weight = jnp.ones((2, 3)), jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(adapted(x, weight, None, False), x @ weight)
    slopes = jax.grad(lambda *args: adapted(*args, None, False).sum(), (0, 1))(x, weight)
    expected = jax.grad(lambda x, weight: (x @ weight).sum(), (0, 1))(x, weight)
    jax.tree.map(np.testing.assert_array_equal, slopes, expected)
