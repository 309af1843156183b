"""`gemma2-grpo evaluate`: base and adapter on the same held-out problems."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gemma2_grpo.config import Config, EvaluateConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.run.console import Display, open_console
from gemma2_grpo.run.directory import EvaluationFolder
from gemma2_grpo.run.results import Evaluation
from gemma2_grpo.run.source import (
    Source,
    as_asked,
    find_source,
    finished_adapter,
    open_source,
    trained_steps,
)
from gemma2_grpo.runtime.devices import start_jax
from gemma2_grpo.task.examples import Example, drop_long, hash_of, load_held_out


def evaluate(
    name: str,
    asked: EvaluateConfig,
    to: Path | None = None,
    *,
    as_json: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates a run or a model, or goes on with it; a finished evaluation is only shown.

    Args:
        name: What `find_source` takes.
        asked: Checked settings.
        to: Where the results are written; by default the run directory, for a model
            `evaluations/` and its name.
        as_json: Print evaluation.json on standard output, and all else on standard error.
        overwrite: Begin anew where an evaluation is already.
        console: What shows the progress.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: for anything that the user can mend.
    """
    display = Display(console or open_console(stderr=as_json))
    source = as_asked(find_source(name, asked.adapter), asked)
    path = to or source.run or Path("evaluations") / _file_name(name)
    folder = EvaluationFolder(path, overwrite=overwrite)
    try:
        folder.check_same("settings", _settings(source.config, asked))
        # Before JAX loads.
        problems = () if folder.result else load_held_out(source.config.data, asked.limit)
        folder.check_same("weights", _weights(source))
        if folder.result:
            display.note(f"{path / Evaluation.FILE} is finished:")
            result = folder.result
        else:
            result = _run(source, asked, problems, folder, display)
            if path == source.run:
                _write_report(path, display)
        display.evaluation(result)
        display.note(f"results: {path / Evaluation.FILE}")
    finally:
        folder.close()
    if as_json:
        print(result.as_json(indent=1))
    return json.loads(result.as_json())


def _write_report(path: Path, display: Display) -> None:
    """Adds the evaluation to the report of its run, which an older version may have made."""
    from gemma2_grpo.report.report import write_report

    try:
        write_report(path)
    except UserError as error:
        display.note(f"the report cannot be written: {error}")


def _file_name(model: str) -> str:
    """A name for a folder, out of a path, a Hugging Face id or a Kaggle handle."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else re.sub(r"[^\w.-]+", "-", model)


def _settings(config: Config, asked: EvaluateConfig) -> dict[str, Any]:
    """All that decides what is computed, under the names of the command line."""
    rollout = config.rollout
    return {
        "data": config.data.dataset,
        "split": config.data.eval_split,
        "limit": asked.limit,
        "samples": asked.samples,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "max_prompt_tokens": rollout.max_prompt_tokens,
        "max_completion_tokens": rollout.max_completion_tokens,
        "batch_prompts": config.run.eval_batch_prompts,
        "seed": config.run.seed,
        "dtype": config.model.dtype,
    }


def _weights(source: Source) -> dict[str, Any]:
    """What tells one policy from another, before any weights load."""
    from gemma2_grpo.model.adapter import fingerprint

    adapter = finished_adapter(source)
    return {
        "model": source.config.model.model,
        "step": trained_steps(source),
        "adapter_sha256": fingerprint(adapter) if adapter else None,
    }


def _run(
    source: Source,
    asked: EvaluateConfig,
    problems: Sequence[Example],
    folder: EvaluationFolder,
    display: Display,
) -> Evaluation:
    """Loads the weights, and evaluates what is not evaluated yet."""
    config = source.config
    start_jax(display.note)
    display.note(f"loading {config.model.model}")
    from gemma2_grpo.model.adapter import fingerprint
    from gemma2_grpo.model.find import find_model
    from gemma2_grpo.model.tokenizer import load_tokenizer
    from gemma2_grpo.run.measure import Evaluator
    from gemma2_grpo.runtime.program_cache import use_program_cache

    directory = find_model(config.model.model)
    tokenizer = load_tokenizer(directory)
    examples, dropped = drop_long(
        problems, lambda prompt: len(tokenizer.encode(prompt)), config.rollout.max_prompt_tokens
    )
    weights = {**_weights(source), "base_sha256": fingerprint(directory)}
    data = {
        "source": config.data.dataset,
        "split": config.data.eval_split,
        "sha256": hash_of(examples),
        "num_problems": len(examples),
        "num_dropped": dropped,
    }
    folder.check_same("weights", weights)
    folder.check_same("data", data)
    use_program_cache(config.run.compilation_cache, display.note)
    opened = open_source(source)
    facts = {
        "name": source.title,
        "model": config.model.model,
        "step": opened.steps,
        "data": data,
        "settings": _settings(config, asked),
        "weights": weights,
    }
    return Evaluator(opened, examples, asked.samples, folder, display).go(facts)
