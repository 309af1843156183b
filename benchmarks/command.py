"""What the commands of this folder have in common."""

from collections.abc import Callable
from typing import TypeVar

from rich.console import Console

from benchmarks.processes import WorkerError
from gemma2_grpo.errors import UserError

Command = TypeVar("Command")


def status_of(run: Callable[[Command, Console, Console], None], command: Command) -> int:
    """Runs a command and returns its exit status; a user's mistake is one line and 2."""
    progress = Console(stderr=True, highlight=False)
    try:
        run(command, Console(highlight=False), progress)
    except (UserError, WorkerError) as error:
        progress.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2 if isinstance(error, UserError) else 1
    return 0
