"""Gemma 3 in training: gradients of adapters are those of PEFT on transformers' model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from gemma2_grpo.commands.sft import supervised
from gemma2_grpo.config import Config
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.lora import add_lora
from gemma2_grpo.model.save import linear_adapters, save_peft
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.model.weights import Model
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.procedural import generate
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training.supervised import SupervisedLearner

PROBLEMS = [Example(p.question, p.answer, p.solution) for p in generate("train", 4, 1)]
GOLDEN = "gemma3_gradients.npz"
Gradients = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def tiny3(goldens: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 for the embedded tokenizer, with a window shorter than any prompt."""
    values = goldens.SMALL3 | {"vocab_size": 496}
    return goldens.write_model(tmp_path_factory.mktemp("gemma3"), values, seed=9)


@pytest.fixture(scope="module")
def sft_config(config: Config, changed: Callable[..., Config], tiny3: Path) -> Config:
    return changed(
        supervised(config),
        model=str(tiny3),
        prompts_per_step=len(PROBLEMS),
        max_prompt_tokens=64,
        max_completion_tokens=64,
        micro_batch_tokens=512,
    )


@pytest.fixture
def models(
    tiny3: Path, sft_config: Config, mesh: Mesh, fill_adapters: Callable[..., None]
) -> tuple[Model, Model]:
    """Base, and policy with all adapters drawn."""
    base = load_weights(tiny3, "float32", mesh)
    policy = add_lora(base, sft_config.model, mesh, 0)
    fill_adapters(policy, seed=3)
    return base, policy


@pytest.fixture
def gradients(
    models: tuple[Model, Model], sft_config: Config, mesh: Mesh, tokenizer: Tokenizer
) -> tuple[float, Gradients]:
    """Mean loss on the solutions, and its gradient as the update takes it, by PEFT's names."""
    base, policy = models
    graph, lora, rest = nnx.split(policy, nnx.LoRAParam, ...)
    copy = nnx.merge(graph, jax.tree.map(jnp.copy, lora), rest)  # An update takes its buffers.
    learner = SupervisedLearner(sft_config, copy, base, tokenizer, mesh)
    seen: list[nnx.State] = []
    apply = learner.updater.programs.apply

    def spy(lora: Any, frozen: Any, state: Any, gradients: nnx.State) -> Any:
        seen.append(gradients)
        return apply(lora, frozen, state, gradients)

    learner.updater.programs.apply = spy  # pyright: ignore[reportAttributeAccessIssue]

    def unscored(_: Sequence[Example], texts: Sequence[str], __: Any) -> Mapping[str, np.ndarray]:
        return {"total": np.zeros(len(texts))}

    result = learner.step(0, PROBLEMS, unscored)
    nnx.update(copy, seen[0])
    found = {}
    for module, a, b in linear_adapters(copy):
        found |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
    return result.updates[0]["loss"], found


def assert_same(found: tuple[float, Gradients], expected: Gradients) -> None:
    loss, gradients = found
    assert loss == pytest.approx(float(expected["loss"]), rel=1e-5)
    names = expected.keys() - {"loss"}
    assert len(names) == 6 * 7 * 2 and names == gradients.keys()
    for name in names:
        wanted = expected[name]
        if name.endswith(("k_proj.lora_A", "v_proj.lora_A")):  # One matrix of ours, two of PEFT's.
            key = name.replace("v_proj", "k_proj")
            wanted = expected[key] + expected[key.replace("k_proj", "v_proj")]
        error = np.linalg.norm(gradients[name] - wanted) / np.linalg.norm(wanted)
        assert error < 1e-4, (name, error)


def test_gradients_are_the_golden_ones(
    gradients: tuple[float, Gradients], goldens: ModuleType
) -> None:
    with np.load(goldens.GOLDEN / GOLDEN) as expected:
        assert_same(gradients, dict(expected))


@pytest.mark.oracle
def test_gradients_are_those_of_peft(
    models: tuple[Model, Model],
    gradients: tuple[float, Gradients],
    sft_config: Config,
    tiny3: Path,
    tokenizer: Tokenizer,
    goldens: ModuleType,
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft")
    save_peft(models[1], tmp_path, sft_config.model, "float32", base=str(tiny3))
    prompts = [tokenizer.encode(render_prompt(problem.question)) for problem in PROBLEMS]
    targets = [[*tokenizer.encode(p.solution), tokenizer.eos_id()] for p in PROBLEMS]
    expected = goldens.peft_gradients(tiny3, tmp_path, prompts, targets)
    assert_same(gradients, expected)
    with np.load(goldens.GOLDEN / GOLDEN) as golden:
        for name, value in expected.items():
            np.testing.assert_allclose(golden[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
