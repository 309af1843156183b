"""Facts of a run besides its results: setup, time by phase, and how to reproduce it."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, pairwise

from gemma2_grpo.config import flat
from gemma2_grpo.presets import nearest_preset
from gemma2_grpo.run.files import RunFiles
from gemma2_grpo.run.outcome import percent
from gemma2_grpo.run.schema import Numbers, Start, numbers
from gemma2_grpo.task.rewards import COMPONENTS

# Home directories and keys, which do not belong into a report.
_PRIVATE = (
    (re.compile(r"(?:/home|/Users)/[^/\s'\"]+|/root(?=/|$)"), "~"),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_…"),
)
_SETUP = (
    ("Model", "{model}, LoRA rank {lora_rank}"),
    ("Problems", "{dataset}"),
    ("A step", "{prompts_per_step} prompts × {num_generations} completions"),
    ("Learning rate", "{learning_rate}"),
    ("KL weight (beta)", "{beta}"),
)
_SOLUTIONS_SETUP = (*_SETUP[:2], ("A step", "{prompts_per_step} worked solutions"), _SETUP[3])
_MAX_VALUE_CHARS = 300

# --- The run ---


def status(run: RunFiles) -> str:
    """Progress of the run: finished or not, and its steps."""
    steps = int(run.metrics[-1]["step"]) if run.metrics else 0
    planned = numbers(run.config).get("max_steps")
    is_finished = run.has_result and steps >= (planned or 0)
    of = "" if planned is None else f" of {planned:,.0f}"
    return f"{'finished' if is_finished else 'not finished'}, {steps:,}{of} steps"


def method(run: RunFiles) -> str:
    """What kind of training it was."""
    return "supervised training" if run.is_supervised else "GRPO training"


def setup(run: RunFiles) -> list[tuple[str, str]]:
    """The run in a few words, for the head of the page."""
    facts = []
    for name, text in _SOLUTIONS_SETUP if run.is_supervised else _SETUP:
        with suppress(KeyError):  # A damaged configuration lacks fields.
            facts.append((name, plain(text.format_map(run.config))))
    devices = run.facts.devices
    return [*facts, ("Devices", f"{len(devices)} × {devices[0]}")] if devices else facts


def weights(run: RunFiles) -> str:
    """The weights of the components of the reward, in words."""
    known = numbers(run.config)
    texts = []
    for name, component in COMPONENTS.items():
        is_known = any(f"mean_components.{name}" in record for record in run.metrics[-1:])
        default = known.get(f"{name}_weight", component.weight if is_known else None)
        weight = known.get(f"weights.{name}", default)
        if weight is not None:
            texts.append(f"{name.removeprefix('self_')} × {weight:.2f}")
    return f", before their weights ({', '.join(texts)})" if texts else ""


def losses(run: RunFiles) -> list[str]:
    """Counts of completions and updates that were left out, as sentences."""
    counts = (
        (_sum(run.metrics, "num_unscored"), "completions had no reward and were left out"),
        (_sum(run.metrics, "num_updates_left_out"), "updates were not finite and were left out"),
    )
    return [f"{count:,.0f} {what}." for count, what in counts if count]


# --- Times ---


def phases(run: RunFiles) -> list[tuple[str, float]]:
    """Seconds of the finished steps and of measurements, by what they went into."""
    names = ("rollout", "reward", "update")
    parts = [(name.capitalize(), _sum(run.metrics, f"{name}_seconds")) for name in names]
    measuring = sum(each.seconds or 0.0 for each in run.evaluations)
    return [*parts, ("Measuring on held-out problems", measuring)] if measuring else parts


def speed(run: RunFiles) -> str:
    """Compiling, tokens a second and memory, in sentences."""
    texts = []
    # Each launch counts from 0 again.
    counts = [r["compile_seconds"] for r in run.metrics if "compile_seconds" in r]
    compiling = sum(b - a if b >= a else b for a, b in pairwise([0.0, *counts]))
    if compiling:
        texts.append(f"{compiling:,.1f} s of all this, and of loading, went into compiling.")
    tokens = sum(r.get("tokens_per_second", 0) * r.get("rollout_seconds", 0) for r in run.metrics)
    seconds = _sum(run.metrics, "rollout_seconds")
    if seconds:
        texts.append(f"{tokens / seconds:,.0f} tokens a second were sampled, {tokens:,.0f} in all.")
    peak = max((record.get("peak_memory_bytes", 0) for record in run.metrics), default=0)
    part = max((record.get("peak_memory_fraction", 0) for record in run.metrics), default=0)
    of_device = f", {percent(part, 0)} of a device" if part else ""
    memory = f"was {peak / 1e9:.2f} GB{of_device}" if peak else "was not recorded"
    return " ".join([*texts, f"Peak memory {memory}."])


def _sum(records: Iterable[Numbers], name: str) -> float:
    return sum(record.get(name, 0.0) for record in records)


# --- How to do it again ---


def starts(run: RunFiles) -> list[tuple[str, str]]:
    """Time and command of every start: training, resuming, and evaluating."""
    kinds = ["Started", *["Resumed"] * len(run.facts.starts)]
    done = list(zip(kinds, run.facts.starts, strict=False))
    if run.evaluation:
        done.append(("Evaluated", run.evaluation))
    return [
        (
            f"{kind} {start.started.replace('T', ' ').replace('Z', ' UTC')}",
            plain(shlex.join(start.command)) or _without_command(run, start),
        )
        for kind, start in done
    ]


def _without_command(run: RunFiles, start: Start) -> str:
    """Note for a start from Python, with the command for the same configuration."""
    said = "# No command was recorded, as where a notebook starts it."
    if start is run.evaluation or not run.config:
        return said
    config = plain(shlex.join([str(run.path / "config.toml")]))
    command = "sft" if run.is_supervised else "train"
    return f"{said} The same configuration:\ngemma2-grpo {command} {config} --run runs/again"


def origins(run: RunFiles) -> list[tuple[str, str]]:
    """Hashes, seeds, versions and machines."""
    facts = run.facts
    last = facts.starts[-1] if facts.starts else None
    rows = [
        ("data", facts.data.source or None),
        ("SHA-256 of the data", facts.data_sha256),
        (
            "SHA-256 of the evaluation's data",
            run.evaluation and (run.evaluation.data.sha256 or None),
        ),
        ("SHA-256 of the base model", facts.base_sha256),
        ("SHA-256 of the reward's file", facts.reward_sha256),
        ("seed", run.config.get("seed")),
        ("data_seed", run.config.get("data_seed")),
        ("devices", ", ".join(facts.devices) or None),
        ("machine", last and last.machine),
        ("versions", last and ", ".join(f"{k} {v}" for k, v in last.versions.items())),
    ]
    return [(name, plain(value)) for name, value in rows if value is not None]


def differences_from_preset(run: RunFiles) -> tuple[str, list[list[str]]] | None:
    """The preset that is nearest to the configuration, and what differs from it.

    None if there is no configuration.
    """
    if not run.config:
        return None
    name, preset = nearest_preset(run.config)
    return name, differences([json.loads(json.dumps(flat(preset))), run.config])


def differences(tables: Sequence[Mapping[str, object]]) -> list[list[str]]:
    """Rows of text: the fields that are not the same in all tables, with their values."""
    rows = []
    for name in dict.fromkeys(chain.from_iterable(tables)):
        values = [table.get(name) for table in tables]
        if any(value != values[0] for value in values):
            rows.append([name, *("–" if value is None else plain(value) for value in values)])
    return rows


def plain(value: object) -> str:
    """A value in a line, without what concerns only the machine."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    short = text if len(text) <= _MAX_VALUE_CHARS else f"{text[: _MAX_VALUE_CHARS - 1]}…"
    return without_private(short)


def without_private(text: str) -> str:
    """A text without homes and keys."""
    for pattern, replacement in _PRIVATE:
        text = pattern.sub(replacement, text)
    return text
