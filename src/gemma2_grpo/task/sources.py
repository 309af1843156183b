"""Where problems that are not generated come from: files, Hugging Face, Kaggle."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_grpo.errors import UserError, first_line
from gemma2_grpo.task.jsonl import json_object, read_jsonl
from gemma2_grpo.task.procedural import Split, split_by_hash
from gemma2_grpo.task.reach import ask_hub, cached_by_kagglehub, check_kaggle, http_status, quiet

GSM8K = "openai/gsm8k"
_GSM8K_FILES = tuple(f"main/{split}-00000-of-00001.parquet" for split in ("train", "test"))
KAGGLE_PREFIX = "kaggle:"
_SUFFIXES = (".jsonl", ".parquet")
# JSON can escape half of a surrogate pair, which no encoding can write again.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_NEEDED = "it needs files with train and test in their names, .jsonl or .parquet"


@dataclass(frozen=True)
class Row:
    """One problem as its file has it: text, not yet graded or rendered."""

    question: str
    answer: str
    place: str
    """File and line (or row), for error messages."""


def read_source(dataset: str) -> dict[Split, list[Row]]:
    """Reads all rows of a data set by split.

    A directory keeps its own train and test split and has no validation rows. A single file is
    split 80/10/10 by the text of the question.

    Args:
        dataset: `openai/gsm8k`, `kaggle:OWNER/NAME`, a directory, or one JSONL file.

    Raises:
        UserError: for a source that cannot be reached or read.
    """
    if dataset == GSM8K:
        return _read_splits(_fetch_gsm8k())
    if dataset.startswith(KAGGLE_PREFIX):
        return _read_splits(_find_splits(_fetch_kaggle(dataset), dataset))
    path = Path(dataset).expanduser()
    if dataset and path.is_dir():
        return _read_splits(_find_splits(path, dataset))
    if path.is_file():
        return _split_by_question(_read_files([path]))
    raise UserError(
        f"dataset {dataset!r}: no such file or directory; use procedural, {GSM8K}, "
        f"{KAGGLE_PREFIX}OWNER/NAME, a directory or a JSONL file"
    )


def _fetch_gsm8k() -> dict[Split, list[Path]]:
    """Downloads the official splits, or finds them in the cache of Hugging Face (HF_HOME)."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(*, cached_only: bool) -> dict[Split, list[Path]]:
        with quiet():
            found = [
                Path(hf_hub_download(GSM8K, f, repo_type="dataset", local_files_only=cached_only))
                for f in _GSM8K_FILES
            ]
        return {"train": found[:1], "test": found[1:]}

    try:
        try:
            return fetch(cached_only=True)  # It has not changed since 2022.
        except LocalEntryNotFoundError:
            ask_hub(GSM8K, _GSM8K_FILES[0], "dataset")
            return fetch(cached_only=False)
    # The hub's client, its HTTP library and the disk each raise errors of their own.
    except Exception as error:
        if http_status(error) == 401:  # It is open to all, but not with a token that is none.
            raise UserError(
                f"dataset {GSM8K}: Hugging Face refuses this HF_TOKEN; make a new token at "
                "huggingface.co/settings/tokens and export HF_TOKEN, or unset it"
            ) from None
        raise UserError(
            f"dataset {GSM8K}: cannot be fetched ({first_line(error)}); check the network and "
            "HF_TOKEN, or pass a local directory with train and test files as dataset"
        ) from None


def _fetch_kaggle(dataset: str) -> Path:
    """The directory of a Kaggle data set: attached to the notebook, or downloaded."""
    handle = dataset.removeprefix(KAGGLE_PREFIX)
    owner, _, name = handle.partition("/")
    if not owner or not name:
        raise UserError(
            f"dataset {dataset!r}: not a Kaggle handle; write {KAGGLE_PREFIX}OWNER/NAME"
        )
    name = name.split("/")[0]  # A version may follow: OWNER/NAME/versions/3.
    attached = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
    # Kaggle has mounted data sets by name alone, and by kind and owner.
    for directory in (attached / name, attached / "datasets" / owner / name):
        if directory.is_dir():
            return directory
    import kagglehub

    try:
        check_kaggle()
        with quiet():
            return Path(kagglehub.dataset_download(handle))
    # kagglehub raises plain ValueErrors, its HTTP library's errors and its own.
    except Exception as error:
        cached = cached_by_kagglehub(f"datasets/{owner}/{name}", "versions")
        if cached and http_status(error) is None and "/versions/" not in handle:
            return cached
        raise UserError(
            f"dataset {dataset}: cannot be fetched ({first_line(error)}); attach it to the "
            "notebook, check the network and KAGGLE_API_TOKEN, or pass a local directory as dataset"
        ) from None


def _find_splits(directory: Path, dataset: str) -> dict[Split, list[Path]]:
    """Finds the files of the train and the test split anywhere under a directory."""
    found: dict[Split, list[Path]] = {"train": [], "test": []}
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        split = _split_in_name(path)
        if split and path.suffix in _SUFFIXES and path.is_file() and not hidden:
            found[split].append(path)
    for split, paths in found.items():
        if not paths:
            raise UserError(f"dataset {dataset}: no {split} file in it; {_NEEDED}")
        # The same split in two folders is one data set in two versions, not one in two parts.
        folders = sorted({str(path.parent) for path in paths})
        if len(folders) > 1:
            raise UserError(
                f"dataset {dataset}: {split} files in {' and in '.join(folders)}; name one of them"
            )
    return found


def _split_in_name(path: Path) -> Split | None:
    """The split that a file name speaks of, if it is exactly one."""
    # By the start of a word: "latest.jsonl" is no test file, "testing_1.jsonl" is.
    words = re.findall(r"[a-z]+", path.stem.lower())
    splits: tuple[Split, ...] = ("train", "test")
    named: list[Split] = [s for s in splits if any(word.startswith(s) for word in words)]
    return named[0] if len(named) == 1 else None


def _read_splits(files: dict[Split, list[Path]]) -> dict[Split, list[Row]]:
    rows: dict[Split, list[Row]] = {"validation": []}
    for split, paths in files.items():
        rows[split] = _read_files(paths)
    return rows


def _split_by_question(rows: list[Row]) -> dict[Split, list[Row]]:
    splits: dict[Split, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        splits[split_by_hash(row.question)].append(row)
    return splits


def _read_files(paths: list[Path]) -> list[Row]:
    """Reads and checks the rows of files, in order."""
    rows: list[Row] = []
    for path in paths:
        read = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(path.suffix)
        if read is None:
            raise UserError(f"dataset {path}: neither .jsonl nor .parquet")
        try:
            found = [_checked(content, place) for place, content in read(path)]
        except OSError as error:
            raise UserError(f"dataset {path}: cannot be read ({first_line(error)})") from None
        if not found:
            raise UserError(f"dataset {path}: no problems in it")
        rows += found
    return rows


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in read_jsonl(path, json_object("question and answer")):
        yield line.place, line.content


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        contents = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"dataset {path}: not valid Parquet ({first_line(error)})") from None
    yield from ((f"{path} row {number}", row) for number, row in enumerate(contents, start=1))


def _checked(content: dict[str, Any], place: str) -> Row:
    """Checks that a row has a question and an answer, both text that is not blank."""
    question, answer = content.get("question"), content.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    for name, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str) or not value.strip() or _HALF_CHARACTER.search(value):
            raise UserError(f"{place}: field {name!r} is missing, blank or not text; fill it in")
    return Row(str(question).strip(), str(answer).strip(), place)
