"""Completing prompts: one `sample` for training, measuring, `evaluate` and `ask`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from gemma2_grpo.config import Config, RolloutConfig
from gemma2_grpo.model.lora import merge_adapters, samples_merged
from gemma2_grpo.model.mesh import batch_sharding
from gemma2_grpo.model.tokenizer import LEAST_TOKENS, Tokenizer, bucket, pad_right
from gemma2_grpo.model.weights import Model, Weights, forward_of, weights_of
from gemma2_grpo.sampling.decode import complete
from gemma2_grpo.sampling.draw import Sampling


@dataclass(frozen=True)
class Completions:
    """N completions in the order of their prompts, those of a group next to each other."""

    texts: list[str]
    tokens: list[Int[np.ndarray, " T"]]
    """Token ids, with the stop token where one was drawn."""
    is_truncated: Bool[np.ndarray, " N"]
    """True where the token limit came before a stop token."""
    logps: list[Float[np.ndarray, " T"]] | None = None
    """Float32 log-probability of each token under the distribution it was drawn from, temperature
    included; NaN where the engine gives none, None where it gives none at all."""

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each completion."""
        return np.array([len(row) for row in self.tokens])

    def first(self, count: int) -> "Completions":
        """The first `count` completions."""
        logps = None if self.logps is None else self.logps[:count]
        return Completions(
            self.texts[:count], self.tokens[:count], self.is_truncated[:count], logps
        )


def is_truncated(
    tokens: Sequence[Int[np.ndarray, " T"]], stop_ids: Sequence[int]
) -> Bool[np.ndarray, " N"]:
    """Whether each completion was cut off, and so does not end with a stop token."""
    return np.array([not len(row) or row[-1] not in stop_ids for row in tokens])


Sample = Callable[..., Completions]
"""Completes prompts: `sample` with its policy and settings, or one of Tunix's engines.

Both are called with prompts, group, key, and by name `greedy` and `first_row`."""


class Policy:
    """A model to sample from."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        is_merged: bool = False,
    ) -> None:
        """Takes a model, with or without adapters, on its mesh.

        Args:
            model: The model; later changes of its weights are seen.
            tokenizer: Tokenizer of the model.
            mesh: Mesh of the model.
            is_merged: Add the adapters, if there are any, into a copy of the weights before
                sampling, instead of applying them separately.
        """
        self.tokenizer, self.mesh = tokenizer, mesh
        self._model, self._is_merged = model, is_merged
        self.forward = forward_of(model, is_sampling=True)

    def weights(self) -> Weights:
        """The weights of the model as they are now."""
        weights = weights_of(self._model)
        if not self._is_merged or not weights.lora:
            return weights
        return Weights(nnx.State({}), merge_adapters(weights, self._model.lora_scale))


def sampler(config: Config, model: Model, tokenizer: Tokenizer, mesh: Mesh) -> Sample:
    """`sample` with a model and the settings of a configuration, merged or not as it says."""
    policy = Policy(model, tokenizer, mesh, is_merged=samples_merged(config))
    return partial(sample, policy, settings=config.rollout)


def sample(
    policy: Policy,
    prompts: Sequence[str],
    group: int,
    key: Key[Array, ""],
    settings: RolloutConfig,
    *,
    greedy: bool = False,
    limits: Sequence[int] | None = None,
    first_row: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Completions:
    """Completes each prompt `group` times, with randomness from `key` alone.

    Unlike Tunix's engines, it runs a prompt once per group, draws every completion with a key of
    its own, keeps the stop token (ending a turn has to be learned), gives the same result however
    prompts are padded, and spends little on completions that have ended.

    Args:
        policy: The model.
        prompts: Rendered prompts of at most `settings.max_prompt_tokens`.
        group: Completions of each.
        key: Key of this call.
        settings: Limits, temperature, top-p and top-k.
        greedy: Take the most likely token each time.
        limits: Most tokens of each completion, if they differ.
        first_row: Number of the first completion in a batch of which these are a part; with the
            key, it decides the randomness.
        on_text: Called with the text of the first completion so far, every few tokens.

    Raises:
        ValueError: if a prompt is too long.
    """
    tokenizer, mesh = policy.tokenizer, policy.mesh
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    lengths = np.array([len(row) for row in ids], np.int32)
    longest, most = settings.max_prompt_tokens, settings.max_completion_tokens
    width = bucket(min(int(lengths.max()), longest), LEAST_TOKENS, longest)
    sharding = batch_sharding(mesh, len(ids))
    truncation = (0.0, 1.0, 0) if greedy else (settings.temperature, settings.top_p, settings.top_k)
    done = complete(
        policy.forward,
        policy.weights(),
        jax.device_put(pad_right(ids, width, tokenizer.pad), sharding),
        jax.device_put(lengths, sharding),
        np.array([most] * group * len(ids) if limits is None else limits, np.int32),
        key,
        max_tokens=most,
        sampling=Sampling(*truncation, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad),
        mesh=mesh,
        first_row=first_row,
        on_tokens=(lambda rows: on_text(_whole_text(tokenizer, rows[0]))) if on_text else None,
    )
    tokens = [row[:end] for row, end in zip(done.tokens, done.lengths, strict=True)]
    return Completions(
        [tokenizer.decode(row) for row in tokens],
        tokens,
        is_truncated(tokens, tokenizer.stop_ids),
        [row[:end] for row, end in zip(done.logps, done.lengths, strict=True)],
    )


def _whole_text(tokenizer: Tokenizer, row: Int[np.ndarray, " T"]) -> str:
    """Text of tokens, of which the last may be half a character."""
    return tokenizer.decode(row).rstrip("\ufffd")
