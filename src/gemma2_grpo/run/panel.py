"""Progress of training and evaluation: a live panel on a terminal, plain lines elsewhere."""

from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType

from rich import box
from rich.console import Console, RenderableType
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

from gemma2_grpo.run.results import EvaluatedCompletion, System
from gemma2_grpo.run.schema import StepRecord
from gemma2_grpo.task.rewards import RISING

_LEVELS = "▁▂▃▄▅▆▇█"
_CURVE_STEPS = 16
_PLAIN_LINES = 20

# --- Training ---


class TrainingPanel(Progress):
    """A bar over the steps, and under it what the last step gave."""

    def __init__(self, console: Console, first: int, total: int) -> None:
        """Starts at the steps that are done already."""
        # First, because rich draws at once.
        self._record: StepRecord | None = None
        self._alarms: Sequence[str] = ()
        # Of the loss in supervised training, else of the reward.
        self._curve: deque[float] = deque(maxlen=_CURVE_STEPS)
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

    def show(self, record: StepRecord, new: Sequence[str] = (), active: Sequence[str] = ()) -> None:
        """Moves on by one step; alarms are shown for as long as they are active."""
        del new
        self._record, self._alarms = record, active
        value = record.mean_reward if record.solution_nll is None else record.solution_nll
        if value is not None:  # No completion may have got a reward.
            self._curve.append(value)
        self.update(self._task, advance=1, left=duration(record.seconds_left or 0.0))

    def held_out(self, step: int, measured: System) -> None:
        """Shows a measurement until there is another."""
        self._held_out = f"{in_words(measured)} at step {step}"

    def get_renderables(self) -> Iterator[RenderableType]:
        """The panel, drawn several times a second."""
        grid = Table.grid(expand=True)
        grid.add_row(self.make_tasks_table(self.tasks))
        if self._record:
            grid.add_row(self._facts(self._record))
        for alarm in self._alarms:
            grid.add_row(Text(f"! {alarm}", style="yellow", overflow="fold"))
        yield Panel(grid, box=box.ROUNDED, border_style="dim")

    def _facts(self, record: StepRecord) -> Table:
        facts = step_facts(record)
        first = next(iter(facts))
        facts[first] = f"{facts[first]}  {curve(self._curve)}"
        if self._held_out:
            facts["held-out"] = self._held_out
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, value in facts.items():
            table.add_row(f"[dim]{name}", value)
        return table


def step_facts(record: StepRecord) -> dict[str, str]:
    """Results of a step, in lines of at most 64 columns; the same on a terminal and off one."""
    facts = _grpo_facts(record) if record.solution_nll is None else _supervised_facts(record)
    # Metrics of the updates that the schema does not name: those that someone has added.
    facts |= {name: _text(value, ".4g") for name, value in (record.model_extra or {}).items()}
    if record.peak_memory_fraction is not None:
        facts["memory"] = f"{record.peak_memory_fraction:.0%} of the fullest device, at most"
    return facts


def _grpo_facts(record: StepRecord) -> dict[str, str]:
    parts = " ".join(f"{name} {_text(record.mean_components[name], '.2f')}" for name in RISING)
    return {
        "reward": f"{_text(record.mean_reward, '.3f')} ({parts})",
        "right": f"{_text(record.correct_fraction, '.1%')} of sampled answers",
        "policy": (
            f"kl {_text(record.kl, '.4f')} entropy {_text(record.entropy, '.3f')} "
            f"clipped {_text(record.clip_fraction, '.1%')} "
            f"gradient {_text(record.grad_norm, '.3g')}"
        ),
        "length": (
            f"{_text(record.mean_completion_tokens, '.0f')} tokens, "
            f"{_text(record.truncated_fraction, '.1%')} cut off, "
            f"{_text(record.tokens_per_second, '.0f')} tokens/s"
        ),
    }


def _supervised_facts(record: StepRecord) -> dict[str, str]:
    return {
        "loss": f"{_text(record.solution_nll, '.4f')} nats per token",
        "policy": (
            f"entropy {_text(record.entropy, '.3f')} gradient {_text(record.grad_norm, '.3g')}"
        ),
        "length": f"{_text(record.mean_completion_tokens, '.0f')} tokens a solution",
    }


def _text(value: float | None, spec: str) -> str:
    """A number; there is none where it was not finite, or no completion had one."""
    return "none" if value is None else format(value, spec)


def step_line(record: StepRecord, total: int) -> str:
    """Results of a step in one line, for a log."""
    facts = "; ".join(
        f"{'' if name in ('policy', 'length') else name + ' '}{value}"
        for name, value in step_facts(record).items()
    )
    return f"step {record.step}/{total}: {facts}; {duration(record.seconds_left or 0.0)} left"


def in_words(measured: System) -> str:
    """Greedy accuracy with its interval."""
    low, high = measured.greedy.correct_fraction_interval
    return f"{measured.greedy.correct_fraction:.1%} ({low:.1%} to {high:.1%})"


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


# --- Evaluation ---


class EvaluationProgress(Progress):
    """A bar with the accuracy so far and the time left; off a terminal, about twenty lines."""

    def __init__(
        self, console: Console, total: int, records: Sequence[EvaluatedCompletion] = ()
    ) -> None:
        """Starts at the records of earlier completions; `total` are those of the evaluation."""
        # First, because rich draws at once.
        self._counts: dict[tuple[bool, str], tuple[int, int]] = {}
        self._is_sampled = False
        self._count(records)
        super().__init__(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("completions  elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            speed_estimate_period=300,  # Batches are slow; the first one compiles.
            disable=not console.is_terminal,
        )
        self._first, self._total = len(records), total
        self._task = self.add_task("", total=total, completed=len(records))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Says how far it came, if a person stops it."""
        super().__exit__(kind, error, trace)
        if kind is KeyboardInterrupt:
            done = f"{self._done} of {self._total} completions"
            self.console.print(f"stopped after {done}; run again to resume")

    @property
    def _done(self) -> int:
        return int(self.tasks[0].completed)

    def add(self, records: Sequence[EvaluatedCompletion]) -> None:
        """Takes the records of one more batch."""
        lines = self._done * _PLAIN_LINES // self._total
        self._count(records)
        self.update(self._task, advance=len(records), refresh=True)
        if self.disable and self._done * _PLAIN_LINES // self._total > lines:
            elapsed, made = self.tasks[0].elapsed or 0.0, self._done - self._first
            left = duration(elapsed / made * (self._total - self._done))
            line = f"{self._done}/{self._total} completions  {self.accuracies()}  left {left}"
            self.console.print(line, soft_wrap=True)

    def accuracies(self) -> str:
        """Fractions of right completions so far, of the kind that is being made."""
        kind = "sampled" if self._is_sampled else "greedy"
        shares = "  ".join(
            f"{system} {correct / count:.1%}"
            for (is_sampled, system), (correct, count) in self._counts.items()
            if is_sampled == self._is_sampled
        )
        return f"right, {kind}: {shares}" if shares else ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar and the line under it."""
        yield self.make_tasks_table(self.tasks)
        if line := self.accuracies():
            yield Text(line)

    def _count(self, records: Sequence[EvaluatedCompletion]) -> None:
        for record in records:
            self._is_sampled = record.sample is not None
            key = self._is_sampled, record.system
            correct, count = self._counts.get(key, (0, 0))
            self._counts[key] = correct + record.correct, count + 1
