"""Gemma's tokenizer: a Hugging Face tokenizer.json with the special tokens resolved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HfTokenizer

from gemma2_grpo.config import UserError
from gemma2_grpo.task.prompts import STOP_TOKENS


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
        UserError: if it is missing or unreadable, or lacks one of Gemma's special tokens.
    """
    path = directory / "tokenizer.json"
    try:
        backend = HfTokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing narrower.
        raise UserError(f"{path}: not a readable tokenizer ({error})") from None
    ids = {name: backend.token_to_id(name) for name in ("<pad>", "<bos>", *STOP_TOKENS)}
    for name, token in ids.items():
        if token is None:
            raise UserError(f"{path}: has no token {name}; is it Gemma's tokenizer?")
    return Tokenizer(backend, ids["<pad>"], ids["<bos>"], tuple(ids[n] for n in STOP_TOKENS))
