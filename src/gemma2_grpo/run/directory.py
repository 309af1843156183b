"""The directory of a run: what it was made with, its logs, and who may write to it."""

import dataclasses
import errno
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gemma2_grpo.config import Config
from gemma2_grpo.errors import ConfigError, UserError
from gemma2_grpo.presets import from_mapping, read_toml, to_toml
from gemma2_grpo.run.recorded_paths import moved_along, with_absolute_paths
from gemma2_grpo.runtime.atomic import write_whole
from gemma2_grpo.task.jsonl import Line, json_object, read_jsonl, skip, whole_bytes

# Fields of [run] that change nothing that is computed.
_FREE_FIELDS = (
    "checkpoint_every_steps",
    "compilation_cache",
    "eval_every_steps",
    "keep_checkpoints",
    "sample_every_steps",
    "tensorboard",
    "trackio",
    "wandb",
)
_PACKAGES = ("gemma2-grpo-reasoning", "google-tunix", "qwix", "jax", "jaxlib", "flax", "optax")


class LockedFolder:
    """A folder that one process at a time writes to, whole files or whole lines."""

    def __init__(self, path: Path, *, kind: str, option: str, lock: str = ".lock") -> None:
        """Opens a folder, which is made if there is none.

        Args:
            path: The folder.
            kind: What it is, for messages.
            option: What names another one on the command line, for messages.
            lock: Name of the file that is locked.

        Raises:
            UserError: if it cannot be written, or is in use.
        """
        self.path = path
        self._kind = kind
        try:
            self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            # The system's own lock, which ends with the process, however that ends. A lock by the
            # mere presence of a file would outlive a process that was killed.
            # A folder that cannot be written is refused for that, not for its lock.
            (path / lock).open("a", encoding="utf-8").close()
            self._lock = FileLock(path / lock, thread_local=False)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"{kind} {path}: another process is writing to it; choose another {option}"
            ) from None
        except OSError as error:
            # A file in its place already exists, but that is not what is wrong with it.
            is_file = isinstance(error, FileExistsError)
            why = os.strerror(errno.ENOTDIR) if is_file else error.strerror
            raise UserError(
                f"{kind} {path}: cannot be written ({why}); choose another {option}"
            ) from None

    def append(self, name: str, *records: Mapping[str, Any]) -> None:
        """Appends JSON lines, all of them or none.

        JSON has no NaN, so a value that is no number becomes null.
        """
        path = self.path / name
        lines = [
            json.dumps({k: _finite(v) for k, v in record.items()}, ensure_ascii=False) + "\n"
            for record in records
        ]
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            with suppress(OSError):  # Half a line is what a full disk had room for.
                os.truncate(path, size)
            raise self._cannot_write(name, error) from None

    def records(self, name: str) -> Iterator[dict[str, Any]]:
        """JSON lines written so far, without damaged ones and a last one that was cut off."""
        return (line.content for line in read_log(self.path / name))

    def write(self, name: str, text: str) -> None:
        """Replaces a file as a whole, so that a killed process leaves the old or the new one."""
        try:
            write_whole(self.path / name, text)
        except OSError as error:
            raise self._cannot_write(name, error) from None

    def _cannot_write(self, name: str, error: OSError) -> UserError:
        return UserError(
            f"{self._kind} {self.path}: {name} cannot be written ({error.strerror}); mend that and "
            "run the same command again, which goes on"
        )

    def close(self) -> None:
        """Lets another process have the folder; removes a new one that nothing is in."""
        lock = Path(self._lock.lock_file)
        is_empty = bool(self._made) and list(self.path.iterdir()) == [lock]
        self._lock.release()  # First, since Windows removes no file that is open.
        if is_empty:
            with suppress(OSError):  # Another process may write there by now.
                lock.unlink(missing_ok=True)
                for folder in self._made:
                    folder.rmdir()
        self._made = []


class RunDirectory(LockedFolder):
    """A run on disk."""

    def __init__(self, path: Path, config: Config, *, allow_config_change: bool = False) -> None:
        """Opens a new or an existing run directory.

        Raises:
            UserError: if it cannot be written, is in use, or belongs to another configuration.
        """
        super().__init__(path, kind="run directory", option="--run")
        self._config = config
        self._allow_config_change = allow_config_change
        self._changed = self._changed_fields(config)
        self._refuse_changes()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def result(self) -> dict[str, Any] | None:
        """What a finished run measured; None while it is not finished."""
        return read_json(self.path / "result.json")

    def _changed_fields(self, config: Config) -> list[str]:
        """Fields whose value differs from the one the run was made with, as text."""
        if not (self.path / "config.toml").exists():
            return []
        before = dataclasses.asdict(with_absolute_paths(read_config(self.path)))
        return [
            f"{name} = {old!r}, not {dataclasses.asdict(config)[section][name]!r}"
            for section, fields in before.items()
            for name, old in fields.items()
            if name not in _FREE_FIELDS and old != dataclasses.asdict(config)[section][name]
        ]

    def check_same(self, name: str, sha256: str | None) -> None:
        """Refuses data, weights or code that are not those that the run was made with.

        Args:
            name: A fact that `describe` records.
            sha256: Its value now.

        Raises:
            ConfigError: if another value was recorded.
        """
        recorded = self._recorded()
        if recorded.get(name, sha256) != sha256:
            self._changed.append(f"{name} = {recorded[name]}, not {sha256}")
            self._refuse_changes()

    def _recorded(self) -> dict[str, Any]:
        """What run.json holds; nothing before the first start."""
        return read_json(self.path / "run.json") or {}

    def _refuse_changes(self) -> None:
        if self._changed and not self._allow_config_change:
            self.close()
            raise ConfigError(
                f"run directory {self.path} was made with {self._changed[0]}; choose another "
                "--run, or resume with --allow-config-change"
            )

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Writes what the run is made with, once it is known that it can start.

        That is config.toml, and run.json with the facts given and the time, command, machine and
        versions of every start;
        changes.jsonl if an earlier run in this directory was made with something else.
        """
        self.write("config.toml", to_toml(self._config))
        if self._changed:
            self.append("changes.jsonl", {"time": utc_now(), "changed": self._changed})
        start = {"started": utc_now(), **command_facts()}
        starts = [*self._recorded().get("starts", []), start]
        recorded = {**facts, "directory": str(self.path.resolve()), "starts": starts}
        self.write("run.json", json.dumps(recorded, indent=1))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes result.json, which marks the run as finished."""
        self.write("result.json", json.dumps(result, indent=1))

    def forget_after(self, steps: int) -> None:
        """Cuts off the records of what a resumed run does again: steps, and a half measurement.

        Records are in the order of their steps, and completions come before their measurement: so
        all that is done again is the end of a log. What precedes it is not touched, damaged or not.
        """
        measured = {record["step"] for record in self.records("evaluations.jsonl")}
        for name in ("metrics.jsonl", "completions.jsonl", "evaluations.jsonl"):
            path = self.path / name
            if path.exists():
                again = (
                    line.start
                    for line in read_log(path)
                    if line.content["step"] > steps
                    or (
                        line.content.get("kind") == "held_out"
                        and line.content["step"] not in measured
                    )
                )
                os.truncate(path, min(next(again, path.stat().st_size), whole_bytes(path)))


def read_config(path: Path) -> Config:
    """The configuration of a run directory, its paths as they are now.

    Raises:
        ConfigError: if it cannot be read.
    """
    file = path / "config.toml"
    config = from_mapping(Config, read_toml(str(file)), str(file))
    return moved_along(config, (read_json(path / "run.json") or {}).get("directory"), path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a file holds; None where there is no such file, or half of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_log(path: Path) -> Iterator[Line[dict[str, Any]]]:
    """Records written so far, without damaged ones; none if there is no file."""
    if path.exists():
        yield from read_jsonl(path, json_object("step"), on_damage=skip, is_log=True)


def check_free_space(path: Path, needed_bytes: int) -> None:
    """Refuses a disk that cannot hold what the run will write.

    Raises:
        UserError: naming what is free and what is needed.
    """
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise UserError(
            f"run directory {path}: {free / 1e6:.0f} MB are free but checkpoints and logs need "
            f"about {needed_bytes / 1e6:.0f} MB; free some space or choose another --run"
        )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command_facts() -> dict[str, Any]:
    """What is run, where, and by which versions."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": _command(),
        "machine": platform.platform(),
        "versions": versions,
    }


def _command() -> list[str]:
    """The command line; empty where the words are those of a notebook's kernel or another program.

    The command is installed under its name, and also run as a module.
    """
    program = Path(sys.argv[0])
    is_ours = program.stem == "gemma2-grpo" or program.parts[-2:] == ("gemma2_grpo", "cli.py")
    return ["gemma2-grpo", *sys.argv[1:]] if is_ours else []


def utc_now() -> str:
    """The time now, as files have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
