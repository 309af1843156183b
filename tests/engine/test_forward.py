import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_grpo.engine.forward import map_chunks


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 20])
def test_chunks_give_what_the_whole_gives(chunk: int) -> None:
    x = jnp.arange(2 * 7 * 3, dtype=jnp.float32).reshape(2, 7, 3)
    y = jnp.arange(14).reshape(2, 7)
    result = map_chunks(lambda pair: pair[0].sum(-1) * pair[1], (x, y), chunk)
    np.testing.assert_array_equal(result, x.sum(-1) * y)


def test_chunks_bound_what_is_in_memory() -> None:
    """With a Python loop over the chunks, the compiler computes them at once: no bound at all."""
    rows, width, vocabulary, dim = 4, 64, 8192, 8
    hidden = jax.ShapeDtypeStruct((rows, width, dim), jnp.float32)
    embedding = jax.ShapeDtypeStruct((vocabulary, dim), jnp.float32)

    def temporaries(chunk: int) -> int:
        def loss(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
            @jax.checkpoint
            def piece(h: jax.Array) -> jax.Array:
                return jax.nn.log_softmax(h @ embedding.T)[..., 0]

            return map_chunks(piece, hidden, chunk).sum()

        compiled = jax.jit(jax.grad(loss)).lower(hidden, embedding).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    logits = rows * width * vocabulary * 4
    assert temporaries(8) < logits / 2
    assert temporaries(8) < temporaries(64) / 2
