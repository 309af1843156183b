"""Runs are found from every folder, and after they were moved together with what they need."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors import safe_open
from tests.fixtures.runs import REWARD

from gemma2_grpo.commands.evaluate import Evaluate
from gemma2_grpo.commands.export import Export
from gemma2_grpo.config import Config, EvaluateConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.hub.find import check_model
from gemma2_grpo.presets import read_toml
from gemma2_grpo.run.directory import RunDirectory, read_config
from gemma2_grpo.run.recorded_paths import with_absolute_paths
from gemma2_grpo.run.schema import RunFacts
from gemma2_grpo.run.source import as_asked, find_source

ROW = {"question": "Tom has {} pens and buys {} more. How many pens does he have?", "answer": ""}


@dataclass(frozen=True)
class Project:
    """A folder with a model, data, a reward and a run, each named by its relative path."""

    path: Path
    config: Config


@pytest.fixture(scope="module")
def trained(
    make_config: Callable[..., Config],
    quiet_train: Callable[..., str],
    tiny_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Project:
    path = tmp_path_factory.mktemp("projects") / "mine"
    shutil.copytree(tiny_model_dir, path / "models" / "tiny")
    rows = [
        ROW | {"question": ROW["question"].format(i, i + 1), "answer": str(2 * i + 1)}
        for i in range(60)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "rewards").mkdir()
    (path / "rewards" / "varied.py").write_text(REWARD)
    config = make_config(
        model={"model": "models/tiny"},
        data={"dataset": "rows.jsonl"},
        rewards={"reward": "rewards/varied.py:reward"},
        run={"max_steps": 1, "checkpoint_every_steps": 1},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        quiet_train(config, Path("runs") / "one")
    return Project(path, config)


@pytest.fixture
def moved(trained: Project, tmp_path: Path) -> Path:
    """The project at another place; the one where it was recorded is out of reach."""
    path = tmp_path / "elsewhere" / "yours"
    shutil.copytree(trained.path, path)
    run = path / "runs" / "one"
    for name in ("config.toml", "run.json"):
        text = (run / name).read_text().replace(str(trained.path), "/gone/mine")
        (run / name).write_text(text)
    return path


def quiet_evaluate(source: str, **asked: Any) -> dict[str, Any]:
    console = Console(file=io.StringIO(), width=100)
    config = EvaluateConfig(num_test_samples=2, **asked)
    return Evaluate(source, config=config)(console)


def test_paths_are_recorded_whole(trained: Project) -> None:
    path, run = trained.path, trained.path / "runs" / "one"
    values = read_toml(str(run / "config.toml"))
    assert values["model"]["model"] == str(path / "models" / "tiny")
    assert values["data"]["dataset"] == str(path / "rows.jsonl")
    assert values["rewards"]["reward"] == f"{path}/rewards/varied.py:reward"
    assert json.loads((run / "run.json").read_text())["directory"] == str(run)
    with safe_open(run / "adapter" / "adapter.safetensors", framework="numpy") as file:
        described = json.loads(file.metadata()["gemma2_grpo"])
    assert described["base"] == str(path / "models" / "tiny")


def test_names_that_are_no_paths_and_paths_that_are_not_here_stay(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()
    for model in ("embedded", "google/gemma-2-2b-it", "kaggle:a/b/c/d", "./gone", "~nobody-here/x"):
        for dataset in ("procedural", "openai/gsm8k", "kaggle:a/b", "gone.jsonl", "x" * 300):
            config = make_config(
                model={"model": model, "adapter": "gone/adapter"},
                data={"dataset": dataset},
                rewards={"reward": "gone.py:reward"},
            )
            assert with_absolute_paths(config) == config


def test_homes_and_folders_above(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("models/m", "runs/a/adapter", "here"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "here")
    config = make_config(model={"model": "~/models/m", "adapter": "../runs/a/adapter"})
    model = with_absolute_paths(config).model
    assert model.model == str(tmp_path / "models" / "m")
    assert model.adapter == str(tmp_path / "runs" / "a" / "adapter")


def test_a_run_is_found_from_another_folder(
    trained: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = trained.path / "runs" / "one"
    config = find_source(str(run)).config
    assert config.model.model == str(trained.path / "models" / "tiny")
    result = quiet_evaluate(str(run))
    assert result["model"] == str(trained.path / "models" / "tiny")
    assert result["settings"]["dataset"] == str(trained.path / "rows.jsonl")
    monkeypatch.chdir(trained.path)
    assert quiet_evaluate("runs/one") == result
    Export("runs/one", tmp_path / "peft", format="peft", verify="never")()
    described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(trained.path / "models" / "tiny")


def test_what_was_moved_together_is_found(
    trained: Project, moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = find_source(str(moved / "runs" / "one")).config
    assert config.model.model == str(moved / "models" / "tiny")
    assert config.data.dataset == str(moved / "rows.jsonl")
    assert config.rewards.reward == f"{moved}/rewards/varied.py:reward"
    # It may be gone on with there, by the same relative paths, and is recorded anew.
    monkeypatch.chdir(moved)
    directory = RunDirectory(Path("runs/one"), with_absolute_paths(trained.config))
    directory.describe(RunFacts())
    directory.close()
    assert not (moved / "runs" / "one" / "changes.jsonl").exists()
    recorded = read_toml(str(moved / "runs" / "one" / "config.toml"))
    assert recorded["model"]["model"] == str(moved / "models" / "tiny")


def test_a_finished_evaluation_is_shown_after_a_move(
    moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("evaluation.json", "evaluation_completions.jsonl"):
        (moved / "runs" / "one" / name).unlink(missing_ok=True)
    monkeypatch.chdir(moved)
    result = quiet_evaluate("runs/one")
    again = moved.rename(moved.parent / "again")
    monkeypatch.chdir(again)
    assert quiet_evaluate("runs/one") == result
    with pytest.raises(UserError, match=r"was made with dataset = '.*/rows.jsonl', not 'proced"):
        quiet_evaluate("runs/one", dataset="procedural")


def test_a_copy_has_its_own(
    trained: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although what it was copied from is still there."""
    copy = tmp_path / "copy"
    shutil.copytree(trained.path, copy)
    monkeypatch.chdir(tmp_path)
    assert find_source("copy/runs/one").config.model.model == str(copy / "models" / "tiny")
    (copy / "models").rename(copy / "others")
    expected = str(trained.path / "models" / "tiny")
    assert find_source("copy/runs/one").config.model.model == expected


def test_a_run_that_was_moved_alone_says_which_path_is_missing(moved: Path) -> None:
    alone = moved.parent / "alone"
    (moved / "runs" / "one").rename(alone)
    with pytest.raises(UserError, match=r"^model '/gone/mine/models/tiny': no such directory; use"):
        find_source(str(alone))
    assert read_config(alone).data.dataset == "/gone/mine/rows.jsonl"


def test_runs_that_recorded_relative_paths_go_on(
    trained: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of before this was recorded."""
    run = tmp_path / "runs" / "one"
    shutil.copytree(trained.path, tmp_path, dirs_exist_ok=True)
    text = (run / "config.toml").read_text().replace(f"{trained.path}/", "")
    (run / "config.toml").write_text(text)
    facts = json.loads((run / "run.json").read_text())
    del facts["directory"]
    (run / "run.json").write_text(json.dumps(facts))
    monkeypatch.chdir(tmp_path)
    assert find_source("runs/one").config == trained.config
    RunDirectory(run, with_absolute_paths(trained.config)).close()


def test_an_adapter_says_where_its_model_is(
    trained: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a relative path that was right in another folder, and looks like a repository here."""
    asked = EvaluateConfig(adapter=str(trained.path / "runs" / "one" / "adapter"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal:
        find_source("models/tiny", asked.adapter)
    base = trained.path / "models" / "tiny"
    assert str(refusal.value) == (
        f"model 'models/tiny': no such directory here; the adapter was made on {base}: pass that"
    )
    monkeypatch.chdir(trained.path)
    asked_here = replace(asked, adapter="runs/one/adapter")
    model = as_asked(find_source("models/tiny", asked_here.adapter), asked_here)
    assert model.config.model.model == str(base)
    assert model.config.model.adapter == asked.adapter


def test_a_missing_path_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs", "google"):
        (tmp_path / folder).mkdir()
    for name in ("./x", "../x", "a/b/c", "runs/x/", "/a/b", "~/x/y"):
        with pytest.raises(UserError, match=r": no such directory; use embedded"):
            check_model(name)
    with pytest.raises(UserError) as refusal:
        check_model("runs/x")
    assert str(refusal.value) == (
        "model 'runs/x': no such directory, although runs is one; check the path, or go to another "
        "folder for what has that name on Hugging Face"
    )
    for name in ("google/gemma-2-2b-it", "someone/tiny"):  # These are asked for, in vain.
        with pytest.raises(UserError) as refusal:
            check_model(name)
        assert "no such directory" not in str(refusal.value)
