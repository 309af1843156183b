"""The report says what the run's files say, takes nothing in and lets nothing out."""

import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tests.fixtures.written_run import finished, greedy, sampled, write, write_lines, write_run

from gemma2_grpo import cli
from gemma2_grpo.report.report import write_comparison, write_report
from gemma2_grpo.run.console import Display
from gemma2_grpo.run.loop import Run
from gemma2_grpo.run.results import Evaluation, HeldOutData, StepsMeasures, System
from gemma2_grpo.run.schema import RunCompletion, RunFacts, Start

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = (1280, 360)
HOSTILE = (
    "</pre><script>alert(1)</script><img src=http://example.invalid/x.png onerror=alert(2)>"
    "<style>*{display:none}</style>\x1b[31m\u202e" + "x" * 3000 + " 1 + 1 = 3"
)
# Measures pages that are shown within another one.
MEASURE = """<!doctype html>{frames}<pre id=out></pre><script>
onload = () => {{
  const measured = Array.from(document.querySelectorAll("iframe"), frame => {{
    const root = frame.contentDocument.documentElement;
    const asked = frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name);
    return {{width: root.scrollWidth, shown: frame.clientWidth, height: root.scrollHeight, asked}};
  }});
  document.getElementById("out").textContent = JSON.stringify(measured);
}};
</script>"""
FRAME = '<iframe style="width:{width}px;height:900px;border:0" src="{page}"></iframe>'


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. To look at, not to change."""
    path = write_run(tmp_path_factory.mktemp("runs") / "run", [False] * 20, [True] * 20)
    write(path, finished(10))
    start = Start(command=("train",))
    write(path, RunFacts(schema_version=1, devices=("cpu:0",), starts=(start,)))
    return path


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "run"))


@pytest.fixture(scope="module")
def hostile_pages(written: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The report of a run that was evaluated as well, and a comparison, of hostile text."""
    folder = tmp_path_factory.mktemp("hostile")
    runs = [Path(shutil.copytree(written, folder / name)) for name in ("run", "n" * 200)]
    steps = tuple(
        StepsMeasures(
            solution_steps=step,
            num_problems=1000,
            num_correct=500,
            correct_fraction=0.5,
            correct_fraction_interval=(0.469, 0.531),
        )
        for step in range(1, 9)
    )
    system = System(
        greedy=greedy(1000, 4000, by_solution_steps=steps),
        sampled=sampled(0.5, pass_at_k={1: 0.5, 16: 1.0}, maj_at_k={1: 0.5, 16: 1.0}),
    )
    evaluation = Evaluation(
        schema_version=1,
        data=HeldOutData(source="x" * 200),
        systems={"base": system, "adapter": system},
    )
    for run in runs:
        records = [line.content for line in RunCompletion.read_lines(run)]
        write_lines(run, [each.model_copy(update={"completion": HOSTILE}) for each in records])
        write(run, evaluation)
    return [write_report(runs[0]), write_comparison((runs[0], runs[1]))]


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page)).split())


def test_a_report_that_cannot_be_made_is_one_line_to_the_run(tmp_path: Path) -> None:
    shown = io.StringIO()
    nothing: Any = SimpleNamespace(path=tmp_path, config=None, writes=True)
    display = Display(Console(file=shown, width=100))
    Run(nothing, nothing, nothing, display, nothing, nothing, write_report)._report()
    assert shown.getvalue().startswith("the report cannot be written: UserError: run ")
    assert shown.getvalue().count("\n") == 1


def test_its_sections_are_the_questions_of_a_reader(written: Path, tmp_path: Path) -> None:
    page = write_report(written, tmp_path / "report.html").read_text()
    assert "finished, 10 of 10 steps" in text_of(page)
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert [html.unescape(heading) for heading in headings] == [
        "Did it get better?",
        "What does it say now?",
        "How did it learn?",
        "Was it healthy?",
        "Where did time and memory go?",
        "How to reproduce it",
    ]


def test_plots_are_written_as_png(written: Path, tmp_path: Path) -> None:
    write_report(written, tmp_path / "here.html", plots=True)
    plots = list((tmp_path / "plots").glob("*.png"))
    assert {"reward.png", "kl.png"} <= {path.name for path in plots}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)


def test_hostile_completions_are_inert(hostile_pages: list[Path]) -> None:
    page = hostile_pages[0].read_text()
    assert "<script" not in page and "<img" not in page and "onerror=alert(2)>" not in page
    assert page.count("<style>") == 1 and " style=" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\x1b" not in page and "\u202e" not in page
    assert "default-src 'none'" in html.unescape(page) and "script-src" not in page
    assert len(page) < 3_000_000


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["metrics.jsonl"], "No step has been finished"),
        (["evaluations.jsonl", "completions.jsonl", "result.json"], "Nothing has been measured"),
        (["config.toml"], "config.toml"),
        (
            "metrics.jsonl evaluations.jsonl completions.jsonl result.json run.json".split(),
            "No step has been finished",
        ),
    ],
)
def test_a_broken_run_has_a_report_that_says_what_is_missing(
    run: Path, missing: list[str], said: str
) -> None:
    for name in missing:
        (run / name).unlink()
    text = text_of(write_report(run).read_text())
    assert said in text
    if "result.json" in missing:
        assert "not finished" in text


def test_damaged_lines_are_left_out(run: Path) -> None:
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 11, "rew')
    assert "10 of 10 steps" in text_of(write_report(run).read_text())


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run), "--to", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.html'}\n"
    assert cli.main(["report", str(run), "--compare", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'compare.html'}\n"
    (tmp_path / "empty").mkdir()
    for words in (
        ["nowhere"],
        [str(run), "--compare", "nowhere"],
        [str(tmp_path / "empty")],
        [str(run), "--to", "/dev/null/x.html"],
    ):
        assert cli.main(["report", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def measured(hostile_pages: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a browser says of each page, in a wide and in a narrow window."""
    folder = tmp_path_factory.mktemp("browser")
    frames = [
        FRAME.format(width=width, page=page.as_uri()) for width in WIDTHS for page in hostile_pages
    ]
    (folder / "measure.html").write_text(MEASURE.format(frames="".join(frames)))
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --allow-file-access-from-files --virtual-time-budget=5000 --dump-dom""".split()
    command = [str(BROWSER), *flags, f"--user-data-dir={folder}", f"{folder}/measure.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<pre id=\"out\">(.*?)</pre>", shown)
    assert found and found[1], shown[-500:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_in_a_browser_nothing_overflows_and_nothing_is_requested(measured: Any) -> None:
    assert [page["shown"] for page in measured] == [width for width in WIDTHS for _ in range(2)]
    for page in measured:
        assert page["height"] > 2000
        assert page["width"] <= page["shown"]
        assert page["asked"] == []
