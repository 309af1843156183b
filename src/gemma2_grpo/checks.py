"""Values and combinations of values that cannot run, each refused in one line."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from gemma2_grpo.config import Config, EvaluateConfig
from gemma2_grpo.errors import ConfigError
from gemma2_grpo.ranges import demand

_OUT_OF_RANGE = (
    "finite_number greater_than greater_than_equal less_than less_than_equal too_short".split()
)
_AnyConfig = TypeVar("_AnyConfig", Config, EvaluateConfig)


def check(config: Config) -> Config:
    """Refuses combinations that cannot run, in one line that names the field and the fix.

    Raises:
        ConfigError: for the first impossible value or combination.
    """
    config = check_fields(config)
    model, data, rollout, grpo = config.model, config.data, config.rollout, config.grpo
    _check_supervised(config)
    if grpo.epsilon_high is not None and grpo.epsilon_high < grpo.epsilon:
        raise ConfigError(
            f"epsilon_high = {grpo.epsilon_high} is below epsilon = {grpo.epsilon}; raise it"
        )
    sequence = rollout.max_prompt_tokens + rollout.max_completion_tokens
    if rollout.kv_cache_tokens is not None and rollout.kv_cache_tokens < sequence:
        raise ConfigError(
            f"kv_cache_tokens = {rollout.kv_cache_tokens} does not hold max_prompt_tokens + "
            f"max_completion_tokens = {sequence}; raise it, or leave it out"
        )
    longest = max(rollout.max_prompt_tokens, rollout.max_completion_tokens)
    if grpo.micro_batch_tokens < longest * model.mesh_shape[0]:
        raise ConfigError(
            f"micro_batch_tokens = {grpo.micro_batch_tokens} does not hold a sequence of "
            f"{longest} tokens for each of mesh_shape[0] = {model.mesh_shape[0]}; raise it to "
            f"{longest * model.mesh_shape[0]}"
        )
    if rollout.prompts_per_step > data.num_train_samples:
        raise ConfigError(
            f"prompts_per_step = {rollout.prompts_per_step} is more than num_train_samples = "
            f"{data.num_train_samples}; lower it"
        )
    return config


def _check_supervised(config: Config) -> None:
    """Refuses a mixture of GRPO and supervised training, whose solutions make no groups."""
    rollout, grpo = config.rollout, config.grpo
    if (rollout.engine == "solutions") != (grpo.loss_type == "nll"):
        raise ConfigError(
            f"engine = {rollout.engine!r} does not go with loss_type = {grpo.loss_type!r}; run "
            "gemma2-grpo sft, which sets both"
        )
    if rollout.engine != "solutions":
        if rollout.num_generations < 2:
            raise ConfigError(f"num_generations = {rollout.num_generations} must be at least 2")
        return
    for name, value, only in (
        ("num_generations", rollout.num_generations, 1),
        ("num_iterations", grpo.num_iterations, 1),
        ("beta", grpo.beta, 0),
        ("temperature", rollout.temperature, 1),
    ):
        if value != only:
            raise ConfigError(f"{name} = {value}: supervised training takes {only}; set that")


def check_fields(config: _AnyConfig) -> _AnyConfig:
    """The configuration with lists as tuples, if each value has its type and is in its range.

    Raises:
        ConfigError: for the first impossible value.
    """
    try:
        return TypeAdapter(type(config)).validate_python(config)
    except ValidationError as error:
        raise ConfigError(explain(type(config), dataclasses.asdict(config), error)) from None


def explain(kind: type, values: Mapping[str, Any], error: ValidationError) -> str:
    """The first error in one line: `max_steps = 0 must be at least 1`."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if not is_out_of_range(first):
        return f"{'.'.join(path)} = {first['input']!r}: {first['msg'].lower()}"
    field, value, hint = "", values, kind
    for name in path:
        if dataclasses.is_dataclass(hint):  # Not an element of a tuple.
            field, value = name, value[name]
            hint = get_type_hints(hint, include_extras=True)[name]
    if first["type"] == "finite_number":
        return f"{field} = {value} must be a finite number"
    return f"{field} = {tuple(value) if isinstance(value, list) else value} {demand(hint)}"


def is_out_of_range(error: ErrorDetails) -> bool:
    """Whether a value has the right type and is one that the field does not take."""
    return error["type"] in _OUT_OF_RANGE
