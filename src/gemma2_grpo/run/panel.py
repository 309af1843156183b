"""Where a training run stands: a panel on a terminal, a line a step elsewhere."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from gemma2_grpo.task.rewards import RISING

if TYPE_CHECKING:  # Showing must not load JAX.
    from gemma2_grpo.run.measure import Measurement

_LEVELS = "▁▂▃▄▅▆▇█"
_CURVE_STEPS = 16


class TrainingPanel(Progress):
    """A bar over the steps, and under it what the last step gave."""

    def __init__(self, console: Console, first: int, total: int) -> None:
        """Starts at the steps that are done already."""
        # First, because rich draws at once.
        self._record: Mapping[str, Any] = {}
        self._alarms: Sequence[str] = ()
        self._rewards: deque[float] = deque(maxlen=_CURVE_STEPS)
        self._held_out = ""
        super().__init__(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[left]} left"),
            console=console,
            expand=True,
        )
        self._task = self.add_task("", total=total, completed=first, left="-:--:--")

    def show(
        self, record: Mapping[str, Any], new: Sequence[str] = (), active: Sequence[str] = ()
    ) -> None:
        """Moves on by one step; alarms are shown for as long as they are active."""
        del new
        self._record, self._alarms = record, active
        if record["reward"] is not None:  # No completion may have got one.
            self._rewards.append(record["reward"])
        self.update(self._task, advance=1, left=duration(record["seconds_left"]))

    def held_out(self, step: int, measurement: "Measurement") -> None:
        """Shows a measurement until there is another."""
        self._held_out = f"{in_words(measurement)} at step {step}"

    def get_renderables(self) -> Iterator[Any]:
        """The panel, drawn anew several times a second."""
        grid = Table.grid(expand=True)
        grid.add_row(self.make_tasks_table(self.tasks))
        if self._record:
            grid.add_row(self._facts())
        for alarm in self._alarms:
            grid.add_row(Text(f"! {alarm}", style="yellow", overflow="fold"))
        yield Panel(grid, box=box.ROUNDED, border_style="dim")

    def _facts(self) -> Table:
        facts = step_facts(self._record)
        facts["reward"] = f"{facts['reward']}  {curve(self._rewards)}"
        if self._held_out:
            facts["held-out"] = self._held_out
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, value in facts.items():
            table.add_row(f"[dim]{name}", value)
        return table


def step_facts(record: Mapping[str, Any]) -> dict[str, str]:
    """What a step gave, in lines of at most 64 columns; the same on a terminal and off one."""
    parts = " ".join(f"{name} {record[name]:.2f}" for name in RISING)
    reward = "none" if record["reward"] is None else f"{record['reward']:.3f}"
    facts = {
        "reward": f"{reward} ({parts})",
        "right": f"{record['correct']:.1%} of sampled answers",
        "policy": (
            f"kl {record['kl']:.4f} entropy {record['entropy']:.3f} "
            f"clipped {record['clip_fraction']:.1%} gradient {record['grad_norm']:.3g}"
        ),
        "length": (
            f"{record['completion_tokens']:.0f} tokens, {record['truncated']:.1%} cut off, "
            f"{record['tokens_per_second']:.0f} tokens/s"
        ),
    }
    if "peak_memory_fraction" in record:
        facts["memory"] = f"{record['peak_memory_fraction']:.0%} of the fullest device, at most"
    return facts


def step_line(record: Mapping[str, Any], total: int) -> str:
    """The same in one line, for a log."""
    facts = "; ".join(
        f"{'' if name in ('policy', 'length') else name + ' '}{value}"
        for name, value in step_facts(record).items()
    )
    return f"step {record['step']}/{total}: {facts}; {duration(record['seconds_left'])} left"


def in_words(measurement: "Measurement") -> str:
    """Accuracy with its interval."""
    low, high = measurement.interval
    return f"{measurement.accuracy:.1%} ({low:.1%} to {high:.1%})"


def curve(values: Sequence[float] | deque[float]) -> str:
    """The last values as a line of blocks, from the lowest of them to the highest."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    top = len(_LEVELS) - 1
    scale = top / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round((value - low) * scale)] for value in values)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
