"""`gemma2-grpo sft`: supervised training on worked solutions, written as a model directory."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from tyro.conf import Positional, arg

from gemma2_grpo.checks import check_sft
from gemma2_grpo.commands.options import Sections
from gemma2_grpo.config import OptimizerConfig, SftConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.task.prompts import render_prompt

if TYPE_CHECKING:
    from gemma2_grpo.model.open import ModelFiles
    from gemma2_grpo.model.tokenizer import Tokenizer
    from gemma2_grpo.model.weights import Model
    from gemma2_grpo.run.console import Display
    from gemma2_grpo.training.supervised import Row

_STORED = "bfloat16"
"""Type of the weights that are written."""

DrawBatch = Callable[[int], "list[Row]"]
"""The rows of a step, a pure function of its number."""


class Phase(NamedTuple):
    """One part of the training."""

    name: str
    steps: int
    draw: DrawBatch
    optimizer: OptimizerConfig


def solution_phases(config: SftConfig, tokenizer: "Tokenizer") -> list[Phase]:
    """One phase: the worked solutions of the training problems.

    Raises:
        UserError: for data that cannot be read or have no solutions.
    """
    from gemma2_grpo.task.examples import batch_indices, load_splits

    data, sft = config.data, config.sft
    solved = [example for example in load_splits(data).train if example.solution]
    if not solved:
        raise UserError(f"dataset = {data.dataset}: has no worked solutions to train on")

    def draw(step: int) -> "list[Row]":
        chosen = batch_indices(len(solved), sft.batch_size, data.data_seed, step)
        return [solution_row(tokenizer, solved[i].question, solved[i].solution) for i in chosen]

    return [Phase("solutions", sft.steps, draw, config.optimizer)]


def solution_row(tokenizer: "Tokenizer", question: str, solution: str) -> "Row":
    """Prompt and solution; the loss is on the solution and the end of the turn."""
    from gemma2_grpo.training.supervised import Row

    prompt = tokenizer.encode(render_prompt(question))
    completion = [*tokenizer.encode(solution), tokenizer.eos_id()]
    return Row(prompt + completion, [False] * len(prompt) + [True] * len(completion))


@dataclass(frozen=True)
class Sft:
    """Train on worked solutions, and write a model directory."""

    config_name: Annotated[Positional[str], arg(metavar="CONFIG")]
    """Path of a TOML file, or the preset `sft-tiny`."""
    to: Annotated[Path, arg(metavar="DIR")] = Path("sft-model")
    """Directory of the model, written as HF safetensors with config and tokenizer."""
    config: Sections[SftConfig] = field(default_factory=SftConfig)

    def __call__(
        self,
        display: "Display | None" = None,
        make_phases: "Callable[[SftConfig, Tokenizer], list[Phase]]" = solution_phases,
    ) -> Path:
        """Trains with the loss on completions only, and writes the model.

        Args:
            display: Display for the progress.
            make_phases: Makes the parts of the training, in order.

        Returns:
            The model directory.

        Raises:
            UserError: for anything that the user can correct.
        """
        config = check_sft(self.config)
        from gemma2_grpo.model.hub.find import check_model
        from gemma2_grpo.run.console import Display
        from gemma2_grpo.runtime.atomic import check_target
        from gemma2_grpo.runtime.devices import require_jax, start_jax

        require_jax()
        display = display or Display()
        if any(self.to.glob("*.safetensors")):
            raise UserError(f"{self.to}: holds a model already; choose another --to")
        check_target(self.to)
        is_pretrained = config.sft.init == "pretrained"
        if is_pretrained:
            check_model(config.model.model)
        start_jax(display.note)
        display.warn_of_cpu(config.model, "this configuration")
        _sft(config, self.to, display, make_phases)
        return self.to


def _sft(
    config: SftConfig,
    to: Path,
    display: "Display",
    make_phases: "Callable[[SftConfig, Tokenizer], list[Phase]]",
) -> None:
    """Trains the model of the configuration, and writes it to a directory."""
    from gemma2_grpo.model.open import open_files
    from gemma2_grpo.model.save import save_model, write_settings
    from gemma2_grpo.runtime.atomic import staged
    from gemma2_grpo.runtime.program_cache import counting_programs, use_program_cache

    files = open_files(config.model, needs_weights=config.sft.init == "pretrained")
    phases = make_phases(config, files.tokenizer)
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
        save_model(trained, folder, _STORED, lora_scale=config.model.lora_scale)
    display.note(str(programs))
    if chat:
        display.note(chat)
    display.note(f"model directory: {to}")


def _train(
    config: SftConfig, files: "ModelFiles", phases: list[Phase], display: "Display"
) -> "Model":
    """Returns the trained model, with its adapters where those were trained."""
    from gemma2_grpo.training.optimizer import make_optimizer
    from gemma2_grpo.training.supervised import train_supervised

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
