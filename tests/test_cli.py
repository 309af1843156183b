"""The command answers at once, passes on what was asked, and says mistakes in one line."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from gemma2_grpo import cli
from gemma2_grpo.commands.evaluate import Evaluate
from gemma2_grpo.commands.export import Export
from gemma2_grpo.commands.score import Score
from gemma2_grpo.commands.sft import Sft
from gemma2_grpo.commands.train import Train
from gemma2_grpo.config import Config, EvaluateConfig, flat, replaced
from gemma2_grpo.errors import UserError
from gemma2_grpo.presets import load_config
from gemma2_grpo.runtime.devices import OLDEST_JAX

ALL = ", ".join(cli.COMMANDS)
Recorder = list[tuple[Any, ...]]


@pytest.fixture
def train_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    """What a run is begun with, in place of running it."""
    calls: Recorder = []
    monkeypatch.setattr("gemma2_grpo.commands.train._run", lambda *given: calls.append(given))
    monkeypatch.chdir(tmp_path)
    return calls


def _python(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "80"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_train_alone_is_the_tiny_preset(train_calls: Recorder) -> None:
    assert cli.main(["train"]) == 0
    [(config, name, directory, _, cluster)] = train_calls
    assert (config, name, cluster) == (load_config("tiny"), "tiny", None)
    assert directory.path == Path("runs/tiny")
    assert cli.parse(["train"]) == Train(config=load_config("tiny"))


def test_options_override_the_preset() -> None:
    command = "train gemma2-2b-v5e8 --run out --max-steps 10 --num_generations=4 --mesh-shape 1 1"
    command += " --beta 0 --epsilon-high 0.3 --no-tensorboard --lora-modules a b"
    flagship = load_config("gemma2-2b-v5e8")
    config = Config(
        model=dataclasses.replace(flagship.model, mesh_shape=(1, 1), lora_modules=("a", "b")),
        data=flagship.data,
        rollout=dataclasses.replace(flagship.rollout, num_generations=4),
        grpo=dataclasses.replace(flagship.grpo, beta=0.0, epsilon_high=0.3),
        optimizer=flagship.optimizer,
        rewards=flagship.rewards,
        run=dataclasses.replace(flagship.run, max_steps=10, tensorboard=False),
    )
    assert cli.parse([*command.split(), "--allow-config-change"]) == Train(
        "gemma2-2b-v5e8", Path("out"), allow_config_change=True, config=config
    )


def test_config_may_be_a_file_and_may_come_last(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[run]\nmax_steps = 7\nseed = 3\n")
    parsed = cli.parse(["train", "--seed", "5", str(file)])
    assert parsed == Train(str(file), config=replaced(Config(), max_steps=7, seed=5))


def test_an_override_can_mend_a_file_that_cannot_run(train_calls: Recorder, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[grpo]\nmicro_batch_tokens = 1000\n")
    assert cli.main(["train", str(file)]) == 2
    assert cli.main(["train", str(file), "--max-completion-tokens", "500"]) == 0
    assert len(train_calls) == 1


def test_sft_takes_config_and_directory() -> None:
    config = replaced(load_config("tiny"), max_steps=3, data_seed=5)
    assert cli.parse("sft tiny --to out --max-steps 3 --data-seed 5".split()) == Sft(
        "tiny", to=Path("out"), config=config
    )
    assert cli.parse(["sft"]) == Sft("tiny", config=load_config("tiny"))


def test_export_takes_its_options() -> None:
    assert cli.parse("export runs/tiny --to out".split()) == Export("runs/tiny", Path("out"))
    plain = {"format": "merged", "dtype": None, "max_shard_gb": 5.0, "verify": "auto"}
    plain |= {"push": None, "public": False, "yes": False}
    assert Export("r", Path()) == Export("r", Path(), **plain)
    words = "--format peft --dtype bfloat16 --max-shard-gb 2 --verify always"
    words += " --push me/model --public --yes"
    full = {"format": "peft", "dtype": "bfloat16", "max_shard_gb": 2.0, "verify": "always"}
    full |= {"push": "me/model", "public": True, "yes": True}
    parsed = cli.parse(["export", "runs/tiny", "--to", "out", *words.split()])
    assert parsed == Export("runs/tiny", Path("out"), **full)


def test_score_takes_file_and_format() -> None:
    parsed = cli.parse(["score", "completions.jsonl", "--json"])
    assert parsed == Score(Path("completions.jsonl"), json=True)


def test_evaluate_takes_the_options_of_train() -> None:
    command = "evaluate runs/tiny --eval-samples 8 --num-test-samples 20 --dataset procedural"
    asked = EvaluateConfig(dataset="procedural", num_test_samples=20, eval_samples=8)
    assert cli.parse(f"{command} --to out --json".split()) == Evaluate(
        "runs/tiny", Path("out"), json=True, config=asked
    )
    shared = {each.name for each in dataclasses.fields(EvaluateConfig)}
    assert shared < set(flat(Config()))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", f"a command is missing; it is one of {ALL}"),
        ("trian", "'trian' is no command; did you mean train?"),
        ("--max-steps 3", f"'--max-steps' is no command; it is one of {ALL}"),
        ("sft tiny --max-steps 0", "max_steps = 0 must be at least 1"),
        ("export runs/tiny", "--to is missing; see gemma2-grpo export --help"),
        ("export r --to d --format gguf", "--format takes one of merged, peft, not 'gguf'"),
        ("score", "FILE.jsonl is missing; see gemma2-grpo score --help"),
        ("evaluate", "RUN|MODEL is missing; see gemma2-grpo evaluate --help"),
        (
            "train --max_stepz 10",
            "'--max_stepz' is not understood by train; did you mean --max-steps?",
        ),
        ("train --json", "'--json' is not understood by train; see gemma2-grpo train --help"),
        ("train tiny more", "'more' is not understood by train; see gemma2-grpo train --help"),
        ("train --max-steps 1.5", "--max-steps takes INT, not '1.5'"),
        ("train --max-steps", "--max-steps takes INT; a value is missing"),
        ("train --learning-rate a'b", '--learning-rate takes FLOAT, not "a\'b"'),
        ("train --mesh-shape 1 x", "--mesh-shape takes INT INT, not '1 x'"),
        ("train --mesh-shape 1", "--mesh-shape takes INT INT; a value is missing"),
        ("train --epsilon-high x", "--epsilon-high takes FLOAT, not 'x'"),
        ("export r --to d --dtype x", "--dtype takes one of bfloat16, float32, not 'x'"),
        ("train --epsilon-high 0.1", "epsilon_high = 0.1 is below epsilon = 0.2; raise it"),
        ("train --epsilon-high None --max-steps 0", "max_steps = 0 must be at least 1"),
        ("train --remat all", "--remat takes one of none, block, decoder, not 'all'"),
        ("train --max-steps 0", "max_steps = 0 must be at least 1"),
        (
            "train gemma2-2b-v5e8 --micro-batch-tokens 1000",
            "micro_batch_tokens = 1000 does not hold a sequence of 768 tokens for each of "
            "mesh_shape[0] = 2; raise it to 1536",
        ),
        (
            "train large --max-steps 3",
            "config 'large': no such file or preset; presets are "
            "gemma2-2b-gpu, gemma2-2b-gsm8k-strong, gemma2-2b-v5e8, "
            "gemma3-1b-gpu, gemma3-1b-v5e8, tiny",
        ),
    ],
)
def test_a_mistake_is_one_line(
    command: str, message: str, train_calls: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command.split()) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert not train_calls


def test_mistakes_are_told_before_jax_loads_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "config.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text('model.model = "embedded"\n')
    (tmp_path / "run" / "checkpoints" / "step_000010").mkdir(parents=True)
    mistakes = {
        "ask nowhere q": "model 'nowhere': no such directory",
        "ask shards q": "shards: no *.safetensors file in it",
        "evaluate nowhere": "model 'nowhere': no such directory",
        "evaluate run --dataset nowhere --to new": "dataset 'nowhere': no such file or directory",
        "export nowhere --to new": "run nowhere: no such directory",
        "train --model nowhere --run new": "model 'nowhere': no such directory",
        "train --model kaggle:x --run new": "model 'kaggle:x': not a Kaggle handle",
        "plan --budget nan": "budget = nan must be a finite number",
    }
    code = (
        "import os, sys; from gemma2_grpo.cli import main; "
        f"os.chdir({str(tmp_path)!r}); "
        f"print(*(main(command.split()) for command in {list(mistakes)!r}), 'jax' in sys.modules)"
    )
    done = _python(code)
    assert done.stdout.split() == ["2"] * len(mistakes) + ["False"]
    for line, mistake in zip(done.stderr.splitlines(), mistakes.values(), strict=True):
        assert line.startswith(f"error: {mistake}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "shards"]


@pytest.mark.parametrize(
    ("raised", "status", "stderr"),
    [
        (
            UserError("prompts.jsonl:3: no field\n  `answer`"),
            2,
            "prompts.jsonl:3: no field `answer`",
        ),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_what_a_run_raises_becomes_the_status(
    raised: BaseException,
    status: int,
    stderr: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("gemma2_grpo.commands.train._run", fail)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train"]) == status
    assert capsys.readouterr() == ("", f"error: {stderr}\n" if stderr else "")


def test_a_jax_that_is_old_or_absent_is_refused(
    monkeypatch: pytest.MonkeyPatch, train_calls: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    for version in (lambda _: "0.9.12", absent):
        monkeypatch.setattr(metadata, "version", version)
        assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == (
        "error: JAX 0.9.12 is too old; pip install 'jax>=0.10'\n"
        "error: JAX is not installed; pip install 'jax>=0.10'\n"
    )
    monkeypatch.setattr(metadata, "version", lambda _: "0.10.0.dev1")
    assert cli.main(["train"]) == 0
    assert len(train_calls) == 1


def test_the_oldest_jax_is_the_one_of_the_project_file() -> None:
    project = Path(__file__).parents[1] / "pyproject.toml"
    dependencies = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    assert "jax>=" + ".".join(map(str, OLDEST_JAX)) in dependencies


def test_an_old_python_is_refused() -> None:
    old = "import sys; sys.version_info = (3, 10, 2); sys.version = '3.10.2 x'"
    done = _python(f"{old}; import gemma2_grpo.cli")
    message = "error: Python 3.10.2 is too old; use 3.11 or newer\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize(
    "command",
    ["--help", "train --help", "train gemma2-2b-gpu -h", *(f"{name} -h" for name in cli.COMMANDS)],
)
def test_help_is_quick_and_fits_the_screen(command: str) -> None:
    code = f"""
import atexit, sys, time
heavy = ("flax", "jax", "numpy", "rich", "transformers", "tunix")
atexit.register(lambda: print(time.process_time(), *(m for m in heavy if m in sys.modules)))
from gemma2_grpo.cli import main
main({command.split()})
"""
    done = _python(code)
    assert (done.returncode, done.stderr) == (0, "")
    *text, last = done.stdout.splitlines()
    seconds, *imported = last.split()
    assert imported == []
    assert float(seconds) < 3  # Seconds of the processor; it takes 0.3 where nothing else runs.
    assert max(map(len, text)) <= 80


def _help(*words: str) -> str:
    return _python(f"from gemma2_grpo.cli import main; main({[*words, '-h']!r})").stdout


def test_a_command_that_takes_the_options_of_another_explains_them() -> None:
    text = _help("sft")
    for own in ("An existing run there is resumed", "Also write the whole model"):
        assert own in text


def test_docstrings_fill_the_lines_of_the_help() -> None:
    """Each line but the last of a paragraph has no room for the next word."""
    text = _help("train")
    paragraph = re.search(r"--dataset STR(.*?)--num-train", text, re.DOTALL)
    assert paragraph
    lines = [line.strip(" │") for line in paragraph[1].splitlines()]
    room = max(map(len, lines[:-1]))
    for line, following in itertools.pairwise(lines[:-1]):
        assert len(f"{line} {following.split()[0]}") > room, line


def test_defaults_that_say_nothing_are_not_shown() -> None:
    for command in cli.COMMANDS:
        text = " ".join(_help(command).replace("│", " ").split())
        for nothing in ("unset", "default: False", "default: None"):
            assert nothing not in text, command
    assert "(default: 40)" in _help("train") and "(default: True)" in _help("train")


def test_help_names_every_field_and_the_values_of_the_preset() -> None:
    text = _help("train", "gemma2-2b-gpu")
    for section in dataclasses.fields(Config):
        assert f" {section.name} options " in text
        for field in dataclasses.fields(getattr(Config(), section.name)):
            assert "--" + field.name.replace("_", "-") in text
    assert "[CONFIG]" in text
    assert "(default: tiny)" in text
    assert "google/gemma-2-2b-it" in text
