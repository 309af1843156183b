"""An evaluation for a terminal of 80 columns."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gemma2_grpo.runs.display import inert
from gemma2_grpo.runs.evaluation import ADAPTER

_GREEDY = (
    ("right", "accuracy"),
    ("right by GSM8K's extraction", "official_accuracy"),
    ("perfect format", "format"),
    ("true equations", "true_equations"),
    ("cut off", "truncated"),
)
_SAMPLED = (("perfect format", "format"), ("true equations", "true_equations"))


def print_evaluation(result: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Prints both systems side by side, and how their answers differ."""
    data, systems = result["data"], result["systems"]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(f"{data['problems']} {data['split']} problems", no_wrap=True)
    for name in systems:
        steps = f", {result['steps']} steps" if name == ADAPTER and result["steps"] else ""
        table.add_column(f"{name}{steps}", justify="right")
    for rows in (_greedy_rows(systems), _step_rows(systems), _sampled_rows(systems)):
        for label, values in rows:
            table.add_row(label, *values)
        table.add_section()
    console.print(f"{inert(result['name'])} on {inert(data['source'])}", soft_wrap=True)
    console.print(table)
    if data["dropped"]:
        console.print(f"{data['dropped']} problems were too long and left out")
    if comparison := result["comparison"]:
        console.print(
            f"{comparison['fixed']} fixed, {comparison['broken']} broken by the adapter; "
            f"McNemar's exact test: p = {comparison['p_value']:.2g}"
        )
    console.print(f"written to {inert(str(folder))}", style="dim", soft_wrap=True)


Rows = list[tuple[str, list[str]]]


def _greedy_rows(systems: Mapping[str, Any]) -> Rows:
    greedy = [system["greedy"] for system in systems.values()]
    rows: Rows = [
        (f"{label}, greedy", [_share(g[name]) for g in greedy]) for label, name in _GREEDY
    ]
    rows.insert(1, ("  95 % interval", [_interval(g["interval"]) for g in greedy]))
    return [*rows, ("tokens, greedy", [f"{g['mean_tokens']:.1f}" for g in greedy])]


def _step_rows(systems: Mapping[str, Any]) -> Rows:
    by_steps = [
        {row["steps"]: row for row in system["greedy"]["by_solution_steps"]}
        for system in systems.values()
    ]
    return [
        (
            f"right, solutions of {steps} step{'s' if steps > 1 else ''} ({row['problems']})",
            [_share(system[steps]["accuracy"]) for system in by_steps],
        )
        for steps, row in by_steps[0].items()
    ]


def _sampled_rows(systems: Mapping[str, Any]) -> Rows:
    sampled = [system["sampled"] for system in systems.values()]
    if not all(sampled):
        return []
    rows: Rows = [
        ("right, sampled", [_share(s["pass_at_1"]) for s in sampled]),
        ("  95 % interval", [_interval(s["interval"]) for s in sampled]),
    ]
    for label, name in (("pass@{k}", "pass_at_k"), ("maj@{k}", "maj_at_k")):
        rows += [
            (label.format(k=k), [_share(s[name][k]) for s in sampled])
            for k in sampled[0][name]
            if k != "1"
        ]
    return rows + [
        (f"{label}, sampled", [_share(s[name]) for s in sampled]) for label, name in _SAMPLED
    ]


def _share(value: float) -> str:
    return f"{value:.1%}"


def _interval(interval: list[float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"
