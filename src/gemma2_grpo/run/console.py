"""The terminal output of runs and evaluations: plan, progress, completions and tables."""

import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from unicodedata import category

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gemma2_grpo.config import ModelConfig
from gemma2_grpo.run.outcome import Result, measure_rows, step_rows
from gemma2_grpo.run.panel import TrainingPanel, in_words, step_line
from gemma2_grpo.run.results import ADAPTER, BASE, Evaluation, Rise, RunResult, System
from gemma2_grpo.run.schema import ScoredCompletion, StepRecord
from gemma2_grpo.task.equations.find import find_equations
from gemma2_grpo.task.prompts import ANSWER_END, ANSWER_START, REASONING_END, REASONING_START
from gemma2_grpo.task.rewards import RISING
from gemma2_grpo.task.statistics import Paired

# Off a terminal there is no width to keep to; a log should not be wrapped early.
_LOG_WIDTH = 100

_STYLES = {REASONING_START: "", REASONING_END: "dim", ANSWER_START: "bold", ANSWER_END: "dim"}
"""Style of the text after each tag."""
_TAG = re.compile("|".join(map(re.escape, _STYLES)))
TRUE_MARK, FALSE_MARK = "✓", "✗"


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
        """Writes to standard output by default."""
        self.console = console or open_console()
        self._panel: TrainingPanel | None = None

    @classmethod
    def silent(cls) -> "Display":
        """A display that shows nothing, for all processes but the first."""
        return cls(Console(file=io.StringIO(), quiet=True))

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
    def measuring(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows the progress of a measurement; yields what to call with each batch's size."""
        # A terminal has one live display at a time.
        if not self.console.is_terminal or self._panel:
            self.console.print(f"{label} ...")
            yield lambda done: None
            return
        with self._bar(is_transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.advance(task, done)

    def _bar(self, *, is_transient: bool = False) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        return Progress(
            *columns, TimeRemainingColumn(), console=self.console, transient=is_transient
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

    def _print_step(self, record: StepRecord, new: Sequence[str], total: int) -> None:
        self.console.print(step_line(record, total), soft_wrap=True)
        for alarm in new:
            self.console.print(f"  ! {inert(alarm)}", soft_wrap=True)

    def sample(self, step: int, scored: ScoredCompletion) -> None:
        """Shows one completion with its scores."""
        shown = {name: scored.components[name] for name in RISING} | {"reward": scored.reward}
        parts = "  ".join(
            f"{name} {'none' if value is None else f'{value:.2f}'}" for name, value in shown.items()
        )
        question = Text(without_controls(scored.question), "dim")
        body = Group(question, *render_completion(scored.completion))
        self.console.print(Panel(body, title=f"step {step}: {parts}", title_align="left"))

    def held_out(self, step: int, measured: System, solution_nll: float | None = None) -> None:
        """Shows a measurement during training; of a supervised one with the held-out loss."""
        if self._panel:
            self._panel.held_out(step, measured)
        self.console.print(
            f"step {step}: held-out accuracy {in_words(measured)}, "
            f"format {measured.greedy.perfect_format_fraction:.1%}"
            + ("" if solution_nll is None else f", loss {solution_nll:.4f}")
        )

    def result(self, result: RunResult) -> None:
        """Shows the measurements of a finished run."""
        self.before_and_after(result.before, result.after)
        self.rises(result.rises)

    def before_and_after(self, before: System, after: System) -> None:
        """Shows two measurements side by side."""
        results = [Result("before", before), Result("after", after)]
        self._measures(f"{before.greedy.num_problems} held-out problems", results)

    def _measures(self, title: str, results: Sequence[Result]) -> None:
        """Shows a table of all measures, within 80 columns."""
        heads = [result.label for result in results] + ["change"] * (len(results) == 2)
        table = Table(title=inert(title), title_justify="left")
        for name in ("", *heads):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        for row in measure_rows(results, with_change=True):
            table.add_row(*row)
        for steps, count, *cells in step_rows(results, with_change=True):
            table.add_row(f"Right, {steps} ({count} problems)", *cells)
        self.console.print(table)

    def rises(self, rises: Sequence[Rise]) -> None:
        """Shows at which step each reward component had made half of its way."""
        for rise in rises:
            half = rise.half_way_step
            when = f"half-way at step {half}" if half is not None else "no rise"
            self.console.print(f"{rise.name:>9}: {rise.first:.2f} to {rise.last:.2f}, {when}")

    def evaluation(self, result: Evaluation) -> None:
        """Shows the systems of an evaluation side by side."""
        data, systems = result.data, result.systems
        dropped = f", {data.num_dropped} too long, dropped" if data.num_dropped else ""
        title = f"{data.num_problems} {data.source} {data.split} problems{dropped}"
        if sampled := next(iter(systems.values())).sampled:
            title += f"\n{sampled.num_samples} sample{'s' if sampled.num_samples > 1 else ''}"
            title += f", temperature {result.settings['temperature']:g}"
        self.console.print()
        self._measures(title, [Result(name, system) for name, system in systems.items()])
        self.console.print()
        if result.comparison:
            self.console.print(_compared(result.comparison))


def _compared(paired: Paired) -> str:
    p_value = paired.p_value
    p_text = f"p = {p_value:.3f}" if p_value >= 0.001 else f"p = {p_value:.0e}"
    return (
        f"{BASE} and {ADAPTER} on the same problems, greedy: {paired.num_fixed} fixed, "
        f"{paired.num_broken} broken,\n{paired.num_both_right} right by both, "
        f"{paired.num_both_wrong} wrong by both; McNemar's exact test: {p_text}"
    )


def inert(text: str) -> str:
    """Text that neither rich nor a terminal takes for instructions."""
    return escape(without_controls(text))


def render_completion(text: str) -> list[Text]:
    """The lines of a completion, each with its marks; hostile text takes no effect.

    A line that is whole is rendered alike however much text follows it.
    """
    marks = {
        equation.end: (TRUE_MARK, "green") if equation.is_true else (FALSE_MARK, "bold red")
        for equation in find_equations(text)
    }
    text = without_controls(text)
    tags = {tag.start(): tag for tag in _TAG.finditer(text)}
    edges = sorted({0, *marks, *tags, *(tag.end() for tag in tags.values())})
    rendered, style = Text(), "dim"
    for start, end in zip(edges, [*edges[1:], len(text)], strict=True):
        if start in marks:
            mark, colour = marks[start]
            rendered.append(f" {mark}", colour)
        tag = tags.get(start)
        rendered.append(text[start:end], "cyan" if tag else style)
        style = _STYLES[tag[0]] if tag else style
    return list(rendered.split("\n", allow_blank=True))


def without_controls(text: str) -> str:
    """Text of the same length without the characters that a terminal would act on."""
    controls = {c: "\ufffd" for c in text if category(c).startswith("C") and c not in "\n\t"}
    return text.translate(str.maketrans(controls))
