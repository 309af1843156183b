"""What a run shows: plain lines off a terminal, one quiet bar on one, nothing that takes effect."""

import io
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from tests.fixtures.written_run import greedy, sampled

from gemma2_grpo.run.console import Display
from gemma2_grpo.run.panel import curve
from gemma2_grpo.run.results import Measurement, Rise
from gemma2_grpo.run.schema import RunCompletion, StepRecord

HOSTILE = [
    "[bold red]",
    "[/bold red] [/] [/dim]",
    "[link=https://example.org]here[/link]",
    "\\[bold]\\",
    "\x1b[31mred\x1b]0;title\x07\x9b31m",
    "back\b\b\rspace\x00\u202e",
]
RECORD = StepRecord(
    step=600,
    mean_reward=1.05,
    mean_components={"format": 1.0, "logic": 1.0, "accuracy": 1.0},
    correct_fraction=0.98765,
    kl=0.123456,
    entropy=1.23456,
    clip_fraction=0.123456,
    grad_norm=12.3456,
    mean_completion_tokens=768.0,
    truncated_fraction=0.123456,
    tokens_per_second=12_345.6,
    peak_memory_fraction=0.95,
    seconds_left=35_999.0,
)
MEASUREMENT = Measurement(
    step=599,
    greedy=greedy(700, 1319, mean_completion_tokens=768.0),
    sampled=sampled(0.5, pass_at_k={1: 0.5, 16: 1.0}, maj_at_k={1: 0.5, 16: 1.0}),
)


def changed(**values: Any) -> StepRecord:
    return RECORD.model_copy(update=values)


def completion(question: str, text: str) -> RunCompletion:
    return RunCompletion(
        step=599,
        kind="train",
        question=question,
        answer="19",
        completion=text,
        completion_tokens=768,
        truncated=False,
        reward=1.05,
        components={"format": 1.0, "logic": 1.0, "accuracy": 1.0},
        correct=True,
        official_correct=True,
        num_equations=1,
        num_true_equations=1,
    )


PLAN = {
    "devices": "8 x TPU v5 lite, mesh 2 fsdp x 4 tp",
    "model": "google/gemma-2-2b-it, 2,614,341,888 parameters in bfloat16",
    "adapters": "LoRA rank 64 on 156 matrices, 79,233,024 parameters in float32",
    "data": "openai/gsm8k: 448 train, 64 test problems; 0 too long, dropped",
    "steps": "600 of 8 prompts x 16 completions, 3 updates each; 300 done, resuming",
}


def show_everything(display: Display) -> None:
    display.plan(PLAN)
    display.note("run directory: runs/gemma2-2b-v5e8")
    with display.measuring("measuring 1319 held-out problems", 2638) as on_batch:
        on_batch(1319)
    with display.training(598, 600) as on_record:
        on_record(changed(step=599))
        display.sample(599, completion("How many eggs? " * 20, "Step 1: 12 + 7 = 19\n" * 5))
        with display.measuring("measuring 1319 held-out problems", 1319) as on_batch:
            on_batch(1319)
        display.held_out(599, MEASUREMENT, 1.23456)
        fell = ["entropy fell to 9 % of its start at step 600"]
        on_record(RECORD, fell, fell)
    display.before_and_after(MEASUREMENT, MEASUREMENT)
    rise = Rise(name="format", first=0.0, last=1.0, half_way_step=600)
    display.rises([rise, rise.model_copy(update={"name": "accuracy", "half_way_step": None})])


def plain() -> tuple[Display, io.StringIO]:
    shown = io.StringIO()
    return Display(Console(file=shown, width=100, highlight=False)), shown


def terminal(width: int = 80) -> tuple[Display, io.StringIO]:
    shown = io.StringIO()
    console = Console(
        file=shown, force_terminal=True, color_system="standard", width=width, highlight=False
    )
    return Display(console), shown


def screen(text: str) -> list[str]:
    """What a terminal shows after the output of rich."""
    lines, row = [""], 0
    for code, end, written in re.findall(r"(\x1b\[[0-9;?]*[a-zA-Z])|([\r\n])|([^\x1b\r\n]+)", text):
        if code == "\x1b[1A":
            row -= 1
        elif code == "\x1b[2K" or end == "\r":
            lines[row] = ""  # After a carriage return, rich always erases or writes a whole line.
        elif end == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif written:
            lines[row] += written
    return [line.rstrip() for line in lines]


def test_off_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_everything(Display())
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\r" not in shown
    lines = [line.rstrip() for line in shown.splitlines()]
    assert (
        "step 600/600: reward 1.050 (format 1.00 logic 1.00 accuracy 1.00); right 98.8% of sampled "
        "answers; kl 0.1235 entropy 1.235 clipped 12.3% gradient 12.3; 768 tokens, 12.3% cut off, "
        "12346 tokens/s; memory 95% of the fullest device, at most; 9:59:59 left"
    ) in lines
    assert "  ! entropy fell to 9 % of its start at step 600" in lines
    assert "measuring 1319 held-out problems ..." in lines
    assert "step 599: held-out accuracy 53.1% (50.4% to 55.8%), format 100.0%, loss 1.2346" in lines
    assert "   format: 0.00 to 1.00, half-way at step 600" in lines
    assert " accuracy: 0.00 to 1.00, no rise" in lines


def test_off_a_terminal_a_step_is_one_line() -> None:
    display, shown = plain()
    with display.training(0, 600) as on_record:
        on_record(changed(kl=12.3, seconds_left=359_999.0))
    assert shown.getvalue().count("\n") == 1
    assert shown.getvalue().endswith("; 99:59:59 left\n")


@pytest.mark.parametrize("make", ["plain", "terminal"])
def test_a_step_without_a_reward_is_not_one_of_0(make: str) -> None:
    display, shown = {"plain": plain, "terminal": terminal}[make]()
    with display.training(598, 600) as on_record:
        on_record(changed(mean_reward=None))
        on_record(changed(mean_reward=None))
    assert "none (format" in shown.getvalue() and "0.000" not in shown.getvalue()


def test_a_terminal_of_80_columns_is_wide_enough() -> None:
    display, shown = terminal()
    show_everything(display)
    lines = screen(shown.getvalue())
    assert max(map(cell_len, lines)) <= 80
    # Each bar is left on the screen once: nothing that wrapped was redrawn in the wrong place.
    assert re.findall(r"\d+/\d+", "\n".join(lines)) == ["600/600"]
    assert not any("…" in line for line in lines)
    [start] = [i for i, line in enumerate(lines) if "600/600" in line]
    panel = [" ".join(line.strip("│ ").split()) for line in lines[start : start + 8]]
    assert re.fullmatch(r"step 600/600 ━+ 9:59:59 left", panel[0])
    assert panel[1:] == [
        "reward 1.050 (format 1.00 logic 1.00 accuracy 1.00) ▁▁",
        "right 98.8% of sampled answers",
        "policy kl 0.1235 entropy 1.235 clipped 12.3% gradient 12.3",
        "length 768 tokens, 12.3% cut off, 12346 tokens/s",
        "memory 95% of the fullest device, at most",
        "held-out 53.1% (50.4% to 55.8%) at step 599",
        "! entropy fell to 9 % of its start at step 600",
    ]
    for line in PLAN.values():
        assert any(line in shown_line for shown_line in lines)
    [head] = [i for i, line in enumerate(lines) if line.startswith("┃") and "before" in line]
    table = [line for line in lines[head:] if line.startswith("│ ") and "%" in line]
    assert len(table) == 13
    assert any("Right in any of 16 samples (pass@16)" in line for line in table)


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("make", [plain, terminal])
def test_what_a_model_writes_takes_no_effect(hostile: str, make: Any) -> None:
    display, shown = make()
    with display.training(0, 2):
        display.sample(1, completion(f"question {hostile}", f"completion {hostile} end"))
    display.note(f"note {hostile if chr(27) not in hostile else ''}")
    display.plan({"data": hostile if chr(27) not in hostile else ""})
    text = shown.getvalue()
    # What is left once the codes of rich itself are gone: its styles, and those of the bar.
    own = re.sub(r"\x1b\[(?:[0-9;]*m|1A|2K|\?25[lh])", "", text)
    assert not re.search(r"[\x00\x07\x08\x9b\u202e]|\x1b", own)
    assert "\x1b[31m" not in text and "\x1b[1;31m" not in text and "\x1b]8" not in text
    visible = re.sub(r"[^\x20-\x7e\n]", "", hostile).replace("\n", " ")
    for word in ("question", "completion"):
        assert f"{word} {visible}" in re.sub(r"[^\x20-\x7e\n]", "", own)


def test_measurements_without_samples_leave_their_rows_out() -> None:
    display, shown = plain()
    measured = MEASUREMENT.model_copy(update={"sampled": None})
    display.before_and_after(measured, measured)
    assert "sampled" not in shown.getvalue()
    assert "Right, greedy" in shown.getvalue()


def test_change_is_in_points() -> None:
    display, shown = plain()
    problems = MEASUREMENT.greedy.num_problems
    more = problems // 4
    better = greedy(700 + more, problems, mean_completion_tokens=700.5)
    display.before_and_after(MEASUREMENT, MEASUREMENT.model_copy(update={"greedy": better}))
    lines = {line.split("│")[1].strip(): line for line in shown.getvalue().splitlines()[4:-1]}
    change = 100 * more / problems
    assert lines["Right, greedy"].split()[-3:-1] == [f"+{change:.1f}", "pp"]
    assert lines["Tokens per completion"].split()[-2] == "\u221267.50"


def test_a_curve_spans_its_own_range() -> None:
    assert curve([0.0, 0.5, 1.0, 0.25]) == "▁▅█▃"
    assert curve([0.3]) == "▁"
