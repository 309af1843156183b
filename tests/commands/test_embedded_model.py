"""The embedded model is the unfinished student its card describes, and the default run lifts it."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from gemma2_grpo.config import Config
from gemma2_grpo.presets import load_config
from gemma2_grpo.run.measure import measure
from gemma2_grpo.run.session import Session
from gemma2_grpo.task.examples import load_splits
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.task.scoring import Scorer
from gemma2_grpo.training.learner import Stream, fold_key

EMBEDDED = Path(str(resources.files("gemma2_grpo") / "assets" / "tiny-gemma2"))


@pytest.fixture(scope="module")
def config() -> Config:
    """The default, with the problems on which settings are chosen."""
    tiny = load_config("tiny")
    data = dataclasses.replace(tiny.data, eval_split="validation", num_test_samples=256)
    run = dataclasses.replace(tiny.run, eval_batch_prompts=128)
    return dataclasses.replace(tiny, data=data, run=run)


@pytest.fixture(scope="module")
def student(open_small: Callable[[Config], Session], config: Config) -> Session:
    return open_small(config)


def test_the_embedded_model_is_small_and_described() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= 5_000_000
    card = (EMBEDDED / "README.md").read_text()
    sha256 = hashlib.sha256((EMBEDDED / "model.safetensors").read_bytes()).hexdigest()
    assert sha256 in card
    assert "python -m tools.tiny_gemma2 --to" in card
    assert "sloppy teacher" in card
    architecture = json.loads((EMBEDDED / "config.json").read_text())
    heads = architecture["num_attention_heads"], architecture["num_key_value_heads"]
    assert heads == (8, 4), "so that it shards over the flagship's mesh"


def test_it_is_an_unfinished_student(student: Session, config: Config) -> None:
    measured = measure(student.learner, student.held_out, Scorer(config.rewards))
    greedy = measured.greedy
    assert greedy.num_problems == 256
    assert 0.35 <= greedy.correct_fraction <= 0.60
    assert greedy.perfect_format_fraction >= 0.75
    assert greedy.truncated_fraction <= 0.05


def test_no_default_problem_is_dropped_or_in_two_splits(student: Session, config: Config) -> None:
    assert len(student.held_out) == 256
    assert len(student.train) == config.data.num_train_samples
    tiny = load_config("tiny").data
    splits = load_splits(tiny)
    assert len(splits.test) >= 256
    questions = [
        {e.question for e in part} for part in (splits.train, splits.test, splits.validation)
    ]
    assert not questions[0] & questions[1] and not questions[1] & questions[2]
    assert not questions[0] & questions[2]


@pytest.mark.oracle
def test_transformers_writes_the_same_answers(student: Session) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        EMBEDDED, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    prompts = [render_prompt(example.question) for example in student.held_out[:128]]
    ours = student.learner.sample(prompts, 1, fold_key(0, Stream.EVAL), greedy=True)
    for prompt, tokens in list(zip(prompts, ours.tokens, strict=True))[:4]:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        limit = student.config.rollout.max_completion_tokens
        with torch.no_grad():
            theirs = model.generate(ids, max_new_tokens=limit, do_sample=False)
        assert theirs[0, ids.shape[1] :].tolist() == tokens.tolist()


@pytest.mark.slow
def test_the_default_command_lifts_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gemma2_grpo.cli", "train", "--run", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert before["greedy"]["num_problems"] == after["greedy"]["num_problems"] >= 256
    assert before["greedy"]["correct_fraction"] <= 0.55
    assert after["greedy"]["correct_fraction"] >= 0.85
    assert max(before["sampled"]["pass_at_k"].values()) >= 0.75
    for name in ("correct_fraction", "perfect_format_fraction", "mean_reward"):
        assert after["sampled"][name] > before["sampled"][name]
    name = "correct_fraction_interval"
    assert before["greedy"][name][1] < after["greedy"][name][0], "intervals are apart"
    rises = {rise["name"]: rise["half_way_step"] for rise in result["rises"]}
    assert rises["accuracy"] is not None
    assert re.search(r"Right, greedy +│ +\d\d\.\d\s% │ +\d\d\.\d\s% │ +\+\d\d\.\d", done.stdout)
