"""Charts of a report: the metrics of one run, or of two, over their steps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from gemma2_grpo.run.files import RunFiles
from gemma2_grpo.run.health import CLIP_FRACTION, KL, TRUNCATED, UNIFORM_GROUPS
from gemma2_grpo.run.outcome import percent
from gemma2_grpo.run.schema import StepRecord
from gemma2_grpo.task.rewards import COMPONENTS

_MAX_BINS = 150
_MEAN_PARTS = 10
_MAX_MEAN_STEPS = 50


@dataclass(frozen=True)
class Curve:
    """A metric over steps."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    look: int = 0
    """Index of colour and dashes."""
    intervals: Sequence[tuple[float, float]] = ()
    """Drawn as whiskers; the values are then points, joined but not averaged."""


@dataclass(frozen=True)
class Chart:
    """One small plot."""

    name: str
    """Name of the file, and of the metric if the chart is of one."""
    title: str
    unit: str
    curves: Sequence[Curve] = ()
    limit: float | None = None
    """Threshold above which an alarm is raised."""
    top: float | None = None
    """Upper end of the axis, unless values are higher."""
    note: str = ""

    @property
    def is_share(self) -> bool:
        """Whether values in [0, 1] are shown in per cent."""
        return self.unit.startswith("%")

    def show(self, value: float) -> str:
        """A value for people to read."""
        if self.is_share:
            return percent(value, 0 if value >= 0.1 or value == 0 else 1)
        size = abs(value)
        if size and not 0.1 <= size < 1e7:
            return f"{value:.2g}"
        return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}"

    @property
    def description(self) -> str:
        """Text alternative of the plot, for screen readers."""
        parts = [
            f"{curve.label} from {self.show(curve.values[0])} at step {curve.steps[0]:.0f} to "
            f"{self.show(curve.values[-1])} at step {curve.steps[-1]:.0f}, lowest "
            f"{self.show(min(curve.values))}, highest {self.show(max(curve.values))}"
            for curve in self.curves
        ]
        return f"{self.title}, {self.unit}: {'; '.join(parts)}."


_SOLUTION_NLL = Chart("solution_nll", "Loss on worked solutions", "nats per token")
_METRICS = (
    _SOLUTION_NLL,
    Chart("kl", "KL to the reference model", "nats per token", limit=KL.warning),
    Chart("sampling_kl", "KL of the rollout to the policy", "nats per token"),
    Chart("entropy", "Entropy of the policy", "nats per token"),
    Chart("clip_fraction", "Clip fraction", "% of tokens", limit=CLIP_FRACTION.warning),
    Chart("mean_completion_tokens", "Length", "tokens per completion"),
    Chart(
        "truncated_fraction", "Cut off at the limit", "% of completions", limit=TRUNCATED.warning
    ),
    Chart(
        "uniform_groups_fraction",
        "Groups without variance",
        "% of groups",
        limit=UNIFORM_GROUPS.warning,
    ),
    Chart("grad_norm", "Gradient norm", "before clipping"),
)
_REWARDS = {
    "mean_reward": "total",
    **{f"mean_components.{name}": name.replace("_", "-") for name in (*COMPONENTS, "custom")},
}
"""Metrics of the reward, and what a chart calls them."""


def charts_of_run(run: RunFiles) -> list[Chart]:
    """Charts of learning: rewards, accuracy and metrics; empty before the first step."""
    if run.is_supervised:
        return _charts_of_solutions(run)
    curves = [
        _curve(run, name, spoken, look)
        for look, (name, spoken) in enumerate(_REWARDS.items())
        if _is_earned([run], name)
    ]
    was_corrected = any(curve.label == "self-correction" for curve in curves)
    rewards = Chart(
        "reward",
        "Reward by component",
        "mean, each before its weight",
        curves,
        top=1.05,
        note="" if was_corrected else "Self-correction was never earned.",
    )
    held_out = _accuracy([run], ["held-out"])
    curves = [*held_out.curves, _curve(run, "correct_fraction", "training", look=2)]
    note = f"{held_out.note.rstrip('.')}; training sampled."
    accuracy = replace(held_out, curves=curves, note=note)
    return _not_empty([rewards, accuracy, *_metrics([run], [""])])


def _charts_of_solutions(run: RunFiles) -> list[Chart]:
    """Charts of supervised training, in which nothing is sampled and no reward counts."""
    measured = [each for each in run.evaluations if each.solution_nll is not None]
    losses = [each.solution_nll or 0.0 for each in measured]
    held_out = Curve("held-out", [each.step for each in measured], losses, look=1)
    training = _curve(run, _SOLUTION_NLL.name, "training", look=2)
    wanted = ("entropy", "mean_completion_tokens", "grad_norm")
    metrics = _metrics([run], [""], [chart for chart in _METRICS if chart.name in wanted])
    loss = replace(_SOLUTION_NLL, curves=[held_out, training])
    return _not_empty([loss, _accuracy([run], ["held-out"]), *metrics])


def charts_of_runs(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Chart]:
    """Charts of learning of several runs, each with a curve for every run."""
    rewards = [
        Chart(name, f"Reward: {spoken}", "mean, before its weight")
        for name, spoken in _REWARDS.items()
        if _is_earned(runs, name)
    ]
    return _not_empty([_accuracy(runs, names), *_metrics(runs, names, [*rewards, *_METRICS])])


def charts_of_speed(run: RunFiles) -> list[Chart]:
    """Charts of the time of a step; the first steps, which compile, are left out."""
    run = replace(run, metrics=run.metrics[2:])
    names = ("rollout", "update", "reward")
    times = [_curve(run, f"{name}_seconds", name, look) for look, name in enumerate(names, 1)]
    speed = [_curve(run, "tokens_per_second", "", look=1)]
    note = "Without the first two steps, which compile."
    charts = [
        Chart("seconds", "Time of a step", "seconds", times, note=note),
        Chart("tokens_per_second", "Speed of the rollout", "tokens per second", speed),
    ]
    return _not_empty(charts)


def _not_empty(charts: Iterable[Chart]) -> list[Chart]:
    """Leaves out what has not been recorded."""
    kept = [replace(chart, curves=[c for c in chart.curves if c.values]) for chart in charts]
    return [chart for chart in kept if chart.curves]


def _is_earned(runs: Sequence[RunFiles], name: str) -> bool:
    return any(record.get(name) for run in runs for record in run.metrics)


def _accuracy(runs: Sequence[RunFiles], names: Sequence[str]) -> Chart:
    """Held-out accuracy."""
    curves = []
    for look, (run, name) in enumerate(zip(runs, names, strict=True), 1):
        steps = [each.step for each in run.evaluations]
        greedy = [each.greedy for each in run.evaluations]
        shares = [each.correct_fraction for each in greedy]
        intervals = [each.correct_fraction_interval for each in greedy]
        curves.append(Curve(name, steps, shares, look, intervals))
    note = "Held-out greedy, with 95\u00a0% intervals."
    return Chart("accuracy", "Accuracy", "% of answers", curves, top=1.0, note=note)


def _metrics(
    runs: Sequence[RunFiles], names: Sequence[str], charts: Sequence[Chart] = _METRICS
) -> list[Chart]:
    """Fills charts that are named as their metric with a curve of each run."""
    updates = {record.get("num_updates") for run in runs for record in run.metrics}
    filled = []
    for chart in (*charts, *_added_charts(runs)):
        labelled = enumerate(zip(runs, names, strict=True), 1)
        curves = [_curve(run, chart.name, name, look) for look, (run, name) in labelled]
        is_unclipped = chart.name == "clip_fraction" and updates <= {0.0, 1.0}
        note = "With one update per batch nothing can be clipped." if is_unclipped else ""
        filled.append(replace(chart, curves=curves, note=note))
    return filled


def _added_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Charts of the metrics of the updates that the schema does not name, in alphabetical order."""
    names = {name for run in runs for record in run.metrics for name in record if "." not in name}
    charts = []
    for name in sorted(names - set(StepRecord.model_fields)):
        title = name.removesuffix("_fraction").replace("_", " ").capitalize()
        unit = "%, last update" if name.endswith("_fraction") else "last update of a step"
        charts.append(Chart(name, title, unit))
    return charts


def _curve(run: RunFiles, metric: str, label: str, look: int) -> Curve:
    """A metric, without steps that have none."""
    known = [record for record in run.metrics if metric in record]
    return Curve(label, [r["step"] for r in known], [r[metric] for r in known], look)


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Centred means over a tenth of the values; over fewer at the ends."""
    half = min(len(values) // _MEAN_PARTS, _MAX_MEAN_STEPS) // 2
    window = np.ones(2 * half + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def thin_out(steps: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """A long curve by the lowest and highest value of each of its parts: no spike is lost."""
    x, y = np.asarray(steps), np.asarray(values)
    if len(y) <= 2 * _MAX_BINS:
        return x, y
    parts = np.array_split(np.arange(len(y)), _MAX_BINS)
    extremes = [part[pick(y[part])] for part in parts for pick in (np.argmin, np.argmax)]
    kept = np.unique([0, *extremes, len(y) - 1])
    return x[kept], y[kept]
