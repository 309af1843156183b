"""Which groups of completions give GRPO a gradient, and from which part of the reward it comes.

python -m benchmarks.groups runs/tiny/completions.jsonl
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.command import status_of
from gemma2_grpo.config import RewardConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.task.jsonl import json_object, read_jsonl
from gemma2_grpo.task.rewards import COMPONENTS, Score, score_completion


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Scores sampled completions again and counts the groups that would teach something."""

    file: tyro.conf.Positional[Path]
    """JSONL with question, answer and completion; neighbours with one question are a group. The
    completions.jsonl of a run will do; only what was sampled in training is read of it."""
    first_steps: int | None = None
    """Read only so many steps of a run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the count and returns the exit status; users' mistakes are one line and 2."""
    command = tyro.cli(Groups, args=arguments, prog="python -m benchmarks.groups")
    return status_of(run, command)


def run(command: Groups, output: Console, _: Console) -> None:
    """Prints the shares of groups with and without a right answer, and what differs in each."""
    groups = [scored(group) for group in read_groups(command)]
    if not groups:
        raise UserError(f"{command.file}: no group of two completions or more; sample some")
    output.width = min(output.width, 80)
    table = Table("", "groups", "with a gradient", "from", box=box.SIMPLE_HEAD)
    for name, chosen in split_by_success(groups).items():
        sources = Counter(" + ".join(varying(group)) for group in chosen if varying(group))
        learns = sum(sources.values())
        share = f"{learns} ({learns / len(chosen):.0%})" if chosen else "-"
        parts = ", ".join(f"{source} {count}" for source, count in sources.most_common())
        table.add_row(name, str(len(chosen)), share, parts)
    output.print(table)


def read_groups(command: Groups) -> Iterator[list[dict[str, Any]]]:
    """The records of each group; a run's held-out completions are left out."""
    lines = read_jsonl(command.file, json_object("question, answer and completion"))
    records = (
        record
        for record in (line.content for line in lines)
        if record.get("kind", "train") == "train"
        and (command.first_steps is None or record.get("step", 0) <= command.first_steps)
    )
    for _, group in groupby(records, lambda record: (record.get("step"), record["question"])):
        members = list(group)
        if len(members) > 1:
            yield members


def scored(group: list[dict[str, Any]]) -> list[Score]:
    """Scores of the completions of one group, with the default weights."""
    return [
        score_completion(
            record["completion"],
            str(record["answer"]),
            record["question"],
            RewardConfig(),
            is_truncated=bool(record.get("truncated", False)),
        )
        for record in group
    ]


def split_by_success(groups: list[list[Score]]) -> dict[str, list[list[Score]]]:
    """The groups by how many of their answers are right."""
    rights = [sum(score.correct for score in group) for group in groups]
    kinds = {
        "no right answer": [g for g, right in zip(groups, rights, strict=True) if not right],
        "some right answers": [
            g for g, right in zip(groups, rights, strict=True) if 0 < right < len(g)
        ],
        "all right": [g for g, right in zip(groups, rights, strict=True) if right == len(g)],
    }
    return {**kinds, "all": groups}


def varying(group: list[Score]) -> list[str]:
    """Components that are not the same for all completions of a group."""
    return [name for name in COMPONENTS if len({score[name] for score in group}) > 1]


if __name__ == "__main__":
    sys.exit(main())
