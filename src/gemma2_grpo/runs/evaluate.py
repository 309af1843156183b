"""`gemma2-grpo evaluate`: a run or a model on held-out problems, with and without its adapter."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gemma2_grpo.config import Config, EvaluateConfig, check
from gemma2_grpo.runs.evaluation import ADAPTER, BASE, summarize
from gemma2_grpo.runs.evaluation_folder import EvaluationFolder
from gemma2_grpo.runs.evaluation_view import print_evaluation
from gemma2_grpo.runs.host_memory import keep_freed_memory
from gemma2_grpo.runs.opening import (
    EMBEDDED,
    Opened,
    Source,
    find_source,
    open_source,
    trained_steps,
    with_adapter,
)
from gemma2_grpo.runs.run_directory import command_facts
from gemma2_grpo.task.data import PROCEDURAL, Example, drop_long, hash_of, load_held_out
from gemma2_grpo.task.scoring import Scorer

if TYPE_CHECKING:
    from gemma2_grpo.engine.sampler import Sampler

_LEAST_PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Batch:
    """Some completions of one system, made at one time."""

    system: str
    samples: int
    """Per problem; 0 is one greedy completion."""
    index: int
    """Among the batches of this system and kind."""
    prompts: int
    """Problems of a full batch."""
    first: int
    """Index of its first problem."""
    problems: int

    @property
    def completions(self) -> int:
        """How many it makes."""
        return self.problems * max(self.samples, 1)


def evaluate(
    name: str,
    options: EvaluateConfig,
    to: Path | None = None,
    *,
    as_json: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates, or goes on with an evaluation that was stopped, or shows a finished one.

    Args:
        name: A run directory, a model directory, a hub id, or `embedded`.
        options: What is asked, checked.
        to: Where the results are written; by default the run, or evaluations/NAME of a model.
        as_json: Print evaluation.json instead of a table.
        overwrite: Begin anew.
        console: Where the table goes.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: for anything that the user can mend.
    """
    console = console or Console(highlight=False)
    source = find_source(name)
    if options.adapter:
        source = with_adapter(source, options.adapter)
    source = replace(source, config=_configured(source, options))
    folder = EvaluationFolder(_place(source, to), overwrite=overwrite)
    try:
        folder.check_same("settings", _settings(source.config, options))
        result = folder.result or _evaluated(source, options, folder)
    finally:
        folder.close()
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print_evaluation(result, folder.path, console)
    return result


def _configured(source: Source, options: EvaluateConfig) -> Config:
    """The configuration of a source with what is asked in its place."""
    config = source.config
    default = config.data.dataset
    if source.run is None:
        default = PROCEDURAL if source.name == EMBEDDED else "openai/gsm8k"
    data = replace(config.data, dataset=options.data or default, eval_split=options.split)
    wanted = {
        "temperature": options.temperature,
        "max_completion_tokens": options.max_completion_tokens,
        "max_prompt_tokens": options.max_prompt_tokens
        or max(config.rollout.max_prompt_tokens, _LEAST_PROMPT_TOKENS),
    }
    # A cache of Tunix's engines, and micro-batches of updates, have no part in this.
    rollout = replace(
        config.rollout,
        kv_cache_tokens=None,
        **{key: value for key, value in wanted.items() if value is not None},
    )
    longest = max(rollout.max_prompt_tokens, rollout.max_completion_tokens)
    tokens = max(config.grpo.micro_batch_tokens, longest * config.model.mesh_shape[0])
    run = replace(
        config.run,
        seed=config.run.seed if options.seed is None else options.seed,
        eval_batch_prompts=options.batch_prompts or config.run.eval_batch_prompts,
    )
    grpo = replace(config.grpo, micro_batch_tokens=tokens)
    return check(replace(config, data=data, rollout=rollout, run=run, grpo=grpo))


def _place(source: Source, to: Path | None) -> Path:
    plain = source.name.removeprefix("kaggle:").strip("/").replace("/", "--")
    return to or source.run or Path("evaluations") / plain


def _settings(config: Config, options: EvaluateConfig) -> dict[str, Any]:
    """What decides the completions, besides problems and weights."""
    rollout = config.rollout
    return {
        "dataset": config.data.dataset,
        "split": config.data.eval_split,
        "limit": options.limit,
        "samples": options.samples,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "max_prompt_tokens": rollout.max_prompt_tokens,
        "max_completion_tokens": rollout.max_completion_tokens,
        "batch_prompts": config.run.eval_batch_prompts,
        "seed": config.run.seed,
        "dtype": config.model.dtype,
        "adapter": options.adapter,
    }


def _evaluated(source: Source, options: EvaluateConfig, folder: EvaluationFolder) -> dict[str, Any]:
    config = source.config
    notes = Console(stderr=True, highlight=False)
    from gemma2_grpo.engine.compilation import use_program_cache
    from gemma2_grpo.engine.export import fingerprint
    from gemma2_grpo.engine.fetch import find_model
    from gemma2_grpo.engine.tokenizer import load_tokenizer

    directory = find_model(config.model.model)
    tokenizer = load_tokenizer(directory)
    examples, dropped = drop_long(
        load_held_out(config.data, options.limit),
        lambda text: len(tokenizer.encode(text)),
        config.rollout.max_prompt_tokens,
    )
    data = {
        "source": config.data.dataset,
        "split": config.data.eval_split,
        "sha256": hash_of(examples),
        "problems": len(examples),
        "dropped": dropped,
    }
    weights = {"base_sha256": fingerprint(directory), "steps": trained_steps(source)}
    folder.check_same("data", data)
    folder.check_same("weights", weights)
    keep_freed_memory()
    use_program_cache(config.run.compilation_cache, notes.print)
    with notes.status(f"loading {config.model.model}"):
        opened = open_source(source)
    facts = {
        "name": source.title,
        "model": config.model.model,
        "steps": opened.steps,
        "data": data,
        "settings": _settings(config, options),
        "weights": weights,
        **command_facts(),
    }
    batches = list(plan_batches(opened, len(examples), options.samples))
    done = folder.begin(facts, [batch.completions for batch in batches])
    records = _complete_all(opened, examples, batches, done, folder, notes)
    result = folder.finish(summarize(records, examples))
    if source.run:
        from gemma2_grpo.runs.report import write_report

        write_report(source.run)
    return result


def plan_batches(opened: Opened, problems: int, samples: int) -> Iterator[Batch]:
    """All batches in their order: the base and then the adapter, greedy and then sampled."""
    systems = [BASE] if opened.policy is None else [BASE, ADAPTER]
    for system in systems:
        for wanted in (0, samples) if samples else (0,):
            size = max(1, opened.config.run.eval_batch_prompts // max(wanted, 1))
            for index, first in enumerate(range(0, problems, size)):
                yield Batch(system, wanted, index, size, first, min(size, problems - first))


def _complete_all(
    opened: Opened,
    examples: Sequence[Example],
    batches: Sequence[Batch],
    done: Sequence[Mapping[str, Any]],
    folder: EvaluationFolder,
    notes: Console,
) -> list[Mapping[str, Any]]:
    """Completes what is not done yet; returns the records of all."""
    records, score = list(done), Scorer(opened.config.rewards)
    samplers: dict[str, Sampler] = {}
    ahead = len(done)
    with _progress(notes, sum(batch.completions for batch in batches), records) as show:
        for batch in batches:
            if ahead >= batch.completions:  # Of an earlier launch.
                ahead -= batch.completions
                continue
            if batch.system not in samplers:
                samplers.clear()
                samplers[batch.system] = opened.sampler(adapted=batch.system == ADAPTER)
            made = _complete(samplers[batch.system], batch, examples, opened.config, score)
            folder.add(made)
            records += made
            show(batch, records)
    return records


def _complete(
    sampler: "Sampler", batch: Batch, examples: Sequence[Example], config: Config, score: Scorer
) -> list[dict[str, Any]]:
    """The records of one batch."""
    from gemma2_grpo.runs.measure import complete_batch

    group = max(batch.samples, 1)
    completions = complete_batch(
        sampler,
        examples,
        batch.index,
        batch.prompts,
        group,
        config.run.seed,
        greedy=not batch.samples,
    )
    of = [batch.first + row // group for row in range(batch.completions)]
    scores = score([examples[i] for i in of], completions.texts)
    return [
        {
            "system": batch.system,
            "index": index,
            "sample": row % group if batch.samples else None,
            "question": examples[index].question,
            "answer": examples[index].answer,
            "completion": completions.texts[row],
            "tokens": len(completions.tokens[row]),
            "truncated": bool(completions.is_truncated[row]),
            **{name: float(column[row]) for name, column in scores.items()},
        }
        for row, index in enumerate(of)
    ]


@contextmanager
def _progress(notes: Console, total: int, records: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """Shows completions, the accuracy so far and the time left; yields what takes each batch."""

    def describe(batch: Batch, records: Sequence[Mapping[str, Any]]) -> str:
        kind = [
            record["correct"]
            for record in records
            if record["system"] == batch.system
            and (record["sample"] is None) != bool(batch.samples)
        ]
        how = "sampled" if batch.samples else "greedy"
        return f"{batch.system}, {how}: {sum(kind) / len(kind):.1%} right so far"

    if not notes.is_terminal:
        shown = -1

        def show(batch: Batch, records: Sequence[Mapping[str, Any]]) -> None:
            nonlocal shown
            if len(records) * 10 // total > shown:
                shown = len(records) * 10 // total
                notes.print(f"{len(records)}/{total} completions; {describe(batch, records)}")

        yield show
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=notes, transient=True) as bar:
        task = bar.add_task("completing", total=total, completed=len(records))
        yield lambda batch, records: bar.update(
            task, completed=len(records), description=describe(batch, records)
        )
