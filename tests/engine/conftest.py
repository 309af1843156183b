"""A tiny Gemma 2 with sharp distributions, its meshes, and what tests compute by plain means."""

import dataclasses
import gc
import importlib.util
from collections.abc import Callable
from importlib import resources
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

from gemma2_grpo.config import (
    Config,
    GrpoConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    UserError,
)
from gemma2_grpo.engine.learner import Completions, Learner
from gemma2_grpo.engine.lora import add_lora
from gemma2_grpo.engine.loss import group_advantages
from gemma2_grpo.engine.model import load_weights, make_mesh
from gemma2_grpo.engine.sampling import Sampling
from gemma2_grpo.engine.tokenizer import Tokenizer, load_tokenizer
from gemma2_grpo.engine.update import UpdateMetrics
from gemma2_grpo.task.data import Example

EMBEDDED = Path(str(resources.files("gemma2_grpo") / "assets" / "tiny-gemma2"))
GOLDENS = Path(__file__).parents[1] / "oracle" / "make_goldens.py"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # The models are so small that optimizing a program takes longer than running it.
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_runtest_teardown() -> None:
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> None:
    """Tunix collects garbage whenever a cluster is made; what is here for good is none."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def goldens() -> ModuleType:
    """The script that makes the goldens, for its random weights and its oracle."""
    spec = importlib.util.spec_from_file_location("make_goldens", GOLDENS)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_values(goldens: ModuleType) -> dict[str, Any]:
    """Architecture that shards over (2, 4), with the embedded tokenizer's vocabulary."""
    return goldens.SMALL | {
        "vocab_size": 496,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 10,
    }


@pytest.fixture(scope="session")
def tiny_directory(
    goldens: ModuleType, tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return goldens.write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_values, seed=7)


@pytest.fixture(scope="session")
def refusal() -> Callable[..., str]:
    """The one line with which a call refuses its arguments."""

    def call(function: Callable[..., Any], *arguments: Any) -> str:
        with pytest.raises(UserError) as caught:
            function(*arguments)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return call


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    return make_mesh((1, 1))


@pytest.fixture(scope="session")
def wide_mesh() -> Mesh:
    return make_mesh((2, 4))


@pytest.fixture(scope="session")
def base(tiny_directory: Path, mesh: Mesh) -> gemma.Gemma:
    return load_weights(tiny_directory, "float32", mesh)


@pytest.fixture(scope="session")
def wide_base(tiny_directory: Path, wide_mesh: Mesh) -> gemma.Gemma:
    return load_weights(tiny_directory, "float32", wide_mesh)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(EMBEDDED)


@pytest.fixture(scope="session")
def config() -> Config:
    """Sizes that fit the tiny model; prompts of the examples have 20 to 28 tokens."""
    return Config(
        model=ModelConfig(
            model="tiny",
            dtype="float32",
            lora_rank=4,
            lora_alpha=8.0,
            mesh_shape=(1, 1),
            remat="none",
            logprob_chunk_tokens=5,
        ),
        rollout=RolloutConfig(
            num_generations=4,
            prompts_per_step=2,
            max_prompt_tokens=28,
            max_completion_tokens=12,
            temperature=0.7,
        ),
        grpo=GrpoConfig(num_iterations=1, micro_batch_tokens=56),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_fraction=0.0, weight_decay=0.0, max_grad_norm=1.0
        ),
        run=RunConfig(max_steps=4),
    )


@pytest.fixture(scope="session")
def changed() -> Callable[..., Config]:
    """Replaces fields of a configuration by their names alone; no two sections share one."""

    def change(config: Config, **fields: Any) -> Config:
        for name, value in fields.items():
            section = next(
                s.name for s in dataclasses.fields(config) if hasattr(getattr(config, s.name), name)
            )
            new = dataclasses.replace(getattr(config, section), **{name: value})
            config = dataclasses.replace(config, **{section: new})
        return config

    return change


@pytest.fixture(scope="session")
def fill_adapters() -> Callable[..., None]:
    """Draws all adapters of a policy, so that it is not its base."""

    def fill(policy: gemma.Gemma, seed: int, scale: float = 0.2) -> None:
        random = np.random.default_rng(seed)
        state = jax.tree.map(
            lambda x: jax.device_put(
                (scale * random.standard_normal(x.shape)).astype(np.float32), x.sharding
            ),
            nnx.state(policy, nnx.LoRAParam),
        )
        nnx.update(policy, state)

    return fill


@pytest.fixture(scope="session")
def make_policy(
    base: gemma.Gemma, mesh: Mesh, config: Config, fill_adapters: Callable[..., None]
) -> Callable[..., gemma.Gemma]:
    """Makes a policy on the base: fresh as `add_lora` gives it, or with all adapters drawn."""
    graphdef, lora, rest = nnx.split(add_lora(base, config.model, mesh, 0), nnx.LoRAParam, ...)
    fresh = jax.device_get(lora)

    def make(*, filled: int | None = None, scale: float = 0.2) -> gemma.Gemma:
        own = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), fresh, lora)
        policy = nnx.merge(graphdef, own, rest, copy=True)
        if filled is not None:
            fill_adapters(policy, filled, scale)
        return policy

    return make


@pytest.fixture(scope="session")
def make_learner(
    base: gemma.Gemma, mesh: Mesh, tokenizer: Tokenizer, make_policy: Callable[..., gemma.Gemma]
) -> Callable[..., Learner]:
    def make(config: Config, policy: gemma.Gemma | None = None) -> Learner:
        return Learner(config, policy or make_policy(), base, tokenizer, mesh)

    return make


@pytest.fixture(scope="session")
def full_logits() -> Callable[[gemma.Gemma, Any], np.ndarray]:
    """Logits [R, L, V] of right-padded tokens with Tunix's own attention: no cache, no chunks."""

    @nnx.jit
    def call(model: gemma.Gemma, tokens: jax.Array) -> jax.Array:
        rows, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        mask = jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))
        return model(tokens, positions, None, mask)[0]

    return lambda model, tokens: np.asarray(call(model, jnp.asarray(tokens)))


@pytest.fixture(scope="session")
def truncated_logps() -> Callable[[np.ndarray, Sampling], np.ndarray]:
    """The drawing distribution by hand, token by token from the likeliest: [V] -> [V]."""

    def truncate(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
        logps = log_softmax(logits / sampling.temperature)
        order = np.argsort(-logps)
        kept = order[: sampling.top_k] if sampling.top_k else order
        probabilities = np.exp(logps[kept]) / np.exp(logps[kept]).sum()
        chosen, total = [], 0.0
        for token, probability in zip(kept, probabilities, strict=True):
            if total >= sampling.top_p and sampling.top_p < 1:
                break
            chosen.append(token)
            total += probability
        result = np.full(len(logits), -np.inf)
        result[chosen] = log_softmax(logps[chosen])
        return result

    return truncate


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Questions of different lengths in words of the embedded tokenizer."""
    counts = (3, 4, 5, 6, 7, 8, 9, 2)
    return [
        Example(
            f"Tom has {n} apples and buys {n + 1} more. " + "How many? " * (n % 3), str(2 * n + 1)
        )
        for n in counts
    ]


@pytest.fixture(scope="session")
def random_completions(tokenizer: Tokenizer) -> Callable[..., Completions]:
    """Completions of random tokens and lengths, some of which end with the end of the turn."""

    def draw(count: int, limit: int, seed: int) -> Completions:
        random = np.random.default_rng(seed)
        tokens = []
        for length in random.integers(1, limit + 1, count):
            row = random.integers(130, 496, length).astype(np.int32)
            if random.random() < 0.7:
                row[-1] = tokenizer.eos_id()
            tokens.append(row)
        truncated = np.array([row[-1] not in tokenizer.stop_ids for row in tokens])
        return Completions([tokenizer.decode(row) for row in tokens], tokens, truncated)

    return draw


@pytest.fixture(scope="session")
def learn() -> Callable[..., list[UpdateMetrics]]:
    """What a step does with completions once they are scored: rewards are [B, G]."""

    def learn(
        learner: Learner, prompts: list[str], completions: Completions, rewards: np.ndarray
    ) -> list[UpdateMetrics]:
        grpo = learner.config.grpo
        advantages = group_advantages(rewards, scale_by_std=grpo.loss_type != "drgrpo")
        chosen = np.ones(len(prompts), bool) if grpo.beta else ~advantages.is_uniform
        packed = learner.pack(prompts, completions, chosen)
        references = learner.updater.reference_logps(packed) if grpo.beta else None
        return learner.update(packed, references, completions, advantages)

    return learn


@pytest.fixture(scope="session")
def adapters() -> Callable[[gemma.Gemma], dict[str, np.ndarray]]:
    """Adapters of a policy by their paths, on the host."""

    def read(policy: gemma.Gemma) -> dict[str, np.ndarray]:
        flat = nnx.to_flat_state(nnx.state(policy, nnx.LoRAParam))
        return {"/".join(map(str, path)): np.asarray(v.get_value()) for path, v in flat}

    return read
