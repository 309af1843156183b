"""The border to Tunix's `RLCluster` and its rollout engines: vanilla, vLLM and SGLang-JAX.

Nothing here is used by our own engine (`engine = "group"`), which is `sampling.rollout.sample`.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from tunix.models.gemma import model as gemma
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout import base_rollout

from gemma2_grpo.config import OWN_ENGINES, Config, ModelConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.architecture import Architecture
from gemma2_grpo.model.gemma import rms_norm
from gemma2_grpo.model.hub.find import find_model
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.model.weights import Model
from gemma2_grpo.sampling.rollout import Completions, is_truncated


class _Float32RMSNorm(gemma.RMSNorm):
    """The norm of our forward pass; Tunix's is computed in the type of the activations."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale.get_value())


@contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Gives Tunix's layers the mesh over which they shard their activations.

    They read it from where only this way of entering a mesh puts it. JAX deprecates the way, but
    under `jax.set_mesh` activations would not be sharded at all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        mesh.__enter__()
    try:
        yield
    finally:
        mesh.__exit__(None, None, None)


def check_engine(engine: str, architecture: Architecture) -> None:
    """Checks, without any weights, that an engine computes a model of this architecture.

    Raises:
        UserError: if it is one of Tunix's, whose layers would compute something else.
    """
    if engine in OWN_ENGINES:
        return
    if architecture.has_qk_norm:
        raise UserError(
            f"engine = {engine}: not compared with Gemma 3's norms of queries and keys; "
            "set engine = group"
        )
    if architecture.query_scalar != architecture.head_dim:
        raise UserError(
            f"engine = {engine}: Tunix's layers divide queries by sqrt({architecture.head_dim}), "
            f"but this model by sqrt({architecture.query_scalar:g}); set engine = group"
        )


def tunix_model(model: Model, config: ModelConfig, mesh: Mesh) -> gemma.Gemma:
    """The same variables in Tunix's own layers, adapters applied by Qwix.

    A part of such a model runs without adapters, since Qwix wraps the call of the whole.
    """
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: _tunix_layers(model.config)))
    _, adapters, base = nnx.split(model, nnx.LoRAParam, ...)
    made = nnx.merge(graphdef, base)
    if not jax.tree.leaves(adapters):
        return made
    provider = qwix.LoraProvider(
        module_path=f".*({'|'.join(config.lora_modules)})",
        rank=config.lora_rank,
        alpha=config.lora_alpha,
    )
    # Qwix runs the model once to find its matrices. Tunix's example has two rows, too few for a
    # larger fsdp axis.
    example: dict[str, Any] = {
        name: value if value is None else jnp.repeat(value, mesh.shape["fsdp"], axis=0)
        for name, value in made.get_model_input().items()
    }
    with on_mesh(mesh):
        adapted = qwix.apply_lora_to_model(made, provider, **example, rngs=nnx.Rngs(0))
    assert isinstance(adapted, gemma.Gemma)
    # Copies: an update of the policy donates its own.
    nnx.update(adapted, jax.tree.map(jnp.copy, adapters))
    return adapted


def _tunix_layers(architecture: Architecture) -> gemma.Gemma:
    model, rngs = gemma.Gemma(architecture, rngs=nnx.Rngs(0)), nnx.Rngs(0)
    for module in (model, *model.layers):
        for name, norm in list(vars(module).items()):
            if isinstance(norm, gemma.RMSNorm):
                setattr(module, name, _Float32RMSNorm(architecture.embed_dim, rngs=rngs))
    return model


class TunixEngine:
    """One of Tunix's rollout engines behind the signature `Sample`."""

    def __init__(self, config: Config, policy: Model, tokenizer: Tokenizer, mesh: Mesh) -> None:
        """Builds Tunix's cluster, which picks and opens the engine that the config names."""
        self._rollout = config.rollout
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._settings = _settings(config, tokenizer)
        self.cluster = RLCluster(
            actor=tunix_model(policy, config.model, mesh),
            tokenizer=tokenizer,
            cluster_config=ClusterConfig(
                role_to_mesh={Role.ACTOR: mesh, Role.ROLLOUT: mesh},
                rollout_engine=config.rollout.engine,
                rollout_config=self._settings,
                # The cluster cannot be had without a trainer. Ours has an optimizer of its own.
                training_config=RLTrainingConfig(
                    actor_optimizer=optax.identity(), eval_every_n_steps=1
                ),
            ),
        )
        # Tunix keeps a second copy of all weights on the host for a sync that is never made here.
        self.cluster._anchor_policy_state = None

    def __call__(
        self,
        prompts: Sequence[str],
        group: int,
        key: Key[Array, ""],
        *,
        greedy: bool = False,
        first_row: int = 0,
    ) -> Completions:
        """Completes each prompt `group` times; the engine takes a prompt once per completion."""
        del first_row  # Such an engine draws a whole batch with one key.
        # `RLCluster.generate` hands an engine the same seed at every call; here each call has its
        # own. Tunix's sampler is greedy only if it is given neither top-p nor top-k.
        changes: dict[str, object] = {"temperature": 0.0, "top_p": None, "top_k": None}
        settings = replace(self._settings, seed=key, **(changes if greedy else {}))
        repeated = [prompt for prompt in prompts for _ in range(group)]
        with on_mesh(self._mesh):
            output = self.cluster.rollout.generate(repeated, settings)
        tokens = [self._with_stop(row) for row in output.tokens]
        truncated = is_truncated(tokens, self._tokenizer.stop_ids)
        return Completions(output.text, tokens, truncated, _aligned(output.logprobs, tokens))

    def _with_stop(self, row: Int[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
        """Puts back the stop token that Tunix's engines take off, since it has to be learned."""
        is_cut = len(row) >= self._rollout.max_completion_tokens
        return row if is_cut else np.append(row, self._tokenizer.eos_id()).astype(np.int32)

    def update_weights(self, policy: Model) -> None:
        """Gives the adapters to the engine, which has weights of its own."""
        adapters = nnx.state(policy, nnx.LoRAParam)
        self.cluster.rollout.update_params(adapters, cast(Any, nnx.LoRAParam))


def _aligned(
    logps: Sequence[Float[np.ndarray, " T"]] | None, tokens: Sequence[Int[np.ndarray, " T"]]
) -> list[Float[np.ndarray, " T"]] | None:
    """Log-probabilities of completions with one entry per token; NaN for the stop token put back.

    Vanilla's are those at the sampling temperature before truncation, vLLM's those after it, and
    SGLang-JAX gives none.
    """
    if logps is None:
        return None
    return [
        np.array([*known[: len(ids)], *[np.nan] * (len(ids) - len(known))], np.float32)
        for known, ids in zip(logps, tokens, strict=True)
    ]


def _settings(config: Config, tokenizer: Tokenizer) -> base_rollout.RolloutConfig:
    """Settings of sampling under Tunix's names."""
    rollout = config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_completion_tokens
    return base_rollout.RolloutConfig(
        max_tokens_to_generate=rollout.max_completion_tokens,
        max_prompt_length=rollout.max_prompt_tokens,
        kv_cache_size=rollout.kv_cache_tokens or longest,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k or None,
        eos_tokens=list(tokenizer.stop_ids),
        return_logprobs=True,
        **_engine_settings(config),
    )


def _engine_settings(config: Config) -> dict[str, Any]:
    """Settings that only vLLM or SGLang-JAX has, under Tunix's names."""
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
