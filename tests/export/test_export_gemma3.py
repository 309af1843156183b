"""A Gemma 3 from training to its exports, which transformers and PEFT load."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
from rich.console import Console
from tests.fixtures.runs import EMBEDDED, TOKENIZER_FILES

from gemma2_grpo.commands.export import Export
from gemma2_grpo.config import Config
from gemma2_grpo.run.console import Display
from gemma2_grpo.run.schema import StepRecord


@pytest.fixture(scope="module")
def run(
    goldens: ModuleType,
    make_config: Callable[..., Config],
    quiet_train: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two steps on a random Gemma 3 with one KV head, whose window is shorter than a prompt."""
    folder = tmp_path_factory.mktemp("gemma3")
    values = goldens.SMALL3 | {"vocab_size": 496, "pad_token_id": 0, "bos_token_id": 2}
    base = goldens.write_model(folder / "base", values, seed=2)
    for name in TOKENIZER_FILES:
        shutil.copy(EMBEDDED / name, base)
    config = make_config(
        model={"model": str(base)},
        grpo={"num_iterations": 1},
        run={"max_steps": 2, "eval_samples": 0, "eval_every_steps": 0},
    )
    quiet_train(config, folder / "run")
    return folder / "run"


def test_a_step_samples_from_what_it_updates(run: Path) -> None:
    lines = (run / StepRecord.FILE).read_text().splitlines()
    records = [StepRecord(**json.loads(line)) for line in lines]
    assert len(records) == 2
    for record in records:
        assert record.max_ratio == 1.0
        assert record.sampling_kl == pytest.approx(0, abs=1e-9)
        assert record.num_updates == 1 and record.grad_norm > 0


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["merged", "peft"])
def test_exports_agree_with_transformers(
    kind: Literal["merged", "peft"], run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    shown = io.StringIO()
    display = Display(Console(file=shown, width=200))
    to = Export(str(run), tmp_path / kind, format=kind, dtype="float32", verify="always")(display)
    assert "agree" in shown.getvalue().lower() or "differ" in shown.getvalue().lower()
    card = (to / "README.md").read_text()
    assert "Gemma 3 that shows its work" in card and "attn_implementation" not in card
