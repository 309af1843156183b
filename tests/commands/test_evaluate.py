"""`gemma2-grpo evaluate`: the right numbers, the same however often it was stopped, in one line."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from tests.fixtures.runs import Finished
from tests.fixtures.written_run import answers
from tests.fixtures.written_run import finished as finished_run

from gemma2_grpo import cli
from gemma2_grpo.commands.evaluate import Evaluate
from gemma2_grpo.config import Config, EvaluateConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.adapter import fingerprint, save_adapter
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.lora import add_lora
from gemma2_grpo.model.mesh import make_mesh
from gemma2_grpo.run import source as opening
from gemma2_grpo.run.directory import EvaluationFolder, RunDirectory
from gemma2_grpo.run.measure import Batch, plan_batches
from gemma2_grpo.run.records import compare_systems, summarize
from gemma2_grpo.run.results import BegunEvaluation, EvaluatedCompletion
from gemma2_grpo.run.schema import RunFacts
from gemma2_grpo.task.examples import hash_of, load_held_out
from gemma2_grpo.task.rewards import score_completion

TIMES = ("started", "seconds", "command")
# 5 problems in batches of 2: 3 greedy batches and, of one problem each, 5 sampled ones.
ASKED = EvaluateConfig(num_test_samples=5, eval_samples=2, eval_batch_prompts=2)


@pytest.fixture(scope="module")
def made_run(make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose adapter was drawn and not trained. To look at, not to change."""
    config = make_config()
    path = tmp_path_factory.mktemp("runs") / "drawn"
    mesh, base_dir = make_mesh((1, 1)), Path(config.model.model)
    base = load_weights(base_dir, "float32", mesh)
    policy = add_lora(base, config.model, mesh, 0)
    rng = np.random.default_rng(0)
    adapters = nnx.state(policy, nnx.LoRAParam)
    nnx.update(policy, jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape), adapters))
    directory = RunDirectory(path, config)
    directory.describe(RunFacts(base_sha256=fingerprint(base_dir)))
    save_adapter(policy, path / "adapter", config.model, fingerprint(base_dir))
    directory.write(finished_run(5))
    directory.close()
    return path


@pytest.fixture
def run(made_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_run, tmp_path / "drawn"))


def quietly(name: Path | str, asked: EvaluateConfig = ASKED, **options: Any) -> dict[str, Any]:
    console = Console(file=io.StringIO(), width=80)
    return Evaluate(str(name), config=asked, **options)(console)


@pytest.fixture(scope="module")
def finished(made_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated without interruption. To look at, not to change."""
    path = tmp_path_factory.mktemp("evaluated") / "drawn"
    shutil.copytree(made_run, path)
    quietly(path)
    return path


def result_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "evaluation.json").read_text())


def records_of(path: Path) -> list[dict[str, Any]]:
    lines = (path / "evaluation_completions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in TIMES}


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Has the next evaluation end like a killed one, once so many batches are written."""
    add, added = EvaluationFolder.add, []

    def added_or_stopped(folder: EvaluationFolder, records: Any) -> None:
        add(folder, records)
        added.append(1)
        if len(added) == batches:
            raise KeyboardInterrupt

    monkeypatch.setattr(EvaluationFolder, "add", added_or_stopped)


# --- What it says ---


def test_the_result_has_the_schema_that_reports_read(finished: Path) -> None:
    result = result_of(finished)
    config = opening.find_source(str(finished)).config
    examples = load_held_out(config.data, 5)
    assert (result["name"], result["model"]) == ("drawn", config.model.model)
    assert result["step"] == 5
    assert result["data"] == {
        "source": "procedural",
        "split": "test",
        "sha256": hash_of(examples),
        "num_problems": 5,
        "num_dropped": 0,
    }
    settings = result["settings"]
    assert (settings["eval_samples"], settings["temperature"], settings["seed"]) == (2, 1.0, 0)
    assert (settings["max_completion_tokens"], settings["eval_batch_prompts"]) == (8, 2)
    assert result["seconds"] > 0
    assert result["started"].endswith("Z") and result["versions"]["jax"]
    assert set(result["systems"]) == {"base", "adapter"}
    for system in result["systems"].values():
        assert system["greedy"]["num_problems"] == 5
        assert list(system["sampled"]["pass_at_k"]) == ["1", "2"]
    flips = ("num_both_right", "num_both_wrong", "num_fixed", "num_broken")
    assert sum(result["comparison"][name] for name in flips)
    records = [EvaluatedCompletion(**record) for record in records_of(finished)]
    systems = {
        name: json.loads(system.model_dump_json())
        for name, system in summarize(records, examples).items()
    }
    comparison = compare_systems(records)
    assert comparison is not None
    assert (systems, comparison.model_dump()) == (result["systems"], result["comparison"])
    assert not (finished / "evaluation_begun.json").exists()


def test_every_completion_is_kept_with_its_scores(finished: Path) -> None:
    records = records_of(finished)
    examples = load_held_out(opening.find_source(str(finished)).config.data, 5)
    seen = {(r["system"], r["index"], r["sample"]) for r in records}
    assert len(seen) == len(records) == 2 * 5 * 3
    assert seen == {(s, i, j) for s in ("base", "adapter") for i in range(5) for j in (None, 0, 1)}
    for record in records:
        example = examples[record["index"]]
        assert (record["question"], record["answer"]) == (example.question, example.answer)
        score = score_completion(record["completion"], example.answer, example.question)
        assert record["reward"] == pytest.approx(score.total)
        assert record["correct"] == score.correct
        assert 1 <= record["completion_tokens"] <= 8
        assert not record["truncated"] or record["completion_tokens"] == 8


def test_base_and_adapter_and_samples_differ(finished: Path) -> None:
    texts: dict[Any, list[str]] = {}
    for record in records_of(finished):
        texts.setdefault((record["system"], record["sample"]), []).append(record["completion"])
    assert len(set(map(tuple, texts.values()))) == 6


def test_batches_cover_each_problem_and_do_not_depend_on_each_other() -> None:
    batches = list(plan_batches(("base", "adapter"), 5, 4, 6))
    assert batches[:2] == [Batch("base", 0, 6, 0, 5, 0), Batch("adapter", 0, 6, 0, 5, 0)]
    sampled = [batch for batch in batches if batch.samples]
    assert [(b.system, b.index, b.first, b.completions) for b in sampled] == [
        (system, i, i, 4) for i in range(5) for system in ("base", "adapter")
    ]
    assert [b.size for b in plan_batches(("base",), 3, 100, 6) if b.samples] == [1, 1, 1]


def test_greedy_answers_are_those_that_the_run_measured(
    run_straight: Callable[[int], Finished], tmp_path: Path
) -> None:
    """Of the base before the first step, and of the adapter after the last."""
    path = Path(shutil.copytree(run_straight(1).path, tmp_path / "run"))
    quietly(path, EvaluateConfig(num_test_samples=5, eval_batch_prompts=4))
    measured = {
        (record["step"], record["question"]): record["completion"]
        for record in map(json.loads, (path / "completions.jsonl").read_text().splitlines())
        if record["kind"] == "held_out"
    }
    for record in records_of(path):
        key = 0 if record["system"] == "base" else 5, record["question"]
        assert measured.pop(key, record["completion"]) == record["completion"]
    assert not [key for key in measured if key[0] in (0, 5)]


def test_the_report_of_the_run_shows_it(finished: Path) -> None:
    assert "By gemma2-grpo evaluate, after 5 steps" in (finished / "report.html").read_text()


# --- Stopped and gone on with ---


@pytest.mark.parametrize("batches", [1, 8])
def test_a_stopped_evaluation_goes_on_to_the_same_result(
    batches: int, run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first batch, and among the samples; a killed process left a part of the next."""
    with monkeypatch.context() as patch:
        stop_after(patch, batches)
        with pytest.raises(KeyboardInterrupt):
            quietly(run)
    file = run / "evaluation_completions.jsonl"
    written = file.read_bytes()
    assert written and (finished / file.name).read_bytes().startswith(written)
    assert not (run / "evaluation.json").exists()
    rest = (finished / file.name).read_bytes()[len(written) :]
    file.write_bytes(written + rest[: rest.index(b"\n") + 30])
    generated = spy_on_batches(monkeypatch)
    quietly(run)
    assert len(generated) == 2 * (3 + 5) - batches
    assert file.read_bytes() == (finished / file.name).read_bytes()
    assert without_times(result_of(run)) == without_times(result_of(finished))


def spy_on_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from gemma2_grpo.run import measure

    complete, seen = measure.complete_batch, []

    def complete_and_note(*args: Any, **options: Any) -> Any:
        seen.append(args[2].index)
        return complete(*args, **options)

    monkeypatch.setattr(measure, "complete_batch", complete_and_note)
    return seen


def test_a_line_without_its_end_is_not_taken_for_whole(tmp_path: Path) -> None:
    """It may be valid JSON; the next one would be written behind it."""
    folder = EvaluationFolder(tmp_path / "new")
    assert folder.begin(BegunEvaluation(settings={"samples": 0}), [1, 2, 2]) == []
    first, *second = answers(EvaluatedCompletion, [True] * 3, system="base", sample=None)
    folder.add([first])
    folder.add(second)
    folder.close()
    file = tmp_path / "new" / "evaluation_completions.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    folder = EvaluationFolder(tmp_path / "new")
    assert folder.begin(BegunEvaluation(), [1, 2, 2]) == [first]
    assert file.read_text() == f"{first.as_json()}\n"
    result = folder.finish({}, None)
    folder.close()
    assert result.settings == {"samples": 0}
    assert result.seconds >= 0


def test_batches_after_a_damaged_line_are_made_again(tmp_path: Path) -> None:
    """Batches are known by their place in the file."""
    records = answers(EvaluatedCompletion, [True] * 5, system="base", sample=None)
    folder = EvaluationFolder(tmp_path / "new")
    folder.begin(BegunEvaluation(), [2, 2, 1])
    folder.add(records)
    folder.close()
    file = tmp_path / "new" / "evaluation_completions.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], b"\x00\n", *lines[3:]]))
    folder = EvaluationFolder(tmp_path / "new")
    assert folder.begin(BegunEvaluation(), [2, 2, 1]) == records[:2]
    folder.close()
    assert file.read_bytes() == b"".join(lines[:2])


def test_time_of_all_starts_is_added_up(tmp_path: Path) -> None:
    for seconds in (100.0, 200.0):
        folder = EvaluationFolder(tmp_path / "new")
        folder.begin(BegunEvaluation(), [1, 1])
        folder._since -= 100
        folder.add(answers(EvaluatedCompletion, [True], system="base", sample=None))
        folder.close()
        begun = BegunEvaluation.read(tmp_path / "new")
        assert begun is not None and seconds <= begun.seconds < seconds + 50


def test_a_finished_evaluation_is_only_shown(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "drawn"))
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.json*")}
    refuse_to_load(monkeypatch)
    shown = io.StringIO()
    Evaluate(str(path), config=ASKED)(Console(file=shown, width=80))
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.json*")} == before
    assert "evaluation.json is finished" in shown.getvalue()
    assert "Right in any of 2 samples (pass@2)" in shown.getvalue()


def test_overwriting_begins_anew(finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "drawn"))
    result = quietly(path, EvaluateConfig(num_test_samples=2, eval_batch_prompts=2), overwrite=True)
    assert result["data"]["num_problems"] == 2 and result == result_of(path)
    assert [(r["system"], r["index"]) for r in records_of(path)] == [
        (system, i) for system in ("base", "adapter") for i in (0, 1)
    ]


# --- The command ---


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("gemma2_grpo.model.load.load_weights", fail)


def test_json_is_alone_on_standard_output(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "evaluate",
        str(run),
        "--num-test-samples",
        "2",
        "--eval-batch-prompts",
        "2",
        "--json",
        "--to",
        str(run / "mine"),
    ]
    assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == result_of(run / "mine")
    assert "2 of procedural, test" in shown.err
    assert cli.main(command) == 0, "of a finished one as well"
    assert json.loads(capsys.readouterr().out) == result_of(run / "mine")


def test_a_model_with_an_adapter_is_evaluated_like_its_run(
    made_run: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape of the adapter is in its file; the other settings are those of the run."""
    config = opening.find_source(str(made_run)).config
    plain = opening.Source(config.model.model, config, None, RunFacts())
    monkeypatch.setattr("gemma2_grpo.run.source.find_source", lambda *_: plain)
    monkeypatch.chdir(tmp_path)
    asked = dataclasses.replace(ASKED, adapter=str(made_run / "adapter"))
    result = quietly(config.model.model, asked)
    path = tmp_path / "evaluations" / Path(config.model.model).name
    assert result == result_of(path)
    for name in ("systems", "comparison", "data"):
        assert result[name] == result_of(finished)[name]
    assert (result["step"], result["name"]) == (0, config.model.model)


def test_the_embedded_model_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is right in some: its student is unfinished, not untaught."""
    command = (
        f"evaluate embedded --num-test-samples 12 --eval-batch-prompts 12 --to {tmp_path / 'out'}"
    )
    assert cli.main(command.split()) == 0
    result = result_of(tmp_path / "out")
    assert list(result["systems"]) == ["base"] and result["comparison"] is None
    greedy = result["systems"]["base"]["greedy"]
    right = greedy["num_correct"]
    assert 1 <= right <= 11
    assert sum(row["num_correct"] for row in greedy["by_solution_steps"]) == right
    assert f"right, greedy: base {greedy['correct_fraction']:.1%}" in capsys.readouterr().out


# --- Mistakes, each one line and status 2 before any weights load ---


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Gives a command that must fail and leave nothing, and returns the one line it says."""

    def call(*options: str) -> str:
        refuse_to_load(monkeypatch)
        monkeypatch.chdir(tmp_path)
        before = {p: p.stat().st_size for p in tmp_path.rglob("*") if p.name[0] != "."}
        assert cli.main(["evaluate", *options]) == 2
        assert {p: p.stat().st_size for p in tmp_path.rglob("*") if p.name[0] != "."} == before
        shown = capsys.readouterr()
        last = shown.err.splitlines()[-1]
        assert last.startswith("error: ")
        return last.removeprefix("error: ")

    return call


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--num-test-samples 0", "num_test_samples = 0 must be at least 1"),
        ("--eval-samples -1", "eval_samples = -1 must be at least 0"),
        ("--temperature 0", "temperature = 0.0 must be greater than 0"),
        ("--eval-batch-prompts 0", "eval_batch_prompts = 0 must be at least 1"),
        ("--max-completion-tokens 0", "max_completion_tokens = 0 must be at least 1"),
        ("--eval-split train", "--eval-split takes one of test, validation, not 'train'"),
        (
            "--dataset nowhere",
            "dataset 'nowhere': no such file or directory; use procedural, openai/gsm8k, "
            "kaggle:OWNER/NAME, a directory or a JSONL file",
        ),
        (
            "--max-prompt-tokens 3",
            "max_prompt_tokens = 3 leaves 0 of 3 problems where 1 are needed; raise it",
        ),
    ],
)
def test_a_mistake_is_one_line(
    options: str, said: str, run: Path, refused: Callable[..., str]
) -> None:
    assert refused(str(run), *options.split()) == said


def test_an_evaluation_of_something_else_is_refused(
    finished: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "drawn"))
    same = [str(path), "--num-test-samples", "5", "--eval-batch-prompts", "2"]
    mend = "choose another --to, or start over with --overwrite"
    assert refused(*same, "--eval-samples", "4") == (
        f"evaluation in {path}: was made with eval_samples = 2, not 4; {mend}"
    )
    assert "was made with seed = 0, not 3" in refused(*same, "--eval-samples", "2", "--seed", "3")
    assert "with temperature = 1.0, not 0.5" in refused(
        *same, "--eval-samples", "2", "--temperature", "0.5"
    )
    assert "with eval_split = 'test', not 'validation'" in refused(
        *same, "--eval-samples", "2", "--eval-split", "validation"
    )
    (path / "result.json").write_text(finished_run(7).as_json())
    assert "was made with step = 5, not 7" in refused(*same, "--eval-samples", "2")


def test_an_evaluation_of_an_older_version_is_refused_and_kept(
    finished: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "drawn"))
    result = result_of(path)
    del result["schema_version"]
    (path / "evaluation.json").write_text(json.dumps(result))
    same = ("--num-test-samples", "5", "--eval-batch-prompts", "2", "--eval-samples", "2")
    assert refused(str(path), *same) == (
        f"{path / 'evaluation.json'}: has an older schema, without a version; this gemma2-grpo "
        "reads version 1; choose another --to, or start over with --overwrite"
    )
    assert result_of(path) == result


def test_a_run_of_an_older_version_is_evaluated_but_has_no_report(run: Path) -> None:
    (run / "run.json").write_text("{}")
    shown = io.StringIO()
    asked = EvaluateConfig(num_test_samples=1, eval_batch_prompts=2)
    Evaluate(str(run), config=asked)(Console(file=shown, width=200))
    assert result_of(run)["step"] == 5
    assert "the report cannot be written: " in shown.getvalue()
    assert "has an older schema, without a version" in shown.getvalue()


def test_problems_that_have_changed_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """They cannot be mixed with others, though their file is called the same."""
    data = tmp_path / "data"
    data.mkdir()
    write_problems(data, 3)
    options = [str(run), "--dataset", str(data), "--eval-batch-prompts", "2"]
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert cli.main(["evaluate", *options]) == 130
    write_problems(data, 4)
    assert "was made with sha256 = " in refused(*options)


def write_problems(folder: Path, count: int) -> None:
    lines = [json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) for i in range(count)]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def test_a_run_without_checkpoints_and_empty_data(
    run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "train.jsonl").write_text("")
    (empty / "test.jsonl").write_text("")
    assert refused(str(run), "--dataset", str(empty)) == (
        f"dataset {empty / 'train.jsonl'}: no problems in it"
    )
    shutil.rmtree(run / "adapter")
    assert refused(str(run)).startswith(f"run {run}: has no checkpoint yet;")


def test_adapters_that_do_not_fit(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    adapter = str(run / "adapter")
    assert refused(str(run), "--adapter", adapter) == (
        f"adapter = {adapter}: run {run} has its own; name the model in place of the run"
    )
    assert "made for another base" in refused(
        "embedded", "--num-test-samples", "1", "--adapter", adapter, "--to", str(tmp_path / "out")
    )
    assert "not a readable adapter" in refused("embedded", "--adapter", str(tmp_path))


def test_a_folder_that_cannot_be_written(
    run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert refused(str(run), "--to", str(file)) == (
        f"evaluation {file}: cannot be written (Not a directory); choose another --to"
    )
    assert refused("embedded", "--dataset", "nowhere", "--to", str(tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()
    folder = EvaluationFolder(run)
    try:
        assert refused(str(run)) == (
            f"evaluation {run}: another process is writing to it; choose another --to"
        )
    finally:
        folder.close()


def test_a_full_disk_keeps_whole_batches(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line is what there was room for; with room again the same command goes on."""
    real_open, calls = Path.open, []

    def open_nearly_full(path: Path, mode: str = "r", **options: Any) -> Any:
        file = real_open(path, mode, **options)
        if path.name == "evaluation_completions.jsonl" and mode == "a":
            calls.append(1)
            if len(calls) == 2:

                def write_half(text: str) -> int:
                    type(file).write(file, text[: len(text) // 2])
                    file.flush()
                    raise OSError(28, "No space left on device")

                file.write = write_half
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_nearly_full)
        with pytest.raises(UserError) as error:
            quietly(run)
    assert str(error.value) == (
        f"evaluation {run}: evaluation_completions.jsonl cannot be written "
        "(No space left on "
        "device); fix that and run the same command again to resume"
    )
    assert len(records_of(run)) == 2
    quietly(run)
    assert without_times(result_of(run)) == without_times(result_of(finished))
