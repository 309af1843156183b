"""What a report is made of: outcomes, marks, curves and tables, from records made by hand."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from tests.fixtures.written_run import write as write_record
from tests.fixtures.written_run import write_evaluation, write_lines, write_run

from gemma2_grpo.errors import UserError
from gemma2_grpo.presets import load_config
from gemma2_grpo.report import facts
from gemma2_grpo.report.curves import charts_of_run, charts_of_runs, running_mean, thin_out
from gemma2_grpo.report.excerpts import choose, mark
from gemma2_grpo.report.report import render, write_comparison, write_report
from gemma2_grpo.run.files import read_run
from gemma2_grpo.run.outcome import by_evaluation, during_run, headline
from gemma2_grpo.run.schema import RunFacts, Start, StepRecord
from gemma2_grpo.task.prompts import render_solution
from gemma2_grpo.task.rewards import score_completion

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a run whose greedy answers before and after are given."""
    return lambda *correct, name="run", **how: write_run(tmp_path / name, *correct, **how)


def said(path: Path) -> str:
    run = read_run(path)
    return headline(during_run(run), is_control=run.is_control).replace("\u00a0", " ")


# --- Did it get better? ---


def test_a_rise_is_said_with_its_flips(write: Write) -> None:
    path = write([False] * 12 + [True] * 8, [True] * 10 + [False] * 2 + [True] * 7 + [False])
    assert said(path) == (
        "Accuracy rose from 40.0 % to 85.0 % on 20 held-out problems; 10 fixed, 1 broken."
    )
    outcome = during_run(read_run(path))
    assert outcome and outcome.paired
    assert (outcome.paired.num_both_right, outcome.paired.num_both_wrong) == (7, 2)
    # 2 (C(11, 0) + C(11, 1)) / 2^11
    assert outcome.paired.p_value == pytest.approx(24 / 2048)


def test_a_fall_is_said(write: Write) -> None:
    path = write([True] * 20, [True] * 8 + [False] * 12)
    assert said(path).startswith("Accuracy fell from 100.0 % to 40.0 %")


def test_what_chance_explains_is_no_rise(write: Write) -> None:
    path = write([False] * 5 + [True] * 15, [True] * 20)
    assert said(path) == (
        "No difference can be told apart from chance: accuracy went from 75.0 % to 100.0 % on 20 "
        "held-out problems; 5 fixed, 0 broken."
    ), "p = 1/16"


def test_a_control_is_named(write: Write) -> None:
    path = write([True] * 4, [True] * 4, shuffle=True)
    assert said(path).startswith("Control run with shuffled rewards, which can teach nothing. No")


def test_a_run_that_has_only_begun(write: Write) -> None:
    assert said(write([True, False])) == (
        "50.0 % of 2 held-out problems are right before training; there is nothing yet to compare "
        "that with."
    )


def test_without_completions_intervals_decide(write: Write) -> None:
    path = write([False] * 20, [True] * 20)
    (path / "completions.jsonl").unlink()
    assert said(path) == "Accuracy rose from 0.0 % to 100.0 % on 20 held-out problems."
    near = write([False] * 12 + [True] * 8, [True] * 12 + [False] * 8, name="near")
    (near / "completions.jsonl").unlink()
    assert said(near).startswith("No difference can be told apart from chance")


def test_counts_that_cannot_be_are_left_out(write: Write) -> None:
    path = write([True, False])
    [line] = (path / "evaluations.jsonl").read_text().splitlines()
    (path / "evaluations.jsonl").write_text(line.replace('"num_correct":1', '"num_correct":3'))
    with (path / "evaluations.jsonl").open("a") as file:
        file.write("\n")
    assert said(path) == "Nothing has been measured yet, so that nothing can be said."
    assert "Nothing has been measured yet" in render(read_run(path))


def test_an_evaluation_comes_first(write: Write) -> None:
    path = write([True] * 4, [True] * 4)
    write_evaluation(path, [False] * 9, [True] * 9)
    run = read_run(path)
    outcome = by_evaluation(run)
    assert outcome and outcome.paired and outcome.before
    assert (outcome.paired.num_fixed, outcome.paired.num_broken) == (9, 0)
    page = render(run).replace("\u00a0", " ")
    assert "<h1>Accuracy rose from 0.0 % to 100.0 % on 9 gsm8k test problems; 9 fixed" in page
    assert outcome.after and outcome.after.system.sampled
    assert outcome.after.system.sampled.pass_at_k[2] == 1
    assert ">Right in at least one of 2 samples</th>" in page and ">100.0 %</td>" in page
    # Five problems with two steps, four with three; by Wilson's interval.
    assert ">2 steps</th>" in page and ">100.0 %, 57 to 100</td>" in page
    assert ">3 steps</th>" in page and ">100.0 %, 51 to 100</td>" in page
    assert "Evaluated 2026-01-02 03:04:05 UTC" in page and "c0ffee" in page
    assert page.index("By gemma2-grpo evaluate") < page.index("measured by the run")


# --- Samples ---


def test_what_flipped_is_shown_first(write: Write) -> None:
    path = write([False, True, True, False] * 4, [True, False, True, False] * 4)
    outcome = during_run(read_run(path))
    assert outcome
    groups = choose(outcome.pairs)
    assert [(g.title[:5], g.total, len(g.shown), len(g.folded)) for g in groups] == [
        ("Fixed", 4, 3, 1),
        ("Broke", 4, 3, 1),
        ("Wrong", 4, 1, 3),
        ("Right", 4, 1, 3),
    ]
    assert [pair.question.question[:10] for pair in groups[0].shown] == [
        "Question 0",
        "Question 4",
        "Question 8",
    ]


def test_equations_are_marked_where_they_stand() -> None:
    text = render_solution(["2 + 2 = 4 eggs", "4 + 1 = 6 = 3 + 3"], "6")
    pieces = mark(text)
    assert "".join(piece.text for piece in pieces) == text
    marked = [(p.text, p.kind) for p in pieces if p.kind in ("true", "false")]
    assert marked == [
        ("2 + 2 = 4", "true"),
        ("4 + 1 = 6", "false"),
        (" = 3 + 3", "true"),
    ]
    scored = score_completion(text, "6").equations
    assert [kind == "true" for _, kind in marked] == [e.is_true for e in scored]


@pytest.mark.parametrize(
    "text", ["", "x" * 20_000, "\n" * 20_000, "<reasoning>" * 500, "1 = 1 " * 3000, "3 + 4 = 8"]
)
def test_marks_of_any_text_keep_its_beginning(text: str) -> None:
    shown = "".join(piece.text for piece in mark(text))
    assert text.startswith(shown) and len(shown) <= 3_000 and shown.count("\n") <= 50


# --- Curves ---


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


# --- Tables ---


def test_times_add_up_over_steps_and_measurements(write: Write) -> None:
    path = write([True], [True], steps=4)
    evaluations = read_run(path).evaluations
    write_lines(path, [each.model_copy(update={"seconds": 6.0}) for each in evaluations])
    run = read_run(path)
    times = render(run).split('id="time"')[1]
    rows = re.findall(r"<th>(.*?)</th><td class=.number.>(.*?)</td><td .*?>(.*?)<", times)
    assert rows == [
        ("Rollout", "8.0", "33\u00a0%"),
        ("Reward", "0.0", "0\u00a0%"),
        ("Update", "4.0", "17\u00a0%"),
        ("Measuring on held-out problems", "12.0", "50\u00a0%"),
        ("Together", "24.0", ""),
    ]
    assert "50 tokens a second were sampled, 400 in all." in facts.speed(run)
    assert "Peak memory was not recorded." in facts.speed(run)


def test_compiling_counts_every_launch(write: Write) -> None:
    path = write([True], steps=4)
    seconds = [3.0, 5.0, 2.0, 2.5]
    records = [StepRecord(step=i + 1, compile_seconds=s) for i, s in enumerate(seconds)]
    records[1] = records[1].model_copy(update={"peak_memory_bytes": 5_000_000_000})
    write_lines(path, records)
    assert facts.speed(read_run(path)) == (
        "7.5 s of all this, and of loading, went into compiling. Peak memory was 5.00 GB."
    )


def test_differences_are_from_the_nearest_preset(write: Write) -> None:
    path = write([True])
    values = dataclasses.asdict(load_config("gemma2-2b-gpu"))
    values["optimizer"]["learning_rate"] = 0.5
    values = {k: {n: v for n, v in s.items() if v is not None} for k, s in values.items()}
    (path / "config.toml").write_text(tomli_w.dumps(values))
    run = read_run(path)
    assert facts.differences_from_preset(run) == (
        "gemma2-2b-gpu",
        [["learning_rate", str(load_config("gemma2-2b-gpu").optimizer.learning_rate), "0.5"]],
    )
    (path / "config.toml").unlink()
    assert facts.differences_from_preset(read_run(path)) is None


def test_nobodys_home_and_no_token_is_told(write: Write) -> None:
    path = write([True])
    command = ["gemma2-grpo", "train", "--run", "/home/ludwig/runs/x", "hf_abcdefghijklmnop"]
    write_record(path, RunFacts(schema_version=1, starts=(Start(command=tuple(command)),)))
    with (path / "config.toml").open("a") as file:
        file.write('[model]\nmodel = "/Users/ludwig/gemma"\n')
    page = render(read_run(path))
    assert "ludwig" not in page and "hf_abc" not in page
    assert "gemma2-grpo train --run ~/runs/x" in page and "~/gemma" in page


def test_a_run_of_a_notebook_is_reproduced_by_its_configuration(write: Write) -> None:
    path = write([True])
    write_record(path, RunFacts(schema_version=1, starts=(Start(command=()),)))
    [(_, command)] = facts.starts(read_run(path))
    assert command.startswith("# No command was recorded")
    assert command.endswith(f"\ngemma2-grpo train {path}/config.toml --run runs/again")
    (path / "config.toml").unlink()
    assert "gemma2-grpo" not in facts.starts(read_run(path))[0][1]


# --- Damage ---


def test_whatever_is_damaged_the_report_opens(write: Write) -> None:
    path = write([False] * 3, [True] * 3)
    for name in ("metrics.jsonl", "evaluations.jsonl", "completions.jsonl"):
        with (path / name).open("a") as file:
            file.write('{"held_out": \n[1]\nnull\n"held_out"\n{"step": null}\n{"step": "x"}\n')
            file.write('{"step": 11, "kl": 1e999, "grad_norm": "much"}\n' + "[" * 100_000 + "\n")
    (path / "run.json").write_text(
        '{"schema_version": 1, "starts": [1], "devices": 3, "data": "x"}'
    )
    (path / "result.json").write_text("[]")
    (path / "evaluation.json").write_text(
        '{"schema_version": 1, "systems": {"base": {"greedy": 3}}}'
    )
    page = render(read_run(path))
    assert "lines are damaged in metrics.jsonl, and left out" in page
    assert "result.json is damaged: whether the run has finished" in page
    for name in ("metrics.jsonl", "config.toml", "run.json"):
        (path / name).write_bytes(b"\xff\xfe\x00")
    assert "config.toml is missing or damaged" in render(read_run(path))


def test_a_crash_at_step_0(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[run]\nmax_steps = 3\n")
    page = write_report(tmp_path).read_text()
    assert "not finished, 0 of 3 steps" in page
    assert "run.json is missing or damaged" in page
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


# --- Other versions ---


def test_a_run_of_an_older_version_is_refused_and_not_misread(write: Write) -> None:
    path = write([True], [True])
    (path / "run.json").write_text('{"starts": [], "data": {"source": "gsm8k", "dropped": 0}}')
    with pytest.raises(UserError) as refusal:
        write_report(path)
    assert str(refusal.value) == (
        f"{path / 'run.json'}: has an older schema, without a version; this gemma2-grpo reads "
        "version 1; train again, or use the version that wrote it"
    )
    assert not (path / "report.html").exists()


def test_an_evaluation_of_an_older_version_is_refused(write: Write) -> None:
    path = write([True], [True])
    (path / "evaluation.json").write_text('{"systems": {"base": {"greedy": {"correct": 3}}}}')
    with pytest.raises(UserError, match="evaluate again with --overwrite"):
        write_report(path)


def test_logs_of_an_older_version_without_run_json_are_empty(write: Write) -> None:
    """Its names are not those of today, so that nothing is taken for something else."""
    path = write([True], [True])
    (path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "correct": 0.25}\n')
    (path / "evaluations.jsonl").write_text('{"step": 0, "problems": 2, "correct": 1}\n')
    page = render(read_run(path))
    assert "1 line is damaged in evaluations.jsonl, and left out" in page
    assert "Reward by component" not in page and "Nothing has been measured" in page


# --- Two runs ---


def test_two_runs_side_by_side(write: Write) -> None:
    first = write([False] * 9, [False] * 9, name="$a$ <b>", shuffle=True)
    second = write([False] * 9, [True] * 9, name="better", metrics={"kl": 0.2})
    file = write_comparison((first, second), plots=True)
    assert file == first / "compare.html"
    page = file.read_text().replace("\u00a0", " ")
    assert (
        "better is right more often than $a$ &lt;b&gt;: 100.0 % against 0.0 % of 9 held-out "
        "problems." in page
    )
    assert "Right only in better" in page and "<b>:" not in page
    assert "A control run" in page
    assert '<th class="mono">shuffle_rewards</th><td class="mono">true</td>' in page
    assert (first / "plots" / "compare_kl.png").is_file()
    runs = [read_run(path) for path in (first, second)]
    [kl] = [chart for chart in charts_of_runs(runs, ["a", "b"]) if chart.name == "kl"]
    assert [(curve.label, curve.values[0]) for curve in kl.curves] == [("a", 0.01), ("b", 0.2)]


def test_equal_or_unlike_runs_are_not_ranked(write: Write) -> None:
    first = write([False] * 9, [True] * 9, name="a")
    page = write_comparison((first, write([False] * 9, [True] * 9, name="b"))).read_text()
    assert "a and b cannot be told apart" in page
    other = write([False] * 8, [True] * 8, name="c")
    page = write_comparison((first, other)).read_text()
    assert "not known to be the same for both" in page
    begun = write([False] * 8, name="d")
    assert "a and d have not both been measured" in write_comparison((first, begun)).read_text()


def test_a_comparison_needs_two_runs(write: Write, tmp_path: Path) -> None:
    first = write([True])
    with pytest.raises(UserError, match="no such directory"):
        write_comparison((first, tmp_path / "nowhere"))
    assert not (first / "compare.html").exists()
