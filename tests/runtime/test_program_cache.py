"""Programs are kept for the next launch, whatever has become of the cache, and counted."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_grpo.runtime.program_cache import ProgramCount, counting_programs, prune

LAUNCH = """
import json, sys
from importlib import metadata
import jax, jax.numpy as jnp, numpy as np
from gemma2_grpo.runtime.program_cache import counting_programs, use_program_cache

{before}
notes = []
cache = use_program_cache({is_wanted}, notes.append)
with counting_programs(cache) as programs:
    x = np.eye(20, dtype=np.float32)
    value = float(jax.jit(lambda x: (jnp.sin(x) @ x.T).sum())(x) + jax.jit(jnp.cumsum)(x)[-1])
print(json.dumps([value, programs.compiled, programs.cached, str(cache), notes]))
"""


class Launched:
    """A process that computes something small, with its cache under `home`."""

    def __init__(self, home: Path, before: str = "", is_wanted: bool = True, **more: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_PERSISTENT")}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH.format(before=before, is_wanted=is_wanted)],
            env=environment | {"XDG_CACHE_HOME": str(home)} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> dict[str, Any]:
        """What it printed; nothing may be on standard error, where XLA would complain."""
        out, err = self._process.communicate(timeout=120)
        assert (self._process.returncode, err) == (0, "")
        return dict(
            zip(("value", "compiled", "cached", "cache", "notes"), json.loads(out), strict=True)
        )


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Where programs are kept in these tests."""
    return tmp_path / "gemma2-grpo" / "programs"


def test_a_second_launch_compiles_nothing(tmp_path: Path, programs: Path) -> None:
    first, second = Launched(tmp_path).result(), Launched(tmp_path).result()
    assert (first["compiled"] > 0, first["cached"], first["notes"]) == (True, 0, [])
    assert second == first | {"compiled": 0, "cached": first["compiled"]}
    assert first["cache"] == str(programs)
    assert programs.stat().st_mode & 0o077 == 0, "what lies there is run"


def test_two_launches_at_once_share_it(tmp_path: Path, programs: Path) -> None:
    first, second = (process.result() for process in [Launched(tmp_path), Launched(tmp_path)])
    total = first["compiled"] + first["cached"]
    assert second["compiled"] + second["cached"] == total
    assert first["value"] == second["value"]
    assert len(list(programs.iterdir())) == total
    assert Launched(tmp_path).result()["cached"] == total


@pytest.mark.parametrize("kept", [0, 100], ids=["empty", "cut off"])
def test_a_damaged_program_is_noted_and_mended(kept: int, tmp_path: Path, programs: Path) -> None:
    first = Launched(tmp_path).result()
    for entry in programs.glob("jit_cumsum-*"):
        entry.write_bytes(entry.read_bytes()[:kept])
    second = Launched(tmp_path).result()
    assert (second["value"], second["compiled"]) == (first["value"], 1)
    [note] = second["notes"]
    assert note.startswith(f"{programs}: reading a compiled program failed (") and "\n" not in note
    assert Launched(tmp_path).result() == first | {"compiled": 0, "cached": first["compiled"]}


def test_a_full_disk_is_noted_once(tmp_path: Path, programs: Path) -> None:
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))"
    launched = Launched(tmp_path, before=limit).result()
    assert launched["compiled"] > 1
    [note] = launched["notes"]
    assert note.startswith(f"{programs}: writing a compiled program failed (")


@pytest.mark.parametrize("is_chosen", [False, True], ids=["default", "chosen"])
def test_a_directory_that_cannot_be_written_is_noted(is_chosen: bool, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    chosen = {"JAX_COMPILATION_CACHE_DIR": str(file / "mine")} if is_chosen else {}
    launched = Launched(file, **chosen).result()
    place = file / "mine" if is_chosen else file / "gemma2-grpo" / "programs"
    assert launched["compiled"] > 0
    assert launched["cache"] == "None"
    assert launched["notes"] == [
        f"compiled programs are not kept: {place} cannot be written (Not a directory)"
    ]


def test_a_chosen_directory_wins(tmp_path: Path, programs: Path) -> None:
    own = tmp_path / "own"
    chosen = {"JAX_COMPILATION_CACHE_DIR": str(own)}
    first = Launched(tmp_path, **chosen).result()
    assert (first["cache"], len(list(own.iterdir()))) == (str(own), first["compiled"])
    assert Launched(tmp_path, **chosen).result()["compiled"] == 0
    assert not programs.exists()


def test_a_chosen_threshold_wins(tmp_path: Path, programs: Path) -> None:
    Launched(tmp_path, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="60").result()
    assert list(programs.iterdir()) == []


@pytest.mark.parametrize(
    "switch", [{"is_wanted": False}, {"JAX_ENABLE_COMPILATION_CACHE": "0"}], ids=["ours", "JAX's"]
)
def test_it_can_be_switched_off(switch: dict[str, Any], tmp_path: Path) -> None:
    launched = Launched(tmp_path, **switch).result()
    assert (launched["compiled"] > 0, launched["cache"], launched["notes"]) == (True, "None", [])
    assert list(tmp_path.iterdir()) == []


def test_a_noisy_jaxlib_keeps_nothing(tmp_path: Path) -> None:
    launched = Launched(tmp_path, before="metadata.version = lambda name: '0.10.1'").result()
    assert launched["cache"] == "None"
    assert launched["notes"] == [
        "compiled programs are not kept with jaxlib 0.10.1; from 0.10.2 on"
    ]
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for age, name in enumerate(("new", "folder/middle", "old", "oldest")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1_000_000 - age, 1_000_000 - age))
    os.utime(tmp_path / "oldest", (2_000_000, 0))  # Written first, but read last.
    prune(tmp_path, 400)
    assert (tmp_path / "old").exists()
    prune(tmp_path, 250)
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "folder", "oldest"}


def test_programs_of_all_threads_are_counted_once() -> None:
    x = np.arange(7.0, dtype=np.float32)
    programs = [jax.jit(lambda x, i=i: jnp.tanh(x * i) - i) for i in range(3)]
    with counting_programs() as count:
        threads = [threading.Thread(target=program, args=[x]) for program in programs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for program in programs:
            program(x)
    assert count.compiled + count.cached == 3
    jax.jit(lambda x: jnp.tanh(x) - 5)(x)
    assert count.compiled + count.cached == 3, "counting is over"


def test_counts_as_records_and_for_people() -> None:
    count = ProgramCount(Path("/cache"), compiled=14, seconds=20.7, cached=9)
    assert count.as_record() == {
        "num_compiled_programs": 14,
        "num_cached_programs": 9,
        "compile_seconds": 20.7,
    }
    assert str(count) == "compiled 14 programs in 21 s; 9 came from the cache at /cache"
    assert str(ProgramCount(None, 14, 20.7)) == "compiled 14 programs in 21 s"
