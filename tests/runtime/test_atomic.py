"""Tests of files and directories that are written whole or not at all."""

import threading
import time
from pathlib import Path

import pytest

from gemma2_grpo.runtime.atomic import whole_directory, whole_file


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old", encoding="utf-8")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("ne", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_fails_leaves_nothing_even_of_a_thread_that_still_writes(
    tmp_path: Path,
) -> None:
    """As Orbax's threads do after one of them has failed on a full disk."""

    def write_on(folder: Path) -> None:
        for i in range(30):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / str(i)).write_text("late", encoding="utf-8")
            time.sleep(0.01)

    def fail() -> None:
        with whole_directory(tmp_path / "runs" / "step") as folder:
            threading.Thread(target=write_on, args=(folder / "state",)).start()
            raise OSError("disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    time.sleep(0.5)  # Longer than the thread writes.
    assert list(tmp_path.iterdir()) == []
