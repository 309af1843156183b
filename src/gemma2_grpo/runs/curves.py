"""What the charts of a report show: the metrics of one run, or of two, over their steps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gemma2_grpo.runs.health import (
    CLIP_FRACTION,
    KL,
    TRUNCATED,
    UNIFORM_GROUPS,
    number,
)
from gemma2_grpo.runs.outcome import percent
from gemma2_grpo.runs.run_files import RunFiles
from gemma2_grpo.task.rewards import COMPONENTS
from gemma2_grpo.task.statistics import wilson_interval

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
    """Which colour and dashes."""
    intervals: Sequence[tuple[float, float]] = ()
    """Drawn as whiskers; the values are then points, joined but not averaged."""


@dataclass(frozen=True)
class Chart:
    """One small plot."""

    name: str
    """Of its file."""
    title: str
    unit: str
    curves: Sequence[Curve]
    is_share: bool = False
    """Values are shown in per cent."""
    limit: float | None = None
    """Above which an alarm would be raised."""
    top: float | None = None
    """Where the axis ends, unless values are higher."""
    note: str = ""

    def show(self, value: float) -> str:
        """A value for people to read."""
        if self.is_share:
            return percent(value, 0 if value >= 0.1 or value == 0 else 1)
        size = abs(value)
        decimals = 0 if size >= 100 else 1 if size >= 10 else 2
        return f"{value:,.{decimals}f}" if size >= 0.1 or not size else f"{value:.2g}"

    @property
    def description(self) -> str:
        """What the plot says, for those who cannot see it."""
        parts = [
            f"{curve.label} from {self.show(curve.values[0])} at step {curve.steps[0]:.0f} to "
            f"{self.show(curve.values[-1])} at step {curve.steps[-1]:.0f}, lowest "
            f"{self.show(min(curve.values))}, highest {self.show(max(curve.values))}"
            for curve in self.curves
        ]
        return f"{self.title}, {self.unit}: {'; '.join(parts)}."


# Name, title, unit, whether a share, and the threshold of the alarm.
_METRICS: tuple[tuple[str, str, str, bool, float | None], ...] = (
    ("kl", "KL to the reference model", "nats per token", False, KL.warning),
    ("entropy", "Entropy of the policy", "nats per token", False, None),
    ("clip_fraction", "Clip fraction", "% of tokens", True, CLIP_FRACTION.warning),
    ("completion_tokens", "Length", "tokens per completion", False, None),
    ("truncated", "Cut off at the limit", "% of completions", True, TRUNCATED.warning),
    ("uniform_groups", "Groups without variance", "% of groups", True, UNIFORM_GROUPS.warning),
    ("grad_norm", "Gradient norm", "before clipping", False, None),
)


def charts_of_run(run: RunFiles) -> list[Chart]:
    """How a run learned, in small plots; empty before its first step."""
    charts = [_rewards(run), _accuracy([run])]
    charts += [_metric([run], *metric) for metric in _METRICS]
    return [chart for chart in charts if chart.curves]


def charts_of_runs(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Chart]:
    """The same of several runs, each plot with a curve for each of them."""
    scores = [("reward", "Reward, total")]
    scores += [(n, f"Reward: {_spoken(n)}") for n in COMPONENTS if _is_earned(runs, n)]
    metrics = [(name, title, "mean, before its weight", False, None) for name, title in scores]
    charts = [_accuracy(runs, names)]
    charts += [_metric(runs, *metric, names=names) for metric in (*metrics, *_METRICS)]
    return [chart for chart in charts if chart.curves]


def charts_of_speed(run: RunFiles) -> list[Chart]:
    """What a step took, in small plots; the first steps, which compile, are left out."""
    records = run.metrics[2:] if len(run.metrics) > 2 else []
    phases = [("rollout", 1), ("update", 2), ("reward", 3)]
    times = [Curve(name, *series(records, f"{name}_seconds"), look) for name, look in phases]
    speed = Curve("", *series(records, "tokens_per_second"), look=1)
    note = "Without the first two steps, which compile."
    charts = [
        Chart("seconds", "Time of a step", "seconds", times, note=note),
        Chart("tokens_per_second", "Speed of the rollout", "tokens per second", [speed]),
    ]
    kept = [replace(c, curves=[curve for curve in c.curves if curve.values]) for c in charts]
    return [chart for chart in kept if chart.curves]


def _spoken(name: str) -> str:
    return name.replace("self_correction", "self-correction").replace("_", " ")


def _is_earned(runs: Sequence[RunFiles], name: str) -> bool:
    return any(number(record, name) for run in runs for record in run.metrics)


def _rewards(run: RunFiles) -> Chart:
    names = ["reward", "format", "logic", "accuracy", "length", "self_correction", "custom"]
    earned = [name for name in names if _is_earned([run], name)]
    curves = [
        Curve("total" if name == "reward" else _spoken(name), *series(run.metrics, name), look=look)
        for look, name in enumerate(names)
        if name in earned
    ]
    never = "" if "self_correction" in earned else "Self-correction was never earned."
    return Chart(
        "reward",
        "Reward by component",
        "mean, each before its weight",
        curves,
        top=1.05,
        note=never,
    )


def _accuracy(runs: Sequence[RunFiles], names: Sequence[str] = ("held-out",)) -> Chart:
    """Held-out accuracy; of one run also that of training."""
    curves = []
    for look, (run, name) in enumerate(zip(runs, names, strict=True)):
        counts = [
            (record["step"], correct, problems)
            for record in run.evaluations
            if (problems := number(record, "problems"))
            and 0 <= (correct := number(record, "correct") or 0) <= problems
        ]
        if counts:
            steps, right, all_ = zip(*counts, strict=True)
            shares = [a / b for a, b in zip(right, all_, strict=True)]
            whiskers = [wilson_interval(int(a), int(b)) for a, b in zip(right, all_, strict=True)]
            curves.append(Curve(name, steps, shares, look + 1, whiskers))
    if len(runs) == 1 and runs[0].metrics:
        steps, values = series(runs[0].metrics, "correct")
        if values:
            curves.append(Curve("training", steps, values, look=2))
    note = "Held-out greedy, with 95\u00a0% intervals"
    note += "; training sampled." if len(runs) == 1 else "."
    return Chart("accuracy", "Accuracy", "% of answers", curves, is_share=True, top=1.0, note=note)


def _metric(
    runs: Sequence[RunFiles],
    field: str,
    title: str,
    unit: str,
    is_share: bool,
    limit: float | None,
    *,
    names: Sequence[str] = ("",),
) -> Chart:
    curves = []
    for look, (run, name) in enumerate(zip(runs, names, strict=True)):
        steps, values = series(run.metrics, field)
        if values:
            curves.append(Curve(name, steps, values, look + 1))
    note = ""
    updates = {number(record, "updates") for run in runs for record in run.metrics}
    if field == "clip_fraction" and updates <= {0.0, 1.0}:
        note = "With one update per batch nothing can be clipped."
    return Chart(field, title, unit, curves, is_share, limit, note=note)


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, without steps that have none."""
    pairs = [(float(record["step"]), number(record, name)) for record in records]
    known = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in known], [value for _, value in known]


def smooth(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and centred means, over a tenth of the steps; fewer at the ends."""
    steps, values = np.asarray(curve.steps), np.asarray(curve.values, np.float64)
    half = min(len(values) // _MEAN_PARTS, _MAX_MEAN_STEPS) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    means = (sums[high] - sums[low]) / (high - low)
    every = max(1, len(values) // (2 * _MAX_BINS))
    kept = np.unique([*at[::every], len(values) - 1])
    return steps[kept], means[kept]


def thin_out(curve: Curve) -> tuple[list[float], list[float]]:
    """A long curve by the lowest and highest value of each of its parts: no spike is lost."""
    if len(curve.values) <= 2 * _MAX_BINS:
        return list(curve.steps), list(curve.values)
    kept = sorted(set(_extremes(np.asarray(curve.values))))
    return [curve.steps[i] for i in kept], [curve.values[i] for i in kept]


def _extremes(values: np.ndarray) -> Iterator[int]:
    for part in np.array_split(np.arange(len(values)), _MAX_BINS):
        yield int(part[values[part].argmin()])
        yield int(part[values[part].argmax()])
