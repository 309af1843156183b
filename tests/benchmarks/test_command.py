from collections.abc import Callable

import pytest

from benchmarks import rounds, scaling, step
from gemma2_grpo.errors import UserError


@pytest.fixture
def without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if everything but TRL were installed."""
    find: Callable[[str], object] = lambda name: None if name == "trl" else object()  # noqa: E731
    monkeypatch.setattr(rounds.importlib.util, "find_spec", find)


@pytest.mark.usefixtures("without_trl")
def test_a_system_that_is_not_installed_is_skipped_with_a_line() -> None:
    chosen, notes = step.choose_systems(step.Step())
    assert chosen == ("ours", "tunix")
    assert notes == ["skipped trl: needs trl; install the extra `bench`"]


@pytest.mark.usefixtures("without_trl")
def test_a_system_that_was_named_must_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--systems", "ours", "trl"]) == 2
    error = capsys.readouterr().err
    assert error == "error: trl: needs trl; install the extra `bench`\n"


def test_the_large_preset_runs_ours() -> None:
    assert step.choose_systems(step.Step(preset="gemma2-2b"))[0] == ("ours",)
    with pytest.raises(UserError, match="ours only"):
        step.choose_systems(step.Step(preset="gemma2-2b", systems=("ours", "tunix")))


def test_the_command_line_overrides_the_preset() -> None:
    sizes = step.Step(preset="gemma2-2b", layers=2, vocab=512, dtype="float32").sizes()
    assert (sizes.layers, sizes.vocab, sizes.dtype, sizes.width) == (2, 512, "float32", 2304)


def test_no_steps_are_a_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--steps", "0"]) == 2
    assert "--steps must be at least 1" in capsys.readouterr().err


def test_points_differ_in_one_thing() -> None:
    for axis, field in (
        ("generations", "generations"),
        ("length", "max_completion_tokens"),
        ("vocab", "vocab"),
    ):
        points = scaling.AXES[axis]
        assert [getattr(sizes, field) for sizes in points.values()] == list(points)
        rest = {tuple(v for k, v in vars(s).items() if k != field) for s in points.values()}
        assert len(rest) == 1
