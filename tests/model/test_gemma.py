"""Log-probabilities of packed completions are those of whole passes, at a bounded cost."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from scipy.special import log_softmax
from tunix.models.gemma import model as gemma

from gemma2_grpo.model.gemma import run_from_start
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.logprobs import TokenLogps, map_chunks, token_logps
from gemma2_grpo.model.weights import Forward, Weights, split_model
from gemma2_grpo.training.packing import MicroBatch, Shapes, prompt_batches
from gemma2_grpo.training.programs import completion_logps


@jax.jit(static_argnames=("forward", "chunk_tokens"))
def packed_logps(
    forward: Forward,
    weights: Weights,
    prompts: jax.Array,
    lengths: jax.Array,
    micro: MicroBatch,
    chunk_tokens: int = 7,
) -> TokenLogps:
    _, prefix = run_from_start(forward, weights, prompts)
    return completion_logps(
        forward, weights, prefix, lengths, micro, temperature=1.0, chunk_tokens=chunk_tokens
    )


@pytest.mark.parametrize("name", ["grouped", "fused", "gemma3"])
def test_packed_completions_are_those_of_transformers(
    name: str, goldens: ModuleType, mesh: Mesh, tmp_path: Path
) -> None:
    """Prompts shorter and longer than the window of 6, down to a single token.

    Each sequence is cut into prompt and completion, and the completion stands twice in its row,
    before and after another.
    """
    with np.load(goldens.GOLDEN / f"{name}.npz") as golden:
        seed, tokens, logits = int(golden["seed"]), golden["tokens"], golden["logits"]
    directory = goldens.write_model(tmp_path, goldens.MODELS[name], seed)
    forward, weights = split_model(load_weights(directory, "float32", mesh))
    shapes = Shapes(prompts=2, prompt_tokens=15, rows=2, row_tokens=48, least_rows=2)
    for starts in [(9, 4), (1, 12), (15, 1)]:
        sequences = [row[:length] for row, length in zip(tokens, goldens.LENGTHS, strict=True)]
        prompts = [row[:at].tolist() for row, at in zip(sequences, starts, strict=True)]
        ends = [row[at:] for row, at in zip(sequences, starts, strict=True)]
        noise = np.array([5, 9, 60, 7, 33], np.int32)
        completions = [each for end in ends for each in (end, noise, end)]
        (batch,) = prompt_batches(prompts, completions, [True, True], shapes, 0)
        (micro,) = batch.micro
        found = packed_logps(forward, weights, batch.prompts, batch.lengths, micro)
        for i, end in enumerate(ends):
            predicted = log_softmax(logits[i, starts[i] - 1 : starts[i] - 1 + len(end)], axis=-1)
            expected = np.take_along_axis(predicted, end[:, None], axis=-1)[:, 0]
            entropy = -(np.exp(predicted) * predicted).sum(-1)
            assert len(end) == 1 or expected.std() > 0.1
            for owner in (3 * i, 3 * i + 2):
                is_own = micro.segment_ids == owner
                np.testing.assert_allclose(found.logps[is_own], expected, atol=1e-4)
                np.testing.assert_allclose(found.entropy[is_own], entropy, atol=1e-4)


def test_adapters_do_not_widen_a_bfloat16_model(make_policy: Callable[..., gemma.Gemma]) -> None:
    """They are float32, and would promote what they are added to."""
    forward, weights = split_model(make_policy())
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights.base)
    weights = Weights(weights.lora, base)
    tokens = jnp.zeros((1, 4), jnp.int32)
    hidden, prefix = jax.eval_shape(partial(run_from_start, forward), weights, tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves((hidden, prefix))} == {jnp.dtype("bfloat16")}


def test_models_of_one_kind_share_programs(
    base: gemma.Gemma, make_policy: Callable[..., gemma.Gemma]
) -> None:
    one, other, reference = (split_model(m)[0] for m in (make_policy(), make_policy(), base))
    assert one == other != reference
    assert hash(one) == hash(other)


def test_tunix_forward_pass_is_refused(make_policy: Callable[..., gemma.Gemma]) -> None:
    """It would leave out the adapters, in silence."""
    with pytest.raises(TypeError, match="hidden_states"):
        make_policy()(**make_policy().get_model_input())


class TestTokenLogps:
    """With the gradient written by hand."""

    @staticmethod
    def forward(base: gemma.Gemma, softcap: float | None) -> Forward:
        forward, _ = split_model(base)
        architecture = dataclasses.replace(forward.architecture, final_logit_softcap=softcap)
        return dataclasses.replace(forward, architecture=architecture)

    @staticmethod
    def plain(hidden: Any, embedding: Any, targets: Any, softcap: Any, temperature: float) -> Any:
        logits = hidden @ embedding.T
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        logps = jax.nn.log_softmax(logits / temperature)
        chosen = jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
        return TokenLogps(chosen, -(jnp.exp(logps) * logps).sum(-1))

    @pytest.fixture(scope="class")
    @classmethod
    def given(cls, base: gemma.Gemma) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Hidden states, targets, and the slope of each log-probability; logits reach 12."""
        random = np.random.default_rng(0)
        _, weights = split_model(base)
        hidden = jnp.asarray(10 * random.standard_normal((3, 11, 32)), jnp.float32)
        assert abs(hidden @ weights.embedding.T).max() > 10
        targets = jnp.asarray(random.integers(0, 496, (3, 11)))
        return hidden, targets, jnp.asarray(random.standard_normal((3, 11)), jnp.float32)

    @pytest.mark.parametrize(
        ("temperature", "softcap"), [(1.0, None), (0.7, None), (1.0, 3.0), (0.7, 30.0)]
    )
    def test_value_and_gradient_are_those_of_the_plain_formula(
        self, temperature: float, softcap: float | None, base: gemma.Gemma, given: Any
    ) -> None:
        hidden, targets, slopes = given
        _, weights = split_model(base)
        forward = self.forward(base, softcap)

        def with_gradient(function: Any) -> Any:
            def of(hidden: jax.Array) -> tuple[jax.Array, TokenLogps]:
                found = function(hidden)
                return jnp.sum(slopes * found.logps), found

            (_, found), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(hidden)
            return found, gradient

        expected, expected_gradient = with_gradient(
            lambda h: self.plain(h, weights.embedding, targets, softcap, temperature)
        )
        size = np.linalg.norm(expected_gradient)
        for chunk in (4, 50):
            found, gradient = with_gradient(
                lambda h, chunk=chunk: token_logps(
                    *(forward, weights, h, targets), temperature=temperature, chunk_tokens=chunk
                )
            )
            np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
            assert np.linalg.norm(gradient - expected_gradient) < 1e-5 * size

    def test_bfloat16_is_near_float32(self, base: gemma.Gemma, given: Any) -> None:
        """Values and slopes differ by the rounding of the inputs: 8 bits, of logits near 10."""
        hidden, targets, slopes = given
        _, weights = split_model(base)
        forward = self.forward(base, 30.0)
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)

        def gradient(hidden: jax.Array, weights: Weights) -> Any:
            def of(hidden: jax.Array) -> Any:
                found = token_logps(
                    *(forward, weights, hidden, targets), temperature=0.7, chunk_tokens=4
                )
                return jnp.sum(slopes * found.logps), found.logps

            return jax.jit(jax.grad(of, has_aux=True))(hidden)

        expected, logps = gradient(hidden, weights)
        actual, narrow_logps = gradient(hidden.astype(jnp.bfloat16), narrow)
        assert (actual.dtype, narrow_logps.dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_allclose(narrow_logps, logps, atol=0.1)
        difference = np.linalg.norm(np.asarray(actual, np.float32) - expected)
        assert difference < 0.02 * np.linalg.norm(expected)

    def test_entropy_carries_no_gradient(self, base: gemma.Gemma, given: Any) -> None:
        hidden, targets, _ = given
        _, weights = split_model(base)
        forward = self.forward(base, 30.0)

        def entropy(hidden: jax.Array) -> jax.Array:
            given = (forward, weights, hidden, targets)
            return token_logps(*given, temperature=1.0, chunk_tokens=4).entropy.sum()

        assert not jax.jit(jax.grad(entropy))(hidden).any()

    def test_memory_is_bounded_by_the_chunk(self, base: gemma.Gemma) -> None:
        """What the gradient keeps of a vocabulary is a few chunks of logits, never all of them."""
        rows, width, dim, chunk = 4, 64, 8, 8
        forward = self.forward(base, 30.0)
        hidden = jax.ShapeDtypeStruct((rows, width, dim), jnp.float32)
        targets = jax.ShapeDtypeStruct((rows, width), jnp.int32)

        def temporaries(vocabulary: int, chunk: int) -> int:
            def loss(hidden: jax.Array, embedding: jax.Array, targets: jax.Array) -> jax.Array:
                base = nnx.State({"embedder": {"input_embedding": nnx.Param(embedding)}})
                found = token_logps(
                    *(forward, Weights(nnx.State({}), base), hidden, targets),
                    temperature=0.7,
                    chunk_tokens=chunk,
                )
                return jnp.sum(jnp.square(found.logps))

            embedding = jax.ShapeDtypeStruct((vocabulary, dim), jnp.float32)
            compiled = jax.jit(jax.grad(loss)).lower(hidden, embedding, targets).compile()
            analysis = compiled.memory_analysis()
            assert analysis is not None
            return analysis.temp_size_in_bytes

        small, large = 32_000, 256_000
        grown = temporaries(large, chunk) - temporaries(small, chunk)
        of_a_chunk = rows * chunk * (large - small) * 4
        print(grown / of_a_chunk)
        assert grown < 6 * of_a_chunk
        assert grown < rows * width * (large - small) * 4
        # The bound is the chunk's: in one piece it is that of the whole width.
        assert temporaries(large, width) > 4 * temporaries(large, chunk)


class TestChunks:
    @pytest.mark.parametrize("chunk", [1, 3, 7, 8, 20])
    def test_they_give_what_the_whole_gives(self, chunk: int) -> None:
        x = jnp.arange(2 * 7 * 3, dtype=jnp.float32).reshape(2, 7, 3)
        y = jnp.arange(14).reshape(2, 7)
        result = map_chunks(lambda pair: pair[0].sum(-1) * pair[1], (x, y), chunk)
        np.testing.assert_array_equal(result, x.sum(-1) * y)

    def test_they_bound_what_is_in_memory(self) -> None:
        """In a Python loop over the chunks, the compiler computes them at once: no bound at all."""
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
