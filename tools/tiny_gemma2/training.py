"""Training of all weights, from random ones, and the model directory that it writes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gemma2_grpo.config import DataConfig, ModelConfig, OptimizerConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.open import open_files
from gemma2_grpo.model.save import save_model, write_settings
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.runtime.atomic import check_target, staged
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training.optimizer import make_optimizer
from tools.tiny_gemma2.supervised import Row, train_supervised

_STORED = "bfloat16"
"""Type of the weights that are written."""

DrawBatch = Callable[[int], list[Row]]
"""The rows of a step, a pure function of its number."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the embedded model was trained."""

    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            model="embedded", dtype="float32", mesh_shape=(1, 1), remat="none"
        )
    )
    """Architecture and tokenizer; the weights are drawn."""
    data: DataConfig = field(
        default_factory=lambda: DataConfig(dataset="procedural", num_train_samples=40_000)
    )
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=3e-3,
            warmup_fraction=0.04,
            final_lr_fraction=0.02,
            weight_decay=0.01,
            max_grad_norm=1.0,
        )
    )
    steps: int = 2500
    """Updates of the first part."""
    batch_size: int = 24
    """Rows in each."""
    max_tokens: int = 80
    """Tokens of a row; longer ones are cut."""
    seed: int = 0
    """Seed of weights and of what the lessons draw."""


class Phase(NamedTuple):
    """One part of the training."""

    name: str
    steps: int
    draw: DrawBatch
    optimizer: OptimizerConfig


def solution_row(tokenizer: Tokenizer, question: str, solution: str) -> Row:
    """Prompt and solution; the loss is on the solution and the end of the turn."""
    prompt = tokenizer.encode(render_prompt(question))
    completion = [*tokenizer.encode(solution), tokenizer.eos_id()]
    return Row(prompt + completion, [False] * len(prompt) + [True] * len(completion))


MakePhases = Callable[[Recipe, Tokenizer], list[Phase]]
"""Makes the parts of the training, in order."""


def train(recipe: Recipe, make_phases: MakePhases, to: Path) -> None:
    """Trains the parts, and writes the model.

    Raises:
        UserError: if it cannot be written.
    """
    if any(to.glob("*.safetensors")):
        raise UserError(f"{to}: holds a model already; choose another --to")
    check_target(to)
    files = open_files(recipe.model, needs_weights=False)
    model = files.draw_base(recipe.seed)
    for name, steps, draw, optimizer in make_phases(recipe, files.tokenizer):
        train_supervised(
            model,
            (draw(step) for step in range(steps)),
            make_optimizer(optimizer, steps),
            files.mesh,
            width=recipe.max_tokens,
            pad_id=files.tokenizer.pad,
            chunk_tokens=recipe.model.logprob_chunk_tokens,
            remat=recipe.model.remat,
            on_step=_printing(name, steps),
        )
    with staged(to) as folder:
        write_settings(folder, files.directory, _STORED)
        save_model(model, folder, _STORED)


def _printing(name: str, total: int) -> Callable[[int, float], None]:
    def show(step: int, loss: float) -> None:
        if step % max(1, total // 20) == 0 or step == total:
            print(f"{name}: step {step}/{total}  loss {loss:.4f}", flush=True)

    return show
