"""Supervised training on worked solutions, and the model directory that it writes."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from gemma2_grpo.checks import check_sft
from gemma2_grpo.commands.sft import Sft
from gemma2_grpo.config import SftConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model import open as opening
from gemma2_grpo.model import save
from gemma2_grpo.model.gemma import run_from_start
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.logprobs import output_logits
from gemma2_grpo.model.mesh import make_mesh
from gemma2_grpo.model.tokenizer import load_tokenizer
from gemma2_grpo.model.weights import split_model
from gemma2_grpo.presets import from_mapping
from gemma2_grpo.run.console import Display
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training import supervised

ROWS = [
    {
        "question": f"Ann has {i} eggs and finds {i + 2} more. How many eggs has she?",
        "answer": f"{i} + {i + 2} = <<{i}+{i + 2}={2 * i + 2}>>{2 * i + 2}\n#### {2 * i + 2}",
    }
    for i in range(40)
]
SHIPPED = Path(str(resources.files("gemma2_grpo") / "assets" / "tiny-gemma2"))
COPIED = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
Make = Callable[..., SftConfig]


class Losses(Display):
    """A display that only keeps the losses."""

    def __init__(self) -> None:
        with Path("/dev/null").open("w") as nowhere:
            super().__init__(Console(file=nowhere, quiet=True))
        self.phases: dict[str, list[float]] = {}

    def supervising(self, label: str, total: int) -> Any:
        del total
        losses = self.phases.setdefault(label, [])

        class Steps:
            def __enter__(self) -> Callable[[int, float], None]:
                return lambda step, loss: losses.append(loss)

            def __exit__(self, *_: object) -> None:
                pass

        return Steps()


@pytest.fixture(scope="module")
def make(tiny_model_dir: Path) -> Make:
    def make(**changes: dict[str, Any]) -> SftConfig:
        values: dict[str, dict[str, Any]] = {
            "model": {
                "model": str(tiny_model_dir),
                "dtype": "float32",
                "mesh_shape": [1, 1],
                "remat": "none",
                "lora_rank": 4,
                "lora_alpha": 4.0,
            },
            "data": {"dataset": "procedural", "num_train_samples": 40, "num_test_samples": 1},
            "sft": {"steps": 12, "batch_size": 4, "max_tokens": 96},
            "optimizer": {"learning_rate": 1e-2, "max_grad_norm": 1.0},
        }
        for name, section in changes.items():
            values[name] |= section
        return check_sft(from_mapping(SftConfig, values, "test"))

    return make


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "train_rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def losses_of(config: SftConfig, to: Path) -> dict[str, list[float]]:
    display = Losses()
    assert Sft("test", to, config)(display) == to
    return display.phases


@pytest.fixture(scope="module")
def adapted(
    make: Make, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SftConfig, Path, dict[str, list[float]]]:
    """Adapters on the solutions of a file, merged."""
    data = {"dataset": str(rows_file), "num_train_samples": 20, "num_test_samples": 1}
    config = make(data=data)
    to = tmp_path_factory.mktemp("sft") / "adapted"
    return config, to, losses_of(config, to)


@pytest.fixture(scope="module")
def from_scratch(
    make: Make, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SftConfig, Path, dict[str, list[float]]]:
    """All weights from random ones, on generated problems."""
    config = make(sft={"init": "random", "train_base": True})
    to = tmp_path_factory.mktemp("sft") / "scratch"
    return config, to, losses_of(config, to)


@pytest.fixture(params=["adapted", "from_scratch"])
def trained(request: pytest.FixtureRequest) -> tuple[SftConfig, Path, dict[str, list[float]]]:
    return request.getfixturevalue(request.param)


def our_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Float32 logits [L, V] of our loader."""
    forward, weights = split_model(load_weights(folder, "float32", make_mesh((1, 1))))
    hidden, _ = run_from_start(forward, weights, np.array([ids]))
    return np.asarray(output_logits(forward, weights, hidden)[0])


def test_a_whole_model_is_written(trained, tiny_model_dir):
    _, folder, _ = trained
    names = [*COPIED, "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name in COPIED:
        assert (folder / name).read_bytes() == (tiny_model_dir / name).read_bytes()
    config = json.loads((tiny_model_dir / "config.json").read_text())
    assert json.loads((folder / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0}
    before = load_file(tiny_model_dir / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert {name: x.shape for name, x in after.items()} == {n: x.shape for n, x in before.items()}
    assert {str(x.dtype) for x in after.values()} == {"bfloat16"}


def test_the_loss_falls(trained):
    config, _, phases = trained
    losses = phases["solutions"]
    assert len(losses) == config.sft.steps
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_adapters_change_the_matrices_they_are_on_and_nothing_else(adapted, tiny_model_dir):
    before = load_file(tiny_model_dir / "model.safetensors")
    after = load_file(adapted[1] / "model.safetensors")
    rounded = {name: x.astype(after[name].dtype) for name, x in before.items()}
    changed = {name for name in after if (after[name] != rounded[name]).any()}
    assert changed == {name for name in after if "self_attn" in name or "mlp" in name}


def test_random_weights_owe_nothing_to_the_model(from_scratch, tiny_model_dir):
    before = load_file(tiny_model_dir / "model.safetensors")
    after = load_file(from_scratch[1] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    a, b = before[name].astype(np.float32).ravel(), after[name].astype(np.float32).ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


@pytest.mark.oracle
def test_transformers_loads_it_and_agrees(trained):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, folder, _ = trained
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = render_prompt(ROWS[3]["question"])
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert ids == load_tokenizer(folder).encode(prompt)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(our_logits(folder, ids), theirs, atol=1e-4)


def test_training_is_seen_in_the_model_that_is_written(adapted, tiny_model_dir):
    """The likeliest first token of an answer is the tag that every solution begins with."""
    tokenizer = load_tokenizer(adapted[1])
    ids = tokenizer.encode(render_prompt(ROWS[0]["question"]))
    [tag] = tokenizer.encode("<reasoning>")[:1]

    def surprise(folder: Path) -> float:
        logits = our_logits(folder, ids)[-1]
        return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tag])

    assert surprise(adapted[1]) < surprise(tiny_model_dir) - 1


@pytest.mark.parametrize("kind", ["adapted", "from_scratch"])
def test_the_same_seed_gives_the_same_bytes(kind, request, tmp_path):
    config, folder, phases = request.getfixturevalue(kind)
    assert losses_of(config, tmp_path / "again") == phases
    weights = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights


def test_another_seed_gives_other_weights(from_scratch, tmp_path):
    config, folder, _ = from_scratch
    other = dataclasses.replace(config, sft=dataclasses.replace(config.sft, seed=1))
    losses_of(other, tmp_path / "other")
    weights = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights


def test_a_base_as_tools_leave_it_gives_a_model_that_chats(
    make, tiny_model_dir, tmp_path, monkeypatch
):
    """No chat template, a fixed length, one stop token."""
    monkeypatch.setattr(supervised, "train_supervised", lambda *_, **__: None)
    base, to = tmp_path / "base", tmp_path / "to"
    shutil.copytree(tiny_model_dir, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    backend = Tokenizer.from_file(str(base / "tokenizer.json"))
    backend.enable_truncation(30)
    backend.save(str(base / "tokenizer.json"))
    (base / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 2.0}')
    display = Losses()
    Sft("test", to, make(model={"model": str(base)}))(display)
    assert (to / "chat_template.jinja").is_file()
    assert json.loads((to / "tokenizer.json").read_text())["truncation"] is None
    generation = json.loads((to / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0}


# --- Mistakes ---


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Gives a configuration that must fail before weights load; returns what it says."""

    def run(config: SftConfig, to: Path | None = None) -> str:
        def fail(*_: Any) -> None:
            raise AssertionError("weights are made")

        for name in ("load_weights", "random_weights"):
            monkeypatch.setattr(opening, name, fail)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as refusal:
            Sft("test", to or tmp_path / "to", config)(Losses())
        assert sorted(tmp_path.rglob("*")) == before
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    return run


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_directory_that_holds_a_model_is_refused(name, make, refused, tmp_path):
    to = tmp_path / "model"
    to.mkdir()
    (to / name).write_bytes(b"weights")
    assert refused(make(), to) == f"{to}: holds a model already; choose another --to"
    assert (to / name).read_bytes() == b"weights"


def test_a_directory_that_cannot_be_written_is_refused(make, refused, tmp_path):
    (tmp_path / "file").write_text("")
    to = tmp_path / "file" / "model"
    expected = f"{to}: cannot be written (Not a directory); choose another --to"
    assert refused(make(), to) == expected


def test_data_without_solutions_are_refused(make, refused, tmp_path):
    file = tmp_path / "answers.jsonl"
    rows = [{"question": row["question"], "answer": str(i)} for i, row in enumerate(ROWS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make(data={"dataset": str(file), "num_train_samples": 20})
    assert refused(config) == f"dataset = {file}: has no worked solutions to train on"


def test_a_model_without_weights_will_do_for_random_ones(make, tiny_model_dir, refused, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model_dir, bare)
    (bare / "model.safetensors").unlink()
    assert "no *.safetensors file in it" in refused(make(model={"model": str(bare)}))
    config = make(model={"model": str(bare)}, sft={"init": "random"})
    with pytest.raises(AssertionError, match="weights are made"):
        Sft("test", tmp_path / "to", config)(Losses())


@pytest.mark.parametrize("is_new", [True, False])
def test_a_disk_that_fills_up_leaves_no_half_model(is_new, make, tmp_path, monkeypatch):
    def full(*args: Any, **_: Any) -> None:
        (args[1] / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "save_model", full)
    monkeypatch.setattr(supervised, "train_supervised", lambda *_, **__: None)
    to = tmp_path / "models" / "to"
    if not is_new:
        to.mkdir(parents=True)
        (to / "notes").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as refusal:
        Sft("test", to, make())(Losses())
    assert str(refusal.value) == (
        f"{to}: could not be written (No space left on device); nothing is left of it"
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_mesh_of_eight_devices_gives_the_same_model(make, tmp_path):
    """Rows over fsdp and heads over tp change rounding only."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    options = {"init": "random", "train_base": True, "steps": 2}
    for name, shape in (("one", [1, 1]), ("eight", [2, 4])):
        losses_of(make(model={"mesh_shape": shape}, sft=options), tmp_path / name)
    one, eight = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "eight"))
    for name, value in one.items():
        a, b = value.astype(np.float32), eight[name].astype(np.float32)
        np.testing.assert_allclose(a, b, atol=2e-2, err_msg=name)
