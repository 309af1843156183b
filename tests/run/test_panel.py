"""An evaluation on a screen of 80 columns: accuracy so far, time left, both systems."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from tests.fixtures.written_run import answers
from tests.run.test_console import screen

from gemma2_grpo.run.console import Display
from gemma2_grpo.run.panel import EvaluationProgress
from gemma2_grpo.run.results import (
    EvaluatedCompletion,
    Evaluation,
    GreedyMeasures,
    HeldOutData,
    SampledMeasures,
    StepsMeasures,
    System,
)
from gemma2_grpo.task.statistics import Paired

FORM = {"true_equations_fraction": 0.9, "truncated_fraction": 0.012, "mean_reward": 0.6}
STEPS = tuple(
    StepsMeasures(
        solution_steps=n,
        num_problems=100,
        num_correct=50,
        correct_fraction=0.5,
        correct_fraction_interval=(0.4, 0.6),
    )
    for n in (1, 2, 11)
)
GREEDY = GreedyMeasures(
    **FORM,
    num_problems=1319,
    num_correct=700,
    correct_fraction=0.5307,
    correct_fraction_interval=(0.5037, 0.5575),
    num_official_correct=690,
    official_correct_fraction=0.5231,
    perfect_format_fraction=0.987,
    mean_completion_tokens=181.26,
    by_solution_steps=STEPS,
)
SAMPLED = SampledMeasures(
    **FORM,
    num_samples=4,
    correct_fraction=0.5,
    correct_fraction_interval=(0.48, 0.52),
    pass_at_k={1: 0.5, 2: 0.6, 4: 0.7},
    maj_at_k={1: 0.5, 2: 0.5, 4: 0.55},
    perfect_format_fraction=0.95,
    mean_completion_tokens=190.0,
)
BETTER = GREEDY.model_copy(update={"correct_fraction": 0.6, "mean_completion_tokens": 170.0})
EVALUATION = Evaluation(
    data=HeldOutData(source="openai/gsm8k", split="test", num_problems=1319, num_dropped=2),
    settings={"temperature": 0.7},
    systems={
        "base": System(greedy=GREEDY, sampled=SAMPLED),
        "adapter": System(greedy=BETTER, sampled=SAMPLED),
    },
    comparison=Paired(num_both_right=600, num_both_wrong=400, num_fixed=219, num_broken=100),
)


def shown(evaluation: Evaluation) -> list[str]:
    file = io.StringIO()
    Display(Console(file=file, width=80)).evaluation(evaluation)
    text = file.getvalue().replace("\u00a0", " ")
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(cell_len, lines)) <= 80
    assert not any("\u2026" in line for line in lines), "nothing is cut short"
    return lines


def cells(lines: list[str], label: str) -> list[str]:
    [row] = [row for row in (line.strip("│┃ ").split("│") for line in lines)
             if row[0].strip() == label]  # fmt: skip
    return [cell.strip() for cell in row[1:]]


def test_both_systems_side_by_side() -> None:
    lines = shown(EVALUATION)
    assert "1319 openai/gsm8k test problems, 2 too long, dropped" in lines
    assert "4 samples, temperature 0.7" in lines
    head = next(line for line in lines if "base  " in line or "base ┃" in line)
    assert head.replace("┃", " ").split() == ["base", "adapter", "change"]
    assert cells(lines, "Right, greedy") == ["53.1 %", "60.0 %", "+6.9 pp"]
    assert "50 to 56 %" in next(line for line in lines if "95 % interval" in line)
    assert cells(lines, "Right by GSM8K's own extraction") == ["52.3 %", "52.3 %", "0.0 pp"]
    assert cells(lines, "Right in any of 2 samples (pass@2)") == ["60.0 %", "60.0 %", "0.0 pp"]
    assert cells(lines, "Right in any of 4 samples (pass@4)") == ["70.0 %", "70.0 %", "0.0 pp"]
    assert cells(lines, "Right by vote of 4 samples (maj@4)") == ["55.0 %", "55.0 %", "0.0 pp"]
    by_steps = cells(lines, "Right, 11 steps (100 problems)")
    assert by_steps == ["50.0 %", "50.0 %", "0.0 pp"]
    assert cells(lines, "Tokens per completion") == ["181.26", "170.00", "\u221211.26"]
    assert lines[-2:] == [
        "base and adapter on the same problems, greedy: 219 fixed, 100 broken,",
        "600 right by both, 400 wrong by both; McNemar's exact test: p = 2e-11",
    ]


def test_one_sample_is_one() -> None:
    one = SAMPLED.model_copy(update={"num_samples": 1, "pass_at_k": {1: 0.5}})
    alone = {"base": System(greedy=GREEDY, sampled=one)}
    assert "1 sample, temperature 0.7" in shown(EVALUATION.model_copy(update={"systems": alone}))


def test_a_model_alone_without_samples() -> None:
    alone = {"systems": {"base": System(greedy=GREEDY)}, "comparison": None}
    lines = shown(EVALUATION.model_copy(update=alone))
    assert not any(word in line for line in lines for word in ("adapter", "change", "sample"))
    assert cells(lines, "Perfect format") == ["98.7 %"]


def records(system: str, sample: int | None, right: int, wrong: int) -> list[EvaluatedCompletion]:
    correct = [True] * right + [False] * wrong
    return answers(EvaluatedCompletion, correct, system=system, sample=sample)


def test_off_a_terminal_a_line_now_and_then() -> None:
    file = io.StringIO()
    with EvaluationProgress(
        Console(file=file, width=80), 400, records("base", None, 1, 1)
    ) as progress:
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
    with EvaluationProgress(console, 40) as progress:
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
        with EvaluationProgress(Console(file=file, width=80), 40) as progress:
            progress.add(records("base", None, 3, 7))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert file.getvalue().splitlines()[-1] == (
        "stopped after 10 of 40 completions; run again to resume"
    )
