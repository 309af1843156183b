"""Nothing needs a module that only POSIX has, or an encoding that not every system has.

There is no Windows here: what it lacks is taken away instead.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma2_grpo.config import Config
from gemma2_grpo.presets import to_toml

# Modules that Windows lacks.
WITHOUT_POSIX = """
import sys
import psutil  # It has another module for each system.
for name in ("fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty", "pty"):
    sys.modules[name] = None
import warnings
warnings.filterwarnings("ignore", "only soft file lock")
"""
IMPORTS = """
import importlib, pkgutil
import gemma2_grpo
for module in pkgutil.walk_packages(gemma2_grpo.__path__, "gemma2_grpo."):
    importlib.import_module(module.name)
print("all imported")
"""
COMMAND = "from gemma2_grpo.cli import main\nsys.exit(main(sys.argv[1:]))\n"


def run(script: str, *arguments: str, folder: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX + script, *arguments],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode("cp1252", "replace")[-2000:]
    return done.stdout.decode("cp1252", "replace")


def test_every_module_can_be_imported(tmp_path: Path) -> None:
    assert run(IMPORTS, folder=tmp_path).endswith("all imported\n")


@pytest.mark.slow
def test_a_run_from_training_to_its_report(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Its output goes into a pipe, which on Windows cannot take every character."""
    steps = {"max_steps": 1, "eval_every_steps": 0, "eval_samples": 0, "sample_every_steps": 1}
    (tmp_path / "small.toml").write_text(to_toml(make_config(run=steps)), encoding="utf-8")
    cp1252 = {"PYTHONIOENCODING": "cp1252", "XLA_FLAGS": ""}
    train = ["train", "small.toml", "--run", "run"]
    assert "step 1/1: reward" in run(COMMAND, *train, folder=tmp_path, **cp1252)
    assert "is finished" in run(COMMAND, *train, folder=tmp_path, **cp1252)
    run(COMMAND, "report", "run", folder=tmp_path, **cp1252)
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8").startswith("<!")


def test_what_cannot_be_encoded_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "☕.jsonl").write_text("{", encoding="utf-8")
    script = COMMAND.replace("sys.exit(main(sys.argv[1:]))", "print(main(sys.argv[1:]))")
    done = run(script, "score", "☕.jsonl", folder=tmp_path, PYTHONIOENCODING="ascii")
    assert done == "2\n"
