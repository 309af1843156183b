"""Paths that a run records: whole, so that they are found from every folder, and after a move."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gemma2_grpo.config import Config
from gemma2_grpo.engine.fetch import EMBEDDED
from gemma2_grpo.task.data import PROCEDURAL
from gemma2_grpo.task.sources import GSM8K, KAGGLE_PREFIX

_NAMES = (EMBEDDED, PROCEDURAL, GSM8K)


def with_absolute_paths(config: Config) -> Config:
    """The configuration with model, adapter, data and reward by their whole paths.

    What is not here stays as it is: an id on Hugging Face, or a mistake that is reported as typed.
    """
    return _map_paths(config, _absolute)


def moved_along(config: Config, before: str | None, now: Path) -> Config:
    """A recorded configuration, of which what was moved together with the run is found.

    Args:
        config: As recorded.
        before: Directory of the run at that time; None where it was not recorded.
        now: Its directory now.
    """
    return _map_paths(config, lambda name: find_moved(name, before, now))


def find_moved(name: str, before: str | None, now: Path) -> str:
    """Where a recorded path is, if it was moved or copied together with what recorded it.

    Args:
        name: A recorded path, or any other text, which stays as it is.
        before: Directory that it was recorded in; None where that is not known.
        now: That directory now.
    """
    if before is None or not Path(name).is_absolute():
        return name
    try:
        moved = os.path.normpath(now.resolve() / os.path.relpath(name, before))
    except ValueError:  # On another drive.
        return name
    return moved if _exists(Path(moved)) else name


def _map_paths(config: Config, change: Callable[[str], str]) -> Config:
    model, data, rewards = config.model, config.data, config.rewards
    file, colon, function = (rewards.reward or "").rpartition(":")
    return replace(
        config,
        model=replace(
            model, model=change(model.model), adapter=model.adapter and change(model.adapter)
        ),
        data=replace(data, dataset=change(data.dataset)),
        rewards=replace(rewards, reward=f"{change(file)}:{function}" if colon else rewards.reward),
    )


def _absolute(name: str) -> str:
    if not name or name in _NAMES or name.startswith(KAGGLE_PREFIX):
        return name
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # The `~` of nobody.
        return name
    return str(path.resolve()) if _exists(path) else name


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # No permission, or no path at all.
        return False
