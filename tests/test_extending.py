"""Each diff of docs/extending.md is one file's, applies, and does what the page says."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gemma2_grpo.commands.notebook import changed
from gemma2_grpo.presets import load_config, to_toml
from gemma2_grpo.task.procedural import generate, split_by_hash

from .test_docs import ROOT

DIFFS = re.findall(
    r"^```diff\n(.*?)^```$", (ROOT / "docs/extending.md").read_text(), re.MULTILINE | re.DOTALL
)
FILES = ["training/loss.py", "task/rewards.py", "task/sources.py", "training/loss.py"]

# Loss and gradient of one token whose ratio of 2 is clipped to 1.2, by objective; a run with all
# that is new; and the score of a completion.
SCRIPT = """
import json, math, sys
import jax, jax.numpy as jnp
from gemma2_grpo.cli import main
from gemma2_grpo.config import GrpoConfig
from gemma2_grpo.model.logprobs import TokenLogps
from gemma2_grpo.training.loss import policy_loss

one = jnp.ones((1, 1))

def loss(logp, loss_type):
    policy = TokenLogps(logp * one, one)
    old, ids = policy.logps * 0 + math.log(0.25), jnp.zeros((1, 1), int)
    config = GrpoConfig(loss_type=loss_type, epsilon=0.2, beta=0.0)
    return policy_loss(policy, old, None, 3 * one, 0.5 * one, ids, old, config).loss

losses = {
    name: [float(each) for each in jax.value_and_grad(loss)(math.log(0.5), name)]
    for name in ("grpo", "cispo")
}
print(json.dumps(losses), flush=True)
assert main(["train", "my.toml", "--weights", "conclusion", "0.2", "--run", "run"]) == 0
assert main(["score", "completions.jsonl", "--json"]) == 0
"""
CONCLUSION = "<reasoning>\n1 + 2 = 3\nTherefore, 3.\n</reasoning>\n<answer>\n3\n</answer>"


@dataclass(frozen=True)
class Extended:
    """What the package does with all four changes."""

    folder: Path
    shown: str
    losses: dict[str, list[float]]
    score: dict[str, Any]

    def records(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "run" / name).read_text().splitlines()
        return [json.loads(line) for line in lines]

    def sampled(self, step: int) -> list[dict[str, Any]]:
        log = self.records("completions.jsonl")
        return [each for each in log if each["kind"] == "train" and each["step"] == step]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Extended:
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for diff in DIFFS:
        command = ["git", "apply", "--verbose", "-"]
        env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        done = subprocess.run(
            command, cwd=folder, env=env, input=diff, text=True, capture_output=True
        )
        assert done.returncode == 0, f"docs/extending.md is out of date:\n{done.stderr}"
    with (folder / "problems.csv").open("w", newline="") as file:
        rows = [(each.question, each.answer) for each in generate("train", 60, 0)]
        csv.writer(file).writerows([("question", "answer"), *rows])
    small = changed(
        load_config("tiny"),
        dataset="problems.csv",
        loss_type="cispo",
        num_train_samples=8,
        num_test_samples=2,
        num_generations=4,
        prompts_per_step=2,
        max_steps=2,
        eval_every_steps=0,
        eval_samples=0,
        eval_batch_prompts=8,
        beta=0.0,  # Needs no program for the reference.
        sample_every_steps=1,
        tensorboard=False,
        compilation_cache=False,
    )
    (folder / "my.toml").write_text(to_toml(small))
    line = {"completion": CONCLUSION, "answer": "3"}
    (folder / "completions.jsonl").write_text(json.dumps(line))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": str(folder / "src"),
            "XLA_FLAGS": "",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    return Extended(folder, done.stdout, json.loads(lines[0]), json.loads(lines[-1]))


def test_each_change_is_one_diff_of_one_file() -> None:
    headers = [re.findall(r"^\+\+\+ b/src/gemma2_grpo/(.*)$", diff, re.MULTILINE) for diff in DIFFS]
    assert headers == [[file] for file in FILES]


def test_an_objective_is_chosen_by_its_name(extended: Extended) -> None:
    # Advantage 3 and weight 0.5. The clipped objective gives a constant, without a gradient;
    # CISPO weighs the log-probability with the clipped ratio.
    assert extended.losses["grpo"] == pytest.approx([-0.5 * 1.2 * 3, 0.0], abs=1e-6)
    assert extended.losses["cispo"] == pytest.approx(
        [0.5 * 1.2 * 3 * 0.6931472, -0.5 * 1.2 * 3], abs=1e-6
    )
    assert all(record["num_updates"] == 1 for record in extended.records("metrics.jsonl"))


def test_a_component_is_scored_weighed_logged_and_charted(extended: Extended) -> None:
    assert extended.score["conclusion"] == 1.0
    assert extended.score["weights"]["conclusion"] == 0.1
    weights = {"format": 0.25, "logic": 0.3, "accuracy": 0.45, "self_correction": 0.05}
    weights |= {"length": 0.05, "conclusion": 0.2}
    for record in extended.records("metrics.jsonl"):
        sampled = extended.sampled(record["step"])
        by_hand = [
            float(
                each["correct"]
                and bool(re.search(r"\nTherefore,[^\n]*\n</reasoning>", each["completion"]))
            )
            for each in sampled
        ]
        assert [each["components"]["conclusion"] for each in sampled] == by_hand
        assert record["mean_components"]["conclusion"] == pytest.approx(sum(by_hand) / 8)
        assert 0 < sum(by_hand) < 8
        for each in sampled:
            total = sum(weights[name] * value for name, value in each["components"].items())
            assert each["reward"] == pytest.approx(total)
    report = (extended.folder / "run" / "report.html").read_text()
    assert "conclusion × 0.20" in report
    assert re.search(r"Reward by component.*conclusion from \d+", report, re.DOTALL)
    assert re.search(r"conclusion: 0\.\d\d to 0\.\d\d", extended.shown)


def test_a_source_is_read_where_it_takes_the_dataset(extended: Extended) -> None:
    with (extended.folder / "problems.csv").open(newline="") as file:
        answers = {row["question"]: row["answer"] for row in csv.DictReader(file)}
    asked = extended.records("completions.jsonl")
    assert len(asked) == 2 * 2 + 2 * 8
    for each in asked:
        assert answers[each["question"]] == each["answer"]
        assert (
            split_by_hash(each["question"]) == {"train": "train", "held_out": "test"}[each["kind"]]
        )


def test_a_metric_reaches_the_log_the_report_and_the_panel(extended: Extended) -> None:
    for record in extended.records("metrics.jsonl"):
        sampled = extended.sampled(record["step"])
        groups = [sampled[i : i + 4] for i in range(0, len(sampled), 4)]
        # Without a KL penalty, a group whose rewards are all equal is not in the update.
        groups = [group for group in groups if len({each["reward"] for each in group}) > 1]
        better = [
            each["completion_tokens"]
            for group in groups
            for each in group
            if each["reward"] - sum(other["reward"] for other in group) / 4 > 1e-6
        ]
        tokens = sum(each["completion_tokens"] for group in groups for each in group)
        expected = sum(better) / tokens
        assert 0 < expected < 1
        assert record["reinforced_fraction"] == pytest.approx(expected, abs=1e-6)
        assert f"reinforced_fraction {expected:.4g};" in extended.shown
    report = (extended.folder / "run" / "report.html").read_text()
    assert "<h3>Reinforced</h3>" in report
