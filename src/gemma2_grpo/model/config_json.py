"""config.json of a model: how it is read, and which of its fields change nothing."""

import json
import reprlib
from collections.abc import Set
from pathlib import Path
from typing import Any, NoReturn

from gemma2_grpo.errors import UserError

JsonObject = dict[str, Any]
"""Fields of a JSON file of a model."""

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
        "_flash_attn_2_enabled _from_model_config _model_name_or_path _name_or_path "
        "attn_implementation base_model finetuning_task id2label label2id language library_name "
        "license model_name name_or_path num_labels pipeline_tag problem_type tags "
        "tokenizer_class transformers.js_config unsloth_fixed "
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
EMPTY = (None, "", [], {})
"""Values of a field that say nothing."""


def read_config(directory: Path) -> JsonObject:
    """Reads config.json.

    Raises:
        UserError: if it is missing or holds no JSON object.
    """
    return read_object(directory / "config.json", "not a readable model configuration ({})")


def read_object(path: Path, fault: str) -> JsonObject:
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


def check_known(path: Path, values: JsonObject, checked: Set[str]) -> None:
    """Refuses a field that is neither checked elsewhere nor known to change nothing.

    Raises:
        UserError: naming the field, since it may change what the model computes.
    """
    for name, value in values.items():
        is_known = name in checked or name in _HARMLESS or name.endswith("_version")
        if not is_known and value not in EMPTY:
            raise UserError(
                f"{path}: {name} = {reprlib.repr(value)} is not known here and may change what "
                "the model computes; if it does not, remove it from a copy of the model"
            )


def refuse(path: Path, name: str, value: object, only: str) -> NoReturn:
    """Refuses a value, saying which ones are computed here.

    Raises:
        UserError: always.
    """
    raise UserError(f"{path}: {name} = {reprlib.repr(value)} is not supported; only {only} is")
