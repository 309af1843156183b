"""Completing prompts with a model that is not trained: to measure it, or to ask it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh
from tunix.models.gemma import model as gemma

from gemma2_grpo.config import RolloutConfig
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.sampling.rollout import Completions, GroupRollout, GroupRolloutConfig


class Sampler:
    """A model, with or without adapters, that completes prompts on our own engine."""

    def __init__(
        self,
        model: gemma.Gemma,
        tokenizer: Tokenizer,
        mesh: Mesh,
        rollout: RolloutConfig,
        *,
        merged_scale: float | None = None,
    ) -> None:
        """Takes a model on its mesh.

        Args:
            model: With or without adapters.
            tokenizer: Of the model.
            mesh: Where the model lies.
            rollout: Limits and sampling settings.
            merged_scale: Scale of the adapters, to add them into the weights before sampling.
        """
        self._tokenizer = tokenizer
        self._settings = GroupRolloutConfig(
            max_tokens_to_generate=rollout.max_completion_tokens,
            max_prompt_length=rollout.max_prompt_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k or None,
            eos_tokens=list(tokenizer.stop_ids),
        )
        self._engine = GroupRollout(
            model, tokenizer, mesh, self._settings, merged_scale=merged_scale
        )

    def generate(
        self,
        prompts: Sequence[str],
        group: int,
        key: jax.Array,
        *,
        greedy: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> Completions:
        """Completes each prompt `group` times, with randomness from `key` alone.

        Args:
            prompts: Rendered prompts of at most `max_prompt_tokens`.
            group: Completions of each.
            key: Key of this call.
            greedy: Take the likeliest token.
            on_text: Takes the first completion as far as it has come, every few tokens.
        """
        settings = replace(self._settings, seed=key)
        if on_text:
            settings = replace(settings, on_tokens=lambda rows: on_text(self._text(rows[0])))
        if greedy:
            settings = replace(settings, temperature=0.0, top_p=None, top_k=None)
        output = self._engine.generate([p for p in prompts for _ in range(group)], settings)
        stops = self._tokenizer.stop_ids
        truncated = np.array([not len(row) or row[-1] not in stops for row in output.tokens])
        return Completions(output.text, output.tokens, truncated)

    def _text(self, row: np.ndarray) -> str:
        """Text of tokens, of which the last may be half a character."""
        return self._tokenizer.decode(row).rstrip("\ufffd")
