"""Packing the completions of a batch into micro-batches with as little padding as possible."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from gemma2_grpo.config import Config
from gemma2_grpo.model.tokenizer import LEAST_TOKENS, bucket, pad_right

# Room in a row for so many of the longest completions: more leave less of it empty, at the price
# of attention masks that are mostly false.
_LONGEST_PER_ROW = 2


# NumPy arrays on the host, JAX arrays on the devices.
_Array = Any
_Ids = Int[_Array, "R W"]
_Values = Float[_Array, "R W"]


class MicroBatch(NamedTuple):
    """R rows of W tokens; a row holds completions of one prompt, one after the other.

    A completion of T tokens takes T places: the last token of its prompt and all of its own but
    the last are run, and each of its own is predicted.
    """

    inputs: _Ids
    """Token ids that are run."""
    targets: _Ids
    """Token ids that they predict."""
    positions: _Ids
    """Position of each input, counted from the start of its prompt."""
    segment_ids: _Ids
    """Completion that each token belongs to, or -1 for padding, which comes last."""
    prompts: Int[_Array, " R"]
    """Index of each row's prompt."""
    rollout_logps: _Values
    """Log-probability with which each target was drawn; NaN where that is not known."""
    places: _Ids | None = None
    """Place in its row of each input whose target is predicted, -1 for padding [R, K]; then
    `targets` and `rollout_logps` are [R, K] too. None: every input predicts its target."""

    @property
    def target_ids(self) -> _Ids:
        """Completion that each target belongs to, or -1 for padding; on the host."""
        if self.places is None:
            return self.segment_ids
        found = np.take_along_axis(self.segment_ids, np.maximum(self.places, 0), axis=1)
        return np.where(self.places < 0, -1, found)


class PromptBatch(NamedTuple):
    """Prompts and the micro-batches of their completions."""

    prompts: Int[_Array, "B P"]
    """Token ids without the last of each prompt, right-padded."""
    lengths: Int[_Array, " B"]
    """Tokens of each prompt that are not padding."""
    micro: list[MicroBatch]


class Credit(NamedTuple):
    """Advantage and loss weight of each token of a micro-batch."""

    advantages: _Values
    weights: _Values
    """Weight in the loss of the whole batch, 0 for padding and for what does not count."""


def assign_credit(
    micro: MicroBatch, advantages: Float[np.ndarray, " N"], weights: Float[np.ndarray, " N"]
) -> Credit:
    """Gives each token of a micro-batch on the host the advantage and weight of its completion."""
    ids = micro.target_ids

    def spread(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, "R W"]:
        return np.where(ids >= 0, values[ids], 0.0).astype(np.float32)

    return Credit(spread(advantages), spread(weights))


def pack_rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Indices of sequences, packed into rows that hold at most so many tokens.

    Longest first, each into the first row with room: at most 11/9 of the fewest rows and, rarely,
    a few more (first-fit decreasing; Johnson 1973).
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (row for row, left in enumerate(room) if left >= lengths[index])
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


@dataclass(frozen=True)
class Shapes:
    """Sizes of micro-batches. The last of a kind may be a half, a quarter, ... of the full size."""

    prompts: int
    """Prompts that are run at one time."""
    prompt_tokens: int
    """Length to which prompts are padded."""
    rows: int
    """Rows of completions that are run at one time."""
    row_tokens: int
    """Tokens of a row; no completion may be longer."""
    least_rows: int
    """Rows of the smallest micro-batch; divides `rows`."""


def choose_shapes(
    config: Config, prompts: int, prompt_tokens: int, completion_tokens: int
) -> Shapes:
    """Sizes of the micro-batches of a batch: as large as the token budget and its groups allow.

    The numbers of tokens are those of the longest prompt and the longest completion.
    """
    rollout, budget = config.rollout, config.grpo.micro_batch_tokens
    fsdp = config.model.mesh_shape[0]
    width = bucket(prompt_tokens, LEAST_TOKENS, rollout.max_prompt_tokens)
    longest = bucket(completion_tokens, LEAST_TOKENS, rollout.max_completion_tokens)
    # fsdp shards the rows, so each of its devices must get one within the budget.
    row_tokens = min(_LONGEST_PER_ROW * longest, budget // fsdp)
    together = min(prompts, budget // width)
    rows_of_group = math.ceil(rollout.num_generations / (row_tokens // longest))
    rows, least_rows = row_shapes(config, row_tokens, together * rows_of_group)
    return Shapes(together, width, rows, row_tokens, least_rows)


def row_shapes(config: Config, row_tokens: int, needed: int) -> tuple[int, int]:
    """Rows of a micro-batch, and of the smallest one, where a batch has so many in all.

    As many as the token budget allows, and at least one for each device of the fsdp axis.
    """
    fsdp = config.model.mesh_shape[0]
    fits = max(1, config.grpo.micro_batch_tokens // row_tokens // fsdp)
    # Whole or half micro-batches: every size is compiled.
    half = max(1, min(fits, math.ceil(needed / fsdp) + 1) // 2)
    return min(2 * half, fits) * fsdp, half * fsdp


def prompt_batches(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Int[np.ndarray, " T"]],
    chosen: Sequence[bool],
    shapes: Shapes,
    pad_id: int,
    logps: Sequence[Float[np.ndarray, " T"]] | None = None,
) -> list[PromptBatch]:
    """Packs completions into micro-batches of few shapes, with the prompts that they follow.

    The completions of a prompt are neighbours. Prompts that are not `chosen` are left out.
    """
    if logps is None:
        logps = [np.full(len(ids), np.nan) for ids in completions]
    wanted = [i for i, is_chosen in enumerate(chosen) if is_chosen]
    group = len(completions) // len(prompts)
    batches = []
    for start in range(0, len(wanted), shapes.prompts):
        part = wanted[start : start + shapes.prompts]
        # A short last batch is filled up with empty prompts: only a few sizes are compiled.
        size = bucket(len(part), 1, shapes.prompts)
        # The last token of a prompt predicts the first of each completion, so it is run in the
        # rows; what all completions of a prompt share ends before it.
        ids = [prompts[i][:-1] for i in part] + [[]] * (size - len(part))
        packed = [
            (i, [number + prompt * group for number in row])
            for i, prompt in enumerate(part)
            for row in pack_rows(
                [len(ids) for ids in completions[prompt * group : (prompt + 1) * group]],
                shapes.row_tokens,
            )
        ]
        lasts = [(len(prompts[i]) - 1, prompts[i][-1]) for i in part]
        batches.append(
            PromptBatch(
                pad_right(ids, shapes.prompt_tokens, pad_id),
                np.array([len(row) for row in ids], np.int32),
                [
                    _micro_batch(
                        packed[at : at + shapes.rows], lasts, completions, shapes, pad_id, logps
                    )
                    for at in range(0, len(packed), shapes.rows)
                ],
            )
        )
    return batches


def _micro_batch(
    packed: Sequence[tuple[int, list[int]]],
    lasts: Sequence[tuple[int, int]],
    completions: Sequence[Int[np.ndarray, " T"]],
    shapes: Shapes,
    pad_id: int,
    logps: Sequence[Float[np.ndarray, " T"]],
) -> MicroBatch:
    """One micro-batch of rows, each with its prompt and the completions it holds.

    `lasts` has position and id of the last token of each prompt.
    """
    shape = (bucket(len(packed), shapes.least_rows, shapes.rows), shapes.row_tokens)
    inputs, targets = (np.full(shape, pad_id, np.int32) for _ in range(2))
    positions, segment_ids = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    prompts = np.zeros(shape[0], np.int32)
    rollout_logps = np.full(shape, np.nan, np.float32)
    for row, (prompt, numbers) in enumerate(packed):
        prompts[row] = prompt
        position, token = lasts[prompt]
        start = 0
        for number in numbers:
            ids = completions[number]
            place = row, slice(start, start + len(ids))
            # Shifted by one: every token of the completion is predicted, its last is not run.
            inputs[place] = [token, *ids[:-1]]
            targets[place] = ids
            # From the start of the prompt, whatever precedes the completion in its row: RoPE and
            # the sliding window see each completion as if it were alone.
            positions[place] = position + np.arange(len(ids))
            segment_ids[place] = number
            rollout_logps[place] = logps[number]
            start += len(ids)
    return MicroBatch(inputs, targets, positions, segment_ids, prompts, rollout_logps)
