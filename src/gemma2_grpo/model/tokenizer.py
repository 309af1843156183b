"""Gemma's tokenizer, its special tokens resolved."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HfTokenizer

from gemma2_grpo.errors import UserError
from gemma2_grpo.model.architecture import Architecture, read_architecture
from gemma2_grpo.task.prompts import STOP_TOKENS

# Rows and prompts are padded to this, or to a power of two of it; each width is more programs.
LEAST_TOKENS = 64
_FILE = "tokenizer.json"
_SPECIAL_TOKENS = ("<pad>", "<bos>", "<start_of_turn>", *STOP_TOKENS)
# Id of <start_of_turn> by the size of the vocabulary: Gemma 2, Gemma 3, and Gemma 3's text models
# that were made together with a vision tower.
_TURN_IDS = {256_000: 106, 262_144: 105, 262_208: 105}
# Whatever stands beside a special token, it is one token, and takes nothing of its neighbours.
_SURROUNDINGS = ("a{}b", " \n{}\n ")


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face fast tokenizer with the special tokens of Gemma resolved.

    It has the methods that Tunix asks of a tokenizer.
    """

    backend: HfTokenizer
    pad: int
    bos: int
    stop_ids: tuple[int, ...]

    def encode(self, text: str, **_: Any) -> list[int]:
        """Token ids of text that already carries its special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Any, **_: Any) -> str:
        """Text of token ids without the stop tokens at its end.

        Other special tokens stay: a completion with padding in it should be seen to have some.
        """
        tokens = [int(i) for i in ids]
        while tokens and tokens[-1] in self.stop_ids:
            tokens.pop()
        return self.backend.decode(tokens, skip_special_tokens=False)

    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.pad

    def bos_id(self) -> int:
        """Id of the token that begins every text."""
        return self.bos

    def eos_id(self) -> int:
        """Id of the token that ends Gemma's turn."""
        return self.stop_ids[0]


def load_tokenizer(directory: Path) -> Tokenizer:
    """Loads tokenizer.json from a model directory.

    Raises:
        UserError: if it is missing or unreadable, is not Gemma's, or has tokens that the model of
            the directory has no embedding for.
    """
    path = directory / _FILE
    text = read_tokenizer(directory)
    try:
        backend = HfTokenizer.from_str(text)
    except Exception as error:  # The library raises nothing narrower.
        raise _not_readable(path, error) from None
    ids = {name: backend.token_to_id(name) for name in _SPECIAL_TOKENS}
    for name, token in ids.items():
        if token is None:
            raise UserError(f"{path}: has no token {name}; is it Gemma's tokenizer?")
        _check_special(path, backend, name, token)
    architecture = read_architecture(directory)
    _check_embedded(path, backend, architecture.num_embed)
    _check_family(path, architecture, ids["<start_of_turn>"])
    return Tokenizer(backend, ids["<pad>"], ids["<bos>"], tuple(ids[n] for n in STOP_TOKENS))


def read_tokenizer(directory: Path) -> str:
    """Reads tokenizer.json without the state of earlier calls that its library saves there.

    That is how texts were cut and padded, and the dropout of merges, by which the same text has
    other tokens each time. All of it would change prompts in silence.

    Raises:
        UserError: if the file is missing or unreadable.
    """
    path = directory / _FILE
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        blocks = [(content, "truncation"), (content, "padding"), (content["model"], "dropout")]
        saved = [(block, name) for block, name in blocks if block.get(name) is not None]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _not_readable(path, error) from None
    if not saved:
        return text
    for block, name in saved:
        block[name] = None
    return json.dumps(content, indent=2, ensure_ascii=False)


def _not_readable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable tokenizer ({error})")


def _check_special(path: Path, backend: HfTokenizer, name: str, token: int) -> None:
    """Refuses a special token that is split, or that takes in the white space beside it."""
    for surrounding in _SURROUNDINGS:
        text = surrounding.format(name)
        encoded = backend.encode(text, add_special_tokens=False)
        spans = zip(encoded.ids, encoded.offsets, strict=True)
        found = [text[start:end] for i, (start, end) in spans if i == token]
        if found != [name]:
            raise UserError(
                f"{path}: reads {text!r} without {name} as one token of its own; take Gemma's own "
                "tokenizer.json, whose special tokens have lstrip, rstrip and single_word false"
            )


def _check_family(path: Path, architecture: Architecture, turn: int) -> None:
    """Refuses the tokenizer of another family beside a model with Google's vocabulary.

    Both have the same special tokens, by other ids.
    """
    own = _TURN_IDS.get(architecture.num_embed)
    if own is not None and turn != own:
        raise UserError(
            f"{path}: is not the tokenizer of a {architecture.family} (its <start_of_turn> is "
            f"{turn}, not {own}); put the model's own tokenizer.json there"
        )


def _check_embedded(path: Path, backend: HfTokenizer, vocab_size: int) -> None:
    """Refuses tokens for which the model has no embedding."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    beyond = sorted((token, name) for name, token in vocabulary.items() if token >= vocab_size)
    if beyond:
        token, name = beyond[0]
        raise UserError(
            f"{path}: {len(beyond)} tokens, such as {name!r} with id {token}, are beyond the "
            f"embedding of vocab_size = {vocab_size} in config.json; take the tokenizer that "
            "belongs to the model, or enlarge the model's embedding"
        )


def bucket(size: int, smallest: int, limit: int) -> int:
    """The least of smallest, 2 x smallest, 4 x smallest, ..., limit that holds a size.

    Raises:
        ValueError: if the limit does not hold it.
    """
    if size > limit:
        raise ValueError(f"{size} is more than the limit of {limit}")
    width = min(smallest, limit)
    while width < size:
        width = min(2 * width, limit)
    return width


def pad_right(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> np.ndarray:
    """Right-pads token ids to [B, width].

    Raises:
        ValueError: if a row is longer; cutting a prompt would change the question.
    """
    padded = np.full((len(rows), width), pad_id, np.int32)
    for i, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(f"prompt of {len(row)} tokens exceeds max_prompt_tokens = {width}")
        padded[i, : len(row)] = row
    return padded
