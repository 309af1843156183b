"""What the README tells a newcomer with a laptop to type, typed."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gemma2_grpo.commands.notebook import changed
from gemma2_grpo.presets import load_config, to_toml

from .test_docs import ROOT, commands

OWN_COMPLETIONS = [
    {"completion": "<reasoning>\n2 + 3 = 5\n</reasoning>\n<answer>\n5\n</answer>", "answer": "5"},
    {"completion": "5", "answer": "6"},
]
ELSEWHERE = {
    "gemma3-1b": "needs the weights and a TPU or GPU",
    "--init-from": "tests/commands/test_sft.py runs it",
    "gemma2-2b": "needs the weights and a TPU or GPU",
    "--wandb": "needs an account; tests/run/test_trackers.py runs it offline",
    "launch": "has no cluster; tests/launch/test_launch.py reads what it prints",
    "plan": "tests/plan/test_plan.py runs it, and takes minutes of libtpu's compiler",
    "sft": "tests/commands/test_sft.py runs it",
    "--help": "tests/test_cli.py reads it",
}


def runnable() -> list[str]:
    """Commands of the README, training first: a later one may use any run."""
    found = [
        command
        for command in dict.fromkeys(commands(ROOT / "README.md"))
        if not any(word in command.split() or word in command for word in ELSEWHERE)
    ]
    return sorted(found, key=lambda command: command.split()[1] != "train")


def test_the_commands_are_those_of_the_package() -> None:
    verbs = [command.split()[1] for command in runnable()]
    assert verbs[:3] == ["train"] * 3
    assert set(verbs) == {"train", "ask", "evaluate", "report", "export", "score"}


@pytest.mark.slow
def test_a_newcomer_types_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(to_toml(changed(load_config("tiny"), max_steps=2)))
    (tmp_path / "completions.jsonl").write_text("\n".join(map(json.dumps, OWN_COMPLETIONS)))
    shown = {}
    for command in runnable():
        done = subprocess.run(
            [sys.executable, "-m", "gemma2_grpo.cli", *shlex.split(command)[1:]],
            cwd=tmp_path,
            env={**os.environ, "XLA_FLAGS": ""},
            input="",
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        shown[" ".join(command.split()[1:4])] = done.stdout
    assert "held-out accuracy 98" in shown["train"]
    base, _, trained = shown["ask runs/tiny --compare"].partition("after 40 steps")
    assert "✗" in base and "15 + 11 = 26 ✓" in trained
    assert "pass@8" in shown["evaluate runs/tiny --eval-samples"]
    assert "McNemar's exact test: p = " in shown["evaluate runs/tiny --eval-samples"]
    for name in ("runs/tiny/report.html", "runs/tiny/compare.html", "model/model.safetensors"):
        assert (tmp_path / name).stat().st_size > 10_000, name
