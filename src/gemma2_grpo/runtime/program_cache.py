"""XLA's programs: kept on disk from one launch to the next, and counted."""

import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from platformdirs import user_cache_path

MAX_CACHE_BYTES = 1 << 30
# Older ones print lines of errors for each program that they read on many CPUs, for no reason
# (https://github.com/jax-ml/jax/issues/38445).
_FIRST_QUIET_JAXLIB = (0, 10, 2)
# JAX keeps what took a second; but the many small programs of a launch take seconds together.
_MIN_COMPILE_SECONDS = 0.0
_MIN_COMPILE_SECONDS_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"

_COMPILE_OR_READ_EVENT = "/jax/core/compile/backend_compile_duration"
_READ_EVENT = "/jax/compilation_cache/cache_hits"
_FAILURE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.+?)'")


def use_program_cache(is_wanted: bool, note: Callable[[str], None]) -> Path | str | None:
    """Has JAX keep compiled programs on disk, to be called before anything is compiled.

    They lie in the user's cache directory, or where JAX_COMPILATION_CACHE_DIR says. Ours is kept
    below about `MAX_CACHE_BYTES`, and mended where it is damaged; another one is left to its owner.

    Args:
        is_wanted: False to keep nothing and to read nothing.
        note: Takes the line that says why programs cannot be kept.

    Returns:
        The directory, or the address of one that is not on this machine; None without a cache.
    """
    if not is_wanted or not _setting("jax_enable_compilation_cache"):
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if _MIN_COMPILE_SECONDS_VARIABLE not in os.environ:
        jax.config.update(_MIN_COMPILE_SECONDS_VARIABLE.lower(), _MIN_COMPILE_SECONDS)
    jaxlib = metadata.version("jaxlib")
    chosen = _setting("jax_compilation_cache_dir")
    if chosen and "://" in chosen:
        return chosen
    if not chosen and _version(jaxlib) < _FIRST_QUIET_JAXLIB:
        wanted = ".".join(map(str, _FIRST_QUIET_JAXLIB))
        note(f"compiled programs are not kept with jaxlib {jaxlib}; from {wanted} on")
        return None
    directory = Path(chosen) if chosen else user_cache_path("gemma2-grpo") / "programs"
    try:
        _prepare(directory)
        if not chosen:
            prune(directory, MAX_CACHE_BYTES)
    except OSError as error:
        jax.config.update("jax_enable_compilation_cache", False)
        note(f"compiled programs are not kept: {directory} cannot be written ({error.strerror})")
        return None
    if not chosen:
        _mend_when_warned(directory, note)
        jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory


def _setting(name: str) -> Any:
    return getattr(jax.config, name)  # Typed nowhere.


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def _prepare(directory: Path) -> None:
    """Makes a directory that can be written, by its owner only: what lies in it is run.

    Raises:
        OSError: if that is not possible.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def prune(directory: Path, max_bytes: int) -> None:
    """Removes the programs that were not used for longest, until the others fit.

    JAX can do this too, but looks at all entries whenever it writes one: with a thousand of them
    that takes longer than most programs take to compile.
    """
    files = []
    for path in directory.rglob("*"):
        with suppress(OSError):  # Another process may be doing the same.
            status = path.stat()
            if path.is_file():
                files.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    excess = sum(size for _, size, _ in files) - max_bytes
    for _, size, path in sorted(files):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size


def _mend_when_warned(directory: Path, note: Callable[[str], None]) -> None:
    """Removes entries that JAX warns of, and passes on the first warning of each kind as a note.

    JAX compiles anew what it cannot read, but never overwrites an entry: one that was cut off, by
    a full disk perhaps, would be warned of at every launch.
    """
    show, told = warnings.showwarning, set[str]()

    def showwarning(message: Warning | str, *others: object, **more: object) -> None:
        failure = _FAILURE.match(str(message))
        if not failure:
            show(message, *others, **more)  # type: ignore[arg-type]
            return
        verb, program = failure.groups()
        if verb == "reading":
            for entry in directory.glob(f"{escape(program)}-*"):
                with suppress(OSError):
                    entry.unlink()
        if verb not in told:
            told.add(verb)
            cause = str(message)[failure.end() :].strip(": ").splitlines()
            note(f"{directory}: {verb} a compiled program failed ({cause[0] if cause else ''})")

    warnings.showwarning = showwarning


@dataclass
class ProgramCount:
    """Programs that XLA made ready to run since counting began.

    Each executable counts, however small; JAX makes one of every operation outside of `jit` too.
    Tracing and lowering are not in the seconds.
    """

    cache: Path | str | None = None
    """Where programs are kept."""
    compiled: int = 0
    seconds: float = 0.0
    """Spent on compiling."""
    cached: int = 0
    """Read from the cache instead."""

    def as_record(self) -> dict[str, int | float]:
        """All counts by name, for a log."""
        return {
            "num_compiled_programs": self.compiled,
            "num_cached_programs": self.cached,
            "compile_seconds": self.seconds,
        }

    def __str__(self) -> str:
        """One line for a person."""
        text = f"compiled {self.compiled} programs in {self.seconds:.0f} s"
        return f"{text}; {self.cached} came from the cache at {self.cache}" if self.cache else text


@contextmanager
def counting_programs(cache: Path | str | None = None) -> Iterator[ProgramCount]:
    """Counts the programs of this process, of all its threads, while the context lasts."""
    count, lock, thread = ProgramCount(cache), threading.Lock(), threading.local()

    def on_event(event: str, **_: str | int) -> None:
        if event == _READ_EVENT:  # Comes within the duration of the same program.
            thread.was_read = True

    def on_duration(event: str, duration_secs: float, **_: str | int) -> None:
        if event != _COMPILE_OR_READ_EVENT:
            return
        was_read, thread.was_read = getattr(thread, "was_read", False), False
        with lock:
            if was_read:
                count.cached += 1
            else:
                count.compiled += 1
                count.seconds += duration_secs

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_listener(on_event)
        jax.monitoring.unregister_event_duration_listener(on_duration)
