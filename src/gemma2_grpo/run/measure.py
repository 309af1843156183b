"""Measuring a model on held-out problems, greedy and sampled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np

from gemma2_grpo.runtime.processes import gather_rows, has_turn
from gemma2_grpo.sampling.rollout import Completions, Sample
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.task.statistics import pass_at_k, wilson_interval
from gemma2_grpo.training.learner import Learner, Scores, Stream, fold_key

OnScored = Callable[[Sequence[str], np.ndarray, Mapping[str, np.ndarray]], None]
"""Takes completions, whether each was cut off, and columns of their scores, aligned with the
examples."""


@dataclass(frozen=True)
class Sampled:
    """Of several sampled completions per problem."""

    samples: int
    pass_at_1: float
    pass_at_k: float
    """With k = samples."""
    format: float
    """Share in perfect format."""
    reward: float | None
    """Mean total reward; None if none could be given."""
    true_equations: float
    """Share of the written equations that hold."""


@dataclass(frozen=True)
class Measurement:
    """Of one model on one set of problems."""

    problems: int
    correct: int
    """Right greedy answers."""
    official_correct: int
    """The same by GSM8K's own extraction."""
    format: float
    """Share of greedy completions in perfect format."""
    true_equations: float
    mean_tokens: float
    truncated: float
    """Share of greedy completions that ran into the limit."""
    reward: float | None
    """Mean total reward of the greedy completions."""
    sampled: Sampled | None = None

    @property
    def accuracy(self) -> float:
        """Greedy pass@1."""
        return self.correct / self.problems

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(self.correct, self.problems)

    def as_record(self) -> dict[str, Any]:
        """All values by name, for a log."""
        low, high = self.interval
        return {**asdict(self), "accuracy": self.accuracy, "interval": [low, high]}


def measure(
    learner: Learner,
    examples: Sequence[Example],
    score: Scores,
    *,
    samples: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
    on_scored: OnScored = lambda texts, cuts, scores: None,
) -> Measurement:
    """Measures the policy on examples; the same examples and seed give the same result.

    Args:
        learner: The policy.
        examples: Held-out problems.
        score: Scores the completions.
        samples: Completions sampled per problem besides the greedy one.
        on_batch: Called with the number of problems that are done.
        on_scored: Called with the greedy completions and their scores.
    """
    done = _complete(learner, examples, 1, score, on_batch, greedy=True)
    table = done.scores
    on_scored(done.texts, done.is_truncated, table)
    return Measurement(
        problems=len(examples),
        correct=int(table["correct"].sum()),
        official_correct=int(table["official_correct"].sum()),
        format=float((table["format"] == 1).mean()),
        true_equations=_share(table["true_equations"], table["equations"]),
        mean_tokens=float(done.tokens.mean()),
        truncated=float(done.is_truncated.mean()),
        reward=_mean(table["total"]),
        sampled=_sampled(learner, examples, score, samples, on_batch) if samples else None,
    )


def _sampled(
    learner: Learner,
    examples: Sequence[Example],
    score: Scores,
    samples: int,
    on_batch: Callable[[int], None],
) -> Sampled:
    table = _complete(learner, examples, samples, score, on_batch, greedy=False).scores
    correct = table["correct"].reshape(-1, samples).sum(axis=1).astype(int).tolist()
    return Sampled(
        samples=samples,
        pass_at_1=pass_at_k(correct, samples, 1),
        pass_at_k=pass_at_k(correct, samples, samples),
        format=float((table["format"] == 1).mean()),
        reward=_mean(table["total"]),
        true_equations=_share(table["true_equations"], table["equations"]),
    )


class _Scored(NamedTuple):
    """Completions in the order of their examples, from all processes."""

    texts: list[str]
    tokens: np.ndarray
    is_truncated: np.ndarray
    scores: Mapping[str, np.ndarray]


def _complete(
    learner: Learner,
    examples: Sequence[Example],
    group: int,
    score: Scores,
    on_batch: Callable[[int], None],
    *,
    greedy: bool,
) -> _Scored:
    """Completes each example `group` times; the processes take batches in turn and score them."""
    rows: list[int] = []
    texts: list[str] = []
    tokens: list[int] = []
    is_truncated: list[bool] = []
    size = _batch_prompts(learner, group)
    for index, start in enumerate(range(0, len(examples), size)):
        kept = min(size, len(examples) - start)
        if has_turn(index):
            seed = learner.config.run.seed
            completions = complete_batch(
                learner.sample, examples, index, size, group, seed, greedy=greedy
            )
            rows += range(start * group, (start + kept) * group)
            texts += completions.texts
            tokens += completions.lengths.tolist()
            is_truncated += completions.is_truncated.tolist()
        on_batch(kept)
    # A user's reward need not cope with no completions at all.
    asked = [examples[row // group] for row in rows]
    scores = score(asked, texts, np.array(is_truncated)) if rows else {}
    done = gather_rows({"row": rows, "text": texts, "tokens": tokens, "cut": is_truncated})
    columns = gather_rows({name: column.tolist() for name, column in scores.items()})
    order = np.argsort(done["row"])
    return _Scored(
        [done["text"][i] for i in order],
        np.array(done["tokens"])[order],
        np.array(done["cut"])[order],
        {name: np.array(column)[order] for name, column in columns.items()},
    )


def complete_batch(
    sample: Sample,
    examples: Sequence[Example],
    index: int,
    size: int,
    group: int,
    seed: int,
    *,
    greedy: bool,
) -> Completions:
    """Completes one batch of examples, the same whichever batches came before.

    Args:
        sample: Completes prompts.
        examples: Of all batches.
        index: Of the batch.
        size: Prompts of a batch; the last one may have fewer examples.
        group: Completions per prompt.
        seed: Seed of sampling.
        greedy: Take the likeliest token.
    """
    start = index * size
    kept = min(size, len(examples) - start) * group
    # A last, short batch is filled up with others, so that one program serves all.
    batch = islice(cycle(examples), start, start + size)
    prompts = [render_prompt(example.question) for example in batch]
    # Greedy decoding draws nothing; sampling draws from a stream that training never sees.
    key = fold_key(seed, Stream.EVAL, group, index)
    return sample(prompts, group, key, greedy=greedy).first(kept)


def _batch_prompts(learner: Learner, group: int) -> int:
    """Prompts at one time: as many completions whether they are greedy or sampled."""
    return max(1, learner.config.run.eval_batch_prompts // group)


def _mean(rewards: np.ndarray) -> float | None:
    """Of those that were given; None if none was."""
    return float(np.nanmean(rewards)) if np.isfinite(rewards).any() else None


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part.sum() / max(whole.sum(), 1))
