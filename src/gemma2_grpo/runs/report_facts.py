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
from gemma2_grpo.runs.outcome import part_of, percent
from gemma2_grpo.runs.run_files import RunFiles

# Of other people's machines, which are nobody's business, and keys.
_PRIVATE = (
    (re.compile(r"(?:/home|/Users)/[^/\s'\"]+|/root(?=/|$)"), "~"),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_…"),
)
_MAX_VALUE_CHARS = 300
_MAX_CONFIG_CHARS = 20_000


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
    """What was done when, and with which commands: training, going on, and evaluating."""
    begun = [start for start in _list(run.facts, "starts") if isinstance(start, dict)]
    kinds = ["Started", *["Resumed"] * len(begun)]
    done: list[tuple[str, Mapping[str, Any]]] = [*zip(kinds, begun, strict=False)]
    if run.evaluation:
        done.append(("Evaluated", run.evaluation))
    return [
        {
            "when": f"{kind} {_text(what.get('started')).replace('T', ' ').replace('Z', ' UTC')}",
            "command": _text(shlex.join(str(word) for word in _list(what, "command"))),
        }
        for kind, what in done
    ]


def origins(run: RunFiles) -> list[tuple[str, str]]:
    """Hashes, seeds, versions and machines."""
    facts = run.facts
    last = next((s for s in reversed(_list(facts, "starts")) if isinstance(s, dict)), {})
    versions = last.get("versions")
    rows = [
        ("data", part_of(facts, "data").get("source")),
        ("SHA-256 of the data", facts.get("data_sha256")),
        ("SHA-256 of the evaluation's data", part_of(run.evaluation or {}, "data").get("sha256")),
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


def different_origins(runs: Sequence[RunFiles]) -> list[list[str]]:
    """Those of `origins` that are not the same for all runs."""
    tables = [dict(origins(run)) for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [[name, *(table.get(name, "not known") for table in tables)] for name in names]
    known = {"seed", "seed of the data"}  # Of the configuration.
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] not in known]


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
