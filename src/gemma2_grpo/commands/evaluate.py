"""`gemma2-grpo evaluate`: base and adapter on the same held-out problems."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from gemma2_grpo.checks import check_fields
from gemma2_grpo.commands.options import Directory, Flag, Sections
from gemma2_grpo.commands.options import Source as SourceName
from gemma2_grpo.config import Config, EvaluateConfig, flat
from gemma2_grpo.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from gemma2_grpo.run.console import Display
    from gemma2_grpo.run.directory import EvaluationFolder
    from gemma2_grpo.run.results import Evaluation
    from gemma2_grpo.run.source import Source
    from gemma2_grpo.task.examples import Example

_SETTINGS = """dataset eval_split num_test_samples eval_samples temperature top_p top_k
max_prompt_tokens max_completion_tokens eval_batch_prompts seed dtype""".split()


@dataclass(frozen=True)
class Evaluate:
    """Measure a run or a model on held-out problems, with and without its adapter.

    Run it again to resume an interrupted evaluation, or to show a finished one.
    """

    source: SourceName
    """A run directory, a directory of a model, a Hugging Face id, `kaggle:HANDLE` or `embedded`."""
    to: Directory = None
    """Directory of the results. Default: the run directory; for a model evaluations/NAME."""
    json: Flag = False
    """Print evaluation.json on standard output, and nothing else there."""
    overwrite: Flag = False
    """Discard an earlier evaluation in that directory, and start over."""
    config: Sections[EvaluateConfig] = field(default_factory=EvaluateConfig)

    def __call__(self, console: "Console | None" = None) -> dict[str, Any]:
        """Evaluates or resumes; a finished evaluation is only shown.

        Returns:
            The content of evaluation.json.

        Raises:
            UserError: for anything that the user can correct.
        """
        asked = check_fields(self.config)
        from gemma2_grpo.run.console import Display, open_console
        from gemma2_grpo.run.directory import EvaluationFolder
        from gemma2_grpo.run.results import Evaluation
        from gemma2_grpo.run.source import as_asked, find_source
        from gemma2_grpo.runtime.devices import require_jax
        from gemma2_grpo.task.examples import load_held_out

        require_jax()
        display = Display(console or open_console(stderr=self.json))
        source = as_asked(find_source(self.source, asked.adapter), asked)
        path = self.to or source.run or Path("evaluations") / _file_name(self.source)
        folder = EvaluationFolder(path, overwrite=self.overwrite)
        try:
            folder.check_same("settings", _settings(source.config, asked))
            # Before JAX loads.
            data, limit = source.config.data, asked.num_test_samples
            problems = () if folder.result else load_held_out(data, limit)
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
        if self.json:
            print(result.as_json(indent=1))
        return json.loads(result.as_json())


def _write_report(path: Path, display: "Display") -> None:
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


def _settings(config: Config, asked: EvaluateConfig) -> dict[str, JsonValue]:
    """All that decides what is computed, under the names of the command line."""
    own = {"num_test_samples": asked.num_test_samples, "eval_samples": asked.eval_samples}
    known = flat(config) | own
    return {name: known[name] for name in _SETTINGS}


def _weights(source: "Source") -> dict[str, JsonValue]:
    """Identity of a policy (files and their hashes), before any weights load."""
    from gemma2_grpo.model.adapter import fingerprint
    from gemma2_grpo.run.source import finished_adapter, trained_steps

    adapter = finished_adapter(source)
    return {
        "model": source.config.model.model,
        "step": trained_steps(source),
        "adapter_sha256": fingerprint(adapter) if adapter else None,
    }


def _run(
    source: "Source",
    asked: EvaluateConfig,
    problems: "Sequence[Example]",
    folder: "EvaluationFolder",
    display: "Display",
) -> "Evaluation":
    """Loads the weights, and evaluates what is not evaluated yet."""
    from gemma2_grpo.runtime.devices import start_jax

    config = source.config
    start_jax(display.note)
    display.note(f"loading {config.model.model}")
    from gemma2_grpo.run.measure import Evaluator
    from gemma2_grpo.run.results import BegunEvaluation, HeldOutData
    from gemma2_grpo.run.source import open_source, open_source_files
    from gemma2_grpo.runtime.program_cache import use_program_cache
    from gemma2_grpo.task.examples import drop_long, hash_of

    files = open_source_files(source)
    examples, dropped = drop_long(
        problems,
        lambda prompt: len(files.tokenizer.encode(prompt)),
        config.rollout.max_prompt_tokens,
    )
    weights = {**_weights(source), "base_sha256": files.sha256}
    data = HeldOutData(
        source=config.data.dataset,
        split=config.data.eval_split,
        sha256=hash_of(examples),
        num_problems=len(examples),
        num_dropped=dropped,
    )
    folder.check_same("weights", weights)
    folder.check_same("data", data.model_dump())
    use_program_cache(config.run.compilation_cache, display.note)
    opened = open_source(source, files)
    begun = BegunEvaluation(
        name=source.title,
        model=config.model.model,
        step=opened.steps,
        data=data,
        settings=_settings(config, asked),
        weights=weights,
    )
    return Evaluator(opened, examples, asked.eval_samples, folder, display).go(begun)
