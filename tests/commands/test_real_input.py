"""Real problems, and a model and a mesh of the flagship's kind; minutes rather than seconds."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma2_grpo.run.schema import numbers
from gemma2_grpo.task.answers import extract_number, gold_answer

pytestmark = pytest.mark.slow

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GSM8K where it lies beside the repository, else problems of its form, as on the Hub."""
    if (GSM8K / "train.jsonl").is_file() and (GSM8K / "test.jsonl").is_file():
        return GSM8K
    folder = tmp_path_factory.mktemp("gsm8k") / "main"
    folder.mkdir()
    for split, count in (("train", 60), ("test", 20)):
        rows = [_problem(split, number) for number in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return folder


def _problem(split: str, number: int) -> dict[str, str]:
    clips, price = 3 * number + 10, number + 2
    total, left = clips * price, clips * price - 5
    padding = "The shop is open on weekdays and shut on Sundays. " * (number % 20)
    return {
        "question": f"In the {split} season Natalia sold {clips} clips at ${price} each. {padding}"
        "She spent $5 of it on lunch. How many dollars does she have left?",
        "answer": f"The clips brought {clips}*{price} = $<<{clips}*{price}={total}>>{total}.\n"
        f"She has {total}-5 = $<<{total}-5={left}>>{left} left.\n#### {left:,}",
    }


# Runs the command as a person would, and says how the policy lies on its devices.
RUN = """
import json, resource, sys
from flax import nnx
from gemma2_grpo import cli
from gemma2_grpo.run import session as session_module

opened = session_module.open_session
report = sys.argv.pop(1)

def spy(*args):
    session = opened(*args)
    weights = {
        "/".join(map(str, path)): {
            "is_adapter": isinstance(variable, nnx.LoRAParam),
            "dtype": str(variable.get_value().dtype),
            "shape": variable.get_value().shape,
            "axes": str(variable.get_value().sharding.spec),
            "shard": variable.get_value().sharding.shard_shape(variable.get_value().shape),
        }
        for path, variable in nnx.to_flat_state(nnx.state(session.learner.policy))
    }
    with open(report, "w") as file:
        json.dump(weights, file)
    return session

session_module.open_session = spy
status = cli.main(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(status)
"""


def run(path: Path, *arguments: object) -> tuple[list[str], dict[str, Any]]:
    """What `gemma2-grpo train` shows on 8 virtual devices, and the weights of its policy."""
    report = path.with_suffix(".json")
    command = [sys.executable, "-c", RUN, report, "train", "--run", path, *arguments]
    command = list(map(str, command))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    [peak] = [int(x.removeprefix("PEAK ")) for x in lines if x.startswith("PEAK ")]
    assert peak < 8 * 1024, f"{peak} MB"
    return lines, json.loads(report.read_text())


def check_run(path: Path, steps: int, updates: int) -> list[dict[str, Any]]:
    """Checks what any run must have written, and returns its completions."""
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == list(range(1, steps + 1))
    for record in metrics:
        assert len(numbers(record)) == len(record) + len(record["mean_components"]) - 1
        assert (record["num_updates"], record["num_updates_left_out"]) == (updates, 0)
    result = json.loads((path / "result.json").read_text())
    assert result["after"]["step"] == steps
    assert (path / "adapter" / "adapter.safetensors").is_file()
    return [json.loads(line) for line in (path / "completions.jsonl").read_text().splitlines()]


def test_the_embedded_model_trains_on_gsm8k(gsm8k: Path, tmp_path: Path) -> None:
    """It knows nothing of these problems; that all of them pass through is the point."""
    options = """--num-train-samples 48 --num-test-samples 8 --prompts-per-step 4 --max-steps 2
    --num-generations 4 --max-prompt-tokens 256 --max-completion-tokens 64 --eval-samples 0
    --eval-batch-prompts 8 --eval-every-steps 0""".split()
    path = tmp_path / "run"
    lines, _ = run(path, "tiny", "--dataset", gsm8k, *options)
    [data] = [line for line in lines if line.startswith("data ")]
    dropped = json.loads((path / "run.json").read_text())["data"]["num_dropped"]
    assert dropped > 0, "some of these prompts are longer than 256 tokens"
    assert f"{48 - dropped} train" in data
    completions = check_run(path, steps=2, updates=1)
    trained = [row for row in completions if row["kind"] == "train"]
    assert len(trained) == 32
    answers = dict(_rows(gsm8k))
    for row in completions:
        expected = extract_number(gold_answer(answers[row["question"]]))
        assert extract_number(row["answer"]) == expected


def _rows(folder: Path) -> list[tuple[str, str]]:
    rows: list[dict[str, str]] = []
    for file in folder.iterdir():
        if file.suffix == ".jsonl":
            rows += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        elif file.suffix == ".parquet":
            rows += pq.read_table(file).to_pylist()
    return [(row["question"].strip(), row["answer"]) for row in rows]


def test_the_flagship_cut_to_size_runs_on_its_mesh(
    gsm8k: Path, write_model: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = {
        "vocab_size": 32_768,
        "hidden_size": 1280,
        "intermediate_size": 6144,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 160,
        "sliding_window": 64,
    }
    model = write_model(tmp_path / "model", dtype="bfloat16", shards=3, **sizes)
    assert len(list(model.glob("*.safetensors"))) == 3
    # What `--max-steps` and the like cut; everything else is the flagship's own.
    options = """--num-train-samples 48 --num-test-samples 8 --prompts-per-step 2 --max-steps 2
    --num-generations 4 --max-prompt-tokens 160 --max-completion-tokens 24
    --eval-batch-prompts 8""".split()
    path = tmp_path / "run"
    lines, weights = run(path, "gemma2-2b-v5e8", "--model", model, "--dataset", gsm8k, *options)
    shown = " ".join(" ".join(lines).split())
    assert "98,970,880 parameters in bfloat16" in shown
    assert "8 x cpu, mesh 2 fsdp x 4 tp" in shown
    check_run(path, steps=2, updates=3)

    adapters = {name: w for name, w in weights.items() if w["is_adapter"]}
    base = {name: w for name, w in weights.items() if not w["is_adapter"]}
    assert len(adapters) == 2 * 2 * 6
    assert {w["dtype"] for w in adapters.values()} == {"float32"}
    assert {w["dtype"] for w in base.values()} == {"bfloat16"}
    matrices = {name: w for name, w in base.items() if len(w["shape"]) > 1}
    assert len(matrices) == 1 + 2 * 6
    for name, w in matrices.items():
        assert "tp" in w["axes"], f"{name} is on every device of a tp group"
        assert math.prod(w["shard"]) * 8 == math.prod(w["shape"]), name
