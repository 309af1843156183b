"""What was trained comes back as it was, from an adapter or from a checkpoint."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from tests.fixtures.runs import Finished
from tunix.models.gemma import model as gemma

from gemma2_grpo.config import Config
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.mesh import mesh_shape_at_hand
from gemma2_grpo.presets import load_config
from gemma2_grpo.run.schema import RunFacts
from gemma2_grpo.run.session import Session
from gemma2_grpo.run.source import Opened, Source, find_source, open_source
from gemma2_grpo.task.prompts import render_prompt


@pytest.fixture(scope="module")
def finished(run_straight: Callable[[int], Finished]) -> Finished:
    return run_straight(1)


def open_path(path: Path) -> Opened:
    return open_source(find_source(str(path)))


def adapters(opened: Opened) -> list[np.ndarray]:
    assert opened.policy is not None
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(opened.policy, nnx.LoRAParam))]


def greedy(opened: Opened, questions: list[str], *, adapted: bool) -> list[str]:
    prompts = [render_prompt(question) for question in questions]
    sampler = opened.sampler(adapted=adapted)
    return sampler(prompts, 1, jax.random.key(0), greedy=True).texts


def measured(finished: Finished, step: int) -> tuple[list[str], list[str]]:
    rows = [
        row
        for row in finished.records("completions.jsonl")
        if row["kind"] == "held_out" and row["step"] == step
    ]
    return [row["question"] for row in rows], [row["completion"] for row in rows]


def test_a_finished_run_says_again_what_it_said(finished: Finished) -> None:
    opened = open_path(finished.path)
    assert opened.steps == 5
    questions, before = measured(finished, 0)
    _, after = measured(finished, 5)
    assert before != after
    assert greedy(opened, questions, adapted=True) == after
    assert greedy(opened, questions, adapted=False) == before


def test_adapters_are_merged_for_measuring_where_they_were_in_training(
    make_config: Callable[..., Config],
    open_small: Callable[[Config], Session],
    fill_adapters: Callable[..., None],
    tmp_path: Path,
) -> None:
    """In bfloat16 a merged weight is rounded, so that it is another policy."""
    config = make_config(
        model={"dtype": "bfloat16"},
        rollout={"merge_lora": "always", "max_completion_tokens": 64},
    )
    session = open_small(config)
    fill_adapters(session.learner.policy, 0, 0.1)
    session.save_adapter(tmp_path)
    prompts, key = [render_prompt("How many apples?")], jax.random.key(0)
    trained = session.learner.sample(prompts, 16, key).texts

    def sampled(merge_lora: Any) -> list[str]:
        model = dataclasses.replace(config.model, adapter=str(tmp_path))
        rollout = dataclasses.replace(config.rollout, merge_lora=merge_lora)
        asked = dataclasses.replace(config, model=model, rollout=rollout)
        opened = open_source(Source("it", asked, None, RunFacts()))
        return opened.sampler(adapted=True)(prompts, 16, key).texts

    assert sampled("always") == trained
    assert sampled("never") != trained


def test_an_unfinished_run_is_opened_where_its_last_checkpoint_is(
    finished: Finished, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    whole = adapters(open_path(path))
    shutil.rmtree(path / "adapter")
    (path / "result.json").unlink()
    opened = open_path(path)
    assert opened.steps == 5
    for a, b in zip(adapters(opened), whole, strict=True):
        np.testing.assert_array_equal(a, b)
    # A damaged checkpoint is passed over.
    (path / "checkpoints/step_000005/manifest.json").write_text("{")
    assert open_path(path).steps == 4
    # What an adapter says of another step than the last is not the last word.
    shutil.copytree(finished.path / "adapter", path / "adapter")
    result = json.loads((finished.path / "result.json").read_text())
    result["after"]["step"] = 3
    (path / "result.json").write_text(json.dumps(result))
    assert open_path(path).steps == 4


def test_a_model_has_no_adapters(tiny_model_dir: Path) -> None:
    source = find_source(str(tiny_model_dir))
    model = dataclasses.replace(source.config.model, dtype="float32")
    rollout = dataclasses.replace(source.config.rollout, max_completion_tokens=8)
    config = dataclasses.replace(source.config, model=model, rollout=rollout)
    opened = open_source(dataclasses.replace(source, config=config))
    assert opened.policy is None and opened.steps == 0
    assert source.run is None and source.title == str(tiny_model_dir)
    questions = ["How many?"]
    assert greedy(opened, questions, adapted=True) == greedy(opened, questions, adapted=False)


def test_the_embedded_model_is_asked_as_its_preset_says() -> None:
    source = find_source("embedded")
    assert source.config.rollout == load_config("tiny").rollout
    assert source.config.model.model == "embedded"


@pytest.mark.parametrize(
    ("wanted", "kv_heads", "expected"),
    [
        ((2, 4), 4, (2, 4)),
        ((2, 4), 1, (8, 1)),
        ((4, 4), 4, (2, 4)),
        ((4, 4), 2, (4, 2)),
        ((1, 1), 4, (1, 1)),
    ],
)
def test_a_mesh_for_the_devices_at_hand(
    wanted: tuple[int, int], kv_heads: int, expected: tuple[int, int]
) -> None:
    """There are eight."""
    sizes: Any = dataclasses.replace(
        gemma.ModelConfig.gemma2_2b(), num_kv_heads=kv_heads, num_heads=8
    )
    assert mesh_shape_at_hand(wanted, sizes) == expected


def test_what_cannot_be_opened_is_refused_before_anything_loads(
    finished: Finished, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"neither a run .* nor a model"):
        find_source(str(tmp_path))
    path = tmp_path / "run"
    path.mkdir()
    shutil.copy(finished.path / "config.toml", path)
    with pytest.raises(UserError, match=r"no checkpoint yet; one is written every .* = 2 steps"):
        find_source(str(path))


def test_damaged_files_of_a_run_are_passed_over_or_named(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    shutil.rmtree(path / "adapter")
    (path / "adapter").mkdir()  # Empty: the last checkpoint has the same.
    steps = sorted((path / "checkpoints").iterdir())
    assert open_source(find_source(str(path))).steps == int(steps[-1].name[-6:])
    for step in steps:
        (step / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"none of the checkpoints verifies; start a new run dir"):
        open_source(find_source(str(path)))
    assert f"checkpoint {steps[-1]} is damaged" in caplog.text


def test_an_adapter_for_another_base_is_refused(
    finished: Finished, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128}
    other = write_model(tmp_path / "other", **sizes)
    source = find_source(str(finished.path))
    model = dataclasses.replace(source.config.model, model=str(other))
    moved = dataclasses.replace(source, config=dataclasses.replace(source.config, model=model))
    with pytest.raises(UserError, match="made for another base"):
        open_source(moved)
    path = tmp_path / "run"
    shutil.copytree(finished.path, path, ignore=shutil.ignore_patterns("adapter", "result.json"))
    unfinished = dataclasses.replace(moved, run=path)
    with pytest.raises(UserError, match="was trained on other weights"):
        open_source(unfinished)
