"""Supervised fine-tuning (SFT): the learner's step on solutions in place of completions."""

from collections.abc import Sequence
from itertools import takewhile

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from gemma2_grpo.config import Config
from gemma2_grpo.model.tokenizer import LEAST_TOKENS, Tokenizer, bucket
from gemma2_grpo.sampling.rollout import Completions
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.training.learner import Learner, Packed
from gemma2_grpo.training.loss import Advantages
from gemma2_grpo.training.packing import MicroBatch, Shapes, prompt_batches, row_shapes


class SupervisedLearner(Learner):
    """Raises the likelihood of worked solutions; the loss is on their tokens alone.

    What all prompts of a batch begin with, the instruction, is run once for all of them. Questions
    with their solutions follow it as completions follow their prompt, several in a row.
    """

    def rollout(self, step: int, batch: Sequence[Example], first_row: int) -> Completions:
        """The worked solution of each example, with the token that ends the turn."""
        del step, first_row
        return solutions_of(batch, self.tokenizer)

    def advantages(self, step: int, rewards: Float[np.ndarray, " N"]) -> Advantages:
        """Every solution counts, whatever its reward."""
        del step
        ones = np.ones((len(rewards), 1))
        return Advantages(ones.astype(np.float32), ones > 0, np.zeros(len(rewards), bool))

    def pack(
        self,
        prompts: Sequence[str],
        completions: Completions,
        chosen: Bool[np.ndarray, " B"] | None = None,
    ) -> Packed:
        """Packs questions with their solutions into rows after what all prompts begin with."""
        del chosen  # All of them.
        ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        # At least the last token of a prompt is run in its row, where it predicts the solution.
        shared = _shared_prefix([row[:-1] for row in ids])
        rests = [
            np.array([*prompt[len(shared) :], *solution], np.int32)
            for prompt, solution in zip(ids, completions.tokens, strict=True)
        ]
        shapes = solution_shapes(self.config, len(shared), [len(row) for row in rests])
        (batch,) = prompt_batches([shared], rests, [True], shapes, self.tokenizer.pad)
        starts = np.array([len(prompt) for prompt in ids])
        micro = [only_solutions(each, starts, self.tokenizer.pad) for each in batch.micro]
        batch = batch._replace(micro=micro)
        return Packed([batch], [self.updater.place(batch)], None)

    def solution_nll(self, examples: Sequence[Example]) -> float | None:
        """Mean negative log-likelihood of a token of the examples' solutions, in nats.

        None if none of them has a solution. All processes compute the same.
        """
        solved = [example for example in examples if example.solution]
        size = self.config.rollout.prompts_per_step
        total, tokens = 0.0, 0
        for start in range(0, len(solved), size):
            part = solved[start : start + size]
            prompts = [render_prompt(example.question) for example in part]
            packed = self.pack(prompts, solutions_of(part, self.tokenizer))
            found = jax.device_get(self.updater.policy_logps(packed.on_device))
            for batch, rows in zip(packed.on_host, found, strict=True):
                for micro, logps in zip(batch.micro, rows, strict=True):
                    is_target = micro.target_ids >= 0
                    total -= float(logps[is_target].sum(dtype=np.float64))
                    tokens += int(is_target.sum())
        return total / tokens if tokens else None


def solutions_of(examples: Sequence[Example], tokenizer: Tokenizer) -> Completions:
    """The examples' worked solutions as completions that end their turn."""
    tokens = [
        np.array([*tokenizer.encode(example.solution), tokenizer.eos_id()], np.int32)
        for example in examples
    ]
    texts = [example.solution for example in examples]
    return Completions(texts, tokens, np.zeros(len(texts), bool))


def _shared_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """What all rows begin with."""
    columns = zip(*rows, strict=False)  # As far as the shortest row goes.
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def solution_shapes(config: Config, shared: int, lengths: Sequence[int]) -> Shapes:
    """Sizes of the micro-batches: rows for two of the longest sequences, within the token budget.

    Args:
        config: Token budget, limits and mesh.
        shared: Tokens that all prompts begin with.
        lengths: Tokens of each prompt without these, and its solution.
    """
    rollout, fsdp = config.rollout, config.model.mesh_shape[0]
    limit = rollout.max_prompt_tokens + rollout.max_completion_tokens
    longest = bucket(max(lengths), LEAST_TOKENS, limit)
    row_tokens = max(longest, min(2 * longest, config.grpo.micro_batch_tokens // fsdp))
    rows, least_rows = row_shapes(config, row_tokens, -(-sum(lengths) // row_tokens))
    width = bucket(max(shared, 1), LEAST_TOKENS, rollout.max_prompt_tokens)
    return Shapes(1, width, rows, row_tokens, least_rows)


def only_solutions(micro: MicroBatch, starts: Int[np.ndarray, " N"], pad_id: int) -> MicroBatch:
    """Leaves only the targets that belong to solutions, at the front of each row.

    `starts` are the positions at which the solutions begin, the lengths of their prompts.
    """
    is_target = (micro.segment_ids >= 0) & (micro.positions + 1 >= starts[micro.segment_ids])
    width = micro.inputs.shape[1]
    most = bucket(max(int(is_target.sum(axis=1).max()), 1), LEAST_TOKENS, width)
    places = np.full((len(micro.inputs), most), -1, np.int32)
    for row, own in enumerate(is_target):
        found = np.flatnonzero(own)
        places[row, : len(found)] = found
    taken = np.maximum(places, 0)
    targets = np.where(places < 0, pad_id, np.take_along_axis(micro.targets, taken, axis=1))
    unknown = np.full(places.shape, np.nan, np.float32)
    return micro._replace(targets=targets, rollout_logps=unknown, places=places)
