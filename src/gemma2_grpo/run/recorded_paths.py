"""Paths that a run records: whole, so that they are found from every folder, and after a move."""

import os
from collections.abc import Callable
from pathlib import Path

from gemma2_grpo.config import Config, replaced
from gemma2_grpo.model.hub.find import EMBEDDED
from gemma2_grpo.task.sources import GSM8K, KAGGLE_PREFIX, PROCEDURAL

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
    if before is None:
        return config
    return _map_paths(config, lambda name: _find_moved(name, before, now))


def is_moved(earlier: object, value: object, folder: Path) -> bool:
    """Whether a recorded path has gone, and another is what it is after a move.

    Args:
        earlier: The recorded path.
        value: The other.
        folder: Where `earlier` is recorded. It was moved together with the path if `value` leads
            on from a folder above it as `earlier` did.
    """
    if not (isinstance(earlier, str) and isinstance(value, str)):
        return False
    old, new = Path(earlier), Path(value)
    if not (old.is_absolute() and new.is_absolute()) or _exists(old):
        return False
    place = folder.resolve()
    above = next((each for each in (place, *place.parents) if new.is_relative_to(each)), None)
    tail = new.relative_to(above).parts if above else ()
    return bool(tail) and old.parts[-len(tail) :] == tail


def _find_moved(name: str, before: str, now: Path) -> str:
    """New location of a recorded path, if it was moved or copied together with the run."""
    if not Path(name).is_absolute():
        return name
    try:
        moved = os.path.normpath(now.resolve() / os.path.relpath(name, before))
    except ValueError:  # On another drive.
        return name
    return moved if _exists(Path(moved)) else name


def _map_paths(config: Config, change: Callable[[str], str]) -> Config:
    adapter, reward = config.model.adapter, config.rewards.reward
    file, colon, function = (reward or "").rpartition(":")
    return replaced(
        config,
        model=change(config.model.model),
        adapter=adapter and change(adapter),
        dataset=change(config.data.dataset),
        reward=f"{change(file)}:{function}" if colon else reward,
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
