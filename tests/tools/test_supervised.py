"""Supervised training: the loss is that of the targets alone, and it goes down."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from tools.tiny_gemma2.supervised import Row, next_token_loss, pack, train_supervised
from tunix.models.gemma import model as gemma

from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.weights import Forward, Weights, forward_of, weights_of

WIDTH = 16
AsTunix = Callable[[gemma.Gemma], gemma.Gemma]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Prompts of 3 to 6 tokens with completions of 4 to 8; the last is longer than the width."""
    random = np.random.default_rng(4)
    made = []
    for prompt, completion in [(3, 8), (6, 4), (4, 6), (6, 14)]:
        tokens = random.integers(3, 496, prompt + completion).tolist()
        made.append(Row(tokens, [False] * prompt + [True] * completion))
    return made


@jax.jit(static_argnames=("forward", "chunk_tokens"))
def loss_of(
    forward: Forward, weights: Weights, tokens: jax.Array, targets: jax.Array, chunk_tokens: int
) -> jax.Array:
    return next_token_loss(forward, weights, tokens, targets, chunk_tokens)


def stock_loss(stock: gemma.Gemma, weights: Weights, tokens: Any, targets: Any) -> jax.Array:
    """The same loss by way of all logits of a model of Tunix's own layers."""
    rows, length = tokens.shape
    mask = jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))
    lora = jax.tree.map(lambda x: x.astype(weights.embedding.dtype), weights.lora)
    stock = nnx.merge(nnx.split(stock)[0], lora, weights.base)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    logits, _ = stock(tokens, positions, None, mask)
    wide = logits[:, :-1].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(wide, tokens[:, 1:])
    return (losses * targets[:, 1:]).sum() / targets[:, 1:].sum()


def all_gradients(model: gemma.Gemma, rows: list[Row]) -> dict[str, np.ndarray]:
    """Of the loss in all weights, by path."""
    tokens, targets = pack(rows, WIDTH, 0)
    forward, weights = forward_of(model), weights_of(model)

    def loss(base: nnx.State) -> jax.Array:
        return next_token_loss(forward, Weights(weights.lora, base), tokens, targets, 7)

    return by_path(jax.jit(jax.grad(loss))(weights.base))


def by_path(state: Any) -> dict[str, np.ndarray]:
    return {
        "/".join(map(str, path)): np.asarray(v.get_value(), np.float32)
        for path, v in nnx.to_flat_state(state)
    }


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


class TestLoss:
    def test_rows_are_padded_or_cut(self) -> None:
        tokens, targets = pack(
            [Row([5, 6, 7], [False, True, True]), Row([8, 9, 1, 2, 3], [False] * 3 + [True] * 2)],
            width=4,
            pad_id=0,
        )
        assert tokens.tolist() == [[5, 6, 7, 0], [8, 9, 1, 2]]
        assert targets.tolist() == [[False, True, True, False], [False, False, False, True]]

    @pytest.mark.parametrize("chunk_tokens", [7, 128])
    def test_by_hand(
        self,
        chunk_tokens: int,
        base: gemma.Gemma,
        rows: list[Row],
        full_logits: Callable[..., np.ndarray],
    ) -> None:
        tokens, targets = pack(rows, WIDTH, 0)
        logits = full_logits(base, tokens).astype(np.float64)
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses = [
            -logps[i, t - 1, tokens[i, t]]
            for i, row in enumerate(rows)
            for t in range(1, WIDTH)
            if t < len(row.tokens) and row.is_target[t]
        ]
        assert len(losses) == 8 + 4 + 6 + 10
        forward, weights = forward_of(base), weights_of(base)
        loss = loss_of(forward, weights, tokens, targets, chunk_tokens)
        assert float(loss) == pytest.approx(np.mean(losses), rel=1e-6)

    def test_prompts_and_padding_carry_none(self, base: gemma.Gemma, rows: list[Row]) -> None:
        tokens, targets = pack(rows[:1], WIDTH, 0)
        forward, weights = forward_of(base), weights_of(base)

        def of(embedding: jax.Array, tokens: np.ndarray) -> jax.Array:
            base = jax.tree.map(lambda x: x, weights.base)
            base["embedder"]["input_embedding"].set_value(embedding)
            return next_token_loss(forward, Weights(weights.lora, base), tokens, targets, 7)

        # What follows the last target is not seen by it.
        other = tokens.copy()
        other[0, 11:] = 400
        losses = [float(of(weights.embedding, t)) for t in (tokens, other)]
        assert losses[0] == losses[1]
        only = np.zeros_like(targets)
        assert float(loss_of(forward, weights, tokens, only, 7)) == 0  # Not 0 / 0.
        only[0, 3] = True
        first = float(loss_of(forward, weights, tokens, only, 7))
        only[0, :3] = True
        only[0, 3] = False
        prompt = float(loss_of(forward, weights, tokens, only, 7))
        assert first > 0 and prompt > 0 and first != pytest.approx(prompt)


class TestGradients:
    """Completions of 8 and more tokens after prompts of up to 6: a window of 10 binds."""

    def test_in_float32_they_are_those_of_tunix_layers(
        self, base: gemma.Gemma, rows: list[Row], as_tunix: AsTunix
    ) -> None:
        tokens, targets = pack(rows, WIDTH, 0)
        weights, tunix = weights_of(base), as_tunix(base)

        def loss(trained: nnx.State) -> jax.Array:
            return stock_loss(tunix, Weights(weights.lora, trained), tokens, targets)

        expected = by_path(jax.jit(jax.grad(loss))(weights.base))
        found = all_gradients(base, rows)
        assert found.keys() == expected.keys() and len(found) == 22
        for name, gradient in expected.items():
            assert distance(found[name], gradient) < 1e-5, name

    @pytest.mark.oracle
    def test_in_float32_they_are_those_of_transformers(
        self, base: gemma.Gemma, tiny_directory: Path, rows: list[Row]
    ) -> None:
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        model = transformers.Gemma2ForCausalLM.from_pretrained(
            tiny_directory, attn_implementation="eager", dtype=torch.float32
        )
        tokens, targets = pack(rows, WIDTH, 0)
        labels = torch.tensor(np.where(targets, tokens, -100), dtype=torch.long)
        model(input_ids=torch.tensor(tokens), labels=labels).loss.backward()
        theirs = {name: x.grad.numpy() for name, x in model.named_parameters()}
        ours = all_gradients(base, rows)
        layer, theirs_layer = "layers/1/", "model.layers.1."
        queries = ours[f"{layer}attn/q_einsum/w"].transpose(0, 2, 1).reshape(64, 32)
        output = ours[f"{layer}attn/attn_vec_einsum/w"].reshape(64, 32).T
        keys, values = ours[f"{layer}attn/kv_einsum/w"].transpose(0, 1, 3, 2).reshape(2, 32, 32)
        for found, name in [
            (ours["embedder/input_embedding"], "model.embed_tokens.weight"),
            (queries, f"{theirs_layer}self_attn.q_proj.weight"),
            (keys, f"{theirs_layer}self_attn.k_proj.weight"),
            (values, f"{theirs_layer}self_attn.v_proj.weight"),
            (output, f"{theirs_layer}self_attn.o_proj.weight"),
            (ours[f"{layer}mlp/gate_proj/kernel"].T, f"{theirs_layer}mlp.gate_proj.weight"),
            (ours[f"{layer}mlp/down_proj/kernel"].T, f"{theirs_layer}mlp.down_proj.weight"),
        ]:
            assert distance(found, theirs[name]) < 2e-5, name

    def test_in_bfloat16_attention_is_that_of_grpo(
        self,
        make_policy: Callable[..., gemma.Gemma],
        mesh: Mesh,
        rows: list[Row],
        as_tunix: AsTunix,
    ) -> None:
        """Tunix's layers, whose softmax would run in bfloat16, give another gradient."""
        model = in_bfloat16(make_policy(filled=3, scale=0.05))
        tokens, targets = pack(rows, WIDTH, 0)
        forward, weights, tunix = forward_of(model), weights_of(model), as_tunix(model)

        @jax.jit
        @jax.grad
        def ours(lora: nnx.State) -> jax.Array:
            return next_token_loss(forward, Weights(lora, weights.base), tokens, targets, 7)

        @jax.jit
        @jax.grad
        def stock(lora: nnx.State) -> jax.Array:
            return stock_loss(tunix, Weights(lora, weights.base), tokens, targets)

        expected, other = by_path(ours(weights.lora)), by_path(stock(weights.lora))
        before = by_path(weights.lora)
        train_supervised(
            model,
            [rows],
            optax.sgd(1.0),
            mesh,
            width=WIDTH,
            pad_id=0,
            chunk_tokens=7,
            train_base=False,
        )
        after = by_path(weights_of(model).lora)
        for name, gradient in expected.items():
            found = distance(before[name] - after[name], gradient)
            assert found < 1e-4 < 3e-3 < distance(other[name], gradient), name

    def test_in_bfloat16_every_exponential_is_in_float32(
        self, make_policy: Callable[..., gemma.Gemma], rows: list[Row], as_tunix: AsTunix
    ) -> None:
        model = in_bfloat16(make_policy())
        tokens, targets = pack(rows, WIDTH, 0)
        forward, weights = forward_of(model), weights_of(model)
        text = str(
            jax.make_jaxpr(lambda w: next_token_loss(forward, w, tokens, targets, 7))(weights)
        )
        tunix = as_tunix(model)
        stock = str(jax.make_jaxpr(lambda w: stock_loss(tunix, w, tokens, targets))(weights))
        exponential = re.compile(r"(\w+)\[[^]]*\] = exp ")
        assert set(exponential.findall(text)) == {"f32"}
        assert "bf16" in exponential.findall(stock)


def in_bfloat16(model: gemma.Gemma) -> gemma.Gemma:
    """The same model with its base in bfloat16."""
    base = nnx.state(model, nnx.Not(nnx.LoRAParam))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), base))
    return model


def train(
    model: gemma.Gemma, rows: list[Row], mesh: Mesh, steps: int, *, train_base: bool
) -> list[float]:
    seen: list[tuple[int, float]] = []
    train_supervised(
        model,
        (rows for _ in range(steps)),
        optax.adam(3e-3 if train_base else 1e-2),
        mesh,
        width=WIDTH,
        pad_id=0,
        chunk_tokens=7,
        train_base=train_base,
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    assert [step for step, _ in seen] == list(range(1, steps + 1))
    return [loss for _, loss in seen]


def values(model: gemma.Gemma, kind: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, kind))]


class TestTraining:
    def test_all_weights(
        self, tiny_directory: Path, mesh: Mesh, wide_mesh: Mesh, rows: list[Row]
    ) -> None:
        results = []
        for where in (mesh, wide_mesh):
            model = load_weights(tiny_directory, "float32", where)
            before = values(model, nnx.Param)
            shardings = [x.sharding for x in jax.tree.leaves(nnx.state(model))]
            results.append(train(model, rows, where, 10, train_base=True))
            after = values(model, nnx.Param)
            assert all((a != b).any() for a, b in zip(before, after, strict=True))
            for leaf, sharding in zip(jax.tree.leaves(nnx.state(model)), shardings, strict=True):
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        one, wide = results
        assert one[-1] < 0.5 * one[0]
        np.testing.assert_allclose(wide, one, rtol=1e-3)

    def test_adapters_alone(
        self,
        make_policy: Callable[..., gemma.Gemma],
        base: gemma.Gemma,
        mesh: Mesh,
        rows: list[Row],
    ) -> None:
        policy = make_policy()
        before = values(base, nnx.Param)
        losses = train(policy, rows, mesh, 15, train_base=False)
        assert losses[-1] < 0.7 * losses[0]
        for model in (base, policy):
            for one, other in zip(values(model, nnx.Not(nnx.LoRAParam)), before, strict=True):
                np.testing.assert_array_equal(one, other)
        assert all(value.any() for value in values(policy, nnx.LoRAParam))

    def test_a_bfloat16_base_keeps_its_type(
        self, make_policy: Callable[..., gemma.Gemma], mesh: Mesh, rows: list[Row]
    ) -> None:
        model = in_bfloat16(make_policy())
        losses = train(model, rows, mesh, 6, train_base=False)
        assert losses[-1] < losses[0]
        assert {v.dtype for v in values(model, nnx.LoRAParam)} == {jnp.dtype("float32")}
        assert {v.dtype for v in values(model, nnx.Not(nnx.LoRAParam))} == {jnp.dtype("bfloat16")}
