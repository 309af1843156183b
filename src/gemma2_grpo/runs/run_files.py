"""What a run has written, read so that a report can be made of whatever is there."""

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_grpo.config import UserError
from gemma2_grpo.runs.health import number
from gemma2_grpo.runs.run_directory import read_json

_MARKS = ("config.toml", "run.json", "metrics.jsonl", "evaluations.jsonl", "evaluation.json")


@dataclass(frozen=True)
class Answer:
    """One completion with its scores."""

    question: str
    answer: str
    completion: str
    is_correct: bool
    scores: Mapping[str, float]
    """Columns of `Scorer` by name, and what else the record has in numbers."""


@dataclass(frozen=True)
class RunFiles:
    """Everything that a report needs; empty where there is nothing."""

    path: Path
    config: Mapping[str, Mapping[str, Any]]
    """Sections of config.toml, as written."""
    facts: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    """In the order of their steps; of a step that was done again, the last record."""
    evaluations: list[dict[str, Any]]
    held_out: Mapping[int, list[Answer]]
    """Greedy completions of the first and the last measurement, by step."""
    result: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    """What `evaluate` wrote."""
    evaluated: Mapping[str, Mapping[int, Answer]]
    """Greedy completions of `evaluate` by system and index of the problem."""
    missing: list[str]
    """What is not there, or damaged, in words."""

    @property
    def name(self) -> str:
        """What to call the run."""
        return self.path.resolve().name or str(self.path)

    def setting(self, section: str, name: str) -> Any:
        """A value of the configuration; None where it is not known."""
        return self.config.get(section, {}).get(name)

    @property
    def steps(self) -> int:
        """Finished steps."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def max_steps(self) -> int | None:
        """Steps that the run is to have; None where that is not known."""
        value = number(self.config.get("run", {}), "max_steps")
        return None if value is None else int(value)

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.result is not None and self.steps >= (self.max_steps or 0)

    @property
    def is_control(self) -> bool:
        """Whether the rewards were shuffled, so that they could teach nothing."""
        return self.setting("rewards", "shuffle_rewards") is True


def read_run(path: Path) -> RunFiles:
    """Reads the directory of a run: finished, going on, crashed or damaged.

    Raises:
        UserError: if it is no run.
    """
    if not any((path / name).is_file() for name in _MARKS):
        what = "is no run (no config.toml in it)" if path.is_dir() else "no such directory"
        raise UserError(f"run {path}: {what}; give the directory of a run, such as runs/tiny")
    missing: list[str] = []
    metrics = _by_step(_read_log(path / "metrics.jsonl", missing))
    evaluations = _by_step(_read_log(path / "evaluations.jsonl", missing))
    evaluation = _mapping(read_json(path / "evaluation.json"))
    run = RunFiles(
        path=path,
        config=_read_config(path / "config.toml", missing),
        facts=_mapping(read_json(path / "run.json")) or {},
        metrics=metrics,
        evaluations=evaluations,
        held_out=_read_held_out(path / "completions.jsonl", evaluations, missing),
        result=_mapping(read_json(path / "result.json")),
        evaluation=evaluation,
        evaluated=_read_evaluated(path / "evaluation_completions.jsonl", missing),
        missing=missing,
    )
    return _naming_what_is_missing(run)


def _naming_what_is_missing(run: RunFiles) -> RunFiles:
    if not run.facts:
        run.missing.append("run.json is missing or damaged: command, data, versions and devices")
    if not run.metrics:
        run.missing.append("No step has been finished: there are no curves, and no times")
    if not run.evaluations:
        run.missing.append("Nothing has been measured on held-out problems")
    elif not run.held_out:
        run.missing.append("completions.jsonl has no held-out completions: there are no samples")
    if (run.path / "evaluation.json").exists() and run.evaluation is None:
        run.missing.append("evaluation.json is damaged; run `gemma2-grpo evaluate` again")
    return run


def _read_config(path: Path, missing: list[str]) -> dict[str, dict[str, Any]]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        missing.append("config.toml is missing or damaged: what the run was to do")
        return {}
    return {name: section for name, section in values.items() if isinstance(section, dict)}


def _read_log(path: Path, missing: list[str], needle: bytes = b"") -> Iterator[dict[str, Any]]:
    """Objects of a JSON Lines file; what is damaged is left out and counted.

    Args:
        path: The file; there need not be one.
        missing: Takes the count, in words.
        needle: What a line of interest has in it; others are not even parsed.
    """
    damaged = 0
    try:
        with path.open("rb") as lines:
            for line in lines:
                if needle not in line:
                    continue
                record = _parse(line)
                if record is not None:
                    yield record
                elif line.endswith(b"\n"):  # Else it is being written now, or was cut off.
                    damaged += 1
    except OSError:
        return
    if damaged:
        plural = "s are" if damaged > 1 else " is"
        missing.append(f"{damaged} line{plural} damaged in {path.name}, and left out")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        return _mapping(json.loads(line))
    except (ValueError, RecursionError):
        return None


def _mapping(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _by_step(records: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    steps = {}
    for record in records:
        step = number(record, "step")
        if step is not None and step >= 0:
            steps[int(step)] = record
    return [steps[step] for step in sorted(steps)]


def _read_held_out(
    path: Path, evaluations: list[dict[str, Any]], missing: list[str]
) -> dict[int, list[Answer]]:
    """Completions of the first and last measurement, out of a log that may have gigabytes."""
    measured = {int(record["step"]): record.get("problems") for record in evaluations}
    wanted = {min(measured), max(measured)} if measured else set()
    answers: dict[int, list[Answer]] = {step: [] for step in wanted}
    for record in _read_log(path, missing, b'"held_out"'):
        step = number(record, "step")
        if record.get("kind") == "held_out" and step in wanted:
            answers[int(step or 0)].append(_answer(record))
    # One that was begun, killed and begun again would have some twice.
    return {step: rows for step, rows in answers.items() if rows and len(rows) == measured[step]}


def _read_evaluated(path: Path, missing: list[str]) -> dict[str, dict[int, Answer]]:
    systems: dict[str, dict[int, Answer]] = {}
    for record in _read_log(path, missing):
        index = number(record, "index")
        if record.get("sample") is None and index is not None:
            systems.setdefault(str(record.get("system")), {})[int(index)] = _answer(record)
    return systems


def _answer(record: Mapping[str, Any]) -> Answer:
    values = {name: number(record, name) for name in record}
    return Answer(
        question=str(record.get("question", "")),
        answer=str(record.get("answer", "")),
        completion=str(record.get("completion", "")),
        is_correct=values.get("correct") == 1,
        scores={name: value for name, value in values.items() if value is not None},
    )
