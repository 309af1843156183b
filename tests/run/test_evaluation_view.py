"""An evaluation on a screen of 80 columns: accuracy so far, time left, both systems."""

import io
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from tests.run.test_console import screen

from gemma2_grpo.run.evaluation_view import Progress, show_evaluation

GREEDY = {
    "problems": 1319,
    "correct": 700,
    "accuracy": 0.5307,
    "interval": [0.5037, 0.5575],
    "official_correct": 690,
    "official_accuracy": 0.5231,
    "format": 0.987,
    "true_equations": 0.9,
    "truncated": 0.012,
    "mean_tokens": 181.26,
    "by_solution_steps": [
        {"steps": n, "problems": 100, "correct": 50, "accuracy": 0.5, "interval": [0.4, 0.6]}
        for n in (1, 2, 11)
    ],
}
SAMPLED = {
    "samples": 4,
    "pass_at_1": 0.5,
    "interval": [0.48, 0.52],
    "pass_at_k": {"1": 0.5, "2": 0.6, "4": 0.7},
    "maj_at_k": {"1": 0.5, "2": 0.5, "4": 0.55},
    "format": 0.95,
    "true_equations": 0.85,
    "truncated": 0.02,
    "mean_tokens": 190.0,
    "reward": 0.6,
}
SYSTEM = {"greedy": GREEDY, "sampled": SAMPLED}


def result(**changes: Any) -> dict[str, Any]:
    better = {"greedy": GREEDY | {"accuracy": 0.6, "mean_tokens": 170.0}, "sampled": SAMPLED}
    return {
        "data": {"source": "openai/gsm8k", "split": "test", "problems": 1319, "dropped": 2},
        "settings": {"eval_samples": 4, "temperature": 0.7},
        "systems": {"base": SYSTEM, "adapter": better},
        "comparison": {
            "both_right": 600,
            "both_wrong": 400,
            "fixed": 219,
            "broken": 100,
            "p_value": 2.1e-11,
        },
        **changes,
    }


def shown(value: dict[str, Any]) -> list[str]:
    file = io.StringIO()
    show_evaluation(Console(file=file, width=80), value)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert max(map(cell_len, lines)) <= 80
    assert not any("\u2026" in line for line in lines), "nothing is cut short"
    return lines


def cells(lines: list[str], label: str) -> list[str]:
    [line] = [line for line in lines if line.strip().startswith(label)]
    return line.strip().removeprefix(label).split()


def test_both_systems_side_by_side() -> None:
    lines = shown(result())
    assert "1319 openai/gsm8k test problems, 2 too long, dropped" in lines
    assert next(line.split() for line in lines if "base  " in line) == ["base", "adapter", "change"]
    assert next(line for line in lines if line.startswith("  right ")).split() == [
        "right",
        "53.1%",
        "60.0%",
        "+6.9",
    ]
    assert "50.4 to 55.8" in next(line for line in lines if "95 % interval" in line)
    assert cells(lines, "right by GSM8K's extraction") == ["52.3%", "52.3%", "+0.0"]
    assert cells(lines, "pass@4") == ["70.0%", "70.0%", "+0.0"]
    assert cells(lines, "maj@4") == ["55.0%", "55.0%", "+0.0"]
    assert cells(lines, "right of 100 with 11 steps") == ["50.0%", "50.0%", "+0.0"]
    assert "181.3         170.0   -11.3" in next(line for line in lines if "tokens" in line)
    assert lines[-2:] == [
        "base and adapter on the same problems, greedy: 219 fixed, 100 broken,",
        "600 right by both, 400 wrong by both; McNemar's exact test: p = 2e-11",
    ]


def test_one_sample_is_one() -> None:
    settings = {"eval_samples": 1, "temperature": 0.7}
    assert "1 sample, temperature 0.7" in shown(result(settings=settings))


def test_a_model_alone_without_samples() -> None:
    alone = {"base": {"greedy": GREEDY, "sampled": None}}
    lines = shown(result(systems=alone, comparison=None))
    assert not any(word in line for line in lines for word in ("adapter", "change", "pass@"))
    assert cells(lines, "perfect format") == ["98.7%"]


def records(system: str, sample: int | None, right: int, wrong: int) -> list[dict[str, Any]]:
    values = [1.0] * right + [0.0] * wrong
    return [{"system": system, "sample": sample, "correct": value} for value in values]


def test_off_a_terminal_a_line_now_and_then() -> None:
    file = io.StringIO()
    with Progress(Console(file=file, width=80), 400, records("base", None, 1, 1)) as progress:
        for _ in range(199):
            progress.add(records("base", 0, 1, 0))
            progress.add(records("adapter", 0, 0, 1))
    lines = file.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[-1] == (
        "400/400 completions  right, sampled: base 100.0%  adapter 0.0%  left 0:00:00"
    )
    assert "\x1b" not in file.getvalue()


def test_on_a_terminal_a_bar_with_the_accuracy_so_far() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system="standard")
    with Progress(console, 40) as progress:
        progress.add(records("base", None, 3, 7))
        progress.add(records("adapter", None, 9, 1))
    lines = screen(file.getvalue())
    assert max(map(cell_len, lines)) <= 80
    bar = next(line for line in lines if "20/40 completions" in line)
    assert "left" in bar and "elapsed" in bar
    assert "right, greedy: base 30.0%  adapter 90.0%" in lines


def test_a_person_who_stops_it_is_told_how_to_go_on() -> None:
    file = io.StringIO()

    def stop() -> None:
        with Progress(Console(file=file, width=80), 40) as progress:
            progress.add(records("base", None, 3, 7))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert file.getvalue().splitlines()[-1] == (
        "stopped after 10 of 40 completions; the same command goes on"
    )
