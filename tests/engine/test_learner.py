from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tunix.models.gemma import model as gemma

from gemma2_grpo.config import Config
from gemma2_grpo.engine.checkpoint import restore_checkpoint, save_checkpoint
from gemma2_grpo.engine.learner import Learner, Stream, fold_key
from gemma2_grpo.engine.lora import add_lora
from gemma2_grpo.engine.tokenizer import Tokenizer
from gemma2_grpo.task.data import Example


def by_length(_: Sequence[Example], texts: Sequence[str]) -> Mapping[str, np.ndarray]:
    return {"total": np.array([len(text) % 7 for text in texts], np.float64)}


def test_keys_are_a_function_of_seed_stream_and_step() -> None:
    def data(*arguments: int, stream: Stream = Stream.TRAIN) -> bytes:
        seed, *counters = arguments
        return np.asarray(jax.random.key_data(fold_key(seed, stream, *counters))).tobytes()

    assert data(0, 1) == data(0, 1)
    different = {data(0, 1), data(0, 2), data(1, 1), data(0, 1, stream=Stream.EVAL), data(0, 1, 0)}
    assert len(different) == 5


def test_a_run_resumes_on_several_devices(
    wide_base: gemma.Gemma,
    wide_mesh: Mesh,
    tokenizer: Tokenizer,
    config: Config,
    examples: list[Example],
    tmp_path: Path,
) -> None:
    """The optimizer's counters begin on one device; restored there, they fit no update."""

    def learner() -> Learner:
        policy = add_lora(wide_base, config.model, wide_mesh, 0)
        return Learner(config, policy, wide_base, tokenizer, wide_mesh)

    batch = examples[: config.rollout.prompts_per_step]
    straight = learner()
    straight.step(0, batch, by_length)
    save_checkpoint(tmp_path, 1, straight.state(), keep=1)
    straight.step(1, batch, by_length)

    resumed = learner()
    leaves = jax.tree.leaves(resumed.state())
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in leaves)
    restored = restore_checkpoint(tmp_path, resumed.state())
    assert restored is not None
    assert restored[0] == 1
    resumed.set_state(restored[1])
    resumed.step(1, batch, by_length)
    for one, other in zip(
        jax.tree.leaves(straight.state()), jax.tree.leaves(resumed.state()), strict=True
    ):
        np.testing.assert_array_equal(one, other)
