"""`gemma2-grpo sft`: supervised training on worked solutions, written as a model directory."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gemma2_grpo.config import OptimizerConfig, SftConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.architecture import Model, query_scale
from gemma2_grpo.model.find import check_model
from gemma2_grpo.model.open import ModelFiles, open_files
from gemma2_grpo.model.save import save_model, write_settings
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.run.console import Display
from gemma2_grpo.runtime.atomic import check_target, staged
from gemma2_grpo.runtime.devices import start_jax
from gemma2_grpo.runtime.program_cache import counting_programs, use_program_cache
from gemma2_grpo.task.examples import batch_indices, load_splits
from gemma2_grpo.task.procedural import bare_equations, generate, sloppy
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.task.sources import PROCEDURAL
from gemma2_grpo.training.supervised import Row, train_supervised
from gemma2_grpo.training.update import make_optimizer

# Of the weights it writes.
_STORED = "bfloat16"
_EQUATIONS_PER_ROW = 9

DrawBatch = Callable[[int], list[Row]]
"""The rows of a step, a pure function of its number."""
Phase = tuple[str, int, DrawBatch, OptimizerConfig]
"""Name, steps, rows and optimizer of one part of the training."""


def sft(config: SftConfig, to: Path, *, display: Display | None = None) -> Path:
    """Trains on worked solutions with the loss on completions only, and writes the model.

    Args:
        config: A checked configuration.
        to: Directory for the trained model, as HF safetensors with config and tokenizer. It must
            not hold another model.
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
    files = open_files(config.model, needs_weights=config.sft.init == "pretrained")
    phases = _phases(config, files.tokenizer)
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
        trained = _train(config, files, phases, display)
    with staged(to) as folder:
        chat = write_settings(folder, files.directory, _STORED)
        save_model(
            trained,
            folder,
            _STORED,
            query_scale=1.0 if config.sft.init == "random" else query_scale(files.directory),
            lora_scale=config.model.lora_scale,
        )
    display.note(str(programs))
    if chat:
        display.note(chat)
    display.note(f"model directory: {to}")
    return to


def _train(config: SftConfig, files: ModelFiles, phases: list[Phase], display: Display) -> Model:
    """Returns the trained model, with its adapters where those were trained."""
    seed, is_random = config.sft.seed, config.sft.init == "random"
    base = files.draw_base(seed) if is_random else files.load_base()
    model = base if config.sft.train_base else files.make_policy(base, seed)
    for name, steps, draw, optimizer in phases:
        with display.supervising(name, steps) as on_step:
            train_supervised(
                model,
                (draw(step) for step in range(steps)),
                make_optimizer(optimizer, steps),
                files.mesh,
                width=config.sft.max_tokens,
                pad_id=files.tokenizer.pad,
                chunk_tokens=config.model.logprob_chunk_tokens,
                train_base=config.sft.train_base,
                remat=config.model.remat,
                on_step=on_step,
            )
    return model


def _phases(config: SftConfig, tokenizer: Tokenizer) -> list[Phase]:
    """The parts of the training, in order."""
    sft, data = config.sft, config.data
    if data.dataset != PROCEDURAL:
        if sft.sloppy_steps or sft.arithmetic_fraction:
            raise UserError(
                f"dataset = {data.dataset}: sloppy_steps and arithmetic_fraction are for the "
                "procedural data only; set both to 0"
            )
        solved = [e for e in load_splits(data).train if e.solution]
        if not solved:
            raise UserError(f"dataset = {data.dataset}: has no worked solutions to train on")
        texts = [(e.question, e.solution) for e in solved]
        return [("solutions", sft.steps, _drawer(config, tokenizer, texts), config.optimizer)]
    problems = generate("train", data.num_train_samples, data.data_seed)
    clean = [(p.question, p.solution) for p in problems]
    phases: list[Phase] = [
        ("solutions", sft.steps, _drawer(config, tokenizer, clean), config.optimizer)
    ]
    if sft.sloppy_steps:
        rng = np.random.default_rng([sft.seed, 1])
        careless = [(p.question, sloppy(p, rng)) for p in problems]
        steady = dataclasses.replace(
            config.optimizer,
            learning_rate=sft.sloppy_learning_rate,
            warmup_fraction=0.0,
            final_lr_fraction=0.05,
        )
        phases.append(
            ("sloppy teacher", sft.sloppy_steps, _drawer(config, tokenizer, careless), steady)
        )
    return phases


def _drawer(config: SftConfig, tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> DrawBatch:
    """What draws the rows of a step: solutions, and bare equations in their share."""
    equations = round(config.sft.arithmetic_fraction * config.sft.batch_size)
    solutions = config.sft.batch_size - equations

    def draw(step: int) -> list[Row]:
        chosen = batch_indices(len(texts), solutions, config.data.data_seed, step)
        rng = np.random.default_rng([config.sft.seed, 2, step])
        return [_solution_row(tokenizer, *texts[i]) for i in chosen] + [
            _equation_row(tokenizer, bare_equations(rng, _EQUATIONS_PER_ROW))
            for _ in range(equations)
        ]

    return draw


def _solution_row(tokenizer: Tokenizer, question: str, solution: str) -> Row:
    """Prompt and solution; the loss is on the solution and the end of the turn."""
    prompt = tokenizer.encode(render_prompt(question))
    completion = [*tokenizer.encode(solution), tokenizer.eos_id()]
    return Row(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _equation_row(tokenizer: Tokenizer, equations: list[str]) -> Row:
    """Equations one after the other; the loss is on their results."""
    tokens, is_target = [tokenizer.bos], [False]
    for equation in equations:
        question, result = equation.split("= ")
        for text, counts in ((f"{question}= ", False), (f"{result}\n", True)):
            ids = tokenizer.encode(text)
            tokens += ids
            is_target += [counts] * len(ids)
    return Row(tokens, is_target)
