"""A run read back from its directory, so that a report can be made of whatever is there."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

from gemma2_grpo.errors import UserError
from gemma2_grpo.run.results import EvaluatedCompletion, Evaluation, Measurement, RunResult
from gemma2_grpo.run.schema import AtStep, Numbers, RunCompletion, RunFacts, StepRecord, numbers
from gemma2_grpo.runtime.folder import Record
from gemma2_grpo.task.jsonl import read_jsonl

_MARKS = ("config.toml", "run.json", "metrics.jsonl", "evaluations.jsonl", "evaluation.json")

_Record = TypeVar("_Record", bound=Record)
_AtStep = TypeVar("_AtStep", bound=AtStep)


@dataclass(frozen=True)
class RunFiles:
    """Everything that a report needs; empty where there is nothing."""

    path: Path
    config: Mapping[str, object]
    """Fields of config.toml as written, without their sections: each name is there once."""
    config_text: str
    facts: RunFacts
    metrics: list[Numbers]
    """Metrics in the order of their steps; of a step that was repeated, the last record."""
    evaluations: list[Measurement]
    """Measurements in the order of their steps; of a repeated one, the last record."""
    held_out: Mapping[int, Sequence[RunCompletion]]
    """Greedy completions of the first and the last measurement by step."""
    evaluation: Evaluation | None
    evaluated: Mapping[str, Sequence[EvaluatedCompletion]]
    """Greedy completions of `evaluate` by system, in the order of the problems."""
    has_result: bool
    missing: list[str]
    """Files that are not there, or damaged, in words."""

    @property
    def name(self) -> str:
        """Name of the run, for people."""
        return self.path.resolve().name or str(self.path)

    @property
    def is_supervised(self) -> bool:
        """Whether it was trained on worked solutions, by `gemma2-grpo sft`."""
        return self.config.get("engine") == "solutions"

    @property
    def is_control(self) -> bool:
        """Whether the rewards were shuffled, so that they could teach nothing."""
        return self.config.get("shuffle_rewards") is True


def read_run(path: Path) -> RunFiles:
    """Reads the directory of a run: finished, in progress, crashed or damaged.

    Raises:
        UserError: if it is no run, or its logs are of another version.
    """
    check_version(path)
    missing: list[str] = []
    config_text, config = _read_config(path / "config.toml")
    if not config:
        missing.append("config.toml is missing or damaged: the settings of the run")
    facts, evaluation = RunFacts.read(path), Evaluation.read(path)
    result = RunResult.read(path)
    if facts is None:
        missing.append("run.json is missing or damaged: command, data, versions and devices")
    if evaluation is None and (path / Evaluation.FILE).exists():
        missing.append("evaluation.json is damaged; run `gemma2-grpo evaluate` again")
    if result is None and (path / RunResult.FILE).exists():
        missing.append("result.json is damaged: whether the run has finished")
    metrics = _by_step(_read_log(path, StepRecord, missing))
    if not metrics:
        missing.append("No step has been finished: there are no curves, and no times")
    evaluations = _by_step(_read_log(path, Measurement, missing))
    held_out = _read_held_out(path, evaluations, missing)
    if not evaluations:
        missing.append("Nothing has been measured on held-out problems")
    elif not held_out:
        missing.append("completions.jsonl has no held-out completions: there are no samples")
    return RunFiles(
        path=path,
        config=config,
        config_text=config_text,
        facts=facts or RunFacts(),
        metrics=[numbers(record.model_dump()) for record in metrics],
        evaluations=evaluations,
        held_out=held_out,
        evaluation=evaluation,
        evaluated=_read_evaluated(path, missing),
        has_result=result is not None,
        missing=missing,
    )


def check_version(path: Path) -> None:
    """Refuses a directory that is no run, or whose logs would be misread.

    Raises:
        UserError: naming what is wrong with it.
    """
    if not any((path / name).is_file() for name in _MARKS):
        what = "is no run (no config.toml in it)" if path.is_dir() else "no such directory"
        raise UserError(f"run {path}: {what}; give the directory of a run, such as runs/tiny")
    RunFacts.check_version(path, "train again, or use the version that wrote it")
    Evaluation.check_version(path, "evaluate again with --overwrite")


def _read_config(path: Path) -> tuple[str, dict[str, object]]:
    try:
        text = path.read_text(encoding="utf-8")
        sections = tomllib.loads(text).values()
    except (OSError, ValueError):
        return "", {}
    fields = [section.items() for section in sections if isinstance(section, dict)]
    return text, dict(chain.from_iterable(fields))


def _read_log(
    path: Path, kind: type[_Record], missing: list[str], needle: bytes = b""
) -> list[_Record]:
    """Records of a log; damaged lines are left out and counted.

    Args:
        path: The directory; there need not be a log in it.
        kind: Model of the records.
        missing: Takes the count, in words.
        needle: Only lines with these bytes are parsed: a log may have gigabytes.
    """
    faults: list[str] = []

    def parse(line: bytes) -> _Record | None:
        return kind.model_validate_json(line) if needle in line else None

    found = []
    with suppress(OSError):
        lines = read_jsonl(path / kind.FILE, parse, on_damage=faults.append, is_log=True)
        found = [line.content for line in lines if line.content]
    if faults:
        plural = "s are" if len(faults) > 1 else " is"
        missing.append(f"{len(faults)} line{plural} damaged in {kind.FILE}, and left out")
    return found


def _by_step(records: Iterable[_AtStep]) -> list[_AtStep]:
    """Metrics in the order of their steps; of a step that was repeated, the last record."""
    steps = {record.step: record for record in records}
    return [steps[step] for step in sorted(steps)]


def _read_held_out(
    path: Path, evaluations: Sequence[Measurement], missing: list[str]
) -> dict[int, list[RunCompletion]]:
    """Completions of the first and the last measurement."""
    ends = {each.step: each.greedy.num_problems for each in (*evaluations[:1], *evaluations[-1:])}
    answers: dict[int, list[RunCompletion]] = {step: [] for step in ends}
    for record in _read_log(path, RunCompletion, missing, b'"held_out"'):
        if record.kind == "held_out" and record.step in ends:
            answers[record.step].append(record)
    # One that was begun, killed and begun again would have some twice.
    return {step: found for step, found in answers.items() if len(found) == ends[step]}


def _read_evaluated(path: Path, missing: list[str]) -> dict[str, list[EvaluatedCompletion]]:
    answers: dict[str, list[EvaluatedCompletion]] = {}
    for record in _read_log(path, EvaluatedCompletion, missing, b'"sample":null'):
        answers.setdefault(record.system, []).append(record)
    return {name: sorted(own, key=lambda answer: answer.index) for name, own in answers.items()}
