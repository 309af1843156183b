"""`gemma2-grpo evaluate`: base and adapter on the same held-out problems."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from gemma2_grpo.config import Config, EvaluateConfig
from gemma2_grpo.runs.display import Display, open_console
from gemma2_grpo.runs.evaluation import ADAPTER, BASE, summarize
from gemma2_grpo.runs.evaluation_display import Progress, show_evaluation
from gemma2_grpo.runs.evaluation_folder import RESULT, EvaluationFolder
from gemma2_grpo.runs.opening import (
    Source,
    as_asked,
    find_source,
    finished_adapter,
    open_source,
    trained_steps,
)
from gemma2_grpo.runs.run_directory import command_facts
from gemma2_grpo.runs.start import start_jax
from gemma2_grpo.task.data import Example, drop_long, hash_of, load_held_out
from gemma2_grpo.task.scoring import Scorer

if TYPE_CHECKING:  # A mistake is reported before JAX has loaded.
    from gemma2_grpo.runs.opening import Opened


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
            display.note(f"{path / RESULT} is finished:")
        else:
            _run(source, asked, problems, folder, display)
            if path == source.run:
                from gemma2_grpo.runs.report import write_report

                write_report(path)
        show_evaluation(display.console, folder.result or {})
        display.note(f"results: {path / RESULT}")
    finally:
        folder.close()
    if as_json:
        print(json.dumps(folder.result, indent=1))
    return folder.result or {}


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
    from gemma2_grpo.engine.export import fingerprint

    adapter = finished_adapter(source)
    return {
        "model": source.config.model.model,
        "steps": trained_steps(source),
        "adapter_sha256": fingerprint(adapter) if adapter else None,
    }


def _run(
    source: Source,
    asked: EvaluateConfig,
    problems: Sequence[Example],
    folder: EvaluationFolder,
    display: Display,
) -> None:
    """Loads the weights, and evaluates what is not evaluated yet."""
    config = source.config
    start_jax(display.note)
    display.note(f"loading {config.model.model}")
    from gemma2_grpo.engine.compilation import use_program_cache
    from gemma2_grpo.engine.export import fingerprint
    from gemma2_grpo.engine.fetch import find_model
    from gemma2_grpo.engine.tokenizer import load_tokenizer

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
        "problems": len(examples),
        "dropped": dropped,
    }
    folder.check_same("weights", weights)
    folder.check_same("data", data)
    use_program_cache(config.run.compilation_cache, display.note)
    opened = open_source(source)
    facts = {
        "name": source.title,
        "model": config.model.model,
        "steps": opened.steps,
        "data": data,
        "settings": _settings(config, asked),
        "weights": weights,
        **command_facts(),
    }
    Evaluation(opened, examples, asked.samples, folder, display).go(facts)


@dataclass(frozen=True)
class Batch:
    """Completions that are made, scored and written together."""

    system: str
    index: int
    """Among the batches of its system and kind."""
    size: int
    """Prompts."""
    first: int
    """Its first problem."""
    problems: int
    samples: int
    """Of each problem; 0 for the greedy completion."""

    @property
    def completions(self) -> int:
        """How many it has."""
        return self.problems * max(self.samples, 1)


def plan_batches(
    systems: Sequence[str], problems: int, samples: int, batch_prompts: int
) -> Iterator[Batch]:
    """All batches: greedy ones first, the systems in turn on the same problems."""
    for each in (0, samples) if samples else (0,):
        size = max(1, batch_prompts // max(each, 1))
        for index, first in enumerate(range(0, problems, size)):
            for system in systems:
                yield Batch(system, index, size, first, min(size, problems - first), each)


class Evaluation:
    """One evaluation, from where it stands to its result."""

    def __init__(
        self,
        opened: "Opened",
        examples: Sequence[Example],
        samples: int,
        folder: EvaluationFolder,
        display: Display,
    ) -> None:
        """Takes what is evaluated on what, and the folder that it is written to."""
        self._config = opened.config
        self._examples = examples
        self._folder = folder
        self._display = display
        # A user's own reward is not run: it may have gone, and nothing here is trained on it.
        self._scorer = Scorer(opened.config.rewards)
        systems = (BASE, ADAPTER) if opened.policy is not None else (BASE,)
        self._samplers = {name: opened.sampler(adapted=name == ADAPTER) for name in systems}
        batch_prompts = opened.config.run.eval_batch_prompts
        self._batches = list(plan_batches(systems, len(examples), samples, batch_prompts))

    def go(self, facts: Mapping[str, Any]) -> None:
        """Completes what is left, and writes the statistics of everything."""
        records = self._folder.begin(facts, [batch.completions for batch in self._batches])
        self._tell_plan(facts, len(records))
        total = sum(batch.completions for batch in self._batches)
        done = 0
        with Progress(self._display.console, total, records) as progress:
            for batch in self._batches:
                done += batch.completions
                if done > len(records):
                    new = self._complete(batch)
                    self._folder.add(new)
                    records += new
                    progress.add(new)
        self._folder.finish(summarize(records, self._examples))

    def _tell_plan(self, facts: Mapping[str, Any], done: int) -> None:
        data, settings = facts["data"], facts["settings"]
        steps = facts["steps"]
        adapter = f"adapter of {steps} steps" if steps else f"adapter {self._config.model.adapter}"
        sampled = f", {settings['samples']} sampled at temperature {settings['temperature']:g}"
        self._display.plan(
            {
                "model": facts["model"] + (f", {adapter}" if len(self._samplers) > 1 else ""),
                "problems": f"{data['problems']} of {data['source']}, {data['split']}; "
                f"{data['dropped']} too long, dropped",
                "each": f"1 greedy completion{sampled if settings['samples'] else ''}",
                **({"resuming": f"{done} completions are there"} if done else {}),
            }
        )

    def _complete(self, batch: Batch) -> list[dict[str, Any]]:
        """The records of a batch."""
        from gemma2_grpo.runs.measure import complete_batch

        group = max(batch.samples, 1)
        completions = complete_batch(
            self._samplers[batch.system],
            self._examples,
            batch.index,
            batch.size,
            group,
            self._config.run.seed,
            greedy=not batch.samples,
        )
        indices = [batch.first + i // group for i in range(batch.completions)]
        asked = [self._examples[index] for index in indices]
        scores = self._scorer(asked, completions.texts, completions.is_truncated)
        return [
            {
                "system": batch.system,
                "index": index,
                "sample": i % group if batch.samples else None,
                "question": example.question,
                "answer": example.answer,
                "completion": completions.texts[i],
                "tokens": len(completions.tokens[i]),
                "truncated": bool(completions.is_truncated[i]),
                **{name: float(column[i]) for name, column in scores.items()},
            }
            for i, (index, example) in enumerate(zip(indices, asked, strict=True))
        ]
