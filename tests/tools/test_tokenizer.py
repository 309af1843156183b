"""The embedded tokenizer: lossless on any text, short on its own, at home in transformers."""

import json
import re
import statistics
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tools.tiny_gemma2.sloppy import sloppy
from tools.tiny_gemma2.tokenizer import make_config, make_tokenizer

from gemma2_grpo.task.procedural import generate
from gemma2_grpo.task.prompts import INSTRUCTION, STOP_TOKENS, render_prompt

SHIPPED = Path(str(resources.files("gemma2_grpo") / "assets" / "tiny-gemma2"))
TOKENIZER = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def pieces(text: str) -> list[str]:
    return TOKENIZER.encode(text, add_special_tokens=False).tokens


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def auto_tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(SHIPPED)


def test_the_shipped_files_are_what_the_module_writes(tmp_path):
    make_config(tmp_path, make_tokenizer(tmp_path))
    for path in tmp_path.iterdir():
        assert path.read_text() == (SHIPPED / path.name).read_text(), path.name


def test_ids_are_gemmas_and_the_vocabulary_shards():
    ids = [TOKENIZER.token_to_id(name) for name in SPECIALS]
    assert ids == [0, 1, 2, 3, 106, 107]
    assert TOKENIZER.get_vocab_size() == 496
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["vocab_size"] == 496
    assert config["eos_token_id"] == [TOKENIZER.token_to_id(name) for name in STOP_TOKENS[::-1]]


awkward = st.lists(
    st.one_of(
        st.text(),
        st.sampled_from([*SPECIALS, *TAGS, INSTRUCTION, "<0x41>", "<unused0>", "\u2581", "😀"]),
        st.sampled_from(["  ", "\n", "\n\n", "\r\n", "\t", "\nStep 2: ", " + ", "Ann has 12 eggs"]),
    )
).map("".join)


@settings(max_examples=300, deadline=None)
@given(awkward)
def test_any_text_survives(text):
    assert decode(encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " leading and  double  spaces ",
        "a\u2581b",  # The character that sentencepiece writes for a space.
        "<0x41> is not A",
        "naïve café 😀👩‍👩‍👧 漢字 \u2028 \x00",
        "<answer>\n1,080.50\n</answer><end_of_turn>\n<eos>",
        render_prompt("What is 2+2?"),
    ],
)
def test_any_text_survives_in_transformers(auto_tokenizer, text):
    ids = auto_tokenizer.encode(text, add_special_tokens=False)
    assert ids == encode(text)
    assert auto_tokenizer.decode(ids) == text


def test_bytes_stand_in_only_for_characters_outside_ascii():
    assert pieces("<0x41>é") == ["<", "0", "x", "4", "1", ">", "<0xC3>", "<0xA9>"]
    ascii_text = "".join(map(chr, range(32, 127))) + "\n\t"
    assert not [piece for piece in pieces(ascii_text) if piece.startswith("<0x")]
    assert not [piece for piece in pieces(ascii_text) if piece.startswith("<unused")]


def test_numbers_are_single_digits():
    for problem in generate("test", 300, seed=0):
        for piece in pieces(problem.question + problem.solution):
            fixed_removed = re.sub(r"Step \d: ", "", piece)
            assert len(piece) == 1 or not re.search(r"\d", fixed_removed)


def test_prompts_and_solutions_are_short_and_of_known_pieces():
    problems = generate("test", 2000, seed=5)
    prompts = [pieces(render_prompt(problem.question)) for problem in problems]
    solutions = [pieces(problem.solution + "<end_of_turn>") for problem in problems]
    rng = np.random.default_rng(0)
    broken = [pieces(sloppy(problem, rng) + "<end_of_turn>") for problem in problems]
    assert all(prompt.count(INSTRUCTION) == 1 for prompt in prompts)
    assert statistics.median(map(len, prompts)) <= 45 and max(map(len, prompts)) <= 60
    assert statistics.median(map(len, solutions)) <= 30 and max(map(len, solutions)) <= 40
    assert max(map(len, broken)) <= 48
    # No word of a problem is spelled out in letters.
    letters = {p for prompt in prompts for p in prompt if len(p) == 1 and p.isalpha()}
    assert letters == {"A"}


def test_a_solution_in_pieces():
    text = (
        "<reasoning>\nStep 1: 12 + 7 = 19\nStep 2: 19 x 4 = 76\n"
        "Therefore, the answer is 76.\n</reasoning>\n<answer>\n76\n</answer><end_of_turn>"
    )
    assert pieces(text) == [
        "<reasoning>", "\nStep 1: ", "1", "2", " + ", "7", " = ", "1", "9",
        "\nStep 2: ", "1", "9", " x ", "4", " = ", "7", "6",
        "\nTherefore, the answer is ", "7", "6",
        ".\n</reasoning>\n<answer>\n", "7", "6", "\n</answer>", "<end_of_turn>",
    ]  # fmt: skip


def test_chat_template_gives_the_ids_of_render_prompt(auto_tokenizer):
    for problem in generate("validation", 20, seed=0):
        messages = [{"role": "user", "content": f"{INSTRUCTION}\n\n{problem.question}"}]
        encoded = auto_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert list(encoded["input_ids"]) == encode(render_prompt(problem.question))


def test_chat_template_alternates_as_gemmas(auto_tokenizer):
    turns = [
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2+2?"},
    ]
    assert auto_tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\n2+2?<end_of_turn>\n"
    )
    with pytest.raises(Exception, match="System role not supported"):
        auto_tokenizer.apply_chat_template([{"role": "system", "content": "x"}, *turns])
    with pytest.raises(Exception, match="must alternate"):
        auto_tokenizer.apply_chat_template(turns[1:])


def test_transformers_knows_the_special_tokens(auto_tokenizer):
    names = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")
    assert [getattr(auto_tokenizer, name) for name in names] == [0, 1, 2, 3]
    assert auto_tokenizer("5")["input_ids"] == [2, *encode("5")]
    answer = auto_tokenizer.decode(encode("<answer>\n7\n</answer><end_of_turn>"), True)
    assert answer == "<answer>\n7\n</answer>"


def test_transformers_reads_the_architecture():
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(SHIPPED)
    assert type(config).__name__ == "Gemma2Config"
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 16)
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
