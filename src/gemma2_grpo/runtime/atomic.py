"""Files and directories that are written whole or not at all."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from gemma2_grpo.errors import UserError

_PARTIAL = ".partial"
# Orbax raises the first error of its threads while others still write, and make the folder anew.
_REMOVALS = 20
_SETTLING_SECONDS = 0.1


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; once that is written, it replaces the file.

    A reader, and a process that was killed, find the old file or the new one. What fails leaves
    nothing behind.
    """
    # Of this process, since several may write the report of one run.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # There may be no folder to remove it from.
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by a text in UTF-8, as a whole."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole_directory(target: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yields a directory to write into; its files are in `target` once all are written.

    What fails leaves nothing behind. Where `target` exists, weights are moved last, so that their
    presence means that the model is complete.

    Args:
        target: The directory.
        partial: The directory to write into; by default `.NAME.tmp` next to the target.
    """
    partial = partial or target.with_name(f".{target.name}.tmp")
    made = [path for path in partial.parents if not path.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)  # Of a process that was killed.
        partial.mkdir(parents=True)
        yield partial
        _move(partial, target)
    except BaseException:
        _remove(partial, made)
        raise


def check_empty(to: Path) -> None:
    """Refuses a directory with anything in it but what a killed process left.

    Raises:
        UserError: if there is something.
    """
    if to.is_dir() and any(path.name != _PARTIAL for path in to.iterdir()):
        raise UserError(f"{to}: is not empty; choose another --to")


def check_target(to: Path, needed_bytes: int = 0) -> None:
    """Refuses a directory that cannot be written, before there is anything to write.

    Args:
        to: The directory, which need not exist.
        needed_bytes: Size of the output, if it is known.

    Raises:
        UserError: naming what is in the way.
    """
    try:
        place = next(path for path in (to, *to.absolute().parents) if path.exists())
        if not place.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(place, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise UserError(
            f"{to}: cannot be written ({error.strerror}); choose another --to"
        ) from None
    if free < needed_bytes:
        raise UserError(
            f"{to}: {free / 1e6:.0f} MB are free but about {needed_bytes / 1e6:.0f} MB are needed; "
            "free some space or choose another --to"
        )


@contextmanager
def staged(to: Path) -> Iterator[Path]:
    """Yields a directory to write into for a user, who gets all of it in `to` or none.

    Raises:
        UserError: if anything cannot be written.
    """
    target = to.resolve()
    # On the file system of `to`, which may be mounted by itself.
    partial = target / _PARTIAL if target.is_dir() else None
    try:
        with whole_directory(target, partial) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{to}: could not be written ({why}); nothing is left of it") from None


def _move(partial: Path, target: Path) -> None:
    if not target.is_dir():
        partial.rename(target)
        return
    for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        path.replace(target / path.name)
    partial.rmdir()


def _remove(partial: Path, made: list[Path]) -> None:
    """Removes what was written, and the directories made for it if nothing else is in them."""
    for _ in range(_REMOVALS):
        shutil.rmtree(partial, ignore_errors=True)
        time.sleep(_SETTLING_SECONDS)
        if not partial.exists():
            break
    for path in made:
        try:
            path.rmdir()
        except OSError:
            return
