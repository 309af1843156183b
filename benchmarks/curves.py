"""Training curves of several runs, grouped by what made them.

python -m benchmarks.curves fast=runs/a,runs/b plain=runs/c,runs/d --out curves.png
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl  # pyright: ignore[reportMissingImports]
import numpy as np
import tyro

mpl.use("Agg")
import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]
from matplotlib.ticker import PercentFormatter  # pyright: ignore[reportMissingImports]

COLOURS = ("#1f6fb4", "#c4561a", "#4b8f29", "#7a4fa3")
_WINDOW = 5


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seeds only."""

    name: str
    runs: list[Path]


def main(
    groups: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: Path = Path("curves.png"),
) -> None:
    """Draws mean reward and held-out accuracy of each group, a line per run.

    Args:
        groups: NAME=RUN,RUN,...; a run is a directory that `gemma2-grpo train` wrote.
        out: The picture.
    """
    parsed = [_parse(group) for group in groups]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for group, colour in zip(parsed, COLOURS, strict=False):
        for i, run in enumerate(group.runs):
            label = f"{group.name} ({len(group.runs)} seeds)" if i == 0 else None
            steps, rewards = smoothed_rewards(run)
            left.plot(steps, rewards, color=colour, alpha=0.8, linewidth=1.5, label=label)
            steps, accuracies = held_out(run)
            right.plot(steps, accuracies, color=colour, alpha=0.8, marker="o", markersize=4)
    left.set(xlabel="step", ylabel=f"mean reward, over {_WINDOW} steps", title="Sampled")
    right.set(xlabel="step", ylabel="held-out accuracy, greedy", title="Held out")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="lower right")
    figure.savefig(out, dpi=150)
    print(out)


def _parse(group: str) -> Group:
    name, _, runs = group.partition("=")
    return Group(name, [Path(run) for run in runs.split(",")])


def smoothed_rewards(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and running means of the reward of a run."""
    records = _records(run / "metrics.jsonl")
    rewards = np.array([record["mean_reward"] for record in records], np.float64)
    smooth = np.convolve(rewards, np.ones(_WINDOW) / _WINDOW, mode="valid")
    return np.arange(_WINDOW, len(rewards) + 1), smooth


def held_out(run: Path) -> tuple[list[float], list[float]]:
    """Steps and greedy accuracies of a run's measurements."""
    records = _records(run / "evaluations.jsonl")
    return [record["step"] for record in records], [
        record["greedy"]["correct_fraction"] for record in records
    ]


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    tyro.cli(main)
