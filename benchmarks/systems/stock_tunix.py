"""Stock Tunix: `RLCluster` with its own sampler, and `GRPOLearner`, as its guides set them up."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.session import Scorer, Session
from benchmarks.tokens import SPECIAL_TOKENS

LORA_MODULES = (
    ".*q_einsum|.*kv_einsum|.*qkv_einsum|.*attn_vec_einsum|.*gate_proj|.*up_proj|.*down_proj"
)


def run(session: Session) -> Scorer:
    """Makes the steps of a session."""
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner

    session.compiles.watch()
    session.imported()
    cluster, tokenizer = _build(session)
    _force_lengths(session, cluster)
    cluster.generate = session.measured("rollout", cluster.generate)
    for name in ("get_ref_per_token_logps", "get_old_per_token_logps"):
        setattr(cluster, name, session.measured("reference", getattr(cluster, name)))
    cluster.update_actor = session.measured("update", cluster.update_actor)
    sizes = session.workload.sizes

    def reward(completions: list[str], **_: Any) -> list[float]:
        assert len(completions) == sizes.rows
        return list(session.batch.rewards)

    learner = GRPOLearner(
        rl_cluster=cluster,
        reward_fns=reward,
        algo_config=GRPOConfig(
            num_generations=sizes.generations,
            num_iterations=sizes.iterations,
            beta=sizes.beta,
            epsilon=sizes.epsilon,
            kl_loss_mode="low_var_kl",  # The estimator of the others; it costs the same.
        ),
    )
    # Its loop asks for a batch when the step before is over, so the data set sets the pace.
    learner.train({"prompts": np.array(batch.prompts)} for batch in session.steps())
    return partial(_score, cluster, tokenizer, sizes.max_prompt_tokens)


def _build(session: Session) -> Any:
    """The cluster, and its tokenizer."""
    import optax
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    from gemma2_grpo.model.tokenizer import load_tokenizer

    sizes = session.workload.sizes
    mesh, reference, actor = _models(session)
    tokenizer = load_tokenizer(session.workload.directory)
    cluster = RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=tokenizer,
        cluster_config=ClusterConfig(
            role_to_mesh={Role.ACTOR: mesh, Role.REFERENCE: mesh, Role.ROLLOUT: mesh},
            rollout_engine="vanilla",
            training_config=RLTrainingConfig(
                actor_optimizer=optax.adamw(sizes.learning_rate),
                eval_every_n_steps=10**9,
                max_steps=10**9,
                mini_batch_size=sizes.prompts,
                train_micro_batch_size=1,
                rollout_micro_batch_size=sizes.prompts,
                compute_logps_micro_batch_size=1,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=sizes.max_completion_tokens,
                max_prompt_length=sizes.max_prompt_tokens,
                kv_cache_size=sizes.max_prompt_tokens + sizes.max_completion_tokens,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                eos_tokens=[sizes.vocab],  # No id of the model: nothing ends a row early.
            ),
        ),
    )
    return cluster, tokenizer


def _models(session: Session) -> Any:
    """The mesh, the base model and the base with adapters."""
    import jax
    import qwix
    from flax import nnx
    from tunix.models.gemma import params_safetensors

    from gemma2_grpo.model.architecture import read_architecture
    from gemma2_grpo.model.mesh import make_mesh

    sizes, directory = session.workload.sizes, session.workload.directory
    mesh = make_mesh(sizes.mesh)
    base = params_safetensors.create_model_from_safe_tensors(
        str(directory), read_architecture(directory), mesh, jax.numpy.dtype(sizes.dtype)
    )
    provider = qwix.LoraProvider(
        module_path=LORA_MODULES, rank=sizes.lora_rank, alpha=float(sizes.lora_rank)
    )
    policy = qwix.apply_lora_to_model(base, provider, **base.get_model_input(), rngs=nnx.Rngs(0))
    with mesh:
        state = nnx.state(policy)
        placed = jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state))
        nnx.update(policy, placed)
    return mesh, base, policy


def _force_lengths(session: Session, cluster: Any) -> None:
    """Makes completions as long as the batch says.

    The stock sampler decodes until its slowest row has ended. Its loop also ends at a step limit,
    which is a value and not a shape: set to the longest forced length, the loop ends at the very
    step at which it would with an end token there, without compiling again. Rows that should be
    shorter have then cost what finished rows cost the sampler, and are cut on the host, where it
    would have cut them too.
    """
    sampler = cluster.rollout._sampler
    start, generate = sampler.init_sample_state, cluster.generate
    width = session.workload.sizes.max_prompt_tokens

    def limited(*args: Any, **kwargs: Any) -> Any:
        # The prefill draws the first token, and each pass of the loop one more.
        last = width + max(session.batch.limits) - 1
        return start(*args, **kwargs).replace(total_sampling_steps=last)

    def cut(*args: Any, **kwargs: Any) -> Any:
        output = generate(*args, **kwargs)
        output.tokens = [
            _ordinary(row[:limit])
            for row, limit in zip(output.tokens, session.batch.limits, strict=True)
        ]
        session.completion_tokens = sum(len(row) for row in output.tokens)
        return output

    sampler.init_sample_state = limited
    cluster.generate = cut


def _ordinary(row: np.ndarray) -> np.ndarray:
    """Replaces special tokens, which random weights may draw and masks would stop at."""
    return np.where(row < len(SPECIAL_TOKENS), len(SPECIAL_TOKENS), row)


def _score(cluster: Any, tokenizer: Any, width: int, prompt: str, ids: Any) -> Sequence[float]:
    import jax.numpy as jnp

    prompt_ids = tokenizer.encode(prompt)
    padded = [tokenizer.pad_id()] * (width - len(prompt_ids)) + prompt_ids
    score: Callable[..., Any] = cluster.get_ref_per_token_logps
    logps = score(
        jnp.array([padded]), jnp.array([list(ids)]), tokenizer.pad_id(), tokenizer.eos_id()
    )
    return logps[0].tolist()
