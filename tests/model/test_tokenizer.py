"""tokenizer.json: prompts are encoded as they are, whatever state its file was saved with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fixtures.models import EMBEDDED
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as HfTokenizer

from gemma2_grpo.model.tokenizer import Tokenizer, load_tokenizer, read_tokenizer
from gemma2_grpo.task.prompts import render_prompt

PROMPT = render_prompt("Tom has 3 boxes with 4 pens in each. How many pens does he have?")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """The embedded tokenizer, changed and saved again by its own library."""

    def save(change: Callable[[HfTokenizer], Any]) -> Path:
        backend = HfTokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
        change(backend)
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "config.json").write_bytes((EMBEDDED / "config.json").read_bytes())
        return tmp_path

    return save


def edited(saved: Callable[..., Path], name: str, **fields: Any) -> Path:
    """The embedded tokenizer with other fields of one of its added tokens."""
    directory = saved(lambda _: None)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    [token] = [token for token in content["added_tokens"] if token["content"] == name]
    token |= fields
    path.write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: backend.enable_truncation(30),
        lambda backend: backend.enable_truncation(30, direction="left"),
        lambda backend: backend.enable_padding(length=300, pad_id=0, pad_token="<pad>"),
        lambda backend: backend.enable_padding(direction="left", pad_to_multiple_of=64),
        lambda backend: (backend.enable_truncation(30), backend.enable_padding(length=30)),
    ],
)
def test_what_was_cut_and_padded_before_is_whole_again(
    change: Callable[[HfTokenizer], Any], saved: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    directory = saved(change)
    assert load_tokenizer(directory).encode(PROMPT) == tokenizer.encode(PROMPT)
    assert HfTokenizer.from_str(read_tokenizer(directory)).to_str() == tokenizer.backend.to_str()


def test_a_file_without_such_state_is_taken_as_it_is() -> None:
    assert read_tokenizer(EMBEDDED) == (EMBEDDED / "tokenizer.json").read_text()


def test_merges_are_not_drawn(saved: Callable[..., Path]) -> None:
    names = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    pieces = [*names, *"abcdefgh \n", "ab", "cd", "ef", "gh", "abcd", "efgh", "abcdefgh"]
    merges = [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"), ("ab", "cd"), ("ef", "gh")]

    def change(backend: HfTokenizer) -> None:
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        backend.model = models.BPE(vocabulary, [*merges, ("abcd", "efgh")], dropout=0.9)

    directory = saved(change)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [
        token | {"id": names.index(token["content"])}
        for token in content["added_tokens"]
        if token["content"] in names
    ]
    content["post_processor"] = None
    path.write_text(json.dumps(content))
    drawn = HfTokenizer.from_file(str(path))
    assert any(len(drawn.encode("abcdefgh").ids) > 1 for _ in range(20))
    loaded = load_tokenizer(directory)
    assert {tuple(loaded.encode("abcdefgh")) for _ in range(20)} == {(pieces.index("abcdefgh"),)}


def test_a_second_first_token_is_not_added(saved: Callable[..., Path]) -> None:
    """The embedded tokenizer's own template would add one, as Gemma's does."""
    loaded = load_tokenizer(saved(lambda _: None))
    assert loaded.backend.encode(PROMPT).ids[:2] == [2, 2]
    assert loaded.encode(PROMPT).count(2) == 1


@pytest.mark.parametrize(
    ("name", "flag"),
    [("<end_of_turn>", "rstrip"), ("<start_of_turn>", "lstrip"), ("<bos>", "single_word")],
)
def test_a_special_token_that_takes_its_neighbours_in(
    name: str, flag: str, saved: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    directory = edited(saved, name, **{flag: True})
    message = refusal(load_tokenizer, directory)
    assert message.startswith(f"{directory}/tokenizer.json: reads ")
    assert message.endswith(
        f" without {name} as one token of its own; take Gemma's own tokenizer.json, whose special "
        "tokens have lstrip, rstrip and single_word false"
    )


def test_a_special_token_that_is_split(
    saved: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    """It is in the vocabulary, and still not read as one token."""
    directory = saved(lambda _: None)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<eos>"]
    path.write_text(json.dumps(content))
    assert "without <eos> as one token of its own" in refusal(load_tokenizer, directory)


def test_a_missing_start_of_turn(saved: Callable[..., Path], refusal: Callable[..., str]) -> None:
    directory = saved(lambda _: None)
    path = directory / "tokenizer.json"
    path.write_text(path.read_text().replace("<start_of_turn>", "<|im_start|>"))
    assert refusal(load_tokenizer, directory) == (
        f"{path}: has no token <start_of_turn>; is it Gemma's tokenizer?"
    )


def test_tokens_without_an_embedding(
    saved: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    directory = saved(lambda backend: backend.add_tokens([AddedToken("<a>"), AddedToken("<b>")]))
    assert refusal(load_tokenizer, directory) == (
        f"{directory}/tokenizer.json: 2 tokens, such as '<a>' with id 496, are beyond the "
        "embedding of vocab_size = 496 in config.json; take the tokenizer that belongs to the "
        "model, or enlarge the model's embedding"
    )
    values = json.loads((directory / "config.json").read_text()) | {"vocab_size": 504}
    (directory / "config.json").write_text(json.dumps(values))
    assert load_tokenizer(directory).encode("<b>") == [497]


@pytest.mark.parametrize("content", ["[]", "{}", '{"model": 3}', "{", "\udcff"])
def test_files_that_are_none(content: str, tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert refusal(load_tokenizer, tmp_path).startswith(f"{path}: not a readable tokenizer (")


@pytest.mark.parametrize(
    ("vocab_size", "family", "own"),
    [(262_144, "Gemma 2", 105), (256_000, "Gemma 2", None), (262_208, "Gemma 2", 105)],
)
def test_the_tokenizer_of_another_family(
    vocab_size: int,
    family: str,
    own: int | None,
    saved: Callable[..., Path],
    refusal: Callable[..., str],
) -> None:
    """By the id of <start_of_turn>, in a vocabulary as large as Google's."""
    directory = saved(lambda backend: None)
    values = json.loads((directory / "config.json").read_text()) | {"vocab_size": vocab_size}
    (directory / "config.json").write_text(json.dumps(values))
    if own is None:
        assert load_tokenizer(directory).stop_ids == (107, 1)
        return
    assert refusal(load_tokenizer, directory) == (
        f"{directory}/tokenizer.json: is not the tokenizer of a {family} (its <start_of_turn> is "
        f"106, not {own}); put the model's own tokenizer.json there"
    )
