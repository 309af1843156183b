"""What a run shows: what it will do, where it is, and whether it got better."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unicodedata import category

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from gemma2_grpo.task.rewards import RISING

if TYPE_CHECKING:  # Showing must not load JAX.
    from gemma2_grpo.runs.measure import Measurement


class _StepProgress(Progress):
    """A bar over the steps, and under it what the last step gave."""

    def __init__(self, console: Console) -> None:
        self._last: Mapping[str, Any] = {}  # First, because rich draws at once.
        super().__init__(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )

    def begin(self, first: int, total: int) -> None:
        """Starts at the steps that are done already."""
        self._task = self.add_task("", total=total, completed=first)

    def show(self, record: Mapping[str, Any]) -> None:
        """Moves on by one step."""
        self._last = record
        self.advance(self._task)

    def get_renderables(self) -> Iterator[Any]:
        """The bar and the line under it."""
        yield self.make_tasks_table(self.tasks)
        if self._last:
            yield Text(_parts(self._last))


class Display:
    """Prints to a terminal with a progress bar, elsewhere as plain lines."""

    def __init__(self, console: Console | None = None) -> None:
        """Writes to standard output unless told otherwise."""
        # Off a terminal there is no width to keep to; a log should not be wrapped.
        width = None if sys.stdout.isatty() else 100
        self.console = console or Console(width=width, highlight=False)
        self._is_training = False  # A terminal shows one live bar at a time.

    def plan(self, facts: Mapping[str, str]) -> None:
        """Shows what the run will do."""
        table = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            table.add_row(f"[bold]{name}", _inert(value))
        self.console.print(table)
        self.console.print()

    def note(self, text: str) -> None:
        """Prints one line, which a path may make long."""
        self.console.print(_inert(text), soft_wrap=True)

    @contextmanager
    def measuring(self, label: str, total: int) -> Iterator[Any]:
        """Shows the progress of a measurement; yields what to call with each batch's size."""
        if not self.console.is_terminal or self._is_training:
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
    def training(self, first: int, total: int) -> Iterator[Any]:
        """Shows the progress of training; yields what to call with each step's record."""
        if not self.console.is_terminal:
            yield lambda record: self.console.print(_line(record, total), soft_wrap=True)
            return
        with _StepProgress(console=self.console) as bar:
            bar.begin(first, total)
            self._is_training = True
            try:
                yield bar.show
            finally:
                self._is_training = False

    def sample(
        self, step: int, question: str, completion: str, record: Mapping[str, float]
    ) -> None:
        """Shows one completion with its scores."""
        parts = "  ".join(f"{name} {record[name]:.2f}" for name in (*RISING, "total"))
        body = f"[dim]{_inert(question)}[/dim]\n{_inert(completion)}"
        self.console.print(Panel(body, title=f"step {step}: {parts}", title_align="left"))

    def held_out(self, step: int, measurement: "Measurement") -> None:
        """Shows a measurement during training."""
        low, high = measurement.interval
        self.console.print(
            f"step {step}: held-out accuracy {measurement.accuracy:.1%} "
            f"({low:.1%} to {high:.1%}), format {measurement.format:.1%}"
        )

    def result(self, result: Mapping[str, Any]) -> None:
        """Shows what a finished run measured."""
        self.before_and_after(result["before"], result["after"])
        self.rises(result["rises"])

    def before_and_after(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Shows the two measurements side by side."""
        table = Table(title=f"{before['problems']} held-out problems", title_justify="left")
        for name in ("", "before", "after", "change"):
            table.add_column(name, justify="left" if not name else "right")
        samples = (before.get("sampled") or {}).get("samples")
        for label, path, is_share in _ROWS:
            old, new = _value(before, path), _value(after, path)
            if old is None or new is None:
                continue
            change = f"{100 * (new - old):+.1f}" if is_share else f"{new - old:+.2f}"
            name = label.format(k=samples)
            table.add_row(name, _show(old, is_share), _show(new, is_share), change)
            if path == ("accuracy",):
                table.add_row("  95 % interval", _interval(before), _interval(after), "")
        self.console.print(table)

    def rises(self, rises: Sequence[Mapping[str, Any]]) -> None:
        """Shows at which step each reward component had made half of its way."""
        for rise in rises:
            half = rise["half_way_step"]
            when = f"half-way at step {half}" if half is not None else "no rise"
            self.console.print(
                f"{rise['name']:>9}: {rise['first']:.2f} to {rise['last']:.2f}, {when}"
            )


_ROWS = (
    ("accuracy, greedy", ("accuracy",), True),
    ("  by GSM8K's extraction", ("official_accuracy",), True),
    ("format, greedy", ("format",), True),
    ("true equations, greedy", ("true_equations",), True),
    ("accuracy, sampled", ("sampled", "pass_at_1"), True),
    ("pass@{k}, sampled", ("sampled", "pass_at_k"), True),
    ("format, sampled", ("sampled", "format"), True),
    ("true equations, sampled", ("sampled", "true_equations"), True),
    ("mean reward, sampled", ("sampled", "reward"), False),
    ("tokens", ("mean_tokens",), False),
)


def _inert(text: str) -> str:
    """Text that neither rich nor a terminal takes for instructions."""
    controls = {c: "\ufffd" for c in text if category(c).startswith("C") and c not in "\n\t"}
    return escape(text.translate(str.maketrans(controls)))


def _value(record: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = record
    if path == ("official_accuracy",):
        return record["official_correct"] / record["problems"]
    for name in path:
        value = (value or {}).get(name)
    return value


def _interval(record: Mapping[str, Any]) -> str:
    low, high = record["interval"]
    return f"{low:.0%} to {high:.0%}"


def _show(value: float, is_share: bool) -> str:
    return f"{value:.1%}" if is_share else f"{value:.2f}"


def _parts(record: Mapping[str, Any]) -> str:
    """What a step gave, within 80 columns."""
    return (
        f"reward {record['reward']:.3f} (format {record['format']:.2f} logic "
        f"{record['logic']:.2f} accuracy {record['accuracy']:.2f}) kl {record['kl']:.4f} "
        f"tokens {record['completion_tokens']:.0f}"
    )


def _line(record: Mapping[str, Any], total: int) -> str:
    """A step for a log, within 100 columns."""
    left = duration(record["seconds_left"])
    return f"step {record['step']}/{total}: {_parts(record)} left {left}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
