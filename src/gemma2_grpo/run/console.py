"""What a run shows: what it will do, where it is, and whether it got better."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gemma2_grpo.config import ModelConfig
from gemma2_grpo.run.completion_view import render_completion, without_controls
from gemma2_grpo.run.outcome import measure_rows, result_of
from gemma2_grpo.run.panel import TrainingPanel, in_words, step_line
from gemma2_grpo.task.rewards import RISING

if TYPE_CHECKING:  # Showing must not load JAX.
    from gemma2_grpo.run.measure import Measurement

# Off a terminal there is no width to keep to; a log should not be wrapped early.
_LOG_WIDTH = 100


def open_console(*, stderr: bool = False) -> Console:
    """A console for standard output or error, be it a terminal, a file or a notebook.

    A notebook gets plain lines with colours: rich would make each line an output of its own, and
    ask for ipywidgets wherever something moves.
    """
    if (sys.stderr if stderr else sys.stdout).isatty():
        return Console(stderr=stderr, highlight=False)
    colours = "standard" if Console().is_jupyter else "auto"
    return Console(
        stderr=stderr,
        highlight=False,
        width=_LOG_WIDTH,
        force_jupyter=False,
        force_terminal=False,  # Kernels of notebooks set FORCE_COLOR, which rich takes for one.
        color_system=colours,
    )


OnStep = Callable[..., None]
"""Takes the record of a step, the alarms that are new with it, and all active ones, in words."""


class Display:
    """Prints to a terminal with a progress bar, elsewhere as plain lines."""

    def __init__(self, console: Console | None = None) -> None:
        """Writes to standard output unless told otherwise."""
        self.console = console or open_console()
        self._panel: TrainingPanel | None = None

    def plan(self, facts: Mapping[str, str]) -> None:
        """Shows what the run will do."""
        table = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            table.add_row(f"[bold]{name}", inert(value))
        self.console.print(table)
        self.console.print()

    def note(self, text: str) -> None:
        """Prints one line, which a path may make long."""
        self.console.print(inert(text), soft_wrap=True)

    def warn_of_cpu(self, model: ModelConfig, name: str) -> None:
        """Warns before a configuration for an accelerator trains without one; JAX has started."""
        from gemma2_grpo.runtime.devices import cpu_warning

        if text := cpu_warning(model, name):
            self.console.print(f"warning: {inert(text)}", style="bold yellow", soft_wrap=True)

    @contextmanager
    def measuring(self, label: str, total: int) -> Iterator[Any]:
        """Shows the progress of a measurement; yields what to call with each batch's size."""
        if (
            not self.console.is_terminal or self._panel
        ):  # A terminal has one live display at a time.
            self.console.print(f"{label} ...")
            yield lambda done: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.advance(task, done)

    @contextmanager
    def supervising(self, label: str, total: int) -> Iterator[Any]:
        """Shows the progress of supervised training; yields what to call with step and loss."""
        if not self.console.is_terminal:
            every = max(1, total // 20)
            yield (
                lambda step, loss: (
                    self.console.print(f"{label}: step {step}/{total}  loss {loss:.4f}")
                    if step % every == 0 or step == total
                    else None
                )
            )
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console) as bar:
            task = bar.add_task(label, total=total)
            yield lambda step, loss: bar.update(
                task, completed=step, description=f"{label}, loss {loss:.4f}"
            )

    @contextmanager
    def training(self, first: int, total: int) -> Iterator[OnStep]:
        """Shows the progress of training; yields what takes each step's record and alarms."""
        if not self.console.is_terminal:
            yield lambda record, new=(), active=(): self._print_step(record, new, total)
            return
        with TrainingPanel(self.console, first, total) as panel:
            self._panel = panel
            try:
                yield panel.show
            finally:
                self._panel = None

    def _print_step(self, record: Mapping[str, Any], new: Sequence[str], total: int) -> None:
        self.console.print(step_line(record, total), soft_wrap=True)
        for alarm in new:
            self.console.print(f"  ! {inert(alarm)}", soft_wrap=True)

    def sample(
        self, step: int, question: str, completion: str, record: Mapping[str, float]
    ) -> None:
        """Shows one completion with its scores."""
        parts = "  ".join(f"{name} {record[name]:.2f}" for name in (*RISING, "total"))
        body = Group(Text(without_controls(question), "dim"), *render_completion(completion))
        self.console.print(Panel(body, title=f"step {step}: {parts}", title_align="left"))

    def held_out(self, step: int, measurement: "Measurement") -> None:
        """Shows a measurement during training."""
        if self._panel:
            self._panel.held_out(step, measurement)
        self.console.print(
            f"step {step}: held-out accuracy {in_words(measurement)}, "
            f"format {measurement.format:.1%}"
        )

    def result(self, result: Mapping[str, Any]) -> None:
        """Shows what a finished run measured."""
        self.before_and_after(result["before"], result["after"])
        self.rises(result["rises"])

    def before_and_after(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Shows the two measurements side by side."""
        found = [result_of(*each) for each in (("before", before), ("after", after))]
        results = [result for result in found if result]
        table = Table(title=f"{before['problems']} held-out problems", title_justify="left")
        for name in ("", *(result.label for result in results), "change"):
            table.add_column(name, justify="left" if not name else "right")
        accuracy, *others = measure_rows(results, with_change=True)
        table.add_row(*accuracy)
        table.add_row("  95 % interval", *(f"{result.interval_text}\u00a0%" for result in results))
        for row in others:
            table.add_row(*row)
        self.console.print(table)

    def rises(self, rises: Sequence[Mapping[str, Any]]) -> None:
        """Shows at which step each reward component had made half of its way."""
        for rise in rises:
            half = rise["half_way_step"]
            when = f"half-way at step {half}" if half is not None else "no rise"
            self.console.print(
                f"{rise['name']:>9}: {rise['first']:.2f} to {rise['last']:.2f}, {when}"
            )


def inert(text: str) -> str:
    """Text that neither rich nor a terminal takes for instructions."""
    return escape(without_controls(text))
