"""Where problems come from: one table of sources, by the `dataset` that each takes."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma2_grpo.errors import UserError, first_line
from gemma2_grpo.task.procedural import Split, generate, split_by_hash
from gemma2_grpo.task.reach import ask_hub, cached_by_kagglehub, check_kaggle, http_status, quiet
from gemma2_grpo.task.rows import Example, Rows, find_splits, graded, read_files, read_splits

PROCEDURAL = "procedural"
GSM8K = "openai/gsm8k"
_GSM8K_FILES = tuple(f"main/{split}-00000-of-00001.parquet" for split in ("train", "test"))
KAGGLE_PREFIX = "kaggle:"
SPLITS: tuple[Split, ...] = ("train", "test", "validation")

Pools = dict[Split, list[Example]]
"""Problems of each split in a seeded order."""
Counts = Mapping[Split, int]
Read = Callable[[str, Counts, int], Pools]
"""Called with the `dataset`, how many problems of each split are wanted, and a seed."""


@dataclass(frozen=True)
class Source:
    """A kind of data set."""

    takes: Callable[[str], bool]
    """Whether a `dataset` is one."""
    read: Read


def read_source(dataset: str, counts: Counts, seed: int) -> Pools:
    """Reads the problems of a data set: all of each split, or of an endless one `counts`.

    Raises:
        UserError: for a source that cannot be reached or read.
    """
    for source in SOURCES.values():
        if source.takes(dataset):
            return source.read(dataset, counts, seed)
    *names, last = SOURCES
    raise UserError(
        f"dataset {dataset!r}: no such file or directory; use {', '.join(names)} or {last}"
    )


def shuffled(read: Callable[[str], Rows]) -> Read:
    """Makes a reader of rows into one of problems: graded, and in a seeded order."""

    def read_shuffled(dataset: str, counts: Counts, seed: int) -> Pools:
        del counts
        pools: Pools = {}
        rows = read(dataset)
        for number, split in enumerate(SPLITS):
            examples = [graded(row) for row in rows.get(split, [])]
            order = np.random.default_rng([seed, number]).permutation(len(examples))
            pools[split] = [examples[i] for i in order]
        return pools

    return read_shuffled


def _generate(dataset: str, counts: Counts, seed: int) -> Pools:
    """Procedural problems, which have no end."""
    del dataset
    return {
        split: [Example(p.question, p.answer, p.solution) for p in generate(split, count, seed)]
        for split, count in counts.items()
    }


def _read_gsm8k(dataset: str) -> Rows:
    del dataset
    return read_splits(_fetch_gsm8k())


def _is_on_kaggle(dataset: str) -> bool:
    return dataset.startswith(KAGGLE_PREFIX)


def _read_kaggle(dataset: str) -> Rows:
    return read_splits(find_splits(_fetch_kaggle(dataset), dataset))


def _is_directory(dataset: str) -> bool:
    return bool(dataset) and _path(dataset).is_dir()


def _read_directory(dataset: str) -> Rows:
    """Rows of a directory, which has its own train and test split and no validation rows."""
    return read_splits(find_splits(_path(dataset), dataset))


def _read_file(dataset: str) -> Rows:
    """Rows of a single file, split 80/10/10 by the text of the question."""
    rows: Rows = {}
    for row in read_files([_path(dataset)]):
        rows.setdefault(split_by_hash(row.question), []).append(row)
    return rows


def _path(dataset: str) -> Path:
    return Path(dataset).expanduser()


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


# A new source is one entry here: the first that takes a `dataset` reads it. The names are shown
# where none does.
SOURCES = {
    PROCEDURAL: Source(PROCEDURAL.__eq__, _generate),
    GSM8K: Source(GSM8K.__eq__, shuffled(_read_gsm8k)),
    f"{KAGGLE_PREFIX}OWNER/NAME": Source(_is_on_kaggle, shuffled(_read_kaggle)),
    "a directory": Source(_is_directory, shuffled(_read_directory)),
    "a JSONL file": Source(lambda dataset: _path(dataset).is_file(), shuffled(_read_file)),
}
