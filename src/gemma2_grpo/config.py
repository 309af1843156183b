"""Run configuration: frozen dataclasses with the range of each field. Imports no JAX."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pydantic import ConfigDict

from gemma2_grpo.errors import ConfigError
from gemma2_grpo.ranges import (
    AtLeast0,
    AtLeast1,
    Decay,
    Fraction,
    MeshShape,
    NotNegative,
    Patterns,
    Positive,
    TopP,
)

OWN_ENGINES = ("group", "solutions")
"""Engines with which completions are sampled by this package, not by one of Tunix's."""


class _Checked:
    """TOML values are checked strictly ("16" is not 16); `check` looks at every field again."""

    __pydantic_config__ = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, revalidate_instances="always"
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """Which weights, and how the policy is adapted and laid out."""

    model: str = "google/gemma-2-2b-it"
    """`embedded`, a directory of HF safetensors, a Hugging Face id, or `kaggle:HANDLE`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the base weights and activations. Adapters, loss and optimizer stay float32."""
    lora_rank: AtLeast1 = 64
    """Inner size of the adapters."""
    lora_alpha: Positive = 64.0
    """Scale of the adapters: their output is multiplied by `lora_alpha / lora_rank`."""
    lora_modules: Patterns = (
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
    mesh_shape: MeshShape = (2, 4)
    """Devices along (fsdp, tp). Their product is the number of devices used."""
    remat: Literal["none", "block", "decoder"] = "decoder"
    """What the update recomputes instead of keeping: nothing, attention and MLP, or layers."""
    logprob_chunk_tokens: AtLeast1 = 128
    """Chunk size of the output head: completion tokens whose logits are materialised at once."""

    @property
    def lora_scale(self) -> float:
        """Factor of the adapters' output."""
        return self.lora_alpha / self.lora_rank


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Checked):
    """Which problems are trained on and which are measured."""

    dataset: str = "openai/gsm8k"
    """`procedural`, `openai/gsm8k`, `kaggle:HANDLE`, a directory with train and test JSONL or
    Parquet files, or one JSONL file."""
    num_train_samples: AtLeast1 = 448
    """Problems to train on, drawn from the official train split."""
    num_test_samples: AtLeast1 = 64
    """Problems to measure on, before and after."""
    eval_split: Literal["test", "validation"] = "test"
    """`validation` is disjoint from both; choose settings on it."""
    data_seed: AtLeast0 = 0
    """Seed of the selection and order of problems."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(_Checked):
    """How completions are sampled."""

    engine: Literal["group", "solutions", "vanilla", "vllm", "sglang_jax"] = "group"
    """`group` is ours; `vanilla`, `vllm` and `sglang_jax` are Tunix's. `vanilla` is slow and plain,
    for comparison; the others need their packages. `solutions`, which `gemma2-grpo sft` sets, takes
    the worked solutions of the data in place of samples."""
    kv_cache_tokens: int | None = None
    """Room for one sequence in the cache of Tunix's engines; by default for the longest prompt
    and completion. That of `group` grows with the completions."""

    num_generations: AtLeast1 = 16
    """Completions per prompt, the group of GRPO: at least 2."""
    prompts_per_step: AtLeast1 = 8
    """Prompts in one batch of rollouts."""
    max_prompt_tokens: AtLeast1 = 256
    """Longer prompts are dropped up front, with a count."""
    max_completion_tokens: AtLeast1 = 768
    """Longer completions are cut off, and counted."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in the loss."""
    top_p: TopP = 1.0
    """Sample from the likeliest tokens that make up this probability; 1 keeps all.

    The loss uses the whole distribution, so that below 1 sampling is a little off-policy."""
    top_k: AtLeast0 = 0
    """Sample from the k likeliest tokens; 0 keeps all."""
    merge_lora: Literal["auto", "always", "never"] = "auto"
    """Add the adapters into the weights before sampling, which saves a third of the decoder's
    operations. `auto` does so in float32; in bfloat16 it would round small changes away."""


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(_Checked):
    """The objective and its updates."""

    num_iterations: AtLeast1 = 3
    """Updates per batch of rollouts (mu)."""
    beta: NotNegative = 0.04
    """Weight of the KL penalty to the reference model."""
    epsilon: Positive = 0.2
    """Clip range of the importance ratio, below (and above, unless epsilon_high is set)."""
    epsilon_high: float | None = None
    """Clip range above 1 (clip-higher, DAPO)."""
    loss_type: str = "grpo"
    """Objective: `grpo`, `drgrpo` (no division by length or deviation), `token_mean` (DAPO),
    `gspo` (ratio of the sequence) or `nll` (likelihood, which `gemma2-grpo sft` sets); the names of
    OBJECTIVES in training/loss.py."""
    micro_batch_tokens: AtLeast1 = 12_288
    """Completion tokens whose gradient is computed at one time; the rest is accumulated."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Checked):
    """AdamW with linear warm-up, cosine decay and global-norm clipping."""

    learning_rate: Positive = 2e-6
    """Peak learning rate."""
    warmup_fraction: Fraction = 0.1
    """Fraction of all updates used for linear warm-up."""
    final_lr_fraction: Fraction = 0.0
    """Fraction of `learning_rate` to which it falls, one update after the last."""
    weight_decay: NotNegative = 0.1
    """Weight decay of AdamW, which multiplies it by the learning rate."""
    adam_b1: Decay = 0.9
    """Decay of the mean of gradients."""
    adam_b2: Decay = 0.99
    """Decay of the mean of squared gradients."""
    max_grad_norm: Positive = 0.1
    """Gradients of a greater norm, over all adapters together, are scaled down to it. One whose
    norm is not a finite number is left out."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(_Checked):
    """Weights of the reward components; each component is in [0, 1] before its weight."""

    format_weight: NotNegative = 0.25
    """Weight of the format component: the four tags, each once, in order, with nothing outside."""
    logic_weight: NotNegative = 0.30
    """Weight of the logic component: true equations that lead from the question to the answer."""
    accuracy_weight: NotNegative = 0.45
    """Weight of the accuracy component: the right number."""
    self_correction_weight: NotNegative = 0.05
    """Weight of the bonus for a false equation that is noticed and corrected."""
    length_weight: NotNegative = 0.05
    """Weight of the bonus for 20 to 200 words with a right answer in perfect format."""
    weights: dict[str, NotNegative] = field(default_factory=dict)
    """Weights of components by name, for those without a field here (see docs/extending.md)."""
    reward: str | None = None
    """`path.py:function`, added to the total with `reward_weight`. Trusted code: it is run."""
    reward_weight: float = 1.0
    """Weight of the custom reward."""
    shuffle_rewards: bool = False
    """Control experiment: permute the rewards within each step, so that they teach nothing."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Checked):
    """Length, seed and rhythm of the run."""

    max_steps: AtLeast1 = 600
    """Steps; a step is one batch of rollouts and its `num_iterations` updates."""
    seed: AtLeast0 = 0
    """Seed of adapters and sampling."""
    eval_every_steps: AtLeast0 = 100
    """Measure greedily every so many steps; 0 only before and after."""
    eval_samples: AtLeast0 = 0
    """Sampled completions per held-out problem, for pass@k before and after; 0 is greedy only."""
    eval_batch_prompts: AtLeast1 = 16
    """Held-out problems that are completed at one time."""
    checkpoint_every_steps: AtLeast1 = 50
    """A checkpoint is also written when a run is stopped, and at its end."""
    keep_checkpoints: AtLeast1 = 2
    """Older ones are deleted."""
    sample_every_steps: AtLeast0 = 25
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
class Config(_Checked):
    """A whole `train` run. The defaults are the flagship's, Gemma 2 2B-IT on a TPU v5e-8."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(_Checked):
    """Settings of `evaluate`. Unset fields are taken from the run."""

    dataset: str | None = None
    """As for `train`. Default: that of the run; for a model GSM8K."""
    eval_split: Literal["test", "validation"] = "test"
    """`validation` is disjoint from what was trained on; choose settings on it."""
    num_test_samples: AtLeast1 | None = None
    """Only so many problems. Default: the whole test split, or as many procedural or validation
    problems as the run has."""
    eval_samples: AtLeast0 = 0
    """Sampled completions per problem, added to the greedy one, for pass@k and maj@k."""
    temperature: Positive | None = None
    """Divides the logits in sampling."""
    max_prompt_tokens: AtLeast1 | None = None
    """Longer prompts are dropped, and counted. Default: 512, or the run's where that is more."""
    max_completion_tokens: AtLeast1 | None = None
    """Longer completions are cut off, and counted."""
    eval_batch_prompts: AtLeast1 | None = None
    """Prompts per batch for greedy decoding; sampled batches hold about as many completions."""
    seed: AtLeast0 | None = None
    """Seed of sampling."""
    adapter: str | None = None
    """Directory of a saved adapter of the model, to compare the model with and without it."""


def flat(config: Config) -> dict[str, Any]:
    """Values of all fields by name. Sections share no field name."""
    return {name: value for own in asdict(config).values() for name, value in own.items()}


def replaced(config: Config, **values: Any) -> Config:
    """A configuration with other values of some fields, whichever section they are in.

    Raises:
        ConfigError: for a field that does not exist.
    """
    for section, own in asdict(config).items():
        changes = {name: values.pop(name) for name in own if name in values}
        config = replace(config, **{section: replace(getattr(config, section), **changes)})
    for name in values:
        raise ConfigError(f"unknown field {name!r}; see docs/configuration.md")
    return config
