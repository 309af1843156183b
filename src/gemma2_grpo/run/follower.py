"""What a process has that works for a run but neither writes nor prints."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from gemma2_grpo.run.console import Display
from gemma2_grpo.run.directory import RunDirectory


class UnseenDirectory(RunDirectory):
    """The run directory of process 0, as another process has it: nothing is read or written.

    Whatever follows from what lies there has to come from process 0.
    """

    def __init__(self, path: Path) -> None:
        """Takes the path, which this machine need not have."""
        self.path = path

    @property
    def result(self) -> dict[str, Any] | None:
        """Known to process 0."""
        return None

    def check_same(self, name: str, sha256: str | None) -> None:
        """Left to process 0."""

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Left to process 0."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Left to process 0."""

    def append(self, name: str, *records: Mapping[str, Any]) -> None:
        """Left to process 0."""

    def records(self, name: str) -> Iterator[dict[str, Any]]:
        """Known to process 0."""
        del name
        return iter(())

    def forget_after(self, steps: int) -> None:
        """Left to process 0."""

    def close(self) -> None:
        """There is nothing to close."""


def silent_display() -> Display:
    """A display that shows nothing."""
    return Display(Console(file=io.StringIO(), quiet=True))
