"""Medians, and ratios of rounds that were run side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.session import StepReport

PHASES = ("rollout", "reference", "update", "step")
Clock = str
"""`cpu` or `wall`."""


@dataclass(frozen=True)
class Ratio:
    """A median of ratios and their range."""

    median: float
    low: float
    high: float


def seconds(reports: Sequence[StepReport], phase: str, clock: Clock) -> list[float]:
    """Seconds of a phase in each step; 0 where a system has no such phase."""
    return [
        getattr(report.seconds[phase], clock) if phase in report.seconds else 0.0
        for report in reports
    ]


def median_seconds(reports: Sequence[StepReport], phase: str, clock: Clock) -> float:
    """Median over steps."""
    return median(seconds(reports, phase, clock))


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Ratio | None:
    """Ratios of values to those of the same round; None where the base took no time."""
    if not base or min(base) <= 0:
        return None
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def tokens_per_second(reports: Sequence[StepReport]) -> float:
    """Completion tokens by the wall seconds of the whole step, median over steps."""
    return median(report.completion_tokens / report.seconds["step"].wall for report in reports)
