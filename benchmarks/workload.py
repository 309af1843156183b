"""What every system is given: sizes, prompts, forced completion lengths and rewards."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.tokens import load_backend
from gemma2_grpo.errors import UserError
from gemma2_grpo.task.procedural import generate
from gemma2_grpo.task.prompts import render_prompt

MIN_COMPLETION_TOKENS = 8
# Spread of log-lengths: a 95th percentile of about 2.2 times the mean.
LENGTH_SIGMA = 0.6


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Architecture, batch and objective, the same for every system."""

    layers: int = 8
    width: int = 384
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    hidden: int = 1536
    vocab: int = 32_768
    window: int = 4096
    attention_softcap: float = 50.0
    final_softcap: float = 30.0
    # In the order of the configuration: equal literals are one object, whatever their order.
    dtype: Literal["bfloat16", "float32"] = "float32"
    remat: Literal["none", "block", "decoder"] = "none"
    mesh: tuple[int, int] = (1, 1)
    lora_rank: int = 64
    prompts: int = 1
    generations: int = 8
    iterations: int = 3
    beta: float = 0.04
    epsilon: float = 0.2
    learning_rate: float = 2e-6
    max_prompt_tokens: int = 128
    max_completion_tokens: int = 256
    mean_completion_tokens: float = 110.0

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.generations


PRESETS = {
    "cpu-30m": Sizes(),
    "gemma2-2b": Sizes(
        layers=26,
        width=2304,
        head_dim=256,
        hidden=9216,
        vocab=256_000,
        dtype="bfloat16",
        remat="decoder",
        prompts=8,
        generations=16,
        max_prompt_tokens=256,
        max_completion_tokens=768,
        mean_completion_tokens=200.0,
    ),
}


@dataclass(frozen=True)
class Batch:
    """One step's input."""

    questions: tuple[str, ...]
    """The problems, [B]."""
    prompt_tokens: tuple[int, ...]
    """Tokens of each prompt, [B]."""
    limits: tuple[int, ...]
    """Tokens that each completion has, [B * G], groups together."""
    rewards: tuple[float, ...]
    """What the completions are said to be worth, [B * G]."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Rendered prompts, [B]."""
        return tuple(map(render_prompt, self.questions))


@dataclass(frozen=True)
class Workload:
    """Everything that a worker process is sent."""

    sizes: Sizes
    directory: Path
    """Model directory: tokenizer.json, and weights where they are shared."""
    batches: tuple[Batch, ...]
    warmup: int
    """Steps that are not measured. They replay the first batches, as often as it takes."""
    seed: int

    def batch(self, step: int) -> Batch:
        """The input of a step, the warm-up steps counted first."""
        is_warmup = step < self.warmup
        return self.batches[(step if is_warmup else step - self.warmup) % len(self.batches)]

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.warmup + len(self.batches)

    @property
    def fixed_completion(self) -> list[int]:
        """Token ids of one completion of the first prompt, whose log-probability all compute."""
        random = np.random.default_rng([self.seed, 3])
        return random.integers(16, self.sizes.vocab, 32).tolist()


def draw_lengths(sizes: Sizes, count: int, seed: int, full: bool = False) -> np.ndarray:
    """Completion lengths of `count` steps, [count, B * G].

    Lognormal with the given mean, clipped to what a completion may have; `full` makes all of them
    the maximum.
    """
    if full:
        return np.full((count, sizes.rows), sizes.max_completion_tokens)
    location = np.log(sizes.mean_completion_tokens) - LENGTH_SIGMA**2 / 2
    random = np.random.default_rng([seed, 1])
    drawn = random.lognormal(location, LENGTH_SIGMA, (count, sizes.rows))
    low = min(MIN_COMPLETION_TOKENS, sizes.max_completion_tokens)
    return np.clip(np.rint(drawn), low, sizes.max_completion_tokens).astype(int)


def read_questions(data: Path | None, seed: int) -> list[str]:
    """Questions of a JSONL file, of a directory's test file, or procedural ones without either.

    Raises:
        UserError: for a file that cannot be read.
    """
    if data is None:
        return [problem.question for problem in generate("test", 64, seed)]
    path = data / "test.jsonl" if data.is_dir() else data
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["question"] for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--data {path}: not JSONL with a field `question` ({type(error).__name__}: {error})"
        ) from None


def make_batches(
    sizes: Sizes,
    questions: Sequence[str],
    directory: Path,
    steps: int,
    seed: int,
    full_length: bool,
) -> tuple[Batch, ...]:
    """Batches of the prompts that fit, in the order of the data.

    Raises:
        UserError: if no prompt fits.
    """
    encoder = load_backend(directory)
    counts = [
        len(encoder.encode(render_prompt(question), add_special_tokens=False).ids)
        for question in questions
    ]
    fitting = [
        (question, tokens)
        for question, tokens in zip(questions, counts, strict=True)
        if tokens <= sizes.max_prompt_tokens
    ]
    if not fitting:
        raise UserError(f"no prompt has at most {sizes.max_prompt_tokens} tokens; use other data")
    lengths = draw_lengths(sizes, steps, seed, full_length)
    rewards = np.random.default_rng([seed, 2]).standard_normal(lengths.shape)
    source = cycle(fitting)
    batches = []
    for limits, values in zip(lengths, rewards, strict=True):
        chosen, tokens = zip(*islice(source, sizes.prompts), strict=True)
        batches.append(Batch(chosen, tokens, tuple(limits.tolist()), tuple(values.tolist())))
    return tuple(batches)
