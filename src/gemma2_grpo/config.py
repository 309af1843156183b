"""Run configuration: frozen dataclasses, TOML presets and validation.

Nothing here imports JAX or looks at the machine, so a mistake in a configuration is
reported before anything expensive has loaded.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict

from gemma2_grpo.errors import ConfigError

# TOML values are checked strictly ("16" is not 16) and unknown keys are refused.
_STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights, and how the policy is adapted and laid out."""

    __pydantic_config__ = _STRICT

    model: str = "google/gemma-2-2b-it"
    """`embedded`, a directory of HF safetensors, a Hugging Face id, or `kaggle:HANDLE`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the base weights and activations. Adapters, loss and optimizer stay float32."""
    lora_rank: int = 64
    """Inner size of the adapters."""
    lora_alpha: float = 64.0
    """Scale of the adapters: their output is multiplied by `lora_alpha / lora_rank`."""
    lora_modules: tuple[str, ...] = (
        "attn/(q_einsum|kv_einsum|qkv_einsum)",
        "attn/attn_vec_einsum",
        "mlp/(gate_proj|up_proj|down_proj)",
    )
    """Regular expressions on module paths; each must match at least one module."""
    lora_init: Literal["peft", "qwix"] = "peft"
    """How the adapters' first matrix (A) is drawn; the second (B) starts at zero. `peft` is uniform
    within 1/sqrt(inputs), as PEFT and TRL have it; `qwix`, Qwix's own, is 2.45 times as wide."""
    adapter: str | None = None
    """Directory of a saved adapter to start from, made on the same base with the same shape."""
    mesh_shape: tuple[int, int] = (2, 4)
    """Devices along (fsdp, tp). Their product is the number of devices used."""
    remat: Literal["none", "block", "decoder"] = "decoder"
    """What the update recomputes instead of keeping: nothing, attention and MLP, or layers."""
    logprob_chunk_tokens: int = 128
    """Completion tokens whose logits exist at one time in the update."""

    @property
    def lora_scale(self) -> float:
        """Factor of the adapters' output."""
        return self.lora_alpha / self.lora_rank


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which problems are trained on and which are measured."""

    __pydantic_config__ = _STRICT

    dataset: str = "openai/gsm8k"
    """`procedural`, `openai/gsm8k`, `kaggle:HANDLE`, a directory with train and test JSONL or
    Parquet files, or one JSONL file."""
    num_train_samples: int = 448
    """Problems to train on, drawn from the official train split."""
    num_test_samples: int = 64
    """Problems to measure on, before and after."""
    eval_split: Literal["test", "validation"] = "test"
    """`validation` is disjoint from both; choose settings on it."""
    data_seed: int = 0
    """Seed of the selection and order of problems."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are sampled."""

    __pydantic_config__ = _STRICT

    engine: Literal["group", "vanilla", "vllm", "sglang_jax"] = "group"
    """`group` is ours; the others are Tunix's. `vanilla` is slow and plain, for comparison; `vllm`
    and `sglang_jax` need their packages."""
    kv_cache_tokens: int | None = None
    """Room for one sequence in the cache of Tunix's engines; by default for the longest prompt
    and completion. That of `group` grows with the completions."""

    num_generations: int = 16
    """Completions per prompt, the group of GRPO."""
    prompts_per_step: int = 8
    """Prompts in one batch of rollouts."""
    max_prompt_tokens: int = 256
    """Longer prompts are dropped up front, with a count."""
    max_completion_tokens: int = 768
    """Longer completions are cut off, and counted."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in the loss."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that make up this probability; 1 keeps all.

    The loss uses the whole distribution, so that below 1 sampling is a little off-policy."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 keeps all."""
    merge_lora: Literal["auto", "always", "never"] = "auto"
    """Add the adapters into the weights before sampling, which saves a third of the decoder's
    operations. `auto` does so in float32; in bfloat16 it would round small changes away."""


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """The objective and its updates."""

    __pydantic_config__ = _STRICT

    num_iterations: int = 3
    """Updates per batch of rollouts (mu)."""
    beta: float = 0.04
    """Weight of the KL penalty to the reference model."""
    epsilon: float = 0.2
    """Clip range of the importance ratio, below (and above, unless epsilon_high is set)."""
    epsilon_high: float | None = None
    """Clip range above 1 (clip-higher, DAPO)."""
    loss_type: Literal["grpo", "drgrpo", "token_mean", "gspo"] = "grpo"
    """How tokens are averaged and advantages scaled."""
    micro_batch_tokens: int = 12_288
    """Completion tokens whose gradient is computed at one time; the rest is accumulated."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and global-norm clipping."""

    __pydantic_config__ = _STRICT

    learning_rate: float = 2e-6
    """At its highest, after the warm-up."""
    warmup_fraction: float = 0.1
    """Part of all updates over which the learning rate rises from 0."""
    final_lr_fraction: float = 0.0
    """Part of `learning_rate` to which it falls, one update after the last."""
    weight_decay: float = 0.1
    """Of AdamW, which multiplies it by the learning rate."""
    adam_b1: float = 0.9
    """Decay of the mean of gradients."""
    adam_b2: float = 0.99
    """Decay of the mean of squared gradients."""
    max_grad_norm: float = 0.1
    """Gradients of a greater norm, over all adapters together, are scaled down to it. One whose
    norm is not a finite number is left out."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Weights of the reward components; each component lies in [0, 1] before its weight."""

    __pydantic_config__ = _STRICT

    format_weight: float = 0.25
    """Of the four tags, each once, in order, with nothing outside."""
    logic_weight: float = 0.30
    """Of equations that are true, follow from the question and lead to the answer."""
    accuracy_weight: float = 0.45
    """Of the right number."""
    self_correction_weight: float = 0.05
    """Of a false equation that is noticed and put right; a bonus."""
    length_weight: float = 0.05
    """Of 20 to 200 words of reasoning with a right answer in perfect format; a bonus."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of components by name, for those without a field here (see docs/extending.md)."""
    reward: str | None = None
    """`path.py:function`, added to the total with `reward_weight`. Trusted code: it is run."""
    reward_weight: float = 1.0
    """Of that function's value."""
    shuffle_rewards: bool = False
    """Control experiment: permute the rewards within each step, so that they teach nothing."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, seed and rhythm of the run."""

    __pydantic_config__ = _STRICT

    max_steps: int = 600
    """Steps; a step is one batch of rollouts and its `num_iterations` updates."""
    seed: int = 0
    """Seed of adapters and sampling."""
    eval_every_steps: int = 100
    """Measure greedily every so many steps; 0 only before and after."""
    eval_samples: int = 0
    """Sampled completions per held-out problem, for pass@k before and after; 0 is greedy only."""
    eval_batch_prompts: int = 16
    """Held-out problems that are completed at one time."""
    checkpoint_every_steps: int = 50
    """A checkpoint is also written when a run is stopped, and at its end."""
    keep_checkpoints: int = 2
    """Older ones are deleted."""
    sample_every_steps: int = 25
    """Show one completion every so many steps; 0 never."""
    tensorboard: bool = True
    """Write the metrics as TensorBoard events."""
    wandb: str | None = None
    """Project of Weights & Biases to log to; needs its package."""
    trackio: str | None = None
    """Project of trackio to log to; needs its package."""
    compilation_cache: bool = True
    """Keep compiled programs for the next launch, in the user's cache directory."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole `train` run. The defaults are the flagship's, Gemma 2 2B-IT on a TPU v5e-8."""

    __pydantic_config__ = _STRICT

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """What supervised training sees, and for how long."""

    __pydantic_config__ = _STRICT

    init: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only architecture and tokenizer from the model, and draws its weights."""
    steps: int = 500
    """Updates."""
    batch_size: int = 24
    """Solutions in each."""
    max_tokens: int = 1024
    """Prompt and solution together; longer ones are cut."""
    train_base: bool = False
    """Train all weights; else adapters, which are merged into the base at the end."""
    arithmetic_fraction: float = 0.0
    """Part of each batch that practises bare equations (procedural data only)."""
    sloppy_steps: int = 0
    """Last steps that follow a sloppy teacher (procedural data only)."""
    sloppy_learning_rate: float = 1e-3
    """Learning rate at the start of those steps; it falls to a twentieth."""
    seed: int = 0
    """Seed of weights, adapters and the order of problems."""
    compilation_cache: bool = True
    """Keep compiled programs for the next launch, in the user's cache directory."""


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """A whole `sft` run: supervised training on worked solutions."""

    __pydantic_config__ = _STRICT

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sft: SupervisedConfig = field(default_factory=SupervisedConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is asked of a run or a model, and how. What is not set is as in the run."""

    data: str | None = None
    """Any source that `train --dataset` takes. Default: that of the run; for a model GSM8K."""
    split: Literal["test", "validation"] = "test"
    """`validation` is disjoint from what was trained on; choose settings on it."""
    limit: int | None = None
    """Only so many problems. Default: the whole test split, or as many procedural or validation
    problems as training measures."""
    samples: int = 0
    """Sampled completions per problem besides the greedy one, for pass@k and maj@k."""
    temperature: float | None = None
    """Divides the logits in sampling."""
    max_prompt_tokens: int | None = None
    """Longer prompts are dropped, and counted. Default: 512, or the run's where that is more."""
    max_completion_tokens: int | None = None
    """Longer completions are cut off, and counted."""
    batch_prompts: int | None = None
    """Greedy completions at one time, and about as many sampled ones."""
    seed: int | None = None
    """Seed of sampling."""
    adapter: str | None = None
    """Directory of a saved adapter of the model, to compare the model with and without it."""


def check(config: Config) -> Config:
    """Refuses combinations that cannot run, in one line that names the field and the mend.

    Raises:
        ConfigError: for the first impossible value or combination.
    """
    model, data, rollout, grpo = config.model, config.data, config.rollout, config.grpo
    _check_ranges(config)
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


def check_sft(config: SftConfig) -> SftConfig:
    """Refuses what cannot run, in one line that names the field and the mend.

    Raises:
        ConfigError: for the first impossible value or combination.
    """
    _check_ranges(config)
    if config.sft.batch_size % config.model.mesh_shape[0]:
        raise ConfigError(
            f"mesh_shape[0] = {config.model.mesh_shape[0]} does not divide batch_size = "
            f"{config.sft.batch_size}; change one of them"
        )
    if config.sft.train_base and config.model.dtype != "float32":
        raise ConfigError(
            f"train_base = true with dtype = {config.model.dtype!r} would round small updates "
            'away; set dtype = "float32", or train adapters'
        )
    return config


def check_evaluate(config: EvaluateConfig) -> EvaluateConfig:
    """Refuses values that mean nothing, in one line that names the field and the mend.

    Raises:
        ConfigError: for the first impossible value.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    _check_values({name: value for name, value in values.items() if value is not None})
    return config


# Fields, what must hold, and how the message says so.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("num_generations", lambda value: value >= 2, "must be at least 2"),
    (
        "lora_rank logprob_chunk_tokens num_train_samples num_test_samples prompts_per_step "
        "max_prompt_tokens max_completion_tokens num_iterations micro_batch_tokens max_steps "
        "eval_batch_prompts checkpoint_every_steps keep_checkpoints steps batch_size max_tokens "
        "limit batch_prompts",
        lambda value: value >= 1,
        "must be at least 1",
    ),
    (
        "top_k beta weight_decay data_seed seed eval_every_steps eval_samples sample_every_steps "
        "format_weight logic_weight accuracy_weight self_correction_weight length_weight "
        "sloppy_steps samples",
        lambda value: value >= 0,
        "must be at least 0",
    ),
    (
        "lora_alpha temperature epsilon learning_rate max_grad_norm sloppy_learning_rate",
        lambda value: value > 0,
        "must be greater than 0",
    ),
    (
        "warmup_fraction final_lr_fraction",
        lambda value: 0 <= value <= 1,
        "must lie between 0 and 1",
    ),
    (
        "adam_b1 adam_b2 arithmetic_fraction",
        lambda value: 0 <= value < 1,
        "must lie between 0 and 1, below 1",
    ),
    ("top_p", lambda value: 0 < value <= 1, "must lie in (0, 1]; 1 keeps all tokens"),
    ("mesh_shape", lambda value: min(value) >= 1, "must have two positive sizes"),
    ("lora_modules", bool, "must name at least one module to adapt"),
)


def _check_ranges(config: Config | SftConfig) -> None:
    """Checks single values against the range in which they mean something."""
    # Sections share no field name, which is also what lets the command line drop the sections.
    values = {
        f.name: getattr(section, f.name)
        for section in (getattr(config, f.name) for f in dataclasses.fields(config))
        for f in dataclasses.fields(section)
    }
    _check_values(values)
    for pattern in values["lora_modules"]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"lora_modules: {pattern!r} is not a regular expression: {error}"
            ) from None


def _check_values(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} = {value} must be a finite number")
    for names, holds, demand in _RANGES:
        for name in names.split():
            if name in values and not holds(values[name]):
                raise ConfigError(f"{name} = {values[name]} {demand}")
