"""Writes the pages that are made from the package: python docs/generate.py."""

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import docstring_parser
from pydantic import BaseModel

from gemma2_grpo.config import Config
from gemma2_grpo.presets import preset_names, read_toml
from gemma2_grpo.ranges import demand
from gemma2_grpo.run import results, schema
from gemma2_grpo.task.rewards import COMPONENTS, score_completion

DOCS = Path(__file__).parent
_MADE = "<!-- Made by docs/generate.py: change its sources instead. -->"
_MARK = "<!-- worked examples -->"


def main() -> None:
    """Writes all generated pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """The generated pages as they should be."""
    rewards = DOCS / "rewards.md"
    before, _, rest = rewards.read_text(encoding="utf-8").partition(_MARK)
    _, _, after = rest.partition(_MARK)
    return {
        DOCS / "configuration.md": configuration_page(),
        DOCS / "logs.md": logs_page(),
        rewards: f"{before}{_MARK}\n{worked_examples()}{_MARK}{after}",
    }


def configuration_page() -> str:
    """Every field of a run: its default, its meaning and where presets differ."""
    parts = [
        "# Configuration\n",
        f"{_MADE}\n",
        "A configuration is a TOML file with the sections below. Every field is also an option\n"
        "of the command line, without its section: `--max-steps 20`. The defaults are the\n"
        "flagship's, Gemma 2 2B-IT on a TPU v5e-8. A preset says only what differs;\n"
        "`gemma2-grpo train my.toml` reads one of your own. Types and names are checked before\n"
        "anything loads.\n",
        "```toml\n[rollout]\nnum_generations = 8\n\n[run]\nmax_steps = 100\n```\n",
    ]
    for field in dataclasses.fields(Config):
        parts += _section(field)
    return "\n".join(parts)


def _section(field: dataclasses.Field[Any]) -> Iterator[str]:
    yield f"## `[{field.name}]`\n"
    yield docstring_parser.parse(field.type.__doc__).short_description + "\n"  # type: ignore[union-attr]
    kind: Any = field.type
    given = {name: read_toml(name).get(field.name, {}) for name in preset_names()}
    meanings = {
        p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(kind).params
    }
    hints = get_type_hints(kind, include_extras=True)
    defaults = dataclasses.asdict(kind())
    rows = ["| field | default | meaning |", "| --- | --- | --- |"]
    for each in dataclasses.fields(kind):
        differs = [
            f"`{name}`: {_value(values[each.name])}"
            for name, values in given.items()
            if each.name in values and _plain(values[each.name]) != _plain(defaults[each.name])
        ]
        meaning = " ".join(meanings.get(each.name, "").split())
        allowed = demand(hints[each.name]).replace("must", "Must", 1)
        notes = [
            meaning,
            f"{allowed}." if allowed else "",
            f"*{'; '.join(differs)}*" if differs else "",
        ]
        text = " ".join(filter(None, notes)).replace("|", "\\|")
        rows.append(f"| `{each.name}` | {_value(defaults[each.name])} | {text} |")
    yield "\n".join(rows) + "\n"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _value(value: Any) -> str:
    """A value as TOML has it."""
    if value is None:
        return "none"
    text = json.dumps(_plain(value)) if not isinstance(value, float) else f"{value:g}"
    return "`" + text.replace("|", "\\|") + "`"


_RECORDS = (
    schema.RunFacts,
    schema.StepRecord,
    schema.RunCompletion,
    results.Measurement,
    results.RunResult,
    schema.Change,
    schema.Identity,
    results.Evaluation,
    results.EvaluatedCompletion,
)
_UNITS = (
    (r"^num_", "count"),
    (r"_fraction$", "fraction, 0 to 1"),
    (r"_interval$", "two fractions"),
    (r"_seconds$|^seconds$", "seconds"),
    (r"_tokens$", "tokens"),
    (r"_bytes|_bytes_by_device$", "bytes"),
    (r"^components$|^mean_components$", "by name"),
    (r"_at_k$", "fraction by k"),
)
"""Units by the names of keys."""


def logs_page() -> str:
    """Every key of every file that runs and evaluations write."""
    parts = [
        "# Logs\n",
        f"{_MADE}\n",
        "A run and an evaluation write these files, a line of JSON for each record of a `.jsonl`.\n"
        "A key has the same meaning in every file. Fractions, tokens, seconds and bytes say so in\n"
        "their names; `num_` is a count. NaN and infinity are written as `null`.\n",
        f"This is version {schema.SCHEMA_VERSION} of the schema; `run.json` and `evaluation.json`"
        " record it.\n"
        "Logs of another version are refused and not misread. TensorBoard, Weights & Biases and\n"
        "trackio get the numbers of `metrics.jsonl` as `train/KEY` and those of\n"
        "`evaluations.jsonl` as `held_out/KEY`, with `/` in place of dots. Parts that two files\n"
        "share, such as `greedy` and `sampled`, are described where they come first.\n",
        "```python\nimport pandas as pd\n\n"
        'metrics = pd.json_normalize(pd.read_json("runs/tiny/metrics.jsonl", lines=True)'
        '.to_dict("records"))\n'
        'metrics.plot(x="step", y=["mean_reward", "mean_components.accuracy"])\n```\n',
    ]
    seen: set[type[BaseModel]] = set(_RECORDS)
    for record in _RECORDS:
        rows = [f"| `{key}` | {unit} | {meaning} |" for key, unit, meaning in _keys(record, seen)]
        parts += [
            f"## `{record.FILE}`\n",
            f"{inspect.getdoc(record)}\n",
            "\n".join(["| key | unit | meaning |", "| --- | --- | --- |", *rows]) + "\n",
        ]
    return "\n".join(parts)


def _keys(
    model: type[BaseModel], seen: set[type[BaseModel]], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Name, unit and meaning of each key, those of a part after the name of the part.

    A part that was `seen` elsewhere on the page is not repeated.
    """
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} has no docstring"
        unit = next((each for each in field.metadata if isinstance(each, str)), "")
        unit = unit or next((unit for pattern, unit in _UNITS if re.search(pattern, name)), "")
        yield f"{prefix}{name}", unit, " ".join(field.description.split()).replace("|", "\\|")
        part, place = _part(field.annotation)
        if part and part not in seen:
            seen.add(part)
            yield from _keys(part, seen, f"{prefix}{name}{place}.")
    for name, computed in model.model_computed_fields.items():
        yield f"{prefix}{name}", "", (computed.description or "").partition("\n")[0]


def _part(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The model of a part, and what follows its name in the name of a key."""
    kinds = get_args(annotation) or (annotation,)
    place = {tuple: "[]", dict: ".NAME"}.get(get_origin(annotation), "")
    found = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return next(found, None), place


def worked_examples() -> str:
    """The completions of examples.jsonl with what they earn."""
    lines = (DOCS / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [json.loads(line) for line in lines]
    parts = [f"> {examples[0]['question']}\n>\n> The answer is {examples[0]['answer']}.\n"]
    for number, example in enumerate(examples, start=1):
        score = score_completion(example["completion"], example["answer"], example["question"])
        parts += [
            f"### {number}. {example['title']}\n",
            f"```text\n{example['completion']}\n```\n",
            "| " + " | ".join([*(n.replace("_", "-") for n in COMPONENTS), "total"]) + " |",
            "| --- " * (len(COMPONENTS) + 1) + "|",
            "| "
            + " | ".join(f"{score[n]:.2f}" for n in COMPONENTS)
            + f" | **{score.total:.3f}** |\n",
            f"{example['remark']}\n",
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
