"""Signs that a run is going wrong, from its records alone; thresholds are those that peers use."""

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Literal

from gemma2_grpo.run.results import Measurement
from gemma2_grpo.run.schema import Numbers, numbers

# Single steps are noisy: what is compared with a threshold is a mean over so many.
WINDOW_STEPS = 5
_RECENT_STEPS = 100
_FEWEST_NORMS = 10
_CORRELATION_STEPS = 50
_FOLLOWS = 0.5


@dataclass(frozen=True)
class Signal:
    """A metric to watch, with the thresholds of its alarms."""

    name: str
    warning: float
    critical: float
    """Threshold of the critical level; infinite if there is none."""
    what: str
    """Says `{value}` and `{threshold}`."""
    hint: str
    """Advice on what to change."""
    is_floor: bool = False
    """Too low is bad, not too high."""

    def level(self, value: float) -> Literal["warning", "critical"] | None:
        """Severity of a value; None if it is fine."""

        def is_beyond(threshold: float) -> bool:
            return value < threshold if self.is_floor else value >= threshold

        if is_beyond(self.critical):
            return "critical"
        return "warning" if is_beyond(self.warning) else None


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
    "uniform_groups_fraction",
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
    "truncated_fraction",
    0.05,
    0.15,
    "{value:.0%} of the completions were cut off (threshold {threshold:.0%})",
    "Raise max_completion_tokens, or look whether the model still ends its answers.",
)
LENGTH = Signal(
    "mean_completion_tokens",
    1.5,
    math.inf,
    "Completions grew to {value:.1f} times their first length, and the reward follows their "
    "length (threshold {threshold:g} times)",
    "Read some: are they better, or only longer? Lower length_weight, or fix the reward.",
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
    "num_updates_left_out",
    1.0,
    math.inf,
    "{value:.0f} updates of one step had a gradient without a finite norm, and were left out",
    'Lower learning_rate; if it happens again, set dtype = "float32".',
)


@dataclass
class Alarm:
    """A signal that went, or still is, beyond its threshold."""

    signal: Signal
    level: Literal["warning", "critical"]
    step: int
    """First step at this level."""
    value: float
    """Worst value so far."""
    last_step: int = 0
    """Last step that gave cause for an alarm."""
    steps: int = 0
    """Number of steps that gave cause for an alarm."""

    @property
    def what(self) -> str:
        """Message of the alarm."""
        signal = self.signal
        threshold = signal.critical if self.level == "critical" else signal.warning
        return signal.what.format(value=self.value, threshold=threshold)


class Health:
    """Watches a run step by step; a step costs the same however long the run is."""

    def __init__(self) -> None:
        self._alarms: dict[str, Alarm] = {}
        self._first: dict[str, list[float]] = defaultdict(list)
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT_STEPS))
        self._lengths_and_rewards: deque[tuple[float, float]] = deque(maxlen=_CORRELATION_STEPS)
        self._step = 0

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms so far: critical ones first, then in the order of their steps."""
        return sorted(self._alarms.values(), key=lambda a: (a.level != "critical", a.step))

    @property
    def active(self) -> list[Alarm]:
        """Alarms that the last step gave cause for."""
        return [alarm for alarm in self.alarms if alarm.last_step == self._step]

    def add(self, record: Mapping[str, object]) -> list[Alarm]:
        """Takes the fields of a `StepRecord`; missing values are no cause for alarm.

        Returns:
            The alarms that are new with it, or have become critical.
        """
        step = numbers(record)
        self._step = int(step.get("step", self._step + 1))
        for name, value in step.items():
            self._recent[name].append(value)
            if len(self._first[name]) < WINDOW_STEPS:
                self._first[name].append(value)
        if LENGTH.name in step and "mean_reward" in step:
            self._lengths_and_rewards.append((step[LENGTH.name], step["mean_reward"]))
        readings = {
            UNIFORM_GROUPS: self._mean(UNIFORM_GROUPS.name),
            TRUNCATED: self._mean(TRUNCATED.name),
            KL: self._mean("kl") if self._is_rising("kl") else None,
            # One update per batch cannot be clipped.
            CLIP_FRACTION: self._mean("clip_fraction") if step.get("num_updates", 0) > 1 else None,
            ENTROPY: self._growth("entropy"),
            LENGTH: self._growth(LENGTH.name) if self._reward_follows_length() else None,
            GRAD_NORM: self._spike(step.get("grad_norm", 0.0)),
            LEFT_OUT: step.get(LEFT_OUT.name),
        }
        return self._raise(readings)

    def add_measurement(self, measured: Measurement) -> list[Alarm]:
        """Takes a measurement on held-out problems, after the steps before it.

        Returns:
            The alarms that are new with it, or have become critical.
        """
        train = self._mean("mean_reward")
        # Sampled like the training reward, where that was measured.
        held_out = (measured.sampled or measured.greedy).mean_reward
        if held_out is None or train is None or not measured.step:
            return []
        return self._raise({OVERFITTING: train - held_out})

    def _mean(self, name: str) -> float | None:
        """Mean of a metric over the last steps; None while they are too few."""
        last = list(self._recent[name])[-WINDOW_STEPS:]
        return statistics.fmean(last) if len(last) == WINDOW_STEPS else None

    def _is_rising(self, name: str) -> bool:
        """Whether the last steps are above those before them, or above the first if none were."""
        last = list(self._recent[name])[-2 * WINDOW_STEPS :]
        level = self._mean(name)
        if level is None:
            return False
        base = statistics.fmean(last[:-WINDOW_STEPS] or last[:1])
        return level > base and not math.isclose(level, base)

    def _growth(self, name: str) -> float | None:
        """The mean over the last steps as a part of that over the first."""
        mean, start = self._mean(name), math.fsum(self._first[name]) / WINDOW_STEPS
        return mean / start if mean is not None and start > 0 else None

    def _reward_follows_length(self) -> bool:
        try:
            lengths, rewards = zip(*self._lengths_and_rewards, strict=True)
            return statistics.correlation(lengths, rewards) >= _FOLLOWS
        except (statistics.StatisticsError, ValueError):  # Too few, or all alike.
            return False

    def _spike(self, norm: float) -> float | None:
        """The gradient norm by its median; without a norm, no group had anything to teach."""
        before = [value for value in list(self._recent["grad_norm"])[:-1] if value]
        return norm / statistics.median(before) if norm and len(before) >= _FEWEST_NORMS else None

    def _raise(self, readings: Mapping[Signal, float | None]) -> list[Alarm]:
        news = []
        for signal, value in readings.items():
            if value is None or (level := signal.level(value)) is None:
                continue
            alarm = self._alarms.get(signal.name)
            if alarm is None or (alarm.level, level) == ("warning", "critical"):
                steps = alarm.steps if alarm else 0
                alarm = Alarm(signal, level, self._step, value, steps=steps)
                self._alarms[signal.name] = alarm
                news.append(alarm)
            alarm.value = (min if signal.is_floor else max)(alarm.value, value)
            alarm.last_step = self._step
            alarm.steps += 1
        return news


def find_alarms(
    records: Iterable[Numbers], measurements: Iterable[Measurement] = ()
) -> list[Alarm]:
    """Alarms of a whole run: critical ones first, then in the order of their steps.

    Args:
        records: Fields of metrics.jsonl, in order.
        measurements: Those of the run; each is taken after the step that it follows.
    """
    health = Health()
    # A measurement after a step sorts behind it.
    events = [(record.get("step", 0), partial(health.add, record)) for record in records]
    events += [(each.step, partial(health.add_measurement, each)) for each in measurements]
    for _, take in sorted(events, key=itemgetter(0)):
        take()
    return health.alarms
