"""Two runs side by side."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gemma2_grpo.errors import UserError
from gemma2_grpo.report.curves import charts_of_runs
from gemma2_grpo.report.report import write_comparison
from gemma2_grpo.run.files import read_run

Write = Callable[..., Path]


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
    assert "a and b do not differ significantly" in page
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
