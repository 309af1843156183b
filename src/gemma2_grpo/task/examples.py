"""Problems for training and measuring: seeded selections of a source, and their batches."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from gemma2_grpo.config import DataConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.task.procedural import Split
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.task.rows import Example
from gemma2_grpo.task.sources import SPLITS, Pools, read_source


@dataclass(frozen=True)
class Splits:
    """The selected problems; no question is in two splits unless the source repeats it there."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]
    validation: tuple[Example, ...]
    source: str
    """The `dataset` of the configuration."""
    sha256: str
    """Hash of all selected problems in order."""


def load_splits(config: DataConfig) -> Splits:
    """Selects the problems of a run, the same ones for the same data and `data_seed`.

    Test problems come from the source's own test split. Validation problems come from its
    training problems that were not selected, as many as `num_test_samples` where there are so
    many left.

    Raises:
        UserError: for a source that cannot be read, or that has fewer problems than are asked for.
    """
    chosen = _select(config)
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(json.dumps([split, *map(astuple, chosen[split])]).encode())
    return Splits(**chosen, source=config.dataset, sha256=digest.hexdigest())


def load_held_out(config: DataConfig, limit: int | None = None) -> tuple[Example, ...]:
    """Problems of `eval_split` in the order in which `load_splits` selects them.

    Args:
        config: Names the source, the split and the seed of the order.
        limit: Number of problems; by default the whole official test split. Procedural problems
            have no end and validation problems are what training has left: of these,
            `num_test_samples`.

    Raises:
        UserError: for a source that cannot be read, or that has fewer problems than are asked for.
    """
    split = config.eval_split
    pools = _read_pools(config, limit or config.num_test_samples)
    pool, default = pools["test"], len(pools["test"])
    if split == "validation":
        pool = _left_for_validation(pools, pools["train"][: config.num_train_samples])
        default = min(config.num_test_samples, len(pool))
    if not pool:
        raise UserError(f"{config.dataset}: no {split} problems in it; choose another split")
    return _take(pool, limit or default, "num_test_samples", config)


def hash_of(examples: Sequence[Example]) -> str:
    """SHA-256 of problems in order."""
    return hashlib.sha256(json.dumps([*map(astuple, examples)]).encode()).hexdigest()


def drop_long(
    examples: Sequence[Example],
    count_tokens: Callable[[str], int],
    max_prompt_tokens: int,
    at_least: int = 1,
) -> tuple[tuple[Example, ...], int]:
    """Drops the examples whose rendered prompt is too long, and counts them.

    Raises:
        UserError: if fewer than `at_least` examples are left.
    """
    kept = tuple(
        example
        for example in examples
        if count_tokens(render_prompt(example.question)) <= max_prompt_tokens
    )
    if len(kept) < at_least:
        raise UserError(
            f"max_prompt_tokens = {max_prompt_tokens} leaves {len(kept)} of {len(examples)} "
            f"problems where {at_least} are needed; raise it"
        )
    return kept, len(examples) - len(kept)


def batch_indices(num_examples: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The examples of one step: [batch] int64 indices, a pure function of its arguments.

    Epochs are seeded permutations laid end to end, so that a batch may straddle two. Even then
    it holds no example twice, unless there are fewer examples than the batch has places.
    """
    start, stop = step * batch, (step + 1) * batch
    first = start // num_examples
    orders = []
    order = np.empty(0, dtype=np.int64)
    # From the beginning, because what a straddling batch has used changes the next order.
    for epoch in range((stop - 1) // num_examples + 1):
        previous, order = order, np.random.default_rng([seed, epoch]).permutation(num_examples)
        used = epoch * num_examples % batch
        if used and num_examples >= batch:
            order = _move_fresh_first(order, previous[-used:], batch - used)
        if epoch >= first:
            orders.append(order)
    stream = np.concatenate(orders)
    return stream[start - first * num_examples : stop - first * num_examples]


def _move_fresh_first(order: np.ndarray, used: np.ndarray, count: int) -> np.ndarray:
    """Moves the first `count` examples that are not among the used ones to the front."""
    front = np.flatnonzero(~np.isin(order, used))[:count]
    return np.concatenate([order[front], np.delete(order, front)])


def _select(config: DataConfig) -> dict[Split, tuple[Example, ...]]:
    pools = _read_pools(config, config.num_test_samples)
    train = _take(pools["train"], config.num_train_samples, "num_train_samples", config)
    test = _take(pools["test"], config.num_test_samples, "num_test_samples", config)
    validation = tuple(_left_for_validation(pools, train)[: config.num_test_samples])
    if config.eval_split == "validation" and len(validation) < config.num_test_samples:
        raise UserError(
            f"eval_split = validation: {config.dataset} has {len(validation)} problems besides "
            f"those of train and test, but num_test_samples = {config.num_test_samples}; lower "
            "num_train_samples or num_test_samples"
        )
    return {"train": train, "test": test, "validation": validation}


def _read_pools(config: DataConfig, held_out: int) -> Pools:
    counts: dict[Split, int] = {
        "train": config.num_train_samples,
        "test": held_out,
        "validation": held_out,
    }
    return read_source(config.dataset, counts, config.data_seed)


def _left_for_validation(pools: Pools, train: Sequence[Example]) -> list[Example]:
    """The source's own validation problems, or those for training that were not selected."""
    selected = {example.question for example in train}
    return pools["validation"] or [e for e in pools["train"] if e.question not in selected]


def _take(pool: list[Example], count: int, field: str, config: DataConfig) -> tuple[Example, ...]:
    if count > len(pool):
        raise UserError(
            f"{field} = {count} is more than the {len(pool)} problems of that split in "
            f"{config.dataset}; lower it"
        )
    return tuple(pool[:count])
