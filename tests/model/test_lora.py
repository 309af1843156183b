"""Adapters: on every matrix, on shared weights, learning everywhere, and saved with their base."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file
from tunix.models.gemma import model as gemma

from gemma2_grpo.config import Config, ModelConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.adapter import check_adapter, load_adapter, save_adapter
from gemma2_grpo.model.gemma import run_from_start
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.logprobs import token_logps
from gemma2_grpo.model.lora import adapter_size, add_lora, merge_adapters
from gemma2_grpo.model.mesh import make_mesh
from gemma2_grpo.model.weights import Forward, Weights, split_model, weights_of
from gemma2_grpo.sampling.rollout import Completions
from gemma2_grpo.sampling.tunix import TunixEngine
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training.learner import Learner

AsTunix = Callable[[gemma.Gemma], gemma.Gemma]
KINDS = ("q_einsum", "kv_einsum", "attn_vec_einsum", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def fused_base(
    goldens: ModuleType,
    tiny_values: dict[str, Any],
    mesh: Mesh,
    tmp_path_factory: pytest.TempPathFactory,
) -> gemma.Gemma:
    values = tiny_values | {"num_key_value_heads": 8}
    directory = goldens.write_model(tmp_path_factory.mktemp("models") / "fused", values, seed=8)
    return load_weights(directory, "float32", mesh)


class TestSize:
    def test_grouped_keys_and_values(self, make_policy: Callable[..., gemma.Gemma]) -> None:
        # Rank 4, width 32, MLP 64, 8 query heads and 4 key heads of 8. Keys and values of a layer
        # are one matrix, which has one A.
        layer = 4 * (
            (32 + 64)  # q
            + (32 + 2 * 32)  # kv
            + (64 + 32)  # attention output
            + 2 * (32 + 64)  # gate, up
            + (64 + 32)  # down
        )
        size = adapter_size(make_policy())
        assert (size.matrices, size.parameters) == (2 * 6, 2 * layer) == (12, 4608)

    def test_as_many_keys_as_queries(
        self, fused_base: gemma.Gemma, mesh: Mesh, config: Config
    ) -> None:
        layer = 4 * ((32 + 3 * 64) + (64 + 32) + 2 * (32 + 64) + (64 + 32))
        size = adapter_size(add_lora(fused_base, config.model, mesh, 0))
        assert (size.matrices, size.parameters) == (2 * 5, 2 * layer) == (10, 4864)


def buffers(model: nnx.Module) -> dict[str, list[int]]:
    """Where the base weights lie, by path and device."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    return {
        "/".join(map(str, path)): [
            shard.data.unsafe_buffer_pointer() for shard in v.get_value().addressable_shards
        ]
        for path, v in flat
    }


def bytes_of_each_device(state: nnx.State) -> dict[jax.Device, int]:
    """Of everything but single numbers."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(state):
        for part in leaf.addressable_shards if leaf.ndim else ():
            held[part.device] = held.get(part.device, 0) + part.data.nbytes
    return held


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (2, 4),
        pytest.param((1, 4), marks=pytest.mark.slow),
        pytest.param((8, 1), marks=pytest.mark.slow),
    ],
)
def test_policy_and_reference_share_the_base(
    shape: tuple[int, int],
    tiny_directory: Path,
    config: Config,
    changed: Callable[..., Config],
    tokenizer: Any,
) -> None:
    """And each device holds its share of it, and of adapters and moments, and no more."""
    mesh = make_mesh(shape)
    base = load_weights(tiny_directory, "float32", mesh)
    policy = add_lora(base, config.model, mesh, seed=0)
    config = changed(config, mesh_shape=shape)
    learner = Learner(config, policy, base, tokenizer, mesh)
    cluster = TunixEngine(changed(config, engine="vanilla"), policy, tokenizer, mesh).cluster
    expected = buffers(base)
    assert len(expected) == 2 + 2 * 10
    for model in (policy, learner.policy, cluster.actor_trainer.model, cluster.rollout.model()):
        assert buffers(model) == expected
    lora = nnx.state(policy, nnx.LoRAParam)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(lora))

    (fsdp, tp), rank = shape, 4
    matrices = 496 * 32 + 2 * (64 * 32 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 64)
    norms = (2 * 4 + 1) * 32
    # Of each adapter the side of the hidden units lies along fsdp, the other one along tp.
    adapters = 2 * 6 * rank * (32 // fsdp + 64 // tp)
    everywhere = set(mesh.devices.ravel())
    for state, held in (
        (nnx.state(base), 4 * (matrices // (fsdp * tp) + norms // tp)),
        (lora, 4 * adapters),
        (nnx.state(learner.optimizer), 2 * 4 * adapters),
    ):
        assert bytes_of_each_device(state) == dict.fromkeys(everywhere, held)


def test_the_base_is_left_as_it_was(base: gemma.Gemma, mesh: Mesh, config: Config) -> None:
    add_lora(base, config.model, mesh, seed=0)
    assert not jax.tree.leaves(nnx.state(base, nnx.LoRAParam))


class TestSeeds:
    def test_a_seed_decides_every_a(
        self,
        base: gemma.Gemma,
        mesh: Mesh,
        config: Config,
        adapters: Callable[..., dict[str, np.ndarray]],
    ) -> None:
        one, same, other = (
            adapters(add_lora(base, config.model, mesh, seed)) for seed in (0, 0, 1)
        )
        drawn = [value for name, value in one.items() if name.endswith("_a")]
        assert len(drawn) == 12
        for name, value in one.items():
            np.testing.assert_array_equal(same[name], value)
            if name.endswith("_a"):
                assert not np.array_equal(other[name], value)
                assert sum(np.array_equal(value, v) for v in drawn) == 1
            else:
                assert name.endswith("_b") and not value.any()

    @pytest.mark.filterwarnings("ignore:rngs must be provided")
    def test_stock_qwix_has_one_seed_unless_told(
        self, base: gemma.Gemma, as_tunix: AsTunix
    ) -> None:
        """Without `rngs=`, Qwix draws from one fixed seed, with a warning at most."""
        provider = qwix.LoraProvider(module_path=".*attn_vec_einsum", rank=4, alpha=8.0)
        drawn = []
        for _ in range(2):
            policy = qwix.apply_lora_to_model(as_tunix(base), provider, **base.get_model_input())
            drawn.append(jax.tree.leaves(nnx.state(policy, nnx.LoRAParam))[0])
        np.testing.assert_array_equal(drawn[0], drawn[1])


# Inputs of each matrix of a model of width 32 with 8 heads of 8 and an MLP of 64.
INPUTS = {
    "q_einsum": 32,
    "kv_einsum": 32,
    "qkv_einsum": 32,
    "attn_vec_einsum": 8 * 8,
    "gate_proj": 32,
    "up_proj": 32,
    "down_proj": 64,
}
# What transformers calls them.
PEFT_NAMES = {
    "q_proj": "q_einsum",
    "k_proj": "kv_einsum",
    "v_proj": "kv_einsum",
    "o_proj": "attn_vec_einsum",
    **{name: name for name in ("gate_proj", "up_proj", "down_proj")},
}


class TestInitialisation:
    """Matrices A are drawn as PEFT draws them, or as Qwix does."""

    @pytest.fixture
    def wide(self, config: Config) -> ModelConfig:
        """Of a rank that gives a variance enough samples."""
        return dataclasses.replace(config.model, lora_rank=64, lora_alpha=64.0)

    @staticmethod
    def drawn(
        base: gemma.Gemma, model: ModelConfig, mesh: Mesh, **changes: Any
    ) -> dict[tuple[Any, ...], np.ndarray]:
        policy = add_lora(base, dataclasses.replace(model, **changes), mesh, 0)
        flat = nnx.to_flat_state(nnx.state(policy, nnx.LoRAParam))
        return {path: np.asarray(v.get_value()) for path, v in flat if str(path[-1]).endswith("_a")}

    @staticmethod
    def check_uniform(values: np.ndarray, inputs: int) -> None:
        bound = inputs**-0.5
        assert values.size >= 2048
        assert 0.98 * bound < abs(values).max() <= bound
        assert values.var() == pytest.approx(bound**2 / 3, rel=0.12)
        assert abs(values.mean()) < 0.06 * bound

    @pytest.mark.parametrize("kind", ["float32", "bfloat16", "fused"])
    def test_peft_by_default(
        self,
        kind: str,
        base: gemma.Gemma,
        fused_base: gemma.Gemma,
        mesh: Mesh,
        wide: ModelConfig,
    ) -> None:
        """Uniform within 1/sqrt(inputs), in float32 whatever the type of the base."""
        model = fused_base if kind == "fused" else base
        if kind == "bfloat16":
            model = in_bfloat16(model)
        found = self.drawn(model, wide, mesh)
        assert len(found) == 2 * (5 if kind == "fused" else 6)
        for path, values in found.items():
            self.check_uniform(values, INPUTS[str(path[-2])])
            assert values.dtype == np.float32
            assert len(np.unique(values)) > 0.99 * values.size

    @pytest.mark.oracle
    def test_as_peft_itself(
        self, tiny_directory: Path, base: gemma.Gemma, mesh: Mesh, wide: ModelConfig
    ) -> None:
        torch = pytest.importorskip("torch")
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        theirs = peft.get_peft_model(
            transformers.Gemma2ForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32),
            peft.LoraConfig(r=64, lora_alpha=64, target_modules=list(PEFT_NAMES)),
        )
        ours = {str(path[-2]): v for path, v in self.drawn(base, wide, mesh).items()}
        compared = 0
        for name, weight in theirs.named_parameters():
            if "lora_A" not in name:
                continue
            [kind] = [ours_name for peft_name, ours_name in PEFT_NAMES.items() if peft_name in name]
            values = weight.detach().numpy()
            self.check_uniform(values, INPUTS[kind])
            assert ours[kind].std() == pytest.approx(values.std(), rel=0.08)
            compared += 1
        assert compared == 2 * 7

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_qwix_as_qwix_itself(
        self, dtype: str, base: gemma.Gemma, mesh: Mesh, wide: ModelConfig, as_tunix: AsTunix
    ) -> None:
        """To the last bit, and 2.45 times as wide."""
        model = base if dtype == "float32" else in_bfloat16(base)
        found = self.drawn(model, wide, mesh, lora_init="qwix")
        provider = qwix.LoraProvider(
            module_path=".*(" + "|".join(wide.lora_modules) + ")", rank=64, alpha=64.0
        )
        stock = qwix.apply_lora_to_model(
            as_tunix(model), provider, **model.get_model_input(), rngs=nnx.Rngs(0)
        )
        for path, variable in nnx.to_flat_state(nnx.state(stock, nnx.LoRAParam)):
            if str(path[-1]).endswith("_a"):
                expected = np.asarray(variable.get_value().astype(jnp.float32))
                np.testing.assert_array_equal(found[path], expected)
                bound = np.sqrt(6 / INPUTS[str(path[-2])])
                assert 0.97 * bound < abs(expected).max() < 1.01 * bound

    @pytest.mark.parametrize("lora_init", ["peft", "qwix"])
    def test_no_mesh_changes_it(
        self,
        lora_init: str,
        base: gemma.Gemma,
        mesh: Mesh,
        wide_base: gemma.Gemma,
        wide_mesh: Mesh,
        config: Config,
    ) -> None:
        one = self.drawn(base, config.model, mesh, lora_init=lora_init)
        eight = self.drawn(wide_base, config.model, wide_mesh, lora_init=lora_init)
        assert one.keys() == eight.keys() and len(one) == 12
        for path, values in one.items():
            np.testing.assert_array_equal(eight[path], values)


def in_bfloat16(model: gemma.Gemma) -> gemma.Gemma:
    """A copy in bfloat16."""
    copy = nnx.merge(*nnx.split(model), copy=True)
    nnx.update(copy, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(copy)))
    return copy


class TestPatterns:
    def test_one_that_matches_nothing_is_refused(
        self,
        base: gemma.Gemma,
        mesh: Mesh,
        config: Config,
        refusal: Callable[..., str],
        as_tunix: AsTunix,
    ) -> None:
        """Qwix passes over such a pattern in silence; Tunix has no o_proj."""
        modules = dataclasses.replace(config.model, lora_modules=("mlp/up_proj", "attn/o_proj"))
        message = refusal(add_lora, base, modules, mesh, 0)
        assert message == (
            "lora_modules: 'attn/o_proj' matches no weight matrix; those of a layer are "
            "layers/0/attn/attn_vec_einsum, layers/0/attn/kv_einsum, layers/0/attn/q_einsum, "
            "layers/0/mlp/down_proj, layers/0/mlp/gate_proj, layers/0/mlp/up_proj"
        )

        provider = qwix.LoraProvider(module_path=".*attn/o_proj", rank=4, alpha=8.0)
        stock = qwix.apply_lora_to_model(
            as_tunix(base), provider, **base.get_model_input(), rngs=nnx.Rngs(0)
        )
        assert not jax.tree.leaves(nnx.state(stock, nnx.LoRAParam))

    @pytest.mark.parametrize("pattern", ["attn", "mlp", "embedder", "final_norm"])
    def test_one_that_matches_only_containers_is_refused(
        self, pattern: str, base: gemma.Gemma, mesh: Mesh, config: Config
    ) -> None:
        """Qwix adapts matrices; with such a pattern it would adapt nothing, in silence."""
        modules = dataclasses.replace(config.model, lora_modules=("mlp/up_proj", pattern))
        with pytest.raises(UserError, match=f"'{pattern}' matches no weight matrix"):
            add_lora(base, modules, mesh, 0)

    @pytest.mark.parametrize("pattern", [".*", ".+", "embedder|mlp/up_proj"])
    def test_a_pattern_that_matches_the_embedding_is_refused(
        self, pattern: str, base: gemma.Gemma, mesh: Mesh, config: Config
    ) -> None:
        """Qwix would adapt it, and the output head never applies that adapter."""
        modules = dataclasses.replace(config.model, lora_modules=(pattern,))
        with pytest.raises(UserError) as refusal:
            add_lora(base, modules, mesh, seed=0)
        assert str(refusal.value).startswith(
            f"lora_modules: {pattern!r} matches the embedder, which takes no adapter; name weight "
            "matrices of the layers, such as attn/attn_vec_einsum"
        )

    def test_one_that_is_none_is_refused(
        self, base: gemma.Gemma, mesh: Mesh, config: Config
    ) -> None:
        modules = dataclasses.replace(config.model, lora_modules=("(",))
        with pytest.raises(UserError, match=r"^lora_modules: '\(' is not a pattern \(.*\)$"):
            add_lora(base, modules, mesh, 0)


class TestGradients:
    """Every matrix learns: B from the start, A as soon as B is not zero."""

    @staticmethod
    def of(policy: gemma.Gemma, tokens: np.ndarray) -> dict[str, np.ndarray]:
        forward, weights = split_model(policy)
        flat = nnx.to_flat_state(_gradient(forward, weights, jnp.asarray(tokens)))
        return {"/".join(map(str, path)): np.asarray(v.get_value()) for path, v in flat}

    def test_at_the_start_and_after_an_update(
        self,
        make_policy: Callable[..., gemma.Gemma],
        make_learner: Callable[..., Learner],
        config: Config,
        examples: list[Example],
        random_completions: Callable[..., Completions],
        learn: Callable[..., list[dict[str, float]]],
    ) -> None:
        policy = make_policy()
        tokens = np.random.default_rng(0).integers(3, 496, (3, 18)).astype(np.int32)
        start = self.of(policy, tokens)
        assert len(start) == 24
        for name, gradient in start.items():
            assert np.isfinite(gradient).all()
            if name.endswith("_b"):
                assert abs(gradient).max() > 1e-4, name
            else:
                assert not gradient.any(), name

        learner = make_learner(config, policy)
        prompts = [render_prompt(example.question) for example in examples[:2]]
        rewards = np.array([[0.0, 1, 2, 3], [3, 1, 0, 1]])
        learn(learner, prompts, random_completions(8, 12, seed=0), rewards)
        after = self.of(policy, tokens)
        for name, gradient in after.items():
            assert abs(gradient).max() > 1e-5, name

    def test_stock_submodule_calls_run_without_adapters(
        self, make_policy: Callable[..., gemma.Gemma], base: gemma.Gemma, as_tunix: AsTunix
    ) -> None:
        """Qwix wraps `__call__` of the whole model; its parts alone run the base, in silence."""
        policy = as_tunix(make_policy(filled=0))
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 32)), jnp.float32)
        np.testing.assert_array_equal(policy.layers[0].mlp(x), base.layers[0].mlp(x))


@jax.jit(static_argnames="forward")
def _gradient(forward: Forward, weights: Weights, tokens: jax.Array) -> nnx.State:
    def loss(lora: nnx.State) -> jax.Array:
        policy = Weights(lora, weights.base)
        hidden, _ = run_from_start(forward, policy, tokens[:, :-1])
        found = token_logps(
            *(forward, policy, hidden, tokens[:, 1:]), temperature=1.0, chunk_tokens=10
        )
        return found.logps.mean()

    return jax.grad(loss)(weights.lora)


def merged_copy(policy: gemma.Gemma, base: gemma.Gemma, scale: float) -> gemma.Gemma:
    """A copy of the base with the policy's adapters added into its weights."""
    merged = nnx.merge(*nnx.split(base), copy=True)
    nnx.update(merged, merge_adapters(weights_of(policy), scale))
    return merged


class TestMerge:
    @pytest.fixture
    def tokens(self) -> np.ndarray:
        return np.random.default_rng(0).integers(3, 496, (2, 16)).astype(np.int32)

    def test_all_adapters(
        self,
        tokens: np.ndarray,
        base: gemma.Gemma,
        make_policy: Callable[..., gemma.Gemma],
        config: Config,
        full_logits: Callable[..., np.ndarray],
    ) -> None:
        policy = make_policy(filled=1, scale=0.1)
        before = full_logits(base, tokens)
        logits = full_logits(policy, tokens)
        assert abs(logits - before).max() > 1
        merged = merged_copy(policy, base, config.model.lora_scale)
        np.testing.assert_allclose(full_logits(merged, tokens), logits, atol=5e-5, rtol=1e-5)
        np.testing.assert_array_equal(full_logits(base, tokens), before)

    def test_as_many_keys_as_queries(
        self,
        tokens: np.ndarray,
        fused_base: gemma.Gemma,
        mesh: Mesh,
        fill_adapters: Callable[..., None],
        config: Config,
        full_logits: Callable[..., np.ndarray],
    ) -> None:
        policy = add_lora(fused_base, config.model, mesh, 0)
        fill_adapters(policy, 1, 0.1)
        logits = full_logits(policy, tokens)
        assert abs(logits - full_logits(fused_base, tokens)).max() > 1
        merged = merged_copy(policy, fused_base, config.model.lora_scale)
        np.testing.assert_allclose(full_logits(merged, tokens), logits, atol=5e-5, rtol=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_kind(
        self,
        kind: str,
        tokens: np.ndarray,
        base: gemma.Gemma,
        make_policy: Callable[..., gemma.Gemma],
        config: Config,
        full_logits: Callable[..., np.ndarray],
    ) -> None:
        policy = make_policy(filled=1, scale=0.1)
        for path, variable in nnx.to_flat_state(nnx.state(policy, nnx.LoRAParam)):
            if kind not in path:
                nnx.update(
                    policy,
                    nnx.from_flat_state([(path, variable.replace(0 * variable.get_value()))]),
                )
        logits = full_logits(policy, tokens)
        assert abs(logits - full_logits(base, tokens)).max() > 0.1
        merged = merged_copy(policy, base, config.model.lora_scale)
        np.testing.assert_allclose(full_logits(merged, tokens), logits, atol=5e-5, rtol=1e-5)


class TestAdapterFile:
    def test_it_comes_back_as_it_was(
        self,
        make_policy: Callable[..., gemma.Gemma],
        adapters: Callable[..., dict[str, np.ndarray]],
        config: Config,
        tmp_path: Path,
    ) -> None:
        saved = make_policy(filled=1)
        path = save_adapter(saved, tmp_path, config.model, "1234")
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        policy = make_policy()
        load_adapter(policy, tmp_path)
        for name, value in adapters(saved).items():
            np.testing.assert_array_equal(adapters(policy)[name], value)
        with safe_open(path, framework="numpy") as file:
            assert file.metadata().keys() == {"gemma2_grpo"}
            described = json.loads(file.metadata()["gemma2_grpo"])
        assert described == {
            "base": "tiny",
            "base_sha256": "1234",
            "lora_rank": 4,
            "lora_alpha": 8.0,
            "lora_modules": list(config.model.lora_modules),
        }

    def test_it_lands_on_its_shards(
        self,
        make_policy: Callable[..., gemma.Gemma],
        wide_base: gemma.Gemma,
        wide_mesh: Mesh,
        adapters: Callable[..., dict[str, np.ndarray]],
        config: Config,
        tmp_path: Path,
    ) -> None:
        saved = make_policy(filled=1)
        save_adapter(saved, tmp_path, config.model, "1234")
        policy = add_lora(wide_base, config.model, wide_mesh, 0)
        before = [x.sharding for x in jax.tree.leaves(nnx.state(policy, nnx.LoRAParam))]
        load_adapter(policy, tmp_path)
        after = [x.sharding for x in jax.tree.leaves(nnx.state(policy, nnx.LoRAParam))]
        assert after == before
        for name, value in adapters(saved).items():
            np.testing.assert_array_equal(adapters(policy)[name], value)

    def test_another_base_is_refused(
        self,
        make_policy: Callable[..., gemma.Gemma],
        config: Config,
        tmp_path: Path,
        refusal: Callable[..., str],
    ) -> None:
        path = save_adapter(make_policy(filled=1), tmp_path, config.model, "1234")
        check_adapter(tmp_path, config.model, "1234")
        assert refusal(check_adapter, tmp_path, config.model, "5678") == (
            f"{path}: made for another base (tiny); load it on that one"
        )

    @pytest.mark.parametrize(
        "change",
        [{"lora_rank": 8}, {"lora_modules": ("attn/q_einsum", "mlp/up_proj")}, {"lora_alpha": 4.0}],
        ids=["rank", "modules", "scale"],
    )
    def test_other_adapters_are_refused(
        self,
        change: dict[str, Any],
        make_policy: Callable[..., gemma.Gemma],
        config: Config,
        tmp_path: Path,
        refusal: Callable[..., str],
    ) -> None:
        other = dataclasses.replace(config.model, **change)
        path = save_adapter(make_policy(filled=1), tmp_path, config.model, "1234")
        assert refusal(check_adapter, tmp_path, other, "1234") == (
            f"{path}: does not fit; it was made with lora_rank = 4, lora_alpha = 8.0, "
            f"lora_modules = {list(config.model.lora_modules)}; set the same"
        )

    def test_what_is_no_adapter_is_refused(
        self,
        make_policy: Callable[..., gemma.Gemma],
        config: Config,
        tmp_path: Path,
        refusal: Callable[..., str],
    ) -> None:
        policy = make_policy()
        start = f"{tmp_path}/adapter.safetensors: not a readable adapter ("
        assert refusal(check_adapter, tmp_path, config.model, "1234").startswith(start)
        path = save_adapter(policy, tmp_path, config.model, "1234")
        path.write_bytes(path.read_bytes()[:-8])
        assert refusal(check_adapter, tmp_path, config.model, "1234").startswith(start)
        save_file({"x": np.zeros(1, np.float32)}, path)
        assert "another base" in refusal(check_adapter, tmp_path, config.model, "1234")
