"""`gemma2-grpo sft`: supervised training on worked solutions, written as a model directory."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tunix.models.gemma import model as gemma

from gemma2_grpo.config import OptimizerConfig, SftConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.architecture import query_scale, read_architecture
from gemma2_grpo.model.find import check_model, find_model
from gemma2_grpo.model.load import load_weights, random_weights
from gemma2_grpo.model.lora import add_lora
from gemma2_grpo.model.mesh import make_mesh
from gemma2_grpo.model.save import save_model, write_settings
from gemma2_grpo.model.tokenizer import Tokenizer, load_tokenizer
from gemma2_grpo.run.console import Display
from gemma2_grpo.runtime.atomic import check_target, staged
from gemma2_grpo.runtime.devices import start_jax
from gemma2_grpo.runtime.program_cache import counting_programs, use_program_cache
from gemma2_grpo.task.examples import batch_indices, load_splits
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training.supervised import Row, train_supervised
from gemma2_grpo.training.update import make_optimizer

# Of the weights it writes.
_STORED = "bfloat16"

DrawBatch = Callable[[int], list[Row]]
"""The rows of a step, a pure function of its number."""


class Phase(NamedTuple):
    """One part of the training."""

    name: str
    steps: int
    draw: DrawBatch
    optimizer: OptimizerConfig


def solution_phases(config: SftConfig, tokenizer: Tokenizer) -> list[Phase]:
    """One phase: the worked solutions of the training problems.

    Raises:
        UserError: for data that cannot be read or have no solutions.
    """
    data, sft = config.data, config.sft
    solved = [example for example in load_splits(data).train if example.solution]
    if not solved:
        raise UserError(f"dataset = {data.dataset}: has no worked solutions to train on")

    def draw(step: int) -> list[Row]:
        chosen = batch_indices(len(solved), sft.batch_size, data.data_seed, step)
        return [solution_row(tokenizer, solved[i].question, solved[i].solution) for i in chosen]

    return [Phase("solutions", sft.steps, draw, config.optimizer)]


def solution_row(tokenizer: Tokenizer, question: str, solution: str) -> Row:
    """Prompt and solution; the loss is on the solution and the end of the turn."""
    prompt = tokenizer.encode(render_prompt(question))
    completion = [*tokenizer.encode(solution), tokenizer.eos_id()]
    return Row(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def sft(
    config: SftConfig,
    to: Path,
    *,
    phases: Callable[[SftConfig, Tokenizer], list[Phase]] = solution_phases,
    display: Display | None = None,
) -> Path:
    """Trains on worked solutions with the loss on completions only, and writes the model.

    Args:
        config: A checked configuration.
        to: Directory for the trained model, as HF safetensors with config and tokenizer. It must
            not hold another model.
        phases: Makes the parts of the training, in order.
        display: What shows the progress.

    Returns:
        The model directory.

    Raises:
        UserError: for anything that the user can mend.
    """
    display = display or Display()
    if any(to.glob("*.safetensors")):
        raise UserError(f"{to}: holds a model already; choose another --to")
    check_target(to)
    if config.sft.init == "pretrained":
        check_model(config.model.model)
    start_jax(display.note)
    display.warn_of_cpu(config.model, "this configuration")
    source = find_model(config.model.model, needs_weights=config.sft.init == "pretrained")
    tokenizer = load_tokenizer(source)
    parts = phases(config, tokenizer)
    display.plan(
        {
            "model": f"{config.model.model}, {config.sft.init}",
            "trained": "all weights" if config.sft.train_base else "adapters",
            "data": config.data.dataset,
            "written to": str(to),
        }
    )
    cache = use_program_cache(config.sft.compilation_cache, display.note)
    with counting_programs(cache) as programs:
        trained = _train(config, source, tokenizer, parts, display)
    with staged(to) as folder:
        chat = write_settings(folder, source, _STORED)
        save_model(
            trained,
            folder,
            _STORED,
            query_scale=1.0 if config.sft.init == "random" else query_scale(source),
            lora_scale=config.model.lora_scale,
        )
    display.note(str(programs))
    if chat:
        display.note(chat)
    display.note(f"model directory: {to}")
    return to


def _train(
    config: SftConfig, source: Path, tokenizer: Tokenizer, phases: list[Phase], display: Display
) -> gemma.Gemma:
    """Returns the trained model, with its adapters where those were trained."""
    mesh = make_mesh(config.model.mesh_shape)
    if config.sft.init == "random":
        base = random_weights(read_architecture(source), config.model.dtype, mesh, config.sft.seed)
    else:
        base = load_weights(source, config.model.dtype, mesh)
    model = base if config.sft.train_base else add_lora(base, config.model, mesh, config.sft.seed)
    for name, steps, draw, optimizer in phases:
        with display.supervising(name, steps) as on_step:
            train_supervised(
                model,
                (draw(step) for step in range(steps)),
                make_optimizer(optimizer, steps),
                mesh,
                width=config.sft.max_tokens,
                pad_id=tokenizer.pad,
                chunk_tokens=config.model.logprob_chunk_tokens,
                train_base=config.sft.train_base,
                remat=config.model.remat,
                on_step=on_step,
            )
    return model
