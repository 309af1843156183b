"""config.json: what real Gemma 2 models have is read, what is not computed is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gemma2_grpo.model.architecture import read_architecture
from gemma2_grpo.model.config_json import GENERATION_FIELDS
from gemma2_grpo.model.tokenizer import load_tokenizer

# google/gemma-2-2b-it as transformers 4.42 wrote it.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}
TURNS = ["sliding_attention", "full_attention"] * 13
# What later versions, other tools and other published Gemma 2 models add to it.
ADDED: dict[str, dict[str, Any]] = {
    "9B": {"sliding_window_size": 4096, "_name_or_path": "google/gemma-2-9b"},
    "transformers 4.53": {"layer_types": TURNS, "transformers_version": "4.53.0"},
    "transformers 5": {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None,
    },
    "a default by its older name": {"rope_scaling": {"rope_theta": 10000, "type": "default"}},
    "unsloth": {
        "unsloth_version": "2025.3.19",
        "unsloth_fixed": True,
        "model_name": "unsloth/gemma-2-2b-it",
        "_attn_implementation_autoset": True,
        "use_cache": False,
    },
    "all that transformers 4 knows": {
        "add_cross_attention": False,
        "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "is_decoder": False,
        "is_encoder_decoder": False,
        "prefix": None,
        "pruned_heads": {},
        "rope_scaling": None,
        "temperature": 1.0,
        "torchscript": False,
    },
    "a field that says nothing": {"some_plugin": None, "some_others": []},
}

# Every one of them changes what transformers, or the tool that wrote it, computes.
REFUSED: dict[str, tuple[Any, str]] = {
    "layer_types": (
        ["full_attention"] * 26,
        "is not supported; only sliding_attention in turn with full_attention, 26 layers in all, "
        "is",
    ),
    "rope_scaling": (
        {"factor": 2.0, "rope_type": "linear"},
        "is not supported; only rope_type default is",
    ),
    "rope_parameters": (
        {"rope_theta": 10000.0, "rope_type": "yarn"},
        "is not supported; only rope_type default is",
    ),
    "partial_rotary_factor": (0.5, "is not supported; only 1.0 is"),
    "use_bidirectional_attention": (True, "is not supported; only False is"),
    "is_causal": (False, "is not supported; only True is"),
    "add_cross_attention": (True, "is not supported; only False is"),
    "hidden_act": ("gelu", "is not supported; only 'gelu_pytorch_tanh' is"),
    "hidden_activation": (None, "is not supported; only 'gelu_pytorch_tanh' is"),
    "sliding_window": (None, "is no number; put the model's own file there"),
    "sliding_window_size": (2048, "is not supported; only 4096 is"),
    "_sliding_window_pattern": (6, "is not supported; only 2 is"),
    "num_key_value_heads": (3, "is not supported; only what divides the 8 heads is"),
    "num_hidden_layers": (26.0, "is not supported; only a whole number above 0 is"),
    "head_dim": (0, "is not supported; only a whole number above 0 is"),
    "query_pre_attn_scalar": (-256, "is not supported; only a number above 0 is"),
    "attn_logit_softcapping": (0.0, "is not supported; only a number above 0 is"),
    "final_logit_softcapping": (True, "is no number; put the model's own file there"),
    "vocab_size": (None, "is no number; put the model's own file there"),
    "architectures": (
        ["Gemma2ForSequenceClassification"],
        "is not supported; only ['Gemma2ForCausalLM'] is",
    ),
    "quantization_config": ({"bits": 4}, "is not supported; only None is"),
    "pruned_heads": ({"1": [0]}, "is not supported; only {} is"),
    **{
        name: (
            value,
            "is not known here and may change what the model computes; if it does not, remove it "
            "from a copy of the model",
        )
        for name, value in {
            "attention_multiplier": 0.5,
            "auto_map": {"AutoModelForCausalLM": "modeling.Own"},
            "num_experts": 8,
            "quantization": {"bits": 4, "group_size": 64},
            "scale_embedding": False,
            "use_qk_norm": True,
        }.items()
    },
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | changes))
        return tmp_path

    return write


@pytest.mark.parametrize("kind", ADDED)
def test_what_real_models_have_is_read(kind: str, write: Callable[..., Path]) -> None:
    found = read_architecture(write(**ADDED[kind]))
    sizes = (found.num_layers, found.num_embed, found.embed_dim, found.hidden_dim, found.head_dim)
    assert sizes == (26, 256_000, 2304, 9216, 256)
    assert (found.num_heads, found.num_kv_heads, found.sliding_window_size) == (8, 4, 4096)
    assert (found.attn_logits_soft_cap, found.final_logit_softcap) == (50.0, 30.0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(
    name: str, write: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    value, why = REFUSED[name]
    directory = write(**{name: value})
    message = refusal(read_architecture, directory)
    assert message.startswith(f"{directory}/config.json: {name} = ") and message.endswith(why)


@pytest.mark.parametrize("block", ["rope_parameters", "rope_scaling"])
def test_an_angle_in_either_block_counts(
    block: str, write: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    """Although the flat field says what is computed."""
    directory = write(**{block: {"rope_theta": 1e6, "rope_type": "default"}})
    assert refusal(read_architecture, directory) == (
        f"{directory}/config.json: rope_theta = 1000000.0 is not supported"
    )


def test_layers_that_take_turns_the_other_way_round(
    write: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    assert "layer_types" in refusal(read_architecture, write(layer_types=TURNS[::-1]))
    assert "layer_types" in refusal(read_architecture, write(layer_types=TURNS[:-2]))


def test_a_query_scalar_that_is_absent_is_that_of_transformers(
    write: Callable[..., Path],
) -> None:
    directory = write(head_dim=64)
    values = json.loads((directory / "config.json").read_text())
    del values["query_pre_attn_scalar"]
    (directory / "config.json").write_text(json.dumps(values))
    assert read_architecture(directory).query_scalar == 256


@pytest.mark.oracle
def test_every_field_of_transformers_is_known(write: Callable[..., Path]) -> None:
    """All fields with their defaults, as `to_dict` gives them."""
    transformers = pytest.importorskip("transformers")
    found = read_architecture(write(**transformers.Gemma2Config(**PUBLISHED).to_dict()))
    assert found.num_layers == 26
    # Where answers end is written anew; these two say nothing of sampling.
    kept = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}
    others = {"use_cache", "cache_implementation", "transformers_version", "_from_model_config"}
    shown = {"output_attentions", "output_hidden_states"}
    fields = set(transformers.GenerationConfig().to_dict()) - kept - others - shown
    assert fields <= GENERATION_FIELDS


@pytest.mark.oracle
def test_what_transformers_writes_is_read(goldens: ModuleType, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.Gemma2Config(**goldens.SMALL).save_pretrained(tmp_path)
    assert read_architecture(tmp_path).num_layers == goldens.SMALL["num_hidden_layers"]


def test_a_tokenizer_comes_with_a_model_that_is_computed(
    tmp_path: Path, tiny_directory: Path, refusal: Callable[..., str]
) -> None:
    """So that no command goes past it, whichever loads first."""
    from tests.fixtures.models import EMBEDDED

    (tmp_path / "tokenizer.json").write_bytes((EMBEDDED / "tokenizer.json").read_bytes())
    values = json.loads((tiny_directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"use_qk_norm": True}))
    assert "use_qk_norm = True is not known here" in refusal(load_tokenizer, tmp_path)
