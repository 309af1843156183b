"""The model card of an export: how to use it, what was measured, how it was made."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import ModelCardData

from gemma2_grpo import __version__
from gemma2_grpo.config import Config
from gemma2_grpo.model.architecture import Architecture
from gemma2_grpo.model.hub.find import EMBEDDED, hub_id
from gemma2_grpo.report import facts as report_facts
from gemma2_grpo.run.files import RunFiles, read_run
from gemma2_grpo.run.outcome import Outcome, by_evaluation, during_run, headline, measure_rows
from gemma2_grpo.runtime.templates import templates_of
from gemma2_grpo.task.procedural import generate
from gemma2_grpo.task.prompts import INSTRUCTION


@dataclass(frozen=True)
class Exported:
    """Content of a model card."""

    run: Path
    config: Config
    steps: int
    format: str
    """`merged` or `peft`."""
    dtype: str
    """Type that is stored."""
    name: str
    """Name that transformers loads: the repository, or the directory."""
    architecture: Architecture
    """Of the model that was trained."""
    verification: str
    """Result of the verification, as text."""


def render_card(exported: Exported) -> str:
    """The card of an export as Markdown with front matter."""
    run = _as_of(read_run(exported.run), exported.steps)
    base = exported.config.model.model
    evaluated, held_out = by_evaluation(run), during_run(run)
    preset, differences = report_facts.differences_from_preset(run) or ("", [])
    templates = templates_of("gemma2_grpo.export", cell=_cell)
    is_supervised = exported.config.rollout.engine == "solutions"
    family = exported.architecture.family
    return templates.get_template("model_card.md.j2").render(
        front_matter=_front_matter(exported),
        title=f"{run.name}: {family} that shows its work",
        family=family,
        method="supervised training (SFT)" if is_supervised else "GRPO",
        command="sft" if is_supervised else "train",
        attention=_attention(exported.architecture),
        is_merged=exported.format == "merged",
        is_gemma=base != EMBEDDED,
        base=hub_id(base) or Path(base).name,
        dtype=exported.dtype,
        headline=headline(evaluated or held_out, is_control=run.is_control),
        name=exported.name,
        instruction=_quoted_lines(INSTRUCTION),
        question=_quoted(generate("test", 1, 0)[0].question),
        max_completion_tokens=exported.config.rollout.max_completion_tokens,
        tables=_tables(evaluated, held_out),
        steps=f"{exported.steps:,}",
        version=__version__,
        preset=preset,
        differences=differences,
        facts=[fact for fact in report_facts.origins(run) if fact[0] != "machine"],
        verification=exported.verification,
    )


def _attention(architecture: Architecture) -> str:
    """The argument for transformers where its default leaves out the soft cap on attention."""
    is_capped = architecture.attn_logits_soft_cap is not None
    return ', attn_implementation="eager"' if is_capped else ""


def _as_of(run: RunFiles, steps: int) -> RunFiles:
    """Leaves out what was measured of other steps than the first and the exported ones."""
    evaluation = run.evaluation
    if evaluation is not None and evaluation.step != steps:
        evaluation = None
    measured = [each for each in run.evaluations if each.step in (0, steps)]
    return replace(run, evaluations=measured, evaluation=evaluation)


def _front_matter(exported: Exported) -> str:
    base = exported.config.model.model
    is_merged = exported.format == "merged"
    data = ModelCardData(
        license="apache-2.0" if base == EMBEDDED else "gemma",
        base_model=hub_id(base),
        library_name="transformers" if is_merged else "peft",
        tags=["grpo", "lora", "tunix"],
        pipeline_tag="text-generation",
    )
    return data.to_yaml().strip()


def _tables(*outcomes: Outcome | None) -> list[dict[str, object]]:
    titles = ("Measured by `gemma2-grpo evaluate`", "Measured by the run, before and after")
    return [
        {
            "title": f"{title}, on {outcome.results[-1].problems:,} {outcome.problems}",
            "heads": outcome.heads,
            "rows": measure_rows(outcome.results, with_change=True),
        }
        for outcome, title in zip(outcomes, titles, strict=True)
        if outcome
    ]


def _cell(text: str) -> str:
    """Text within one cell of a Markdown table, no part of which is taken for HTML."""
    line = " ".join(str(text).split())
    return line.replace("|", "\\|").replace("<", "&lt;")


def _quoted_lines(text: str) -> Sequence[str]:
    """A Python string over several lines."""
    lines = textwrap.wrap(text, 80, break_on_hyphens=False)
    return [_quoted(f"{line} ") for line in lines[:-1]] + [_quoted(lines[-1])]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
