"""The persistent cache of compiled XLA programs, and a count of compilations."""

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
# Older versions print false errors for each program that they read on many CPUs
# (https://github.com/jax-ml/jax/issues/38445).
_FIRST_QUIET_JAXLIB = (0, 10, 2)
# JAX caches programs that took a second; the many small ones of a launch take seconds together.
_MIN_COMPILE_SECONDS = 0.0
_MIN_COMPILE_SECONDS_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"

_COMPILE_OR_READ_EVENT = "/jax/core/compile/backend_compile_duration"
_READ_EVENT = "/jax/compilation_cache/cache_hits"
_FAILURE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.+?)'")


def use_program_cache(is_wanted: bool, note: Callable[[str], None]) -> Path | str | None:
    """Turns on JAX's persistent compilation cache; call it before anything is compiled.

    The cache is in the user's cache directory, or in JAX_COMPILATION_CACHE_DIR. Ours is pruned to
    about `MAX_CACHE_BYTES`, and damaged entries are removed; another directory is not touched.

    Args:
        is_wanted: False to neither write nor read a cache.
        note: Takes the line that says why programs cannot be cached.

    Returns:
        The directory, or the URL of a remote one; None without a cache.
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
        _repair_when_warned(directory, note)
        jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory


def _setting(name: str) -> Any:
    return getattr(jax.config, name)  # Typed nowhere.


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def _prepare(directory: Path) -> None:
    """Makes a writable directory, private to its owner because cached programs are executed.

    Raises:
        OSError: if it cannot be written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def prune(directory: Path, max_bytes: int) -> None:
    """Removes the least recently used programs until the rest fit.

    JAX's own limit scans all entries at every write, which with a thousand entries takes longer
    than compiling most programs.
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


def _repair_when_warned(directory: Path, note: Callable[[str], None]) -> None:
    """Removes entries that JAX cannot read, and notes the first failure of each kind.

    JAX recompiles a program that it cannot read but never overwrites its entry, so that a truncated
    one, for example after a full disk, would warn at every launch.
    """
    show, noted = warnings.showwarning, set[str]()

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
        if verb not in noted:
            noted.add(verb)
            cause = str(message)[failure.end() :].strip(": ").splitlines()
            note(f"{directory}: {verb} a compiled program failed ({cause[0] if cause else ''})")

    warnings.showwarning = showwarning


@dataclass
class ProgramCount:
    """XLA executables compiled or read from the cache since counting began.

    Every executable counts; JAX also makes one for each operation outside of `jit`. The seconds do
    not include tracing and lowering.
    """

    cache: Path | str | None = None
    """Directory of the cache."""
    compiled: int = 0
    seconds: float = 0.0
    """Compile time."""
    cached: int = 0
    """Programs read from the cache."""

    def as_record(self) -> dict[str, int | float]:
        """All counts by name, for metrics.jsonl."""
        return {
            "num_compiled_programs": self.compiled,
            "num_cached_programs": self.cached,
            "compile_seconds": self.seconds,
        }

    def __str__(self) -> str:
        """Summary in one line."""
        text = f"compiled {self.compiled} programs in {self.seconds:.0f} s"
        return f"{text}; {self.cached} came from the cache at {self.cache}" if self.cache else text


@contextmanager
def counting_programs(cache: Path | str | None = None) -> Iterator[ProgramCount]:
    """Counts the programs of this process, of all its threads, while the context lasts."""
    count, lock, thread = ProgramCount(cache), threading.Lock(), threading.local()

    def on_event(event: str, **_: str | int) -> None:
        if event == _READ_EVENT:  # Arrives before the duration event of the same program.
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
