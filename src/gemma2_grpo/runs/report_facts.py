"""What a report says in tables: results, times, and how to do a run again."""

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma2_grpo.config import ConfigError
from gemma2_grpo.presets import load_config, preset_names
from gemma2_grpo.runs.health import number
from gemma2_grpo.runs.outcome import MEASURES, Outcome, Result, percent
from gemma2_grpo.runs.run_files import Answer, RunFiles
from gemma2_grpo.task.rewards import COMPONENTS
from gemma2_grpo.task.statistics import Paired, wilson_interval

# Of other people's machines, which are nobody's business, and keys.
_PRIVATE = (
    (re.compile(r"(?:/home|/Users)/[^/\s'\"]+|/root(?=/|$)"), "~"),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_…"),
)
_MAX_VALUE_CHARS = 300
_MAX_CONFIG_CHARS = 20_000


@dataclass(frozen=True)
class OutcomeTable:
    """An outcome as it is shown."""

    title: str
    results: Sequence[tuple[Result, str]]
    """With the class of each in the style sheet."""
    paired: Paired | None
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    step_heads: Sequence[str] = ()
    by_steps: Sequence[Sequence[str]] = ()
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """What a part of a run took."""

    name: str
    seconds: str
    share: float | None
    """Of the whole, in [0, 1]."""
    is_total: bool = False

    @property
    def share_text(self) -> str:
        """For people."""
        return "" if self.share is None else percent(self.share, 0)


def outcome_table(outcome: Outcome, title: str, note: str = "") -> OutcomeTable:
    """Puts the measurements of an outcome side by side."""
    results = [(result, kind) for result, kind in _sides(outcome) if result]
    heads = [result.label for result, _ in results]
    both = [result for result, _ in results]
    rows = measure_rows(both)
    if len(both) == 2:
        heads.append("change")
        rows = [[*row, change] for row, change in zip(rows, _changes(*both), strict=True)]
    return OutcomeTable(
        title=title,
        results=results,
        paired=outcome.paired,
        heads=heads,
        rows=rows,
        step_heads=["problems", *(result.label for result in both)],
        by_steps=_by_steps(both),
        note=note,
    )


def _sides(outcome: Outcome) -> list[tuple[Result | None, str]]:
    return [(outcome.before, "before"), (outcome.after, "after")]


def measure_rows(results: Sequence[Result]) -> list[list[str]]:
    """A row for each of MEASURES that any result has."""
    k = max((result.samples or 0 for result in results), default=0)
    rows = []
    for name, label, is_share in _measured(results):
        cells = [_cell(result.values.get(name), is_share) for result in results]
        rows.append([label.format(k=k), *cells])
    return rows


def _measured(results: Sequence[Result]) -> list[tuple[str, str, bool]]:
    return [each for each in MEASURES if any(each[0] in result.values for result in results)]


def _cell(value: float | None, is_share: bool) -> str:
    if value is None:
        return "–"
    return percent(value) if is_share else f"{value:.2f}"


def _changes(before: Result, after: Result) -> list[str]:
    changes = []
    for name, _, is_share in _measured([before, after]):
        old, new = before.values.get(name), after.values.get(name)
        if old is None or new is None:
            changes.append("")
        else:
            text = f"{100 * (new - old):+.1f} pp" if is_share else f"{new - old:+.2f}"
            changes.append(re.sub(r"[+-](0\.0+)\b", r"\1", text).replace("-", "\u2212"))
    return changes


def _by_steps(results: Sequence[Result]) -> list[list[str]]:
    """Accuracy by the number of steps of a solution, with its interval."""
    tables = [
        {number(row, "steps"): row for row in result.by_steps if number(row, "problems")}
        for result in results
    ]
    steps = sorted({step for table in tables for step in table if step is not None})
    rows = []
    for step in steps:
        found = [table.get(step, {}) for table in tables]
        problems = max(int(number(row, "problems") or 0) for row in found)
        name = f"{step:.0f} step{'s' if step != 1 else ''}"
        rows.append([name, f"{problems:,}", *(_share_cell(row) for row in found)])
    return rows


def _share_cell(row: Mapping[str, Any]) -> str:
    problems, correct = number(row, "problems"), number(row, "correct")
    if not problems or correct is None or not 0 <= correct <= problems:
        return "–"
    low, high = wilson_interval(int(correct), int(problems))
    return f"{percent(correct / problems)} ({100 * low:.0f} to {100 * high:.0f})"


def reward_parts(answer: Answer) -> list[tuple[str, float]]:
    """Components of the reward of an answer, and the total."""
    names = (*COMPONENTS, "custom", "total")
    return [(_spoken(name), answer.scores[name]) for name in names if name in answer.scores]


def weights(run: RunFiles) -> str:
    """The weights of the components, in words."""
    values = [(n, number(run.config.get("rewards", {}), f"{n}_weight")) for n in COMPONENTS]
    texts = [f"{_spoken(name)} × {value:.2f}" for name, value in values if value is not None]
    return f", before their weights ({', '.join(texts)})" if texts else ""


def _spoken(name: str) -> str:
    return name.replace("self_correction", "correction")


# --- Times ---


def phases(run: RunFiles) -> list[Phase]:
    """Where the time of the finished steps and of measurements went."""
    records = run.metrics
    if not records:
        return []
    names = (("rollout", "Rollout"), ("reward", "Reward"), ("update", "Update"))
    parts = [(label, _sum(records, f"{name}_seconds")) for name, label in names]
    measuring = _sum(run.evaluations, "seconds")
    if measuring:
        parts.append(("Measuring on held-out problems", measuring))
    total = sum(seconds for _, seconds in parts)
    rows = [Phase(label, f"{s:,.1f}", s / total if total else 0.0) for label, s in parts]
    rows.append(Phase("Together", f"{total:,.1f}", None, is_total=True))
    return rows


def _sum(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(number(record, name) or 0.0 for record in records)


def speed(run: RunFiles) -> str:
    """Compiling, tokens a second and memory, in sentences."""
    records = run.metrics
    texts = []
    compiling = _compile_seconds(records)
    if compiling:
        texts.append(f"{compiling:,.1f} s of all this, and of loading, went into compiling.")
    tokens = sum(
        (number(r, "tokens_per_second") or 0) * (number(r, "rollout_seconds") or 0) for r in records
    )
    seconds = _sum(records, "rollout_seconds")
    if seconds:
        texts.append(f"{tokens / seconds:,.0f} tokens a second were sampled, {tokens:,.0f} in all.")
    return " ".join([*texts, _memory(records)])


def _memory(records: Sequence[Mapping[str, Any]]) -> str:
    peak = max((number(record, "peak_memory_bytes") or 0 for record in records), default=0)
    part = max((number(record, "peak_memory_fraction") or 0 for record in records), default=0)
    if not peak:
        return "Peak memory was not recorded."
    return (
        f"Peak memory was {peak / 1e9:.2f} GB{f', {percent(part, 0)} of a device' if part else ''}."
    )


def _compile_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """Of all launches; each counts from 0 again."""
    total = before = 0.0
    for record in records:
        seconds = number(record, "compile_seconds") or 0.0
        if seconds < before:
            total += before
        before = seconds
    return total + before


# --- How to do it again ---


def setup(run: RunFiles) -> list[tuple[str, str]]:
    """The run in a few words, for the head of the page."""
    setting = run.setting
    devices = _list(run.facts, "devices")
    facts = [
        (
            "Model",
            f"{_text(setting('model', 'model'))}, LoRA rank {_text(setting('model', 'lora_rank'))}",
        ),
        ("Problems", _text(setting("data", "dataset"))),
        (
            "A step",
            f"{_text(setting('rollout', 'prompts_per_step'))} prompts × "
            f"{_text(setting('rollout', 'num_generations'))} completions",
        ),
        ("Learning rate", _text(setting("optimizer", "learning_rate"))),
        ("KL weight (beta)", _text(setting("grpo", "beta"))),
        ("Devices", f"{len(devices)} × {_text(devices[0])}" if devices else None),
    ]
    return [(name, text) for name, text in facts if text and run.config]


def starts(run: RunFiles) -> list[dict[str, str]]:
    """When and with which commands the run was started."""
    return [
        {
            "when": _text(start.get("started")).replace("T", " ").replace("Z", " UTC"),
            "command": _text(shlex.join(str(word) for word in _list(start, "command"))),
        }
        for start in _list(run.facts, "starts")
        if isinstance(start, dict)
    ]


def origins(run: RunFiles) -> list[tuple[str, str]]:
    """Hashes, seeds, versions and machines."""
    facts = run.facts
    data = facts.get("data")
    data = data if isinstance(data, dict) else {}
    last = next((s for s in reversed(_list(facts, "starts")) if isinstance(s, dict)), {})
    versions = last.get("versions")
    rows = [
        ("data", data.get("source")),
        ("SHA-256 of the data", facts.get("data_sha256")),
        ("SHA-256 of the base model", facts.get("base_sha256")),
        ("SHA-256 of the reward's file", facts.get("reward_sha256")),
        ("seed", run.setting("run", "seed")),
        ("seed of the data", run.setting("data", "data_seed")),
        ("devices", ", ".join(map(str, _list(facts, "devices"))) or None),
        ("machine", last.get("machine")),
        (
            "versions",
            ", ".join(f"{k} {v}" for k, v in versions.items())
            if isinstance(versions, dict)
            else None,
        ),
    ]
    return [(name, _text(value)) for name, value in rows if value is not None]


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    value = values.get(name)
    return value if isinstance(value, list) else []


def config_text(run: RunFiles) -> str:
    """config.toml as it is written."""
    try:
        text = (run.path / "config.toml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    return _without_private(text[:_MAX_CONFIG_CHARS])


def differences_from_preset(run: RunFiles) -> tuple[str, list[list[str]]] | None:
    """The preset that is nearest to the configuration, and what differs from it.

    None if there is no configuration.
    """
    if not run.config:
        return None
    candidates = []
    for name in preset_names():
        try:
            preset = json.loads(json.dumps(dataclasses.asdict(load_config(name))))
        except ConfigError:  # Those of `sft`.
            continue
        candidates.append((name, differences([preset, run.config])))
    return min(candidates, key=lambda candidate: len(candidate[1]))


def differences(configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Fields that are not the same everywhere, with their values."""
    fields = {
        (section, name): None
        for config in configs
        for section, values in config.items()
        for name in values
    }
    rows = []
    for section, name in fields:
        values = [config.get(section, {}).get(name) for config in configs]
        if any(value != values[0] for value in values):
            rows.append([name, *(_text(value, "not set") for value in values)])
    return rows


def _text(value: Any, absent: str = "") -> str:
    """A value in a line, without what concerns only the machine."""
    if value is None:
        return absent
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    short = text if len(text) <= _MAX_VALUE_CHARS else f"{text[: _MAX_VALUE_CHARS - 1]}…"
    return _without_private(short)


def _without_private(text: str) -> str:
    for pattern, replacement in _PRIVATE:
        text = pattern.sub(replacement, text)
    return text
