"""What a run has written, read so that a report can be made of whatever is there."""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic_core import from_json

from gemma2_grpo.errors import UserError
from gemma2_grpo.run.directory import read_json
from gemma2_grpo.task.statistics import Paired

_MARKS = ("config.toml", "run.json", "metrics.jsonl", "evaluations.jsonl", "evaluation.json")

# Of float32; what is above it is damage, and would overflow in sums.
_LARGEST = 3.5e38

_File = TypeVar("_File", bound=BaseModel)

Numbers = Mapping[str, float]
"""The finite numbers of a record by name."""


class Start(BaseModel):
    """When a command was given, and where."""

    started: str = ""
    command: list[str] = []
    machine: str | None = None
    versions: dict[str, str] = {}


class Facts(BaseModel):
    """run.json: what a run was made with."""

    devices: list[str] = []
    data: dict[str, Any] = {}
    data_sha256: str | None = None
    base_sha256: str | None = None
    reward_sha256: str | None = None
    starts: list[Start] = []


class Greedy(BaseModel, extra="allow"):
    """Measures of greedy completions: those of `run/summary.py` by name, and a table."""

    by_solution_steps: list[dict[str, Any]] = []


class System(BaseModel):
    """What `evaluate` measured of one model."""

    greedy: Greedy
    sampled: dict[str, Any] | None = None


class Evaluation(Start):
    """evaluation.json: what `evaluate` wrote."""

    steps: int = 0
    data: dict[str, Any] = {}
    systems: dict[str, System] = {}
    comparison: Paired | None = None


@dataclass(frozen=True)
class Answer:
    """One completion with its scores."""

    question: str
    answer: str
    completion: str
    scores: Numbers
    """Columns of `Scorer` by name, and what else the record has in numbers."""

    @property
    def is_correct(self) -> bool:
        """Whether our grader found it right."""
        return self.scores.get("correct") == 1


@dataclass(frozen=True)
class RunFiles:
    """Everything that a report needs; empty where there is nothing."""

    path: Path
    config: Mapping[str, Any]
    """Fields of config.toml as written, without their sections: each name is there once."""
    config_text: str
    facts: Facts
    metrics: list[Numbers]
    """In the order of their steps; of a step that was done again, the last record."""
    evaluations: list[Numbers]
    """Likewise; each says how many answers were right of how many."""
    held_out: Mapping[int, list[Answer]]
    """Greedy completions of the first and the last measurement by step."""
    evaluation: Evaluation | None
    evaluated: Mapping[str, list[Answer]]
    """Greedy completions of `evaluate` by system, in the order of the problems."""
    has_result: bool
    missing: list[str]
    """What is not there, or damaged, in words."""

    @property
    def name(self) -> str:
        """What to call the run."""
        return self.path.resolve().name or str(self.path)

    @property
    def is_control(self) -> bool:
        """Whether the rewards were shuffled, so that they could teach nothing."""
        return self.config.get("shuffle_rewards") is True


def read_run(path: Path) -> RunFiles:
    """Reads the directory of a run: finished, going on, crashed or damaged.

    Raises:
        UserError: if it is no run.
    """
    if not any((path / name).is_file() for name in _MARKS):
        what = "is no run (no config.toml in it)" if path.is_dir() else "no such directory"
        raise UserError(f"run {path}: {what}; give the directory of a run, such as runs/tiny")
    missing: list[str] = []
    config_text, config = _read_config(path / "config.toml")
    facts, evaluation = _read(path / "run.json", Facts), None
    if not config:
        missing.append("config.toml is missing or damaged: what the run was to do")
    if facts is None:
        missing.append("run.json is missing or damaged: command, data, versions and devices")
    if (path / "evaluation.json").exists():
        evaluation = _read(path / "evaluation.json", Evaluation)
        if evaluation is None:
            missing.append("evaluation.json is damaged; run `gemma2-grpo evaluate` again")
    has_result = bool(read_json(path / "result.json"))
    if (path / "result.json").exists() and not has_result:
        missing.append("result.json is damaged: whether the run has finished")
    metrics = _by_step(_read_log(path / "metrics.jsonl", missing))
    if not metrics:
        missing.append("No step has been finished: there are no curves, and no times")
    evaluations = _by_step(_read_log(path / "evaluations.jsonl", missing))
    evaluations = [record for record in evaluations if is_counted(record)]
    held_out = _read_held_out(path / "completions.jsonl", evaluations, missing)
    if not evaluations:
        missing.append("Nothing has been measured on held-out problems")
    elif not held_out:
        missing.append("completions.jsonl has no held-out completions: there are no samples")
    return RunFiles(
        path=path,
        config=config,
        config_text=config_text,
        facts=facts or Facts(),
        metrics=metrics,
        evaluations=evaluations,
        held_out=held_out,
        evaluation=evaluation,
        evaluated=_read_evaluated(path / "evaluation_completions.jsonl", missing),
        has_result=has_result,
        missing=missing,
    )


def numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record by name, those of a part of it as `part.name`; none is infinite."""
    found = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and abs(value) <= _LARGEST:
            found[f"{prefix}{name}"] = float(value)
    return found


def is_counted(record: Numbers) -> bool:
    """Whether a record says how many answers were right of how many."""
    problems = record.get("problems", 0)
    return problems >= 1 and 0 <= record.get("correct", -1) <= problems


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        sections = tomllib.loads(text).values()
    except (OSError, ValueError):
        return "", {}
    fields = [section.items() for section in sections if isinstance(section, dict)]
    return text, dict(chain.from_iterable(fields))


def _read(path: Path, kind: type[_File]) -> _File | None:
    """A JSON file; None if there is none, or it is not what it should be."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _read_log(path: Path, missing: list[str], needle: bytes = b"") -> Iterator[dict[str, Any]]:
    """Objects of a JSON Lines file; what is damaged is left out and counted.

    Args:
        path: The file; there need not be one.
        missing: Takes the count, in words.
        needle: What a line of interest has in it; others are not even parsed.
    """
    damaged = 0
    with suppress(OSError), path.open("rb") as lines:
        for line in lines:
            if needle not in line:
                continue
            try:
                record = from_json(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                yield record
            else:
                damaged += line.endswith(b"\n")  # Else it is being written now, or was cut off.
    if damaged:
        plural = "s are" if damaged > 1 else " is"
        missing.append(f"{damaged} line{plural} damaged in {path.name}, and left out")


def _by_step(records: Iterable[Mapping[str, Any]]) -> list[Numbers]:
    steps = {found["step"]: found for found in map(numbers, records) if found.get("step", -1) >= 0}
    return [steps[step] for step in sorted(steps)]


def _read_held_out(
    path: Path, evaluations: list[Numbers], missing: list[str]
) -> dict[int, list[Answer]]:
    """Completions of the first and last measurement, out of a log that may have gigabytes."""
    ends = {
        int(record["step"]): record["problems"] for record in evaluations[:1] + evaluations[-1:]
    }
    answers: dict[int, list[Answer]] = {step: [] for step in ends}
    for record in _read_log(path, missing, b'"held_out"'):
        if record.get("kind") == "held_out" and (step := numbers(record).get("step")) in ends:
            answers[int(step)].append(_answer(record))
    # One that was begun, killed and begun again would have some twice.
    return {step: found for step, found in answers.items() if len(found) == ends[step]}


def _read_evaluated(path: Path, missing: list[str]) -> dict[str, list[Answer]]:
    answers: dict[str, list[Answer]] = {}
    for record in _read_log(path, missing, b'"sample": null'):
        if record.get("sample") is None:
            answers.setdefault(str(record.get("system")), []).append(_answer(record))
    return {
        name: sorted(own, key=lambda a: a.scores.get("index", 0)) for name, own in answers.items()
    }


def _answer(record: Mapping[str, Any]) -> Answer:
    texts = [str(record.get(name, "")) for name in ("question", "answer", "completion")]
    return Answer(texts[0], texts[1], texts[2], numbers(record))
