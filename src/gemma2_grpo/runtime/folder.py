"""JSON files and logs that have a model each, and folders that one process at a time writes to."""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from gemma2_grpo.errors import UserError
from gemma2_grpo.runtime.atomic import write_whole
from gemma2_grpo.task.jsonl import Line, OnDamage, read_jsonl, skip


class Part(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Record(Part):
    """The content of a file, or of a line of one."""

    FILE: ClassVar[str]

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Reads the file of a folder; None if there is none, or it is damaged."""
        try:
            return cls.model_validate_json((folder / cls.FILE).read_bytes())
        except (OSError, ValueError):
            return None

    @classmethod
    def read_lines(cls, folder: Path, on_damage: OnDamage = skip) -> Iterator[Line[Self]]:
        """Reads the log of a folder; there need not be one."""
        file = folder / cls.FILE
        if file.exists():
            yield from read_jsonl(file, cls.model_validate_json, on_damage=on_damage, is_log=True)

    def as_json(self, indent: int | None = None) -> str:
        """The record as it is written, without keys for which nothing is known."""
        return self.model_dump_json(indent=indent, exclude_unset=True)


_Record = TypeVar("_Record", bound=Record)


class LockedFolder:
    """A folder that one process at a time writes to, whole files or whole lines.

    Of several processes that train together only the first one writes, and it alone knows what is
    there: in the others nothing is locked, read or written, and the folder need not exist.
    """

    def __init__(
        self, path: Path, *, kind: str, option: str, lock: str = ".lock", writes: bool = True
    ) -> None:
        """Opens a folder, which is made if there is none.

        Args:
            path: The folder.
            kind: Kind of directory, for messages.
            option: Command-line option that names another directory, for messages.
            lock: Name of the file that is locked.
            writes: Whether this process reads and writes it.

        Raises:
            UserError: if it cannot be written, or is in use.
        """
        self.path = path
        self.writes = writes
        self._kind = kind
        self._made: list[Path] = []
        if not writes:
            return
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

    def append(self, *records: Record) -> None:
        """Appends records of one kind to their log, all of them or none.

        Raises:
            UserError: if they cannot be written.
        """
        if not records or not self.writes:
            return
        path = self.path / records[0].FILE
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{record.as_json()}\n" for record in records))
        except OSError as error:
            with suppress(OSError):  # Half a line is what a full disk had room for.
                os.truncate(path, size)
            raise self._cannot_write(path.name, error) from None

    def records(self, kind: type[_Record]) -> Iterator[_Record]:
        """The records of a log, without damaged ones and a last one that was cut off."""
        if self.writes:
            yield from (line.content for line in kind.read_lines(self.path))

    def read(self, kind: type[_Record]) -> _Record | None:
        """The content of a file; None if there is none, or it is damaged."""
        return kind.read(self.path) if self.writes else None

    def write(self, record: Record) -> None:
        """Replaces a file as a whole, so that a killed process leaves the old or the new one.

        Raises:
            UserError: if it cannot be written.
        """
        self.write_text(record.FILE, record.as_json(indent=1))

    def write_text(self, name: str, text: str) -> None:
        """Replaces a file that has no records; see `write`."""
        if not self.writes:
            return
        try:
            write_whole(self.path / name, text)
        except OSError as error:
            raise self._cannot_write(name, error) from None

    def _cannot_write(self, name: str, error: OSError) -> UserError:
        return UserError(
            f"{self._kind} {self.path}: {name} cannot be written ({error.strerror}); fix that and "
            "run the same command again to resume"
        )

    def close(self) -> None:
        """Lets another process have the folder; removes a new one that nothing is in."""
        if not self.writes:
            return
        lock = Path(self._lock.lock_file)
        is_empty = bool(self._made) and list(self.path.iterdir()) == [lock]
        self._lock.release()  # First, since Windows removes no file that is open.
        if is_empty:
            with suppress(OSError):  # Another process may write there by now.
                lock.unlink(missing_ok=True)
                for folder in self._made:
                    folder.rmdir()
        self._made = []
