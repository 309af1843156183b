"""The notebook runs whole, on the embedded default, as it would on Kaggle."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "train_grpo.ipynb"
# What Kaggle's machines bring along; the secret must be asked for by its name.
SECRETS = """
class UserSecretsClient:
    def get_secret(self, label):
        assert label == "HF_TOKEN"
        return "hf_of_this_test"
"""


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_short_and_committed_without_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 15
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert "def " not in cell.source and "class " not in cell.source


@pytest.mark.parametrize("place", ["kaggle/input/datasets/me/copy", "clone"])
def test_the_root_of_the_repository_is_found(notebook: Any, place: str, tmp_path: Path) -> None:
    """As it is found where the package is not installed; the line that installs is left out."""
    root = tmp_path / place
    (root / "src" / "gemma2_grpo").mkdir(parents=True)
    (tmp_path / "clone" / "notebooks").mkdir(parents=True)
    lines = notebook.cells[1].source.replace("/kaggle/input", f"{tmp_path}/kaggle/input")
    find, _, install = lines.partition("if importlib")
    assert "pip install" in install and "pyproject.toml" in install
    printed = subprocess.run(
        [sys.executable, "-c", f"{find}print(SOURCE)"],
        cwd=tmp_path / "clone" / "notebooks",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed == f"{root}\n"


def output_of(cell: Any) -> str:
    """All that a cell shows, without colours."""
    shown = [
        output.get("text", "") + str(output.get("data", {}).get("text/html", ""))
        for output in cell.outputs
    ]
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join(shown))


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "border").mkdir()
    (tmp_path / "border" / "kaggle_secrets.py").write_text(SECRETS)
    paths = [str(tmp_path / "border"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    cells = [*notebook.cells, nbformat.v4.new_code_cell("import os; print(os.environ['HF_TOKEN'])")]
    executed = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    nbclient.NotebookClient(
        executed, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [output_of(cell) for cell in executed.cells if cell.cell_type == "code"]
    assert not any("Warning" in text for text in shown)
    install, machine, settings, before, training, report, after, exported, token = shown
    assert install == ""
    assert "Kaggle: " in machine and "configuration tiny: no TPU and no GPU" in machine
    assert token == "hf_of_this_test\n"
    assert all("hf_of_this_test" not in text for text in shown[:-1])
    assert "max_steps = 40\n" in settings
    assert "Step 1: 24 x 4 = 96 ✓\n" in before
    assert "step 40/40: " in training and "256 held-out problems" in training
    assert "srcdoc" in report and "&lt;html" in report
    assert "No command was recorded" in report and "HistoryManager" not in report
    assert before in after.partition("after 40 steps")[0]
    assert "98 - 96 = 2 ✓" in after.partition("after 40 steps")[2]
    assert "model: merged, bfloat16, after 40 steps" in exported
    result = json.loads((tmp_path / "runs/tiny/result.json").read_text())
    assert result["after"]["accuracy"] > 0.9 > 0.6 > result["before"]["accuracy"]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        assert (tmp_path / "model" / name).is_file(), exported
