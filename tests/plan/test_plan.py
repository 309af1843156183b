"""A plan says whether a run fits, and by how much, before anything is run."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma2_grpo import cli
from gemma2_grpo.plan.footprint import Compiler
from gemma2_grpo.plan.memory import compiled_memory
from gemma2_grpo.plan.plan import make_plan
from gemma2_grpo.presets import load_config
from gemma2_grpo.runtime.chips import find_target

# Compiles a cut of the flagship and says how its inputs and activations are laid out.
CUT = """
import dataclasses, json, math, os, re
from gemma2_grpo.runtime.chips import find_target
from gemma2_grpo.presets import load_config
from gemma2_grpo.plan.plan import _set_environment
config, target = load_config("gemma2-2b-v5e8"), find_target("v5e-8")
_set_environment(config, target)
import jax
from gemma2_grpo.plan.programs import Programs
from gemma2_grpo.plan.costs import known_architecture
from gemma2_grpo.plan.footprint import target_mesh
whole = known_architecture("google/gemma-2-2b-it")
cut = dataclasses.replace(whole, num_layers=2, attention_types=whole.attention_types[:2])
mesh = target_mesh(target, (2, 4))
programs = Programs(cut, config, mesh)
replicated = [
    str(leaf.shape)
    for leaf in jax.tree.leaves(programs.weights)
    if math.prod(leaf.shape) * leaf.dtype.itemsize > 2**20
    and math.prod(leaf.sharding.shard_shape(leaf.shape)) == math.prod(leaf.shape)
]
lowered = programs.all()["update"]()
compiled = lowered.compile()
text = compiled.as_text()
print(json.dumps({
    "replicated": replicated,
    "constraints": lowered.as_text().count("sharding_constraint"),
    "wide": len(re.findall(r"= (?:bf16|f32)\\[8,1536,2304\\]", text)),
    "peak": compiled.memory_analysis().peak_memory_in_bytes,
}))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plan(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = cli.main(["plan", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_embedded_model_is_compiled_for_a_cpu(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = plan("tiny", "--target", "cpu", "--json", capsys=capsys)
    made = json.loads(out)
    assert status == 0 and made["fits"] and made["proof"] == "compiled"
    names = [program["name"] for program in made["programs"]]
    assert {"prefill", "decode", "reference", "update", "optimizer"} <= set(names)
    assert made["peak_bytes"] == max(program["run_peak"] for program in made["programs"])
    assert made["seconds_per_step"] is None and made["chips"] == 1
    assert sum(made["parts"].values()) >= made["peak_bytes"]
    # What was compiled once is not compiled again.
    assert len(list((own_cache / "gemma2-grpo" / "plans").iterdir())) == 1
    status, out, err = plan("tiny", "--target", "cpu", capsys=capsys)
    assert status == 0 and "It fits." in out and "compiling" not in err
    assert all(len(line) <= 80 for line in out.splitlines()[1:])
    assert "cannot be read" not in out
    # As it is with a TPU v6e or v5p.
    [kept] = (own_cache / "gemma2-grpo" / "plans").iterdir()
    memory = json.loads(kept.read_text())
    for program in memory["programs"]:
        program["collectives"] = None
    kept.write_text(json.dumps(memory))
    status, out, _ = plan("tiny", "--target", "cpu", capsys=capsys)
    assert status == 0 and "What moves between chips cannot be read" in out


@pytest.mark.slow
def test_a_change_compiles_again_what_it_changes() -> None:
    config, target, notes = load_config("tiny"), find_target("cpu"), []
    compiler = Compiler(notes.append)
    before = compiled_memory(config, target, compiler)
    first, changed = len(notes), dataclasses.replace(config.rollout, num_generations=2)
    after = compiled_memory(dataclasses.replace(config, rollout=changed), target, compiler)
    assert notes[first:] == ["compiling prefill", "compiling decode"]
    assert after.programs[2:] == before.programs[2:]
    assert all(after.programs[i]["peak"] < before.programs[i]["peak"] for i in (0, 1))


def test_a_gpu_is_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = plan("gemma2-2b-gpu", "--target", "h100", capsys=capsys)
    assert status == 0 and "Estimated by formulas, not compiled" in out
    status, out, _ = plan("gemma2-2b-gpu", "--target", "h100", "--json", capsys=capsys)
    made = json.loads(out)
    assert sum(made["parts"].values()) == pytest.approx(made["peak_bytes"], abs=10)
    status, out, _ = plan("gemma2-2b-gpu", "--target", "h100", "--budget", "0.1", capsys=capsys)
    assert status == 3 and "would not finish in time" in out and "--max-steps " in out
    status, out, _ = plan("gemma2-2b-gpu", "--target", "h100", "--budget", "0.0001", capsys=capsys)
    assert status == 3 and "--max-steps" not in out
    assert "Nothing was found that makes it fit and finish." in out
    # Fewer steps need no less memory.
    nine = ("--model", "google/gemma-2-9b-it", "--budget", "0.1")
    status, out, _ = plan("gemma2-2b-gpu", "--target", "t4", *nine, capsys=capsys)
    assert status == 3 and "It does not fit" in out and "smallest change" not in out


def test_the_smallest_change_is_found_by_trying() -> None:
    config = load_config("gemma2-2b-gpu")
    found = make_plan(
        config, "t4", budget_hours=1000, mean_completion_tokens=200, note=lambda _: None
    )
    assert not found.fits and found.changes
    sections = {"num_generations": "rollout", "prompts_per_step": "rollout"}
    for name, value in found.changes.items():
        section = sections.get(name, "grpo" if name == "micro_batch_tokens" else "model")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    again = make_plan(
        config, "t4", budget_hours=1000, mean_completion_tokens=200, note=lambda _: None
    )
    assert again.fits and not again.changes


def test_without_libtpu_it_is_an_estimate_that_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else real(name)
    )
    status, out, _ = plan(capsys=capsys)
    assert status == 0 and "Estimated by formulas" in out
    assert "For the proof by its compiler: pip install libtpu" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "v9"], "target = 'v9': not known; it is one of v5e-1"),
        (["--target", "v5e-4"], "mesh_shape = [2, 4] is not one of the 4 chips of v5e-4"),
        (["--budget", "0"], "budget = 0.0 must be a finite number greater than 0"),
        (["--budget", "nan"], "budget = nan must be a finite number greater than 0"),
        (["--mean-completion-tokens", "0"], "mean_completion_tokens = 0 must be a finite"),
        (
            ["--mesh-shape", "1", "8"],
            "mesh_shape[1] = 8 does not divide the model's 4 KV heads; meshes that fit: [2, 4], "
            "[4, 2], [8, 1]",
        ),
        (["gemma2-2b-gpu", "--target", "h100", "--mesh-shape", "1", "3"], "mesh_shape[1] = 3"),
        (["nowhere"], "no such file or preset"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = plan(*words, capsys=capsys)
    assert status == 2 and out == ""
    assert message in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="extra `tpu`")
def test_a_cut_of_the_flagship_for_a_tpu() -> None:
    """By the TPU's own compiler; two layers are enough to see how all are laid out."""
    shown = subprocess.run(
        [sys.executable, "-c", CUT],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert shown.returncode == 0, shown.stderr[-2000:]
    found: dict[str, Any] = json.loads(shown.stdout.splitlines()[-1])
    assert found["replicated"] == [], "a weight of more than 1 MB is whole on every chip"
    assert found["constraints"] > 20, "activations are not laid out"
    # Rows lie over fsdp: no chip has the activations of a whole micro-batch.
    assert found["wide"] == 0
    assert found["peak"] < 2 * 2**30 and math.isfinite(found["peak"])
