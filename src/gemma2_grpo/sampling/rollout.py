"""Tunix's rollout engines: ours, and what Tunix's own need."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tunix.models.gemma import model as gemma
from tunix.rl.rollout import base_rollout

from gemma2_grpo.config import Config
from gemma2_grpo.model.find import find_model
from gemma2_grpo.model.gemma import Weights, network_of, weights_of
from gemma2_grpo.model.load import plain_network
from gemma2_grpo.model.lora import merge_adapters
from gemma2_grpo.model.mesh import batch_sharding
from gemma2_grpo.model.tokenizer import LEAST_TOKENS, bucket, pad_right
from gemma2_grpo.sampling.decode import OnTokens, complete
from gemma2_grpo.sampling.draw import Sampling


@dataclass(frozen=True)
class Completions:
    """N completions in the order of their prompts, groups together."""

    texts: list[str]
    tokens: list[np.ndarray]
    """Token ids, with the stop token where one was drawn."""
    is_truncated: np.ndarray
    """True where the token limit came before a stop token, [N]."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each completion, [N]."""
        return np.array([len(row) for row in self.tokens])


@dataclass
class GroupRolloutConfig(base_rollout.RolloutConfig):
    """Tunix's settings of a call, and what only this engine knows."""

    limits: Sequence[int] | None = None
    """The most tokens of each completion; by default `max_tokens_to_generate` for all."""
    first_row: int = 0
    """Number of the first completion where these are part of a larger batch."""
    on_tokens: OnTokens | None = None
    """Takes the tokens so far, every few tokens."""


class GroupRollout(base_rollout.BaseRollout):
    """Tunix rollout engine for groups of completions.

    Unlike Tunix's own, it computes the prompt once per group, draws every completion from a key
    of its own, keeps the stop token (it has to be trained on), gives the same result however
    prompts were padded, and spends nothing on completions that have ended.
    """

    def __init__(
        self,
        rollout_actor: gemma.Gemma,
        tokenizer: Any,
        mesh: Mesh,
        rollout_config: base_rollout.RolloutConfig,
        *,
        merged_scale: float | None = None,
    ) -> None:
        """Takes what `RLCluster` hands to a rollout engine.

        Args:
            rollout_actor: The policy.
            tokenizer: Encodes prompts and decodes completions.
            mesh: Mesh of the policy.
            rollout_config: It is given again at each call, where it may differ.
            merged_scale: Scale of the adapters, to add them into the weights before sampling;
                None to run them beside the weights.
        """
        del rollout_config
        self._model = rollout_actor
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._merged_scale = merged_scale
        self._network = (
            network_of(rollout_actor, is_sampling=True)
            if merged_scale is None
            else plain_network(rollout_actor.config, mesh, is_sampling=True)
        )

    def generate(
        self,
        prompts: list[str],
        rollout_config: base_rollout.RolloutConfig,
        **_: Any,
    ) -> base_rollout.RolloutOutput:
        """Samples one completion per entry; equal neighbours form a group and share a prefill.

        Args:
            prompts: Rendered prompts, each repeated once per completion that is wanted.
            rollout_config: Sampling settings. `seed` is the key of this very call and
                `max_prompt_length` the longest prompt there may be.

        Returns:
            Texts, token ids with their stop token, and float32 log-probabilities under the
            distribution that was sampled from (temperature and truncation included).
        """
        # The largest group that every run of equal prompts is made of.
        group = math.gcd(*(len(list(copies)) for _, copies in groupby(prompts)))
        ids = [self._tokenizer.encode(prompt) for prompt in prompts[::group]]
        lengths = np.array([len(row) for row in ids], np.int32)
        longest = rollout_config.max_prompt_length
        width = bucket(min(int(lengths.max()), longest), LEAST_TOKENS, longest)
        limit = rollout_config.max_tokens_to_generate
        limits = getattr(rollout_config, "limits", None)
        sampling = Sampling(
            temperature=rollout_config.temperature,
            top_p=1.0 if rollout_config.top_p is None else rollout_config.top_p,
            top_k=rollout_config.top_k or 0,
            stop_ids=tuple(rollout_config.eos_tokens or (self.eos_id(),)),
            pad_id=self.pad_id(),
        )
        sharding = batch_sharding(self._mesh, len(ids))
        done = complete(
            self._network,
            self._weights(),
            jax.device_put(pad_right(ids, width, self.pad_id()), sharding),
            jax.device_put(lengths, sharding),
            np.array([limit] * len(prompts) if limits is None else limits, np.int32),
            jax.random.key(0) if rollout_config.seed is None else rollout_config.seed,
            max_tokens=limit,
            sampling=sampling,
            mesh=self._mesh,
            first_row=getattr(rollout_config, "first_row", 0),
            on_tokens=getattr(rollout_config, "on_tokens", None),
        )
        tokens = [row[:end] for row, end in zip(done.tokens, done.lengths, strict=True)]
        return base_rollout.RolloutOutput(
            text=[self._tokenizer.decode(row) for row in tokens],
            logits=[],
            tokens=tokens,
            left_padded_prompt_tokens=np.repeat(
                _pad_left(ids, longest, self.pad_id()), group, axis=0
            ),
            logprobs=[row[:end] for row, end in zip(done.logps, done.lengths, strict=True)],
        )

    def _weights(self) -> Weights:
        """The policy's weights as its network takes them."""
        weights = weights_of(self._model)
        if self._merged_scale is None:
            return weights
        return Weights(nnx.State({}), merge_adapters(weights, self._merged_scale))

    def get_per_token_logps(
        self, prompt_tokens: jax.Array, completion_tokens: jax.Array
    ) -> jax.Array:
        """Not part of this engine: the update computes old log-probabilities itself."""
        raise NotImplementedError("the first update iteration gives the old log-probabilities")

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Takes new weights; with a shared model there is nothing to do."""
        del filter_types
        nnx.update(self._model, params)

    def pad_id(self) -> int:
        """Id of the padding token."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """Id of the token that ends a turn."""
        return self._tokenizer.eos_id()

    def model(self) -> gemma.Gemma:
        """The policy that samples."""
        return self._model


def engine_settings(config: Config) -> dict[str, Any]:
    """What vLLM and SGLang-JAX need to know besides, under Tunix's names."""
    model, engine = config.model, config.rollout.engine
    if engine == "vllm":
        return {
            "rollout_vllm_model_version": str(find_model(model.model)),
            "rollout_vllm_init_with_random_weights": False,
            "rollout_vllm_lora_config": {"rank": model.lora_rank, "alpha": model.lora_alpha},
        }
    if engine == "sglang_jax":
        return {
            "rollout_sglang_jax_model_version": str(find_model(model.model)),
            "rollout_sglang_jax_init_with_random_weights": False,
            "rollout_sglang_jax_enable_static_lora": True,
            "rollout_sglang_jax_lora_target_modules": ["all"],
            "rollout_sglang_jax_max_lora_rank": model.lora_rank,
            "rollout_sglang_jax_lora_scaling": model.lora_scale,
        }
    return {}


def _pad_left(rows: list[list[int]], width: int, pad_id: int) -> np.ndarray:
    """Left-pads token ids to [B, width], which is how Tunix wants its prompts back."""
    padded = np.full((len(rows), width), pad_id, np.int32)
    for i, row in enumerate(rows):
        padded[i, width - len(row) :] = row
    return padded
