"""The tokenizer and the architecture of the embedded model.

A vocabulary of a few hundred pieces keeps the model tiny and its texts short: the words and
fixed strings of the procedural problems are one token each, and any other text falls back to
characters and bytes, so that every text survives encoding and decoding.
"""

import json
import re
from pathlib import Path
from typing import Any

from gemma2_grpo.model.chat_template import CHAT_TEMPLATE
from gemma2_grpo.task.procedural import generate
from gemma2_grpo.task.prompts import (
    ANSWER_END,
    ANSWER_START,
    INSTRUCTION,
    REASONING_END,
    REASONING_START,
)

PAD, EOS, BOS, UNK = SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")  # Ids 0 to 3, as in Gemma.
TURNS = ("<start_of_turn>", "<end_of_turn>")
TURN_IDS = (106, 107)  # As in Gemma, for code that knows Gemma's ids by heart.
SHARD_MULTIPLE = 8  # The embedding is sharded over its rows.

# Among ordinary pieces the fewest win. Bytes and padding may never win against characters:
# they would make the text "<0x41>" come back as "A".
_ORDINARY, _NEVER = -1.0, -1000.0

# Strings that every prompt or worked solution holds, with what a broken one needs besides.
_FIXED = (
    INSTRUCTION,
    "\n\n",
    "user\n",
    "model\n",
    REASONING_START,
    REASONING_END,
    ANSWER_START,
    ANSWER_END,
    f"{REASONING_END}\n",
    f"{ANSWER_START}\n",
    f"\n{ANSWER_END}",
    f"{REASONING_END}\n{ANSWER_START}\n",
    f".\n{REASONING_END}\n{ANSWER_START}\n",
    *(f"Step {number}: " for number in range(1, 6)),
    *(f"\nStep {number}: " for number in range(1, 6)),
    "\nTherefore, the answer is ",
    *(f" {operator} " for operator in "+-x="),
)


def make_tokenizer(to: Path) -> int:
    """Writes a tokenizer that `transformers.AutoTokenizer` loads, and returns its vocabulary size.

    A Unigram model with byte fallback and Gemma's special tokens. Unlike Gemma's, spaces stay
    spaces inside the pieces: writing them as U+2581 would lose that character itself.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    pieces = _vocabulary()
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=SPECIALS.index(UNK), byte_fallback=True))
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIALS + TURNS]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIALS.index(BOS))]
    )
    to.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(to / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    _write_json(to / "special_tokens_map.json", names)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": list(TURNS),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "padding_side": "left",
    }
    _write_json(to / "tokenizer_config.json", names | settings)
    return len(pieces)


def make_config(to: Path, vocab_size: int) -> None:
    """Writes the architecture of the embedded model as a Hugging Face Gemma 2 `config.json`.

    Eight query heads and four KV heads shard over the flagship's mesh as Gemma 2 2B does.
    """
    config = {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "pad_token_id": SPECIALS.index(PAD),
        "bos_token_id": SPECIALS.index(BOS),
        "eos_token_id": [SPECIALS.index(EOS), TURN_IDS[1]],
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    _write_json(to / "config.json", config)


def _vocabulary() -> list[tuple[str, float]]:
    """Every piece with its score, in the order of the ids."""
    characters = [*map(chr, range(32, 127)), "\n", "\t"]
    ordinary = dict.fromkeys([*_FIXED, *characters, *_words()])
    never = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [(piece, _ORDINARY) for piece in ordinary] + [(piece, _NEVER) for piece in never]
    pieces[:0] = [(name, _NEVER) for name in SPECIALS]
    pieces[TURN_IDS[0] : TURN_IDS[0]] = [(name, _NEVER) for name in TURNS]
    missing = -len(pieces) % SHARD_MULTIPLE
    return pieces + [(f"<unused{number}>", _NEVER) for number in range(missing)]


def _words() -> list[str]:
    """The words of the procedural problems, with the space before them where they have one."""
    # Enough problems for every template with every name and thing.
    text = "\n".join(problem.question for problem in generate("train", 2000, seed=0))
    return sorted(set(re.findall(r" ?[A-Za-z]+", text)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
