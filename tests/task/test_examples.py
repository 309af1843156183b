"""Data: every source gives the same rows, selections are seeded, batches are pure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kagglehub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma2_grpo.config import DataConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.task.examples import (
    Example,
    batch_indices,
    drop_long,
    hash_of,
    load_held_out,
    load_splits,
)
from gemma2_grpo.task.procedural import split_by_hash

PROCEDURAL_SHA256 = "a248371e85f91ccedf4da7e3d3dfc5b442af4488a18b9313b231a5fb5ca87741"
GSM8K_SHA256 = "d0fc3215bd575a2ae9c92b8cbd2327b0f3691c9e4dab1aadb1057b1595ebf96b"
GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
NATALIA = {
    "question": "Natalia sold clips to 48 friends, and then half as many. How many altogether?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\n\n"
    "She sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72",
}


def make_rows(split: str, count: int) -> list[dict[str, str]]:
    """Rows in GSM8K's form whose gold answer is their number."""
    return [
        {
            "question": f"{split} question {number}: how much is {number} + 0?",
            "answer": f"It is {number}+0=<<{number}+0={number}>>{number}.\n#### {number}",
        }
        for number in range(count)
    ]


TRAIN, TEST = make_rows("train", 40), make_rows("test", 12)


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def config(dataset: object, train: int = 10, test: int = 5, **fields) -> DataConfig:
    return DataConfig(
        dataset=str(dataset), num_train_samples=train, num_test_samples=test, **fields
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "folder"
    write_jsonl(path / "train.jsonl", TRAIN)
    write_jsonl(path / "test.jsonl", TEST)
    return path


def message(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- What a row becomes ---


def test_a_gsm8k_row_becomes_a_tagged_solution(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [NATALIA])
    write_jsonl(tmp_path / "test.jsonl", TEST)
    (example,) = load_splits(config(tmp_path, train=1)).train
    assert example == Example(
        question=NATALIA["question"],
        answer="72",
        solution="<reasoning>\nStep 1: She sold 48/2 = 24 clips in May.\n"
        "Step 2: She sold 48+24 = 72 clips altogether.\nTherefore, the answer is 72.\n"
        "</reasoning>\n<answer>\n72\n</answer>",
    )


@pytest.mark.parametrize(
    ("answer", "kept"), [("18", "18"), (18, "18"), (-2.5, "-2.5"), ("$1,080.00", "1080")]
)
def test_a_bare_answer_has_no_solution(tmp_path, answer, kept):
    write_jsonl(tmp_path / "train.jsonl", [{"question": " How many? ", "answer": answer}])
    write_jsonl(tmp_path / "test.jsonl", TEST)
    (example,) = load_splits(config(tmp_path, train=1)).train
    assert example == Example("How many?", kept, "")


def test_unused_columns_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    row = json.dumps(NATALIA | {"level": 3})
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + f"\n{row}\n\n".encode())
    write_jsonl(tmp_path / "test.jsonl", TEST)
    assert len(load_splits(config(tmp_path, train=1)).train) == 1


# --- Selection ---


def test_official_splits_stay_apart(folder):
    splits = load_splits(config(folder))
    assert len(splits.train) == 10 and len(splits.test) == 5
    assert len(splits.validation) == 5
    questions = [example.question for example in splits.train + splits.validation]
    assert len(set(questions)) == 15
    assert all(question.startswith("train") for question in questions)
    assert all(example.question.startswith("test") for example in splits.test)


def test_selection_is_seeded_and_more_extends_fewer(folder):
    first, again = load_splits(config(folder)), load_splits(config(folder))
    assert first == again
    more = load_splits(config(folder, train=20))
    assert more.train[:10] == first.train and more.test == first.test
    other = load_splits(config(folder, data_seed=1))
    assert set(other.train) != set(first.train) and set(other.test) != set(first.test)
    assert len({first.sha256, more.sha256, other.sha256}) == 3
    assert [example.answer for example in first.test] == ["0", "7", "1", "11", "3"]


def test_all_of_a_split_may_be_taken_and_no_more(folder):
    splits = load_splits(config(folder, train=40, test=12))
    assert {example.answer for example in splits.train} == set(map(str, range(40)))
    assert {example.answer for example in splits.test} == set(map(str, range(12)))
    assert splits.validation == ()
    assert message(load_splits, config(folder, train=41)) == (
        f"num_train_samples = 41 is more than the 40 problems of that split in {folder}; lower it"
    )
    assert message(load_splits, config(folder, test=13)) == (
        f"num_test_samples = 13 is more than the 12 problems of that split in {folder}; lower it"
    )


def test_too_few_problems_left_for_validation(folder):
    assert len(load_splits(config(folder, 37, 4)).validation) == 3
    assert message(load_splits, config(folder, 37, 4, eval_split="validation")) == (
        f"eval_split = validation: {folder} has 3 problems besides those of train and test, but "
        "num_test_samples = 4; lower num_train_samples or num_test_samples"
    )


def test_a_question_that_train_repeats_is_not_used_for_validation(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [NATALIA, NATALIA, *TRAIN[:3]])
    write_jsonl(tmp_path / "test.jsonl", TEST)
    for seed in range(6):
        splits = load_splits(config(tmp_path, 3, data_seed=seed))
        assert not set(splits.train) & set(splits.validation)


def test_procedural_splits():
    splits = load_splits(config("procedural", 300, 100))
    assert [len(splits.train), len(splits.test), len(splits.validation)] == [300, 100, 100]
    chains = [{e.solution for e in part} for part in (splits.train, splits.test)]
    assert not chains[0] & chains[1]
    assert splits == load_splits(config("procedural", 300, 100))
    assert splits.source == "procedural"
    assert splits.sha256 == PROCEDURAL_SHA256


def test_held_out_problems_are_the_whole_test_split_and_begin_with_the_selected_ones(folder):
    whole = load_held_out(config(folder))
    assert {example.answer for example in whole} == set(map(str, range(12)))
    assert whole[:5] == load_splits(config(folder)).test == load_held_out(config(folder), 5)
    assert len({hash_of(whole), hash_of(whole[:5]), hash_of(whole[:4])}) == 3
    assert hash_of(load_held_out(config(folder))) == hash_of(whole)
    assert message(load_held_out, config(folder), 13) == (
        f"num_test_samples = 13 is more than the 12 problems of that split in {folder}; lower it"
    )


def test_held_out_validation_problems_are_not_trained_on(folder):
    asked = config(folder, eval_split="validation")
    assert load_held_out(asked) == load_splits(asked).validation
    train = set(load_splits(asked).train)
    left = load_held_out(asked, 30)
    assert len(set(left)) == 30 and not train & set(left)
    said = message(load_held_out, asked, 31)
    assert said.startswith("num_test_samples = 31 is more than the 30 problems")
    assert len(load_held_out(config(folder, 37, 5, eval_split="validation"))) == 3
    assert message(load_held_out, config(folder, 40, eval_split="validation")) == (
        f"{folder}: no validation problems in it; choose another split"
    )


def test_held_out_procedural_problems_have_no_end():
    asked = config("procedural", 300, 100)
    assert load_held_out(asked) == load_splits(asked).test
    more = load_held_out(asked, 120)
    assert more[:100] == load_splits(asked).test and len(more) == 120
    validation = config("procedural", 300, 10, eval_split="validation")
    assert load_held_out(validation) == load_splits(validation).validation


def test_steps_of_a_solution(tmp_path):
    three = {"question": "Q?", "answer": "2+2=4\n\n4+1=5\nStep 9: so 5\n#### 5"}
    rows = [NATALIA, three, {"question": "R?", "answer": "7"}]
    write_jsonl(tmp_path / "train.jsonl", TRAIN)
    write_jsonl(tmp_path / "test.jsonl", rows)
    steps = {e.question: e.solution_steps for e in load_held_out(config(tmp_path))}
    assert steps == {NATALIA["question"]: 2, "Q?": 3, "R?": None}
    for example in load_held_out(config("procedural", test=20)):
        assert example.solution_steps == example.solution.count(" = ")


# --- Sources ---


def test_every_layout_of_a_directory_gives_the_same_selection(folder, tmp_path):
    expected = load_splits(config(folder)).sha256
    hub, parts = tmp_path / "hub", tmp_path / "parts"
    write_parquet(hub / "main" / "train-00000-of-00001.parquet", TRAIN)
    write_parquet(hub / "main" / "test-00000-of-00001.parquet", TEST)
    write_jsonl(hub / ".cache" / "train.jsonl", TRAIN)
    (hub / "README.md").write_text("train and test")
    write_jsonl(parts / "data" / "My_Train-1.jsonl", TRAIN[:7])
    write_parquet(parts / "data" / "My_Train-2.parquet", TRAIN[7:])
    write_jsonl(parts / "data" / "latest_testing.jsonl", TEST)
    write_jsonl(parts / "data" / "latest.jsonl", TEST)
    for directory in (hub, parts):
        assert load_splits(config(directory)).sha256 == expected


def test_one_file_is_split_by_its_questions(tmp_path):
    rows = make_rows("some", 300)
    path = write_jsonl(tmp_path / "problems.jsonl", rows)
    splits = load_splits(config(path, 200, 20))
    for split, examples in (
        ("train", splits.train),
        ("test", splits.test),
        ("validation", splits.validation),
    ):
        assert {split_by_hash(example.question) for example in examples} == {split}


HUB_SCRIPT = """
from gemma2_grpo.config import DataConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.task.examples import load_splits
try:
    print(load_splits(DataConfig(num_train_samples=10, num_test_samples=5)).sha256)
except UserError as error:
    print(error)
"""


def run_offline(hf_home: Path) -> str:
    """Loads `openai/gsm8k` in a process of its own: the hub reads its settings at import."""
    environment = os.environ | {"HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", HUB_SCRIPT]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_gsm8k_from_the_cache_of_hugging_face(folder, tmp_path):
    repository = tmp_path / "home" / "hub" / "datasets--openai--gsm8k"
    commit = "0" * 40
    write_parquet(
        repository / "snapshots" / commit / "main" / "train-00000-of-00001.parquet", TRAIN
    )
    write_parquet(repository / "snapshots" / commit / "main" / "test-00000-of-00001.parquet", TEST)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert run_offline(tmp_path / "home") == load_splits(config(folder)).sha256


def test_gsm8k_without_network_or_cache(tmp_path):
    said = run_offline(tmp_path)
    assert said.startswith("dataset openai/gsm8k: cannot be fetched (")
    assert said.endswith(
        "); check the network and HF_TOKEN, or pass a local directory with train and test files "
        "as dataset"
    )
    assert "\n" not in said


@pytest.mark.parametrize("mounted", ["gsm8k", "datasets/someone/gsm8k"])
@pytest.mark.parametrize("handle", ["someone/gsm8k", "someone/gsm8k/versions/2"])
def test_kaggle_data_attached_to_a_notebook(folder, tmp_path, monkeypatch, mounted, handle):
    attached = tmp_path / "input" / mounted
    write_jsonl(attached / "train.jsonl", TRAIN)
    write_jsonl(attached / "test.jsonl", TEST)
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "input"))
    monkeypatch.setattr(kagglehub, "dataset_download", None)
    assert load_splits(config(f"kaggle:{handle}")).train == load_splits(config(folder)).train


def test_kaggle_data_is_downloaded_where_it_is_not_attached(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "nothing"))
    monkeypatch.setattr(kagglehub, "dataset_download", {"someone/gsm8k": str(folder)}.__getitem__)
    splits = load_splits(config("kaggle:someone/gsm8k"))
    assert splits.train == load_splits(config(folder)).train


def test_kaggle_data_that_cannot_be_fetched(tmp_path, monkeypatch):
    def refuse(handle: str) -> str:
        raise ConnectionError(f"401 for {handle}\nResponse: ...")

    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path))
    monkeypatch.setattr(kagglehub, "dataset_download", refuse)
    assert message(load_splits, config("kaggle:someone/gsm8k")) == (
        "dataset kaggle:someone/gsm8k: cannot be fetched (401 for someone/gsm8k); attach it to the "
        "notebook, check the network and KAGGLE_API_TOKEN, or pass a local directory as dataset"
    )
    assert message(load_splits, config("kaggle:gsm8k")) == (
        "dataset 'kaggle:gsm8k': not a Kaggle handle; write kaggle:OWNER/NAME"
    )


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside the repository")
def test_the_whole_of_gsm8k():
    splits = load_splits(config(GSM8K, 7473, 1319))
    assert len(splits.train) == 7473 and len(splits.test) == 1319
    for example in splits.train + splits.test:
        assert "<<" not in example.solution and "####" not in example.solution
        assert example.solution.endswith(f"<answer>\n{example.answer}\n</answer>")
    flagship = load_splits(DataConfig(dataset=str(GSM8K)))
    assert [len(flagship.train), len(flagship.test), len(flagship.validation)] == [448, 64, 64]
    assert flagship.sha256 == GSM8K_SHA256


# --- Bad input ---


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'question': 1}", "not valid JSON (Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1)); write one object a line"),
        ("[1, 2]", "not a JSON object; write one with question and answer"),
        ('{"answer": "1"}', "field 'question' is missing, blank or not text; fill it in"),
        ('{"question": " ", "answer": "1"}',
         "field 'question' is missing, blank or not text; fill it in"),
        ('{"question": 5, "answer": "1"}',
         "field 'question' is missing, blank or not text; fill it in"),
        (r'{"question": "Q \ud83d?", "answer": "1"}',
         "field 'question' is missing, blank or not text; fill it in"),
        ('{"question": "Q?"}', "field 'answer' is missing, blank or not text; fill it in"),
        ('{"question": "Q?", "answer": null}',
         "field 'answer' is missing, blank or not text; fill it in"),
        ('{"question": "Q?", "answer": true}',
         "field 'answer' is missing, blank or not text; fill it in"),
        ('{"question": "Q?", "answer": "many"}', "field 'answer' has no number; write a number, "
         "or a solution that ends in '#### NUMBER'"),
        ('{"question": "Q?", "answer": "2 or 3\\n#### many"}', "field 'answer' has no number; "
         "write a number, or a solution that ends in '#### NUMBER'"),
        ('{"question": "Q?", "answer": NaN}', "field 'answer' has no number; write a number, "
         "or a solution that ends in '#### NUMBER'"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(folder, line, said):
    path = folder / "train.jsonl"
    path.write_text(f"{json.dumps(NATALIA)}\n\n{line}\n")
    assert message(load_splits, config(folder, 1)) == f"{path}:3: {said}"


def test_a_deeply_nested_line_is_a_bad_line(folder):
    (folder / "train.jsonl").write_text("[" * 100_000)
    assert message(load_splits, config(folder)).startswith(f"{folder}/train.jsonl:1: not valid ")


def test_a_bad_row_of_parquet_is_named(tmp_path):
    rows = [*TRAIN[:2], {"question": "", "answer": "1"}]
    path = write_parquet(tmp_path / "train.parquet", rows)
    write_jsonl(tmp_path / "test.jsonl", TEST)
    assert message(load_splits, config(tmp_path)) == (
        f"{path} row 3: field 'question' is missing, blank or not text; fill it in"
    )


def test_files_that_cannot_be_read(folder):
    path = folder / "train.jsonl"
    path.write_text("\n")
    assert message(load_splits, config(folder)) == f"dataset {path}: no problems in it"
    path.write_bytes(b"\xff\xfe\x00")
    said = "not UTF-8; save the file as UTF-8"
    assert message(load_splits, config(folder)) == f"{path}:1: {said}"
    path.unlink()
    (folder / "train.parquet").write_text("no parquet")
    said = message(load_splits, config(folder))
    assert said.startswith(f"dataset {folder}/train.parquet: not valid Parquet (")


def test_directories_without_the_splits(folder):
    (folder / "test.jsonl").unlink()
    assert message(load_splits, config(folder)) == (
        f"dataset {folder}: no test file in it; it needs files with train and test in their "
        "names, .jsonl or .parquet"
    )
    for name in ("main", "socratic"):
        write_jsonl(folder / name / "test.jsonl", TEST)
    assert message(load_splits, config(folder)) == (
        f"dataset {folder}: test files in {folder}/main and in {folder}/socratic; name one of them"
    )


def test_sources_that_do_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Which an empty name does not stand for.
    assert message(load_splits, config("")).startswith("dataset '': no such file or directory")
    assert message(load_splits, config("gsm9k")) == (
        "dataset 'gsm9k': no such file or directory; use procedural, openai/gsm8k, "
        "kaggle:OWNER/NAME, a directory or a JSONL file"
    )
    table = tmp_path / "problems.csv"
    table.write_text("question,answer\n")
    assert message(load_splits, config(table)) == f"dataset {table}: neither .jsonl nor .parquet"


def test_nothing_expensive_is_imported_before_it_is_needed():
    heavy = {"pyarrow", "huggingface_hub", "kagglehub", "jax", "transformers"}
    script = f"import sys, gemma2_grpo.task.examples; print({heavy} & set(sys.modules))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


# --- Dropping long prompts ---


def test_long_prompts_are_dropped_with_a_count():
    examples = [Example("short", "1"), Example("long " * 50, "2"), Example("brief", "3")]
    limit = 60  # The instruction and the turns have fewer words than that.
    kept, dropped = drop_long(examples, lambda text: len(text.split()), limit)
    assert kept == (examples[0], examples[2]) and dropped == 1
    assert message(drop_long, examples, len, 5) == (
        "max_prompt_tokens = 5 leaves 0 of 3 problems where 1 are needed; raise it"
    )
    assert message(drop_long, examples, lambda text: len(text.split()), limit, 3) == (
        "max_prompt_tokens = 60 leaves 2 of 3 problems where 3 are needed; raise it"
    )


# --- Batches ---

SIZES = [(448, 8), (10, 10), (10, 3), (17, 16), (7, 5), (16, 1), (1, 1), (5, 4)]


@pytest.mark.parametrize(("num_examples", "batch"), SIZES)
def test_each_epoch_covers_every_example_once(num_examples, batch):
    steps = -(-num_examples * 5 // batch)
    stream = np.concatenate([batch_indices(num_examples, batch, 0, step) for step in range(steps)])
    epochs = stream[: num_examples * 5].reshape(5, num_examples)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num_examples), (5, 1)))
    if num_examples > 9:
        assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize(("num_examples", "batch"), SIZES)
def test_no_batch_holds_an_example_twice(num_examples, batch):
    for step in range(60):
        assert len(set(batch_indices(num_examples, batch, 3, step))) == batch


def test_fewer_examples_than_places_repeat_evenly():
    for step in range(5):
        counts = np.bincount(batch_indices(3, 8, 0, step), minlength=3)
        assert counts.sum() == 8
        assert set(counts) <= {2, 3, 4}
    stream = np.concatenate([batch_indices(3, 8, 0, step) for step in range(3)])
    np.testing.assert_array_equal(np.bincount(stream), [8, 8, 8])


def test_batches_are_a_pure_function_of_seed_and_step():
    forward = [batch_indices(20, 8, 1, step) for step in range(10)]
    for step in (9, 0, 5):
        np.testing.assert_array_equal(batch_indices(20, 8, 1, step), forward[step])
    assert not np.array_equal(batch_indices(20, 8, 2, 0), forward[0])
    assert batch_indices(10, 4, 0, 3).tolist() == [1, 8, 7, 6]
    assert batch_indices(10, 4, 0, 3).dtype == np.int64
