"""The curves of a report: long ones, missing ones, and those that explode."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gemma2_grpo.report.curves import charts_of_run, running_mean, thin_out
from gemma2_grpo.report.report import render, write_report
from gemma2_grpo.run.files import read_run

Write = Callable[..., Path]


def test_long_curves_keep_their_spikes() -> None:
    values = [0.0] * 100_000
    values[54_321], values[777] = 9.0, -5.0
    steps, kept = thin_out(range(1, 100_001), values)
    assert len(kept) <= 302 and (max(kept), min(kept)) == (9.0, -5.0)
    assert steps[kept.argmax()] == 54_322
    assert (steps[0], steps[-1]) == (1, 100_000)


def test_running_means_are_centred_and_shorter_at_the_ends() -> None:
    values = [float(i % 2) for i in range(40)]
    means = running_mean(values)
    assert len(means) == 40
    assert means[0] == pytest.approx((0 + 1 + 0) / 3)
    assert means[20] == pytest.approx((0 + 1 + 0 + 1 + 0) / 5)


def test_charts_leave_out_what_was_not_recorded(write: Write) -> None:
    run = read_run(write([True], [True], metrics={"mean_reward": 0.5, "kl": 0.1, "entropy": None}))
    assert [chart.name for chart in charts_of_run(run)] == ["reward", "accuracy", "kl"]
    accuracy = charts_of_run(run)[1]
    assert accuracy.curves[0].values == [1.0, 1.0]
    assert "held-out from 100" in accuracy.description


def test_what_explodes_still_fits_its_chart(write: Write) -> None:
    path = write(
        [True], metrics={"grad_norm": 3e38, "kl": 1e300, "entropy": -2e20, "mean_reward": 1e12}
    )
    page = render(read_run(path))
    assert ">3e+38</text>" in page and ">-2e+20</text>" in page
    assert "KL to the reference" not in page


def test_a_long_run_is_a_small_page(write: Write) -> None:
    path = write([False] * 300, [True] * 300, steps=20_000)
    assert write_report(path).stat().st_size < 400_000
