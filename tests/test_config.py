"""Presets load, the flagship has the specification's numbers, mistakes get one clear line."""

import dataclasses
from pathlib import Path

import pytest

from gemma2_grpo.checks import check
from gemma2_grpo.config import Config
from gemma2_grpo.errors import ConfigError
from gemma2_grpo.presets import from_mapping, load_config, preset_names, read_toml

SPECIFICATION = {
    "model": {
        "model": "google/gemma-2-2b-it",
        "dtype": "bfloat16",
        "lora_rank": 64,
        "mesh_shape": (2, 4),
    },
    "data": {"dataset": "openai/gsm8k", "num_train_samples": 448, "num_test_samples": 64},
    "rollout": {
        "num_generations": 16,
        "max_prompt_tokens": 256,
        "max_completion_tokens": 768,
    },
    "grpo": {"num_iterations": 3, "beta": 0.04, "epsilon": 0.2},
    "optimizer": {"learning_rate": 2e-6},
    "rewards": {"format_weight": 0.25, "logic_weight": 0.30, "accuracy_weight": 0.45},
    "run": {"max_steps": 600},
}
PRESETS = (
    "gemma2-2b-gpu, gemma2-2b-gsm8k-strong, gemma2-2b-v5e8, gemma3-1b-gpu, gemma3-1b-v5e8, tiny"
)
FIXED = [(section, name) for section, values in SPECIFICATION.items() for name in values]


def test_the_presets_are_these() -> None:
    assert ", ".join(preset_names()) == PRESETS


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name: str) -> None:
    assert isinstance(load_config(name), Config)


@pytest.mark.parametrize(("section", "name"), FIXED)
def test_flagship_has_the_number_of_the_specification(section: str, name: str) -> None:
    wanted = SPECIFICATION[section][name]
    assert getattr(getattr(load_config("gemma2-2b-v5e8"), section), name) == wanted
    assert getattr(getattr(Config(), section), name) == wanted
    assert name in read_toml("gemma2-2b-v5e8")[section], "stated, not inherited"


def test_a_micro_batch_of_the_flagship_is_one_group_at_full_length() -> None:
    config = load_config("gemma2-2b-v5e8")
    group = config.rollout.num_generations * config.rollout.max_completion_tokens
    assert config.grpo.micro_batch_tokens == Config().grpo.micro_batch_tokens == group
    assert "micro_batch_tokens" in read_toml("gemma2-2b-v5e8")["grpo"]


def test_a_micro_batch_may_hold_just_one_sequence() -> None:
    values = {"grpo": {"micro_batch_tokens": 1536}}
    check(from_mapping(Config, values, "test"))


def test_flagship_adapts_attention_and_mlp() -> None:
    patterns = " ".join(load_config("gemma2-2b-v5e8").model.lora_modules)
    parts = ("q_einsum", "kv_einsum", "attn_vec_einsum", "gate_proj", "up_proj", "down_proj")
    assert all(part in patterns for part in parts)


def test_gpu_preset_is_the_flagship_on_one_device() -> None:
    flagship, gpu = load_config("gemma2-2b-v5e8"), load_config("gemma2-2b-gpu")
    assert gpu.model.mesh_shape == (1, 1)
    for section in ("data", "rollout", "grpo", "optimizer", "rewards"):
        assert getattr(gpu, section) == getattr(flagship, section)


def test_sections_share_no_field_name() -> None:
    config = Config()
    sections = (getattr(config, section.name) for section in dataclasses.fields(config))
    names = [f.name for section in sections for f in dataclasses.fields(section)]
    assert len(names) == len(set(names))


def test_absent_fields_take_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "short.toml"
    file.write_text("[run]\nmax_steps = 7\n[rollout]\ntemperature = 1\n")
    config = load_config(str(file))
    assert config.run.max_steps == 7
    assert config.rollout == Config().rollout


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[model]\nlora_rank = '16'", "model.lora_rank = '16': input should be a valid integer"),
        ("[model]\nlora_rank = 1.5", "model.lora_rank = 1.5: input should be a valid integer"),
        ("[run]\nseed = true", "run.seed = True: input should be a valid integer"),
        ("[run]\ntensorboard = 1", "run.tensorboard = 1: input should be a valid boolean"),
        ("[grpo]\nbeta = 'x'", "grpo.beta = 'x': input should be a valid number"),
        (
            "[model]\nremat = 'all'",
            "model.remat = 'all': input should be 'none', 'block' or 'decoder'",
        ),
        ("model = 3", "model = 3: input should be an object"),
        ("[model]\nlora_rnk = 1", "unknown field 'model.lora_rnk'; did you mean 'lora_rank'?"),
        ("[modle]\nlora_rank = 1", "unknown field 'modle'; did you mean 'model'?"),
        ("max_steps = 1", "unknown field 'max_steps'; it belongs in [run]"),
        (
            "[data]\nxyz = 1",
            "unknown field 'data.xyz'; known are dataset, num_train_samples, num_test_samples, "
            "eval_split, data_seed",
        ),
        ("x", "Expected '=' after a key in a key/value pair (at end of document)"),
    ],
)
def test_a_wrong_file_is_refused_by_field(toml: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(toml)
    with pytest.raises(ConfigError) as refusal:
        load_config(str(file))
    assert str(refusal.value) == f"config {file}: {message}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"grpo": {"micro_batch_tokens": 1535}},
            "micro_batch_tokens = 1535 does not hold a sequence of 768 tokens for each of "
            "mesh_shape[0] = 2; raise it to 1536",
        ),
        (
            {"rollout": {"max_prompt_tokens": 6145}},
            "micro_batch_tokens = 12288 does not hold a sequence of 6145 tokens for each of "
            "mesh_shape[0] = 2; raise it to 12290",
        ),
        (
            {"rollout": {"kv_cache_tokens": 1023}},
            "kv_cache_tokens = 1023 does not hold max_prompt_tokens + max_completion_tokens = "
            "1024; raise it, or leave it out",
        ),
        (
            {"data": {"num_train_samples": 4}},
            "prompts_per_step = 8 is more than num_train_samples = 4; lower it",
        ),
        ({"grpo": {"micro_batch_tokens": 0}}, "micro_batch_tokens = 0 must be at least 1"),
        ({"rollout": {"num_generations": 1}}, "num_generations = 1 must be at least 2"),
        ({"run": {"max_steps": 0}}, "max_steps = 0 must be at least 1"),
        ({"run": {"seed": -1}}, "seed = -1 must be at least 0"),
        ({"rollout": {"temperature": 0.0}}, "temperature = 0.0 must be greater than 0"),
        ({"rollout": {"top_p": 0.0}}, "top_p = 0.0 must lie in (0, 1]; 1 keeps all tokens"),
        ({"optimizer": {"adam_b1": 1.5}}, "adam_b1 = 1.5 must lie between 0 and 1, below 1"),
        ({"grpo": {"epsilon_high": 0.1}}, "epsilon_high = 0.1 is below epsilon = 0.2; raise it"),
        ({"model": {"mesh_shape": [0, 8]}}, "mesh_shape = (0, 8) must have two positive sizes"),
        (
            {"model": {"lora_modules": []}},
            "lora_modules = () must name at least one module to adapt",
        ),
        (
            {"model": {"lora_modules": ["attn/("]}},
            "lora_modules: 'attn/(' is not a regular expression: "
            "missing ), unterminated subpattern at position 5",
        ),
        ({"grpo": {"beta": float("nan")}}, "beta = nan must be a finite number"),
        (
            {"rewards": {"reward_weight": float("inf")}},
            "reward_weight = inf must be a finite number",
        ),
    ],
)
def test_what_cannot_run_is_refused(values: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check(from_mapping(Config, values, "test"))
    assert str(refusal.value) == message


def test_an_unknown_preset_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    for name in ("large", str(tmp_path), str(tmp_path / "absent.toml")):
        with pytest.raises(ConfigError) as refusal:
            load_config(name)
        message = f"config {name!r}: no such file or preset; presets are {PRESETS}"
        assert str(refusal.value) == message


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "binary.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="can't decode byte 0xff"):
        load_config(str(file))
