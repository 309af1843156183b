"""Writes the pages that are made from the package: python docs/generate.py."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import docstring_parser

from gemma2_grpo.config import Config, SftConfig
from gemma2_grpo.presets import preset_names, read_toml
from gemma2_grpo.ranges import demand
from gemma2_grpo.task.rewards import COMPONENTS, score_completion

DOCS = Path(__file__).parent
_MADE = "<!-- Made by docs/generate.py: change what it is made from instead. -->"
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
        rewards: f"{before}{_MARK}\n{worked_examples()}{_MARK}{after}",
    }


def configuration_page() -> str:
    """Every field of `train` and `sft`: its default, its meaning and where presets differ."""
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
        parts += _section(field, [name for name in preset_names() if not name.startswith("sft-")])
    parts.append(
        "## `[sft]`\n\n`gemma2-grpo sft` takes `[model]`, `[data]`, `[optimizer]` and this:\n"
    )
    parts += _table(dataclasses.fields(SftConfig)[-1], ["sft-tiny"])
    return "\n".join(parts)


def _section(field: dataclasses.Field[Any], presets: list[str]) -> Iterator[str]:
    yield f"## `[{field.name}]`\n"
    yield docstring_parser.parse(field.type.__doc__).short_description + "\n"  # type: ignore[union-attr]
    yield from _table(field, presets)


def _table(field: dataclasses.Field[Any], presets: list[str]) -> Iterator[str]:
    kind: Any = field.type
    given = {name: read_toml(name).get(field.name, {}) for name in presets}
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
