"""Runs written by hand, in seconds less than training would take, for reports to be made of."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma2_grpo.config import RewardConfig
from gemma2_grpo.runs.evaluation import summarize
from gemma2_grpo.task.data import Example
from gemma2_grpo.task.prompts import render_solution
from gemma2_grpo.task.scoring import Scorer

RIGHT, WRONG = render_solution(["1 + 2 = 3"], "3"), render_solution(["1 + 2 = 4"], "4")
METRICS = {
    "reward": 0.5,
    "correct": 0.4,
    "format": 0.9,
    "logic": 0.6,
    "accuracy": 0.4,
    "length": 0.2,
    "self_correction": 0.0,
    "kl": 0.01,
    "entropy": 1.0,
    "clip_fraction": 0.01,
    "completion_tokens": 50.0,
    "truncated": 0.01,
    "uniform_groups": 0.1,
    "grad_norm": 0.2,
    "updates": 3,
    "rollout_seconds": 2.0,
    "reward_seconds": 0.0,
    "update_seconds": 1.0,
    "tokens_per_second": 50.0,
}
"""Of a step, as `step_record` has them."""


def write_run(
    path: Path,
    before: Sequence[bool],
    after: Sequence[bool] | None = None,
    *,
    shuffle: bool = False,
    steps: int = 10,
    metrics: dict[str, Any] = METRICS,
) -> Path:
    """Writes a run whose greedy answers before and after are right or not as given."""
    path.mkdir()
    (path / "config.toml").write_text(
        f"[run]\nmax_steps = {steps}\nseed = {len(path.name)}\n"
        f"[rewards]\nshuffle_rewards = {str(shuffle).lower()}\n"
    )
    measured = [(0, before)] + ([(steps, after)] if after is not None else [])
    evaluations, completions = [], []
    for step, correct in measured:
        counts = {"problems": len(correct), "correct": sum(correct)}
        evaluations.append({"step": step, **counts, "official_correct": sum(correct)})
        completions += answers(correct, step=step, kind="held_out")
    write_lines(path / "evaluations.jsonl", evaluations)
    write_lines(path / "completions.jsonl", completions)
    write_lines(path / "metrics.jsonl", [{"step": s, **metrics} for s in range(1, steps + 1)])
    return path


def write_evaluation(path: Path, base: Sequence[bool], adapter: Sequence[bool]) -> None:
    """Writes what `evaluate` does into a run: greedy answers as given, and two samples of each."""
    records = []
    for system, correct in (("base", base), ("adapter", adapter)):
        records += answers(correct, system=system, sample=None)
        drawn = [answers(correct, system=system, sample=0), answers(base, system=system, sample=1)]
        records += [record for pair in zip(*drawn, strict=True) for record in pair]
    solutions = [
        render_solution(["Step 1: 1 + 2 = 3"] * (2 + i % 2), "3") for i in range(len(base))
    ]
    examples = [Example("What is 1 + 2?", "3", solution) for solution in solutions]
    evaluation = {
        "steps": 10,
        "data": {"source": "gsm8k", "split": "test", "sha256": "c0ffee", "dropped": 0},
        "command": ["gemma2-grpo", "evaluate", "run"],
        "started": "2026-01-02T03:04:05Z",
        **summarize(records, examples),
    }
    (path / "evaluation.json").write_text(json.dumps(evaluation))
    write_lines(path / "evaluation_completions.jsonl", records)


def answers(correct: Sequence[bool], **place: Any) -> list[dict[str, Any]]:
    """Records of completions with their scores."""
    texts = [RIGHT if is_correct else WRONG for is_correct in correct]
    examples = [Example(f"Question {i}: what is 1 + 2?", "3") for i in range(len(correct))]
    scores = Scorer(RewardConfig())(examples, texts)
    return [
        {
            **place,
            "index": i,
            "question": example.question,
            "answer": example.answer,
            "completion": text,
            "tokens": 20,
            "truncated": False,
            **{name: float(column[i]) for name, column in scores.items()},
        }
        for i, (example, text) in enumerate(zip(examples, texts, strict=True))
    ]


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
