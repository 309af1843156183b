"""The report says what the run's files say, takes nothing in and lets nothing out."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma2_grpo import cli
from gemma2_grpo.runs.report import write_report

from .conftest import Finished

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = (
    "</pre><script>alert(1)</script><img src=http://example.invalid/x.png onerror=alert(2)>"
    "<style>*{display:none}</style>\x1b[31m\u202e" + "x" * 3000 + " 1 + 1 = 3"
)
# Measures a page that is shown within another one of the given width.
MEASURE = """<!doctype html><iframe id=page style="width:{width}px;height:900px;border:0"
src="{report}"></iframe><pre id=out></pre><script>
onload = () => {{
  const page = document.getElementById("page"), root = page.contentDocument.documentElement;
  const asked = page.contentWindow.performance.getEntriesByType("resource").map(e => e.name);
  document.getElementById("out").textContent = JSON.stringify(
    {{width: root.scrollWidth, shown: page.clientWidth, height: root.scrollHeight, asked}});
}};
</script>"""


@pytest.fixture(scope="module")
def finished(run_straight: Callable[[int], Finished]) -> Finished:
    return run_straight(3)


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    return path


@pytest.fixture
def hostile(run: Path) -> Path:
    """Whatever a model could write, in every completion."""
    lines = (run / "completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"completion": HOSTILE} for line in lines]
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page)).split())


def test_training_writes_it(finished: Finished) -> None:
    assert (finished.path / "report.html").is_file()


def test_it_says_what_the_run_measured(run: Path) -> None:
    page = write_report(run).read_text()
    text = text_of(page)
    result = json.loads((run / "result.json").read_text())
    for when in ("before", "after"):
        assert f"{100 * result[when]['accuracy']:.1f} %" in text
    record = json.loads((run / "run.json").read_text())
    assert record["data_sha256"] in text and record["base_sha256"] in text
    assert "finished, 5 of 5 steps" in text
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert [html.unescape(heading) for heading in headings] == [
        "Did it get better?",
        "What does it say now?",
        "How did it learn?",
        "Was it healthy?",
        "Where did time and memory go?",
        "How to reproduce it",
    ]
    assert len(page) < 3_000_000


def test_plots_are_written_as_png(run: Path, tmp_path: Path) -> None:
    write_report(run, tmp_path / "here.html", plots=True)
    plots = list((tmp_path / "plots").glob("*.png"))
    assert {"reward.png", "kl.png"} <= {path.name for path in plots}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)


def test_hostile_completions_are_inert(hostile: Path) -> None:
    page = write_report(hostile).read_text()
    assert "<script" not in page and "<img" not in page and "onerror=alert(2)>" not in page
    assert page.count("<style>") == 1
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
            file.write('{"step": 6, "rew')
    assert "5 of 5 steps" in text_of(write_report(run).read_text())


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run), "--to", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.html'}\n"
    (tmp_path / "empty").mkdir()
    for words in (["nowhere"], [str(tmp_path / "empty")], [str(run), "--to", "/dev/null/x.html"]):
        assert cli.main(["report", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 360])
def test_in_a_browser_nothing_overflows_and_nothing_is_requested(
    hostile: Path, width: int, tmp_path: Path
) -> None:
    report = write_report(hostile)
    (tmp_path / "measure.html").write_text(MEASURE.format(width=width, report=report.as_uri()))
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --allow-file-access-from-files --virtual-time-budget=5000""".split()
    shown = subprocess.run(
        [
            *(str(BROWSER), *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
            (tmp_path / "measure.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    found = re.search(r"<pre id=\"out\">(.*?)</pre>", shown)
    assert found and found[1], shown[-500:]
    measured = json.loads(html.unescape(found[1]))
    assert measured["height"] > 2000
    assert measured["shown"] == width and measured["width"] <= width
    assert measured["asked"] == []
