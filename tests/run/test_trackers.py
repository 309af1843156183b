"""Metrics reach every tracker, without a network."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from gemma2_grpo.config import Config, RunConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.run.trackers import _identity, check_trackers, tracking

STEPS = [
    ("held_out", {"step": 0, "accuracy": 0.25, "interval": [0.1, 0.4], "sampled": None}),
    ("train", {"step": 1, "reward": 0.5, "kl": 0.0}),
    ("train", {"step": 2, "reward": 0.75, "kl": 0.125}),
]


def track_all(path: Path, **fields: object) -> None:
    config = Config(run=RunConfig(**{"tensorboard": False, **fields}))  # type: ignore[arg-type]
    with tracking(config, path) as track:
        for kind, record in STEPS:
            track(kind, record)


def test_tensorboard(tmp_path: Path) -> None:
    track_all(tmp_path, tensorboard=True)
    [events] = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    for name in (b"train/reward", b"train/kl", b"held_out/accuracy"):
        assert name in written
    assert b"interval" not in written


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    track_all(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="extra `trackers`")
@pytest.mark.filterwarnings("ignore")  # It leaves files of its own open.
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track_all(tmp_path, wandb="words")
    wandb.teardown()  # Its service writes the file in its own time; this waits for its end.
    [file] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    written = file.read_bytes()
    for piece in (b"train/reward", b"held_out/accuracy", b"0.125", b"learning_rate", b"words"):
        assert piece in written


@pytest.fixture
def trackio_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "trackio"


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="extra `trackers`")
@pytest.mark.filterwarnings("ignore")
def test_trackio_offline(trackio_folder: Path, tmp_path: Path) -> None:
    track_all(tmp_path / "words", trackio="project")
    written = b"".join(f.read_bytes() for f in trackio_folder.rglob("*") if f.is_file())
    for name in (b"train/reward", b"held_out/accuracy", b"0.125"):
        assert name in written


def trackio_runs(project: str) -> dict[str, list[float]]:
    """Rewards of each run of the project, as trackio itself reads them."""
    from trackio.sqlite_storage import SQLiteStorage

    runs = [record["name"] for record in SQLiteStorage.get_run_records(project)]
    logs = {name: SQLiteStorage.get_logs(project, name) for name in runs}
    key = "train/reward"
    return {name: [row[key] for row in rows if key in row] for name, rows in logs.items()}


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="extra `trackers`")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("trackio_folder")
def test_runs_of_one_name_are_kept_apart_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    for parent in ("one", "two", "one"):
        track_all(tmp_path / parent / "words", trackio="apart")
    shown = trackio_runs("apart")
    assert sorted(shown.values()) == [[0.5, 0.75], [0.5, 0.75, 0.5, 0.75]]
    assert all(name.startswith("words-") for name in shown)


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="extra `trackers`")
@pytest.mark.filterwarnings("ignore")  # It leaves files of its own open.
def test_wandb_gets_the_id_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for parent in ("one", "two", "one"):
        track_all(tmp_path / parent / "words", wandb="project")
    ids = {
        parent: {
            path.name.split("-")[3]  # offline-run-TIME-ID; a second one in that second gets "-1".
            for path in (tmp_path / parent / "words/wandb").glob("offline-run-*")
        }
        for parent in ("one", "two")
    }
    assert len(ids["one"]) == 1 and len(ids["two"]) == 1 and ids["one"] != ids["two"]


def test_the_id_of_a_run_that_is_moved_copied_or_made_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = _identity(run)
    assert _identity(run) == first
    moved = run.rename(tmp_path / "moved")
    assert _identity(moved) == first
    copy = Path(shutil.copytree(moved, tmp_path / "copy"))
    assert _identity(copy) not in (first, "") and _identity(copy) == _identity(copy)
    assert _identity(moved) == first
    shutil.rmtree(moved)
    assert _identity(moved) != first


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_id_is_drawn_again(text: str, tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text(text)
    assert _identity(tmp_path) == _identity(tmp_path) != ""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"{name} = 'mine' needs the package {name}; pip install"):
        check_trackers(RunConfig(**{name: "mine"}))
    check_trackers(RunConfig())
