from pathlib import Path

import pytest
from benchmarks.compare import median_seconds, paired_ratio, seconds, tokens_per_second
from benchmarks.floor import Floor
from benchmarks.machine import Peaks
from benchmarks.meter import Instant, Meter
from benchmarks.plot import finding
from benchmarks.report import print_report
from benchmarks.rounds import Result
from benchmarks.scaling import Point, largest_scratch, make_table
from benchmarks.session import Ready, StepReport, Summary
from benchmarks.step import ratios, verify
from rich.console import Console


def report(step: float, rollout: float, tokens: int = 100, programs: int = 0) -> StepReport:
    parts = {
        "rollout": Instant(rollout, 2 * rollout),
        "update": Instant(step - rollout, 2 * (step - rollout)),
        "step": Instant(step, 2 * step),
    }
    return StepReport(parts, tokens, programs, 0.5 * programs)


def result(label: str, *steps: StepReport, logp: float = -1.0) -> Result:
    ready = Ready(500_000_000, Instant(1.0, 1.0))
    return Result(label, ready, [steps[0]], list(steps), Summary(2**31, [-3.0, logp], "cpu", None))


OURS = result("ours", report(2, 1), report(4, 1), report(3, 1))
OTHER = result("tunix 0.1.7", report(4, 2), report(12, 2), report(6, 2, programs=2))


def test_ratios_pair_the_rounds() -> None:
    ratio = paired_ratio(seconds(OTHER.steps, "step", "cpu"), seconds(OURS.steps, "step", "cpu"))
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 3.0)


def test_a_phase_that_a_system_does_not_have_has_no_ratio() -> None:
    assert seconds(OURS.steps, "reference", "cpu") == [0.0, 0.0, 0.0]
    assert paired_ratio([1.0], [0.0]) is None
    found = ratios({"ours": OURS, "tunix": OTHER}, "cpu")
    assert found["tunix"]["reference"] is None
    assert found["tunix"]["rollout"] == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_medians_are_over_steps() -> None:
    assert median_seconds(OURS.steps, "step", "wall") == 3
    assert median_seconds(OURS.steps, "step", "cpu") == 6
    assert tokens_per_second(OURS.steps) == pytest.approx(100 / 3)


def test_equal_work_is_verified_and_other_work_is_not() -> None:
    checks = verify({"ours": OURS, "tunix": OTHER})
    assert checks["passed"]
    far = result("trl", *OTHER.steps, logp=-1.002)
    assert not verify({"ours": OURS, "trl": far})["passed"]
    longer = result("trl", report(2, 1, tokens=101), *OTHER.steps[1:])
    assert not verify({"ours": OURS, "trl": longer})["passed"]


def test_the_tables_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    results = {"ours": OURS, "tunix": OTHER, "trl": result("trl 1.16.0", *OTHER.steps)}
    peaks = Peaks(8e10, 9e10, 2e10, 1e10)
    print_report(Console(width=80), results, [Floor(0.1, 0.2, 0.3)] * 3, peaks, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    text = "\n".join(lines)
    assert "2.00 (2.00 to 3.00)" in text
    assert "compiled 2 programs in 1.0 s" in text


def test_phases_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100, 1))
    monkeypatch.setattr("benchmarks.meter.now", lambda: Instant(n := next(clock), 2.0 * n))
    meter = Meter()
    meter.start()
    with meter.phase("update"), meter.phase("reference"):
        pass
    spent = meter.stop()
    assert spent["reference"] == Instant(1.0, 2.0)
    assert spent["update"] == Instant(2.0, 4.0)
    assert spent["step"].wall == sum(v.wall for name, v in spent.items() if name != "step")


def test_the_largest_program_is_found_in_what_xla_wrote(tmp_path: Path) -> None:
    ending = "cpu_after_optimizations-buffer-assignment.txt"
    for name, size in (("module_0001.jit_sample", 10), ("module_0002.jit__train_step", 30)):
        text = f"allocation 3: size 99, parameter 0:\nallocation 4: size {size}, preallocated-temp:"
        (tmp_path / f"{name}.{ending}").write_text(text, encoding="utf-8")
    assert largest_scratch(tmp_path) == ("_train_step", 30)
    assert largest_scratch(tmp_path / "none") == (None, None)


def test_the_plot_says_what_was_found() -> None:
    points = [
        Point("generations", 4, "ours", 1.0, 2.0, 10**9, 10**8, 10**8, "loss"),
        Point("generations", 32, "ours", 2.0, 10.0, 2 * 10**9, 10**8, None, None),
    ]
    text = finding("generations", points)
    assert text == "8 times the completions per prompt:\nours 4.0 times"
    assert make_table(points).row_count == 2
