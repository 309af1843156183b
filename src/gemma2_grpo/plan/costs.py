"""What a run costs at the least, by formulas that can be checked by hand.

Letters: B prompts of P tokens with G completions each; C completion tokens of a step; D width, F
MLP units, V vocabulary entries, L layers, r LoRA rank, mu iterations. A product of a matrix of n
entries with t tokens takes 2 n t operations. The base is frozen, so a backward pass computes no
gradients of its matrices: it takes as much as the forward pass, not twice as much. Of attention it
takes five products where the forward pass has two: those of four gradients, and the weights again.
The slope of the output head is taken in the forward pass, by a second product, and by no other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma2_grpo.config import Config
from gemma2_grpo.model.architecture import Architecture
from gemma2_grpo.model.layout import adapter_parameters, adapter_sides, axis_sizes, linear_layers
from gemma2_grpo.model.lora import samples_merged, updates_merged
from gemma2_grpo.plan.memory import Row
from gemma2_grpo.runtime.chips import Target
from gemma2_grpo.sampling.decoding_batch import cache_lengths

_FLOAT32 = 4
# What a whole step reaches of a chip's peak, on which the estimate of time rests. Assumed.
COMPUTE_EFFICIENCY = 0.4
BANDWIDTH_EFFICIENCY = 0.6


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, and bytes of what a run keeps."""

    decoder: int
    """Entries of the matrices of all layers."""
    head: int
    """Entries of the embedding, which is the output head as well."""
    adapters: int
    cache_bytes_per_token: int
    """Keys and values of one token in all layers."""
    attention: int
    """Query heads x head size, over all layers: 4 x this operations per pair of tokens."""
    item_bytes: int
    """Bytes of a weight or an activation."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the base weights."""
        return (self.decoder + self.head) * self.item_bytes


def model_sizes(architecture: Architecture, config: Config) -> Sizes:
    """Sizes of a model with the adapters of a configuration on all its matrices."""
    a = architecture
    item = 2 if config.model.dtype == "bfloat16" else 4
    return Sizes(
        decoder=a.num_layers * sum(map(math.prod, linear_layers(axis_sizes(a)))),
        head=a.num_embed * a.embed_dim,
        adapters=adapter_parameters(a, config.model.lora_rank),
        cache_bytes_per_token=a.num_layers * 2 * a.num_kv_heads * a.head_dim * item,
        attention=a.num_layers * a.num_heads * a.head_dim,
        item_bytes=item,
    )


@dataclass(frozen=True)
class Work:
    """Operations and memory traffic of one part of a step, over all chips."""

    name: str
    operations: float
    bytes: float
    """Weights and cache, which each device of an fsdp axis reads for itself."""

    def seconds(self, target: Target, chips: int, dtype: str) -> float:
        """The least time on so many chips: the longer of computing and reading."""
        peak = target.flops if dtype == "bfloat16" else target.float32_flops
        assert peak and target.memory_bandwidth
        return max(self.operations / (peak * chips), self.bytes / (target.memory_bandwidth * chips))


@dataclass(frozen=True)
class _Forward:
    """Operations of one pass through the model."""

    prompts: float
    """Operations of the layers' matrices and their adapters on prompts."""
    completions: float
    adapters: float
    """Operations of the adapters alone, on prompts and completions."""
    head: float
    """Operations of the output head, which prompts do not need."""
    prompt_attention: float
    attention: float


def _forward(sizes: Sizes, config: Config, mean_tokens: float) -> _Forward:
    rollout = config.rollout
    prompt = rollout.max_prompt_tokens
    prompts = rollout.prompts_per_step * prompt
    tokens = rollout.prompts_per_step * rollout.num_generations * mean_tokens
    # A token attends to half of its own row on average, and of a completion to the prompt.
    per_pair = 4.0 * sizes.attention
    return _Forward(
        prompts=prompts * 2.0 * (sizes.decoder + sizes.adapters),
        completions=tokens * 2.0 * (sizes.decoder + sizes.adapters),
        adapters=(prompts + tokens) * 2.0 * sizes.adapters,
        head=tokens * 2.0 * sizes.head,
        prompt_attention=prompts * per_pair * prompt / 2,
        attention=tokens * per_pair * (prompt + mean_tokens / 2),
    )


def step_work(sizes: Sizes, config: Config, mean_tokens: float) -> list[Work]:
    """The parts of a step whose completions have so many tokens on average.

    Decoding continues until the longest of a step's completions ends; here that is the limit.
    """
    rollout, mu = config.rollout, config.grpo.num_iterations
    forward = _forward(sizes, config, mean_tokens)
    prefill = forward.prompts + forward.prompt_attention
    decode = forward.completions + forward.head + forward.attention
    layers, head = (
        float(config.model.mesh_shape[0] * entries * sizes.item_bytes)
        for entries in (sizes.decoder, sizes.head)
    )
    # A cache is read up to where it is written; the prompt's once for each group.
    prompt_tokens = rollout.prompts_per_step * rollout.max_prompt_tokens
    tokens = rollout.prompts_per_step * rollout.num_generations * mean_tokens
    cache = sizes.cache_bytes_per_token * (tokens * mean_tokens / 2 + prompt_tokens * mean_tokens)
    # Forward, backward, and once more forward where the layers are computed again.
    passes = 3.0 if config.model.remat != "none" else 2.0
    micro = _micro_batches(config, mean_tokens)
    read = (micro * passes + passes + 1) * layers + 2 * micro * head
    parts = [
        Work("prefill", prefill, layers),
        Work("decode", decode, (layers + head) * rollout.max_completion_tokens + cache),
        Work("update", mu * _update_operations(forward, passes), mu * read),
    ]
    if config.grpo.beta:
        # The reference has no adapters.
        operations = prefill + decode - forward.adapters
        parts.insert(2, Work("reference", operations, (micro + 1) * layers + micro * head))
    return parts


def _update_operations(forward: _Forward, passes: float) -> float:
    """Operations of one update. Prompts are run once more, before their completions."""
    return (
        passes * forward.completions
        + (passes + 1) * forward.prompts
        + forward.adapters  # Gradients of A and B.
        + 2 * forward.head
        + (passes + 1.5) * forward.attention
        + (passes + 2.5) * forward.prompt_attention
    )


def _micro_batches(config: Config, mean_tokens: float) -> int:
    """Micro-batches of a step, if they are full."""
    rows = config.rollout.prompts_per_step * config.rollout.num_generations
    return math.ceil(rows * mean_tokens / config.grpo.micro_batch_tokens)


def moved_bytes(
    architecture: Architecture,
    config: Config,
    mean_tokens: float,
    programs: Sequence[Row],
) -> float:
    """Bytes that collectives bring to one chip in a step, none of them hidden behind computing.

    By the compiled programs, times how often each runs. Within the loop of decoding, two sums a
    layer of the hidden states of all rows.
    """
    rollout, mu = config.rollout, config.grpo.num_iterations
    rows = rollout.prompts_per_step * rollout.num_generations
    micro = _micro_batches(config, mean_tokens)
    runs = {"reference": micro, "update": mu * micro, "optimizer": mu}
    runs |= {"update prompts": mu, "update prompts, back": mu}
    moved = float(
        sum(
            runs.get(program["name"], 1) * size
            for program in programs
            for _, size in program["collectives"].values()
        )
    )
    fsdp, tp = config.model.mesh_shape
    if tp > 1:
        row_bytes = architecture.embed_dim * (2 if config.model.dtype == "bfloat16" else 4)
        sums = 2 * architecture.num_layers * rollout.max_completion_tokens
        moved += sums * rows / fsdp * row_bytes
    return moved


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest chip by formulas; a compiler's own account is better."""

    weights: float
    trained: float
    gathered: float
    """The copy of the weights that sampling brings together over fsdp."""
    caches: Mapping[str, float]
    """KV cache of sampling at its largest by program, all rows alive; two while it grows."""
    sampling_copy: float
    """Copy of the weights with the adapters merged, if sampling uses one."""
    update_copy: float
    """Copy of the weights with the adapters merged, if an update uses one."""
    logits: float
    """One chunk in float32, with its exponentials and its gradient."""
    activations: float
    """Activations of an update: a residual stream per layer, and the inside of one layer."""

    @property
    def decode(self) -> float:
        """Peak of sampling."""
        growing = self.caches.get("grow cache", 0.0)
        used = max(self.gathered + self.caches["decode"], growing)
        return self.weights + self.trained + self.sampling_copy + used

    @property
    def update(self) -> float:
        """Peak of an update; its gradients are as large as the adapters."""
        kept = self.weights + self.trained * 4 / 3 + self.update_copy
        return kept + self.logits + self.activations

    @property
    def peak(self) -> float:
        """Peak of the run."""
        return max(self.decode, self.update)


def estimate_memory(sizes: Sizes, architecture: Architecture, config: Config) -> MemoryEstimate:
    """Memory of one chip, at full prompt and completion lengths."""
    fsdp, tp = config.model.mesh_shape
    rollout, tokens = config.rollout, config.grpo.micro_batch_tokens
    rows = rollout.prompts_per_step * rollout.num_generations
    weights = sizes.weight_bytes / (fsdp * tp)
    # A matrix is sharded over both axes, each adapter over the axis of the side that they share:
    # the width over fsdp, heads and MLP units over tp.
    a, own = architecture, tokens / fsdp
    sides = adapter_sides(axis_sizes(a))
    layer = sum(size / (fsdp if axes == "D" else tp) for axes, size in sides)
    adapters = a.num_layers * config.model.lora_rank * layer
    prompts = rollout.prompts_per_step * rollout.max_prompt_tokens
    token_bytes = sizes.cache_bytes_per_token / (fsdp * tp)
    slots = cache_lengths(rollout.max_completion_tokens)
    caches = [(rows * size + prompts) * token_bytes for size in slots]
    of_programs = {"prefill": caches[0], "decode": caches[-1]}
    if len(caches) > 1:
        of_programs["grow cache"] = caches[-2] + caches[-1]
    chunk = min(config.model.logprob_chunk_tokens, 2 * rollout.max_completion_tokens)
    width = 2 * rollout.max_completion_tokens
    chunk_rows = max(1, tokens // width // fsdp)
    residual = own * a.embed_dim * sizes.item_bytes / tp
    inside = own * (4 * a.embed_dim + 4 * a.hidden_dim / tp) * _FLOAT32
    kept = {"none": inside / 2, "block": 3 * residual, "decoder": residual}[config.model.remat]
    return MemoryEstimate(
        weights=weights,
        trained=3 * _FLOAT32 * adapters,
        gathered=weights * fsdp if fsdp > 1 else 0.0,
        caches=of_programs,
        sampling_copy=weights if samples_merged(config) else 0.0,
        update_copy=weights if updates_merged(config) else 0.0,
        logits=3 * chunk_rows * chunk * a.num_embed * _FLOAT32 / tp,
        activations=a.num_layers * kept + inside,
    )
