"""The least that a step can cost: useful work at the measured peak of the machine.

With N parameters in the matrices of the layers, A in the adapters, D the width, V the vocabulary,
L layers, H query heads of h, a prompt of P tokens, its G completions of T_1 .. T_G tokens (C in
all), F the peak in FLOP/s and B the memory traffic in bytes/s:

    a(x) = 4 L H h x                   attention of one query to x keys: scores and values
    S    = sum over p = 1..P of a(p)                         a prompt's attention, computed once
         + sum over i and t = 1..T_i of a(P + t)             and that of its completions
    reference   = (2 N (P + C) + S + 2 D V C) / F            one forward pass of the base
    update      = mu ((4 N + 6 A) (P + C) + 3 S + 4 D V C) / F
    rollout     = max((2 N P + sum of a(p) + 2 D V) / F, w / B)          the prompt
                + sum over decode steps t = 1 .. max T_i - 1 of
                  max(w / B, alive(t) (2 N + 2 D V + a(P + t)) / F)

The update runs the base forward and backward to its activations (2 N each a token), the adapters
forward and backward to activations and weights (6 A), the frozen head forward and backward
(4 D V a completion token), and attention forward and twice that backward. alive(t) counts the
completions longer than t, over all prompts of the step, since they decode together; w is the bytes
of N + D V weights. Adapters are taken as merged for sampling. Reads of the KV cache, norms, soft
caps, softmax, sampling and the optimizer are free: the floor is below what can be reached. A window
shorter than a sequence bounds the x of every other layer.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.workload import Batch, Sizes
from gemma2_grpo.model.layout import linear_layers


@dataclass(frozen=True)
class Floor:
    """Seconds, on the clock of the peaks."""

    rollout: float
    reference: float
    update: float

    @property
    def step(self) -> float:
        """All three."""
        return self.rollout + self.reference + self.update


def layer_parameters(sizes: Sizes) -> int:
    """N: parameters in the matrices of all layers."""
    return sizes.layers * sum(outputs * inputs for outputs, inputs in _linear_layers(sizes))


def adapter_parameters(sizes: Sizes) -> int:
    """A: parameters of adapters on the seven matrices of every layer."""
    sides = sum(outputs + inputs for outputs, inputs in _linear_layers(sizes))
    return sizes.layers * sizes.lora_rank * sides


def _linear_layers(sizes: Sizes) -> list[tuple[int, int]]:
    axes = (sizes.width, sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim)
    return linear_layers(dict(zip("DFNKH", axes, strict=True)))


def attention_flops(sizes: Sizes, context: np.ndarray) -> np.ndarray:
    """a(x) of one query for each number of keys, the shorter windows of local layers included."""
    local = (sizes.layers + 1) // 2
    keys = local * np.minimum(context, sizes.window) + (sizes.layers - local) * context
    return 4 * sizes.heads * sizes.head_dim * keys


def step_floor(sizes: Sizes, batch: Batch, flops: float, bytes_per_second: float) -> Floor:
    """The floor of one step, by the formula above."""
    N, A, head = layer_parameters(sizes), adapter_parameters(sizes), sizes.width * sizes.vocab
    limits = np.array(batch.limits).reshape(sizes.prompts, sizes.generations)
    tokens, completion_tokens = sum(batch.prompt_tokens) + limits.sum(), limits.sum()
    prompt_attention = [attention_flops(sizes, np.arange(p) + 1).sum() for p in batch.prompt_tokens]
    attention = sum(prompt_attention) + sum(
        attention_flops(sizes, prompt + 1 + np.arange(length)).sum()
        for prompt, row in zip(batch.prompt_tokens, limits, strict=True)
        for length in row
    )
    reference = 2 * N * tokens + attention + 2 * head * completion_tokens
    update = (4 * N + 6 * A) * tokens + 3 * attention + 4 * head * completion_tokens
    weight_seconds = (N + head) * (2 if sizes.dtype == "bfloat16" else 4) / bytes_per_second
    prefill = 2 * N * sum(batch.prompt_tokens) + sum(prompt_attention) + 2 * head * sizes.prompts
    rollout = max(prefill / flops, weight_seconds)
    rollout += np.maximum(decode_flops(sizes, batch) / flops, weight_seconds).sum()
    return Floor(
        rollout=float(rollout),
        reference=float(reference / flops),
        update=float(sizes.iterations * update / flops),
    )


def decode_flops(sizes: Sizes, batch: Batch) -> np.ndarray:
    """FLOPs of each decode step, [max T - 1], of the completions that have not ended."""
    limits = np.array(batch.limits).reshape(sizes.prompts, sizes.generations)
    steps = np.arange(1, limits.max())
    per_row = 2 * layer_parameters(sizes) + 2 * sizes.width * sizes.vocab
    total = np.zeros(len(steps))
    for prompt, row in zip(batch.prompt_tokens, limits, strict=True):
        alive = (row[:, None] > steps).sum(axis=0)
        total += alive * (per_row + attention_flops(sizes, prompt + steps))
    return total
