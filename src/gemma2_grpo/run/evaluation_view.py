"""What an evaluation shows: how far it is and how well it goes, and at the end both systems."""

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemma2_grpo.run.panel import duration
from gemma2_grpo.run.summary import ADAPTER, BASE

_PLAIN_LINES = 20


class Progress:
    """A bar with the accuracy so far and the time left; off a terminal, about twenty lines."""

    def __init__(
        self, console: Console, total: int, records: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Starts at the records that are there already.

        Args:
            console: Where to show it.
            total: Completions of the whole evaluation.
            records: Of earlier completions.
        """
        self._console = console
        self._total = total
        self._counts: dict[tuple[bool, str], tuple[int, int]] = {}
        self._is_sampled = False
        self._count(records)
        self._first = self._done = len(records)
        self._since = time.perf_counter()
        self._bar = _Bar(console, total, self._done, self.accuracies()) if self._live else None

    @property
    def _live(self) -> bool:
        return self._console.is_terminal

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        if kind is KeyboardInterrupt:
            self._console.print(
                f"stopped after {self._done} of {self._total} completions; the same command goes on"
            )

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes the records of one more batch."""
        before = self._done * _PLAIN_LINES // self._total
        self._count(records)
        self._done += len(records)
        if self._bar:
            self._bar.show(self._done, self.accuracies())
        elif self._done * _PLAIN_LINES // self._total > before:
            self._console.print(
                f"{self._done}/{self._total} completions  {self.accuracies()}  "
                f"left {duration(self._seconds_left())}",
                soft_wrap=True,
            )

    def accuracies(self) -> str:
        """Shares of right completions so far, of the kind that is being made."""
        kind = "sampled" if self._is_sampled else "greedy"
        shares = "  ".join(
            f"{system} {correct / count:.1%}"
            for (is_sampled, system), (correct, count) in self._counts.items()
            if is_sampled == self._is_sampled
        )
        return f"right, {kind}: {shares}" if shares else ""

    def _count(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            self._is_sampled = record["sample"] is not None
            key = self._is_sampled, str(record["system"])
            correct, count = self._counts.get(key, (0, 0))
            self._counts[key] = correct + int(record["correct"]), count + 1

    def _seconds_left(self) -> float:
        per_completion = (time.perf_counter() - self._since) / max(self._done - self._first, 1)
        return per_completion * (self._total - self._done)


class _Bar(progress.Progress):
    """A bar over all completions, and under it how many are right."""

    def __init__(self, console: Console, total: int, done: int, line: str) -> None:
        self._line = line  # First, because rich draws at once.
        super().__init__(
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("completions  elapsed"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=console,
            expand=True,
            speed_estimate_period=300,  # Batches are slow; the first one compiles.
        )
        self._task = self.add_task("", total=total, completed=done)

    def show(self, done: int, line: str) -> None:
        """Moves on to so many completions."""
        self._line = line
        self.update(self._task, completed=done, refresh=True)

    def get_renderables(self) -> Iterator[Any]:
        """The bar and the line under it."""
        yield self.make_tasks_table(self.tasks)
        if self._line:
            yield Text(self._line)


_GREEDY = (
    ("right", "accuracy", True),
    ("  95 % interval", "interval", True),
    ("right by GSM8K's extraction", "official_accuracy", True),
    ("perfect format", "format", True),
    ("true equations", "true_equations", True),
    ("cut off", "truncated", True),
    ("tokens", "mean_tokens", False),
)
_SAMPLED = (
    ("right", "pass_at_1", True),
    ("  95 % interval", "interval", True),
    ("pass@{}", "pass_at_k", True),
    ("maj@{}", "maj_at_k", True),
    ("perfect format", "format", True),
    ("true equations", "true_equations", True),
    ("cut off", "truncated", True),
    ("tokens", "mean_tokens", False),
)


def show_evaluation(console: Console, result: Mapping[str, Any]) -> None:
    """Shows both systems side by side, within 80 columns."""
    data, settings, systems = result["data"], result["settings"], result["systems"]
    table = Table(title=_title(data), title_justify="left", box=None, pad_edge=False)
    for name in ("", *systems, *(["change"] if ADAPTER in systems else [])):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    columns = list(systems.values())
    table.add_row("[bold]greedy[/bold]")
    _add_rows(table, _GREEDY, [system["greedy"] for system in columns])
    sampled = [system["sampled"] for system in columns]
    if sampled[0]:
        count = settings["eval_samples"]
        heading = f"{count} sample{'s' if count > 1 else ''}, temperature "
        heading += f"{settings['temperature']:g}"
        table.add_row("")
        table.add_row(f"[bold]{heading}[/bold]")
        _add_rows(table, _SAMPLED, sampled)
    _add_steps(table, [system["greedy"]["by_solution_steps"] for system in columns])
    console.print()
    console.print(table)
    console.print()
    if result["comparison"]:
        console.print(_compared(result["comparison"]))


def _title(data: Mapping[str, Any]) -> Text:
    dropped = f", {data['dropped']} too long, dropped" if data["dropped"] else ""
    return Text(f"{data['problems']} {data['source']} {data['split']} problems{dropped}")


def _add_rows(
    table: Table, rows: Sequence[tuple[str, str, bool]], systems: Sequence[Mapping[str, Any]]
) -> None:
    """Adds what is told of the systems, one row a value, and one for each k of pass@k."""
    for label, name, is_share in rows:
        values = [system[name] for system in systems]
        if isinstance(values[0], Mapping):
            for k in list(values[0])[1:]:  # That of 1 is the share of right ones.
                _add_row(table, label.format(k), [value[k] for value in values], is_share)
        elif isinstance(values[0], Sequence):
            bounds = (f"{100 * low:.1f} to {100 * high:.1f}" for low, high in values)
            table.add_row(f"  {label}", *bounds)
        else:
            _add_row(table, label, values, is_share)


def _add_row(table: Table, label: str, values: Sequence[float], is_share: bool) -> None:
    cells = [f"{value:.1%}" if is_share else f"{value:.1f}" for value in values]
    if len(values) > 1:
        change = values[1] - values[0]
        cells.append(f"{100 * change:+.1f}" if is_share else f"{change:+.1f}")
    table.add_row(f"  {label}", *cells)


def _add_steps(table: Table, systems: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    if not systems[0]:
        return
    table.add_row("")
    table.add_row("[bold]greedy, by steps of the solution[/bold]")
    for rows in zip(*systems, strict=True):
        steps, problems = rows[0]["steps"], rows[0]["problems"]
        label = f"right of {problems} with {steps} step{'s' if steps > 1 else ''}"
        _add_row(table, label, [row["accuracy"] for row in rows], True)


def _compared(comparison: Mapping[str, Any]) -> str:
    p_value = comparison["p_value"]
    told = f"p = {p_value:.3f}" if p_value >= 0.001 else f"p = {p_value:.0e}"
    return (
        f"{BASE} and {ADAPTER} on the same problems, greedy: {comparison['fixed']} fixed, "
        f"{comparison['broken']} broken,\n{comparison['both_right']} right by both, "
        f"{comparison['both_wrong']} wrong by both; McNemar's exact test: {told}"
    )
