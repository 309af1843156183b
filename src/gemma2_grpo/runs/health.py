"""Signs that a run is going wrong, from its records alone; thresholds are those that peers use."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

# Single steps are noisy: what is compared with a threshold is a mean over so many.
WINDOW_STEPS = 5
_MEDIAN_STEPS = 100
_FEWEST_NORMS = 10
_CORRELATION_STEPS = 50
_FOLLOWS = 0.5


@dataclass(frozen=True)
class Signal:
    """Something to watch, and from where on it is worth a word."""

    name: str
    warning: float
    critical: float
    """Infinite, or below anything, where there is no such level."""
    what: str
    """Says `{value}` and `{threshold}`."""
    hint: str
    """What to do about it."""
    is_floor: bool = False
    """Too low is bad, not too high."""

    def level(self, value: float) -> Literal["warning", "critical"] | None:
        """How bad a value is; None is fine."""
        if self.is_floor:
            value, warning, critical = -value, -self.warning, -self.critical
            return "critical" if value > critical else "warning" if value > warning else None
        is_critical, is_warning = value >= self.critical, value >= self.warning
        return "critical" if is_critical else "warning" if is_warning else None


@dataclass(frozen=True)
class Alarm:
    """A signal that went, or still is, beyond its threshold."""

    signal: str
    level: Literal["warning", "critical"]
    step: int
    """The first at this level."""
    last_step: int
    """The last at which there was cause for any alarm."""
    steps: int
    """How many gave cause."""
    value: float
    """The worst so far."""
    threshold: float
    what: str
    hint: str


ENTROPY = Signal(
    "entropy",
    0.30,
    0.10,
    "Entropy fell to {value:.0%} of its start (threshold {threshold:.0%})",
    "The policy settles on few answers: lower learning_rate, or raise temperature or epsilon_high.",
    is_floor=True,
)
KL = Signal(
    "kl",
    0.5,
    2.0,
    "KL to the reference model rose to {value:.2f} nats a token (threshold {threshold:g})",
    "The policy moves far from the model it started from: raise beta or lower learning_rate.",
)
UNIFORM_GROUPS = Signal(
    "uniform_groups",
    0.5,
    0.75,
    "{value:.0%} of the groups had rewards without variance (threshold {threshold:.0%})",
    "Such groups teach nothing: take problems that are neither too easy nor too hard, or raise "
    "num_generations or temperature.",
)
CLIP_FRACTION = Signal(
    "clip_fraction",
    0.2,
    0.4,
    "{value:.0%} of the tokens were clipped (threshold {threshold:.0%})",
    "The updates of a step move further than epsilon lets them: lower learning_rate or "
    "num_iterations.",
)
TRUNCATED = Signal(
    "truncated",
    0.05,
    0.15,
    "{value:.0%} of the completions were cut off (threshold {threshold:.0%})",
    "Raise max_completion_tokens, or look whether the model still ends its answers.",
)
LENGTH = Signal(
    "completion_tokens",
    1.5,
    math.inf,
    "Completions grew to {value:.1f} times their first length, and the reward follows their "
    "length (threshold {threshold:g} times)",
    "Read some: are they better, or only longer? Lower length_weight, or mend the reward.",
)
GRAD_NORM = Signal(
    "grad_norm",
    10.0,
    math.inf,
    "The gradient norm was {value:.0f} times its median (threshold {threshold:g} times)",
    "Read the completions of that step; max_grad_norm bounds what it can do. Lower learning_rate "
    "if it happens again.",
)
OVERFITTING = Signal(
    "held_out_gap",
    0.15,
    0.30,
    "The training reward was {value:.2f} above the held-out reward (threshold {threshold:g})",
    "The policy learns its training problems by heart: train on more of them (num_train_samples) "
    "or for fewer steps.",
)
LEFT_OUT = Signal(
    "updates_left_out",
    1.0,
    math.inf,
    "{value:.0f} updates of one step had a loss or gradient that is no number, and were left out",
    'Lower learning_rate; if it goes on, set dtype = "float32".',
)


class _Series:
    """The beginning and the end of a metric's values."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=2 * WINDOW_STEPS)

    def append(self, value: float) -> None:
        if len(self._first) < WINDOW_STEPS:
            self._first.append(value)
        self._last.append(value)

    @property
    def start(self) -> float:
        return math.fsum(self._first) / max(len(self._first), 1)

    @property
    def mean(self) -> float | None:
        """Of the last steps; None while they are too few."""
        last = list(self._last)[-WINDOW_STEPS:]
        return math.fsum(last) / WINDOW_STEPS if len(last) == WINDOW_STEPS else None

    @property
    def is_rising(self) -> bool:
        """Whether the last steps are above those before them, or above the first if none were."""
        last = list(self._last)
        before, now = last[:-WINDOW_STEPS], last[-WINDOW_STEPS:]
        return statistics.fmean(now) > (statistics.fmean(before) if before else now[0])


class Health:
    """Watches a run step by step; a step costs the same however long the run is."""

    def __init__(self) -> None:
        self._alarms: dict[str, Alarm] = {}
        names = "entropy kl uniform_groups clip_fraction truncated completion_tokens reward"
        self._series = {name: _Series() for name in names.split()}
        self._norms: deque[float] = deque(maxlen=_MEDIAN_STEPS)
        self._pairs: deque[tuple[float, float]] = deque(maxlen=_CORRELATION_STEPS)
        self._step = 0

    @property
    def alarms(self) -> list[Alarm]:
        """All so far: critical ones first, then in the order of their steps."""
        return sorted(self._alarms.values(), key=lambda a: (a.level != "critical", a.step))

    @property
    def active(self) -> list[Alarm]:
        """Those that the last step gave cause for."""
        return [alarm for alarm in self.alarms if alarm.last_step == self._step]

    def add(self, record: Mapping[str, Any]) -> list[Alarm]:
        """Takes the record of a step (see `step_record`); missing values are no cause for alarm.

        Returns:
            The alarms that are new with it, or have become critical.
        """
        self._step = int(number(record, "step") or self._step + 1)
        for name, series in self._series.items():
            value = number(record, name)
            if value is not None:
                series.append(value)
        readings = [*self._levels(record), *self._growth(record), *self._spikes(record)]
        return self._raise(readings)

    def add_evaluation(self, record: Mapping[str, Any]) -> list[Alarm]:
        """Takes a measurement on held-out problems, after the steps before it.

        Returns:
            The alarms that are new with it, or have become critical.
        """
        # Sampled like the training reward, where that was measured.
        sampled = record.get("sampled")
        held_out = number(sampled if isinstance(sampled, Mapping) else record, "reward")
        train = self._series["reward"].mean
        if held_out is None or train is None or not number(record, "step"):
            return []
        return self._raise([(OVERFITTING, train - held_out)])

    def _levels(self, record: Mapping[str, Any]) -> Iterator[tuple[Signal, float]]:
        """Means over the last steps, where there are enough."""
        for signal in (UNIFORM_GROUPS, TRUNCATED, KL, CLIP_FRACTION):
            series = self._series[signal.name]
            is_due = (
                series.is_rising
                if signal is KL and series.mean is not None
                # One update per batch cannot be clipped.
                else signal is not CLIP_FRACTION or (number(record, "updates") or 0) > 1
            )
            if series.mean is not None and is_due:
                yield signal, series.mean

    def _growth(self, record: Mapping[str, Any]) -> Iterator[tuple[Signal, float]]:
        """Means over the last steps as a part of those over the first."""
        entropy, length = self._series["entropy"], self._series["completion_tokens"]
        if entropy.mean is not None and entropy.start > 0:
            yield ENTROPY, entropy.mean / entropy.start
        pair = number(record, "completion_tokens"), number(record, "reward")
        if pair[0] is not None and pair[1] is not None:
            self._pairs.append((pair[0], pair[1]))
        if length.mean is not None and length.start > 0 and self._reward_follows_length():
            yield LENGTH, length.mean / length.start

    def _reward_follows_length(self) -> bool:
        try:
            return statistics.correlation(*zip(*self._pairs, strict=True)) >= _FOLLOWS
        except (statistics.StatisticsError, TypeError):  # Too few, or all alike.
            return False

    def _spikes(self, record: Mapping[str, Any]) -> Iterator[tuple[Signal, float]]:
        """What one step is enough for."""
        norm, left_out = number(record, "grad_norm"), number(record, "updates_left_out")
        if norm:  # Without one, no group had anything to teach.
            if len(self._norms) >= _FEWEST_NORMS:
                yield GRAD_NORM, norm / statistics.median(self._norms)
            self._norms.append(norm)
        if left_out:
            yield LEFT_OUT, left_out

    def _raise(self, readings: Iterable[tuple[Signal, float]]) -> list[Alarm]:
        news = []
        for signal, value in readings:
            level = signal.level(value)
            if level is None:
                continue
            before = self._alarms.get(signal.name)
            alarm = self._alarms[signal.name] = self._alarm(signal, level, value, before)
            if before is None or before.level != alarm.level:
                news.append(alarm)
        return news

    def _alarm(
        self,
        signal: Signal,
        level: Literal["warning", "critical"],
        value: float,
        before: Alarm | None,
    ) -> Alarm:
        """The alarm as it is with one more cause."""
        if before is not None:
            value = min(before.value, value) if signal.is_floor else max(before.value, value)
        threshold = signal.critical if level == "critical" else signal.warning
        alarm = Alarm(
            signal=signal.name,
            level=level,
            step=self._step,
            last_step=self._step,
            steps=before.steps + 1 if before else 1,
            value=value,
            threshold=threshold,
            what=signal.what.format(value=value, threshold=threshold),
            hint=signal.hint,
        )
        if before is None or (before.level, level) == ("warning", "critical"):
            return alarm
        kept = signal.critical if before.level == "critical" else signal.warning
        return replace(
            alarm,
            level=before.level,
            step=before.step,
            threshold=kept,
            what=signal.what.format(value=value, threshold=kept),
        )


def find_alarms(
    records: Iterable[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]] = ()
) -> list[Alarm]:
    """Alarms of a whole run: critical ones first, then in the order of their steps.

    Args:
        records: Of metrics.jsonl, in order.
        evaluations: Of evaluations.jsonl; each is taken after the step that it was made after.
    """
    health = Health()
    waiting = deque(sorted(evaluations, key=lambda record: number(record, "step") or 0))
    for record in records:
        while waiting and (number(waiting[0], "step") or 0) < (number(record, "step") or 0):
            health.add_evaluation(waiting.popleft())
        health.add(record)
    for evaluation in waiting:
        health.add_evaluation(evaluation)
    return health.alarms


def number(record: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a record; None if it is absent, or something else."""
    value = record.get(name)
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # An integer of hundreds of digits.
        return None
