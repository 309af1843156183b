"""Alarms ring at their thresholds and are quiet below them."""

from typing import Any

import pytest
from tests.fixtures.written_run import greedy, sampled

from gemma2_grpo.run.health import Health, find_alarms
from gemma2_grpo.run.results import Measurement

QUIET = {
    "mean_reward": 0.5,
    "entropy": 1.0,
    "kl": 0.01,
    "uniform_groups_fraction": 0.1,
    "clip_fraction": 0.0,
    "truncated_fraction": 0.0,
    "mean_completion_tokens": 100.0,
    "grad_norm": 0.1,
    "num_updates": 3,
    "num_updates_left_out": 0,
}


def steps(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [{**QUIET, "step": step, **changes} for step in range(1, count + 1)]


def alarms(records: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return [(alarm.signal.name, alarm.level, alarm.step) for alarm in find_alarms(records)]


def test_a_quiet_run_has_none() -> None:
    assert alarms(steps(200)) == []
    assert alarms([]) == []
    assert alarms([{"step": 1}, {}]) == []


@pytest.mark.parametrize(
    ("name", "below", "warning", "critical"),
    [
        ("uniform_groups_fraction", 0.49, 0.5, 0.75),
        ("clip_fraction", 0.19, 0.2, 0.4),
        ("truncated_fraction", 0.049, 0.05, 0.15),
    ],
)
def test_levels(name: str, below: float, warning: float, critical: float) -> None:
    assert alarms(steps(20, **{name: below})) == []
    assert [a[:2] for a in alarms(steps(20, **{name: warning}))] == [(name, "warning")]
    assert [a[:2] for a in alarms(steps(20, **{name: critical}))] == [(name, "critical")]


def test_one_noisy_step_is_no_alarm() -> None:
    records = steps(20)
    records[10]["truncated_fraction"] = 0.2
    assert alarms(records) == []


def test_entropy_is_measured_by_its_start() -> None:
    records = steps(20) + [{**QUIET, "step": 20 + i, "entropy": 0.25} for i in range(1, 11)]
    assert [a[:2] for a in alarms(records)] == [("entropy", "warning")]
    records += [{**QUIET, "step": 30 + i, "entropy": 0.05} for i in range(1, 11)]
    assert [a[:2] for a in alarms(records)] == [("entropy", "critical")]


def test_a_spike_of_the_gradient() -> None:
    records = steps(30)
    records[25]["grad_norm"] = 0.9
    assert alarms(records) == []
    records[25]["grad_norm"] = 1.01
    assert alarms(records) == [("grad_norm", "warning", 26)]


def test_kl_alarms_while_it_rises() -> None:
    high = steps(20, kl=0.7)
    assert alarms(high) == [], "it stands still"
    rising = [{**record, "kl": 0.02 * record["step"]} for record in steps(40)]
    # The mean of five steps reaches 0.5 with steps 23 to 27.
    assert alarms(rising) == [("kl", "warning", 27)]
    assert alarms([{**r, "kl": 0.1 * r["step"]} for r in steps(40)]) == [("kl", "critical", 22)]


@pytest.mark.parametrize(("grown", "found"), [(149.0, []), (150.0, ["mean_completion_tokens"])])
def test_length_alarms_where_the_reward_follows_it(grown: float, found: list[str]) -> None:
    longer = {"mean_completion_tokens": grown, "mean_reward": 0.8}
    records = steps(10) + [{**QUIET, "step": 10 + i, **longer} for i in range(1, 11)]
    assert [a[0] for a in alarms(records)] == found
    assert alarms([{**record, "mean_reward": 0.5} for record in records]) == []


def test_entropy_alarms_below_its_threshold_only() -> None:
    for level, found in ((0.3, []), (0.29, ["warning"]), (0.1, ["warning"]), (0.09, ["critical"])):
        records = steps(5) + [{**QUIET, "step": 5 + i, "entropy": level} for i in range(1, 6)]
        assert [a[1] for a in alarms(records)] == found, level


@pytest.mark.parametrize(
    ("held_out", "found"), [(0.36, []), (0.35, ["warning"]), (0.2, ["critical"])]
)
def test_a_training_reward_above_the_held_out_one(held_out: float, found: list[str]) -> None:
    def at(step: int, reward: float, sampled_reward: float | None = None) -> Measurement:
        drawn = sampled(0.5, pass_at_k={}, maj_at_k={})
        return Measurement(
            step=step,
            greedy=greedy(1, 2, mean_reward=reward),
            sampled=sampled_reward and drawn.model_copy(update={"mean_reward": sampled_reward}),
        )

    levels = [a.level for a in find_alarms(steps(10), [at(0, 0.0), at(10, held_out)])]
    assert levels == found
    drawn = find_alarms(steps(10), [at(10, 0.0, held_out)])
    assert [alarm.level for alarm in drawn] == found


def test_values_that_are_no_numbers_raise_nothing() -> None:
    odd: list[Any] = [None, "high", float("nan"), 10**400, [1.0], True]
    for value in odd:
        assert alarms(steps(12, kl=value, entropy=value, grad_norm=value, num_updates=value)) == []


def test_updates_that_were_left_out() -> None:
    records = steps(5)
    records[2]["num_updates_left_out"] = 1
    assert alarms(records) == [("num_updates_left_out", "warning", 3)]


def test_alarms_are_new_once_and_active_while_they_last() -> None:
    health = Health()
    new = [bool(health.add(record)) for record in steps(10, truncated_fraction=0.1)]
    assert sum(new) == 1
    assert [alarm.signal.name for alarm in health.active] == ["truncated_fraction"]
    for record in steps(20):
        health.add({**record, "step": record["step"] + 10})
    assert health.active == [] and len(health.alarms) == 1
