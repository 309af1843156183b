"""config.json: the sizes of a Gemma 2, and whether it is one that can be computed here."""

import json
import reprlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunix.models.gemma import model as gemma

from gemma2_grpo.errors import UserError


@dataclass(unsafe_hash=True)
class Architecture(gemma.ModelConfig):
    """Sizes of a model, as Tunix names them; hashable, so that `jit` takes it as static."""

    query_scalar: float = 256.0
    """Queries are divided by its square root; for some models it is not the size of a head."""

    @property
    def is_sliding(self) -> tuple[bool, ...]:
        """For each layer, whether its tokens attend only within the sliding window."""
        return tuple(kind == gemma.AttentionType.LOCAL_SLIDING for kind in self.attention_types)


class Model(gemma.Gemma):
    """Container of a model's variables under Tunix's paths, with or without adapters.

    It is run by `model.gemma.hidden_states`, never by Tunix's layers.
    """

    config: Architecture
    lora_scale: float = 1.0
    """Factor of the adapters."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Refuses Tunix's forward pass, which would leave the adapters out in silence."""
        raise TypeError("a Model only holds variables: run gemma2_grpo.model.gemma.hidden_states")


_SIZES = (
    "num_hidden_layers vocab_size hidden_size intermediate_size num_attention_heads head_dim "
    "num_key_value_heads final_logit_softcapping attn_logit_softcapping sliding_window"
).split()
_SOFTCAPS = ("final_logit_softcapping", "attn_logit_softcapping")
_SLIDING, _FULL = "sliding_attention", "full_attention"
# What transformers takes where the field is absent.
_QUERY_SCALAR = 256

# Fields that decide what is computed, with the values that are computed here. Other fields of that
# kind are unknown, which is refused as well.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gemma2",),
    "architectures": (["Gemma2ForCausalLM"], None),
    "rms_norm_eps": (1e-6,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_act": ("gelu_pytorch_tanh", None),
    "attention_bias": (False,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (False, None),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "sliding_window_pattern": (2,),
    "_sliding_window_pattern": (2,),
    "partial_rotary_factor": (1.0, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
_ROPE: dict[str, tuple[Any, ...]] = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1.0, None),
}

GENERATION_FIELDS = frozenset(
    (
        "assistant_confidence_threshold assistant_early_exit assistant_lookbehind bad_words_ids "
        "begin_suppress_tokens cache_config compile_config constraints continuous_batching_config "
        "disable_compile diversity_penalty do_sample dola_layers early_stopping "
        "encoder_no_repeat_ngram_size "
        "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty "
        "force_words_ids forced_bos_token_id forced_decoder_ids forced_eos_token_id guidance_scale "
        "is_assistant length_penalty low_memory max_length max_matching_ngram_size max_new_tokens "
        "max_time min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens "
        "num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences "
        "output_logits output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens "
        "remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate "
        "return_legacy_cache sequence_bias stop_strings suppress_tokens target_lookbehind "
        "task_specific_params temperature token_healing top_h top_k top_p typical_p "
        "watermarking_config"
    ).split()
)
"""Settings of `generate`, which old versions of transformers kept in config.json."""

_HARMLESS = GENERATION_FIELDS | frozenset(
    (
        # Where it is from, and for whom.
        "_attn_implementation _attn_implementation_autoset _attn_implementation_internal "
        "_commit_hash _experts_implementation _experts_implementation_internal "
        "_flash_attn_2_enabled _from_model_config _name_or_path attn_implementation base_model "
        "finetuning_task id2label label2id language library_name license model_name name_or_path "
        "num_labels pipeline_tag problem_type tags tokenizer_class transformers.js_config "
        "unsloth_fixed "
        # How it is stored, run and trained.
        "attention_dropout cache_implementation chunk_size_feed_forward dtype "
        "gradient_checkpointing hidden_dropout initializer_range is_decoder "
        "keys_to_ignore_at_inference max_position_embeddings neftune_noise_alpha "
        "output_attentions output_hidden_states return_dict tf_legacy_loss tie_encoder_decoder "
        "torch_dtype torchscript use_bfloat16 use_cache use_return_dict "
        # Special tokens: their ids are those of the tokenizer.
        "bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id unk_token_id"
    ).split()
)
# Those that have a check of their own.
_CHECKED = frozenset(
    (
        *_SIZES,
        *_COMPUTED,
        "layer_types",
        "query_pre_attn_scalar",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window_size",
    )
)
_EMPTY = (None, "", [], {})


def read_architecture(directory: Path) -> Architecture:
    """Reads the architecture of a Gemma 2 of any size from its Hugging Face config.json.

    Raises:
        UserError: if the file is missing or describes what is not computed here, and for a field
            that is not known, since it might.
    """
    path = directory / "config.json"
    values = read_config(directory)
    for name, computed in _COMPUTED.items():
        if values.get(name, computed[0]) not in computed:
            _refuse(path, name, values[name], repr(computed[0]))
    _check_sizes(path, values)
    _check_rope(path, values)
    _check_layers(path, values)
    for name, value in values.items():
        is_known = name in _CHECKED or name in _HARMLESS or name.endswith("_version")
        if not is_known and value not in _EMPTY:
            raise UserError(
                f"{path}: {name} = {reprlib.repr(value)} is not known here and may change what "
                "the model computes; if it does not, remove it from a copy of the model"
            )
    kinds = (gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL)
    layers = values["num_hidden_layers"]
    return Architecture(
        num_layers=layers,
        num_embed=values["vocab_size"],
        embed_dim=values["hidden_size"],
        hidden_dim=values["intermediate_size"],
        num_heads=values["num_attention_heads"],
        head_dim=values["head_dim"],
        num_kv_heads=values["num_key_value_heads"],
        final_logit_softcap=values["final_logit_softcapping"],
        attn_logits_soft_cap=values["attn_logit_softcapping"],
        sliding_window_size=values["sliding_window"],
        attention_types=tuple(kinds[i % 2] for i in range(layers)),
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        query_scalar=float(values.get("query_pre_attn_scalar", _QUERY_SCALAR)),
    )


def known_architecture(name: str) -> Architecture | None:
    """The architecture of one of Google's Gemma 2, known without its files."""
    sizes = {"2b": Architecture.gemma2_2b, "9b": Architecture.gemma2_9b}
    for size, make in sizes.items():
        if f"gemma-2-{size}" in name:
            # Tunix counts some entries of the vocabulary that the published weights lack.
            return replace(make(), num_embed=256_000)
    return None


def read_config(directory: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        UserError: if it is missing or holds no JSON object.
    """
    return read_object(directory / "config.json", "not a readable model configuration ({})")


def read_object(path: Path, fault: str) -> dict[str, Any]:
    """Reads a JSON object from a file of a model.

    Args:
        path: The file.
        fault: What is said of a file that cannot be read, with braces for the reason.

    Raises:
        UserError: if there is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {fault.format(error)}") from None
    return values


def _check_sizes(path: Path, values: dict[str, Any]) -> None:
    missing = [name for name in _SIZES if name not in values]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; is it a Gemma 2?")
    sizes = {name: values[name] for name in _SIZES}
    sizes["query_pre_attn_scalar"] = values.get("query_pre_attn_scalar", _QUERY_SCALAR)
    for name, value in sizes.items():
        if name in _SOFTCAPS and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"{path}: {name} = {value!r} is no number; put the model's own file there"
            )
        may_be_broken = name in _SOFTCAPS or name == "query_pre_attn_scalar"
        if not value > 0 or not (may_be_broken or isinstance(value, int)):
            kind = "number" if may_be_broken else "whole number"
            _refuse(path, name, value, f"a {kind} above 0")
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % kv_heads:
        _refuse(path, "num_key_value_heads", kv_heads, f"what divides the {heads} heads")


def _check_rope(path: Path, values: dict[str, Any]) -> None:
    """Refuses other rotary embeddings than those of angle 10,000.

    Flat up to transformers 4; from 5 on in `rope_parameters`, which `rope_scaling` overrides.
    """
    blocks = {name: values.get(name) for name in ("rope_parameters", "rope_scaling")}
    nested = [block for block in blocks.values() if isinstance(block, dict)]
    for block in (values, *nested):
        theta = block.get("rope_theta")
        if theta not in (10_000, None):
            raise UserError(f"{path}: rope_theta = {theta} is not supported")
    for name, block in blocks.items():
        if block in _EMPTY:
            continue
        is_default = isinstance(block, dict) and all(
            value in _ROPE.get(field, ()) for field, value in block.items() if field != "rope_theta"
        )
        if not is_default:
            _refuse(path, name, block, "rope_type default")


def _check_layers(path: Path, values: dict[str, Any]) -> None:
    """Refuses layers that do not take turns, and a window that is given twice."""
    layers, window = values["num_hidden_layers"], values["sliding_window"]
    turns = [(_SLIDING, _FULL)[i % 2] for i in range(layers)]
    if values.get("layer_types") not in (turns, None):
        _refuse(
            path,
            "layer_types",
            values["layer_types"],
            f"{_SLIDING} in turn with {_FULL}, {layers} layers in all,",
        )
    if values.get("sliding_window_size") not in (window, None):
        _refuse(path, "sliding_window_size", values["sliding_window_size"], str(window))


def _refuse(path: Path, name: str, value: Any, only: str) -> None:
    raise UserError(f"{path}: {name} = {reprlib.repr(value)} is not supported; only {only} is")
