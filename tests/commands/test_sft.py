"""`sft` and `train --init-from`: a warm start, from its run, its adapter or the model it wrote."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from gemma2_grpo.commands.sft import Sft
from gemma2_grpo.commands.train import Train
from gemma2_grpo.config import Config
from gemma2_grpo.errors import UserError
from gemma2_grpo.model import open as opening
from gemma2_grpo.run.console import Display
from gemma2_grpo.run.results import Measurement, RunResult
from gemma2_grpo.run.schema import StepRecord

ADAPTER = "adapter/adapter.safetensors"


def lines(path: Path, kind: Any) -> list[Any]:
    return [kind(**json.loads(line)) for line in (path / kind.FILE).read_text().splitlines()]


def shown() -> tuple[Display, io.StringIO]:
    text = io.StringIO()
    return Display(Console(file=text, width=100, highlight=False)), text


@pytest.fixture(scope="module")
def sft_config(make_config: Callable[..., Config]) -> Config:
    return make_config(
        data={"num_train_samples": 40, "num_test_samples": 3},
        rollout={"prompts_per_step": 4, "max_completion_tokens": 64},
        optimizer={"learning_rate": 5e-2},
        run={"max_steps": 12, "eval_samples": 0, "eval_every_steps": 6},
        rewards={"reward": None},
    )


@pytest.fixture(scope="module")
def trained(sft_config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The run, the model that it wrote, and what it showed."""
    folder = tmp_path_factory.mktemp("sft")
    display, text = shown()
    run = Sft("test", folder / "run", config=sft_config, to=folder / "model")(display)
    assert run == folder / "run"
    return run, folder / "model", text.getvalue()


def test_it_is_a_run_whose_loss_falls(trained: tuple[Path, Path, str]) -> None:
    run, _, text = trained
    losses = [record.loss for record in lines(run, StepRecord)]
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    held_out = [(each.step, each.solution_nll) for each in lines(run, Measurement)]
    assert [step for step, _ in held_out] == [0, 6, 12]
    assert held_out[2][1] < 0.9 * held_out[0][1]
    assert f"loss {held_out[2][1]:.4f}" in text
    assert "12 updates on 4 worked solutions each" in text
    result = RunResult.read(run)
    assert result is not None and result.rises == ()
    for name in (ADAPTER, "report.html", "checkpoints/step_000012", "config.toml"):
        assert (run / name).exists()
    # The data's own solutions are what was trained on, and they earn the reward in full.
    assert {record.correct_fraction for record in lines(run, StepRecord)} == {1.0}


def test_resuming_gives_the_same_run(
    trained: tuple[Path, Path, str], sft_config: Config, tmp_path: Path
) -> None:
    """From the checkpoint before the last one."""
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    shutil.rmtree(run / "checkpoints" / "step_000012")
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()
    Sft("test", run, config=sft_config)(shown()[0])
    for a, b in zip(lines(run, StepRecord), lines(trained[0], StepRecord), strict=True):
        assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)
    assert (run / ADAPTER).read_bytes() == (trained[0] / ADAPTER).read_bytes()


def test_run_adapter_and_model_are_the_same_start(
    trained: tuple[Path, Path, str], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    run, model, _ = trained
    config = make_config(run={"max_steps": 1, "eval_every_steps": 0})
    accuracies = []
    for name, place in (("run", run), ("adapter", run / "adapter"), ("model", model)):
        display, text = shown()
        made = Train("test", tmp_path / name, init_from=str(place), config=config)(display)
        merged = model if name == "model" else made / "warm_start"
        assert f'model = "{merged}"' in (made / "config.toml").read_text()
        weights = load_file(merged / "model.safetensors")
        assert len(weights) == 13
        accuracies.append(lines(made, Measurement)[0].greedy)
        if name != "model":
            assert f"into {merged}" in text.getvalue()
            assert str(weights["model.norm.weight"].dtype) == "float32"
    assert accuracies[0] == accuracies[1]
    once, twice = (
        load_file(tmp_path / name / "warm_start" / "model.safetensors")
        for name in ("run", "adapter")
    )
    written = load_file(model / "model.safetensors")
    for name, value in once.items():
        # The adapter's own mesh takes all devices, which changes the order of sums.
        np.testing.assert_allclose(value, twice[name], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            value, written[name].astype(np.float32), rtol=2**-8, atol=1e-6, err_msg=name
        )


def test_a_second_start_of_a_run_merges_nothing(
    trained: tuple[Path, Path, str], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config(run={"max_steps": 1, "eval_every_steps": 0})
    for max_steps in (1, 2):
        more = dataclasses.replace(config.run, max_steps=max_steps)
        display, text = shown()
        Train(
            "test",
            tmp_path / "run",
            init_from=str(trained[0]),
            allow_config_change=True,
            config=dataclasses.replace(config, run=more),
        )(display)
        assert ("merging" in text.getvalue()) == (max_steps == 1)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "nowhere",
            "--init-from {0}: neither a run (no config.toml in it), nor an adapter (no "
            "adapter.safetensors), nor a model (no config.json); name the run directory of `sft`",
        ),
        ("empty", "run {0}: has no checkpoint yet"),
    ],
)
def test_what_cannot_be_started_from_is_one_line(
    place: str,
    message: str,
    trained: tuple[Path, Path, str],
    make_config: Callable[..., Config],
    tmp_path: Path,
) -> None:
    folder = tmp_path / place
    if place == "empty":
        folder.mkdir()
        shutil.copy(trained[0] / "config.toml", folder)
    with pytest.raises(UserError) as refusal:
        Train("test", tmp_path / "run", init_from=str(folder), config=make_config())(shown()[0])
    assert str(refusal.value).startswith(message.format(folder))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


# --- Mistakes ---


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Gives a configuration that must fail before weights load; returns what it says."""

    def run(config: Config, to: Path | None = None) -> str:
        def fail(*_: Any) -> None:
            raise AssertionError("weights are made")

        monkeypatch.setattr(opening, "load_weights", fail)
        with pytest.raises(UserError) as refusal:
            Sft("test", tmp_path / "run", config=config, to=to)(shown()[0])
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    return run


def test_a_target_with_something_in_it_is_refused_before_training(
    refused: Callable[..., str], sft_config: Config, tmp_path: Path
) -> None:
    to = tmp_path / "model"
    to.mkdir()
    (to / "model.safetensors").write_bytes(b"weights")
    assert refused(sft_config, to) == f"{to}: is not empty; choose another --to"
    (tmp_path / "file").write_text("")
    to = tmp_path / "file" / "model"
    assert refused(sft_config, to) == (
        f"{to}: cannot be written (Not a directory); choose another --to"
    )
    assert not (tmp_path / "run").exists()


def test_data_without_usable_solutions_are_refused(
    refused: Callable[..., str],
    sft_config: Config,
    changed: Callable[..., Config],
    tmp_path: Path,
) -> None:
    file = tmp_path / "train_rows.jsonl"
    rows = [
        {"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(50)
    ]
    bare = [{**row, "answer": row["answer"].split("#### ")[1]} for row in rows]

    def config(content: list[dict[str, str]], **fields: Any) -> Config:
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
        return changed(sft_config, dataset=str(file), **fields)

    assert refused(config(bare)) == f"dataset = {file}: has no worked solutions to train on"
    assert refused(config(rows, max_completion_tokens=8)) == (
        "max_completion_tokens = 8 leaves 0 of 40 worked solutions where 4 are needed; raise it"
    )
