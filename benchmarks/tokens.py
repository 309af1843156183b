"""A tokenizer for the benchmark: words and single digits, and as many ids as the model has.

Only the number of prompt tokens matters to the cost of a step. Gemma's tokenizer is not free to
download; this one cuts the text about as finely, and every system reads the same tokenizer.json.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_PIECES = Regex(r"\d| ?[^\W\d]+|\n| ?[^\w\s]")


def write_tokenizer(directory: Path, texts: Iterable[str], vocab: int) -> Path:
    """Writes tokenizer.json with the pieces of `texts`, filled up to `vocab` entries."""
    cut = Split(_PIECES, "isolated")
    pieces = Counter(piece for text in texts for piece, _ in cut.pre_tokenize_str(text))
    words = [*SPECIAL_TOKENS, *(word for word, _ in pieces.most_common())][:vocab]
    # Any id that a random model samples has a text.
    words += [f"token{i}" for i in range(len(words), vocab)]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = cut
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def load_backend(directory: Path) -> Tokenizer:
    """Reads tokenizer.json."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))
