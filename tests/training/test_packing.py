"""Every completion is trained on once, after its own prompt, whatever it shares a row with."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from gemma2_grpo.model.tokenizer import bucket, pad_right
from gemma2_grpo.presets import load_config
from gemma2_grpo.training.packing import (
    MicroBatch,
    PromptBatch,
    Shapes,
    assign_credit,
    choose_shapes,
    pack_rows,
    prompt_batches,
)

PAD = 0
NAN = np.nan
SHAPES = Shapes(prompts=2, prompt_tokens=6, rows=4, row_tokens=8, least_rows=1)


class TestBucket:
    @pytest.mark.parametrize(
        ("size", "smallest", "limit", "width"),
        [
            (1, 64, 768, 64),
            (64, 64, 768, 64),
            (65, 64, 768, 128),
            (300, 64, 768, 512),
            (513, 64, 768, 768),  # The limit need not be a power of two of the smallest.
            (768, 64, 768, 768),
            (5, 64, 12, 12),  # A limit below the smallest is the only width.
            (0, 2, 8, 2),
            (3, 2, 6, 4),
            (5, 2, 6, 6),
        ],
    )
    def test_by_hand(self, size: int, smallest: int, limit: int, width: int) -> None:
        assert bucket(size, smallest, limit) == width

    def test_what_the_limit_does_not_hold_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^769 is more than the limit of 768$"):
            bucket(769, 64, 768)


class TestRows:
    def test_first_fit_decreasing_by_hand(self) -> None:
        # In falling order 7, 6, 5, 3, 2, 2, 1 (equal ones in their order): 7 alone, 6, 5 + 3,
        # 6 + 2, the next 2 opens a row, 7 + 1.
        rows = pack_rows([2, 7, 3, 6, 1, 2, 5], 8)
        assert rows == [[1, 4], [3, 0], [6, 2], [5]]

    def test_rows_of_nothing(self) -> None:
        assert pack_rows([], 8) == []
        assert pack_rows([8, 8], 8) == [[0], [1]]
        assert pack_rows([1] * 17, 8) == [[*range(8)], [*range(8, 16)], [16]]

    @pytest.mark.parametrize("seed", range(20))
    def test_random_lengths(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        width = int(random.integers(1, 60))
        lengths = random.integers(1, width + 1, random.integers(1, 40)).tolist()
        rows = pack_rows(lengths, width)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        sums = [sum(lengths[index] for index in row) for row in rows]
        assert max(sums) <= width
        # No row could have been left out: what begins a row fitted into none before it.
        for later in range(1, len(rows)):
            assert all(total + lengths[rows[later][0]] > width for total in sums[:later])


class TestPadding:
    def test_by_hand(self) -> None:
        assert pad_right([[5], [], [6, 7, 8]], 3, 9).tolist() == [[5, 9, 9], [9, 9, 9], [6, 7, 8]]

    def test_a_prompt_is_never_cut(self) -> None:
        with pytest.raises(ValueError, match=r"^prompt of 4 tokens exceeds max_prompt_tokens = 3$"):
            pad_right([[1, 2, 3, 4]], 3, 0)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_batch_by_hand() -> None:
    prompts = [[2, 11, 12], [2, 21]]
    completions = [ints(31, 32, 33, 34, 35), ints(41, 42), ints(51), ints(61, 62, 63, 64)]
    (batch,) = prompt_batches(prompts, completions, [True, True], SHAPES, PAD)
    # The last token of a prompt is run with each completion, not with the prompt.
    assert batch.prompts.tolist() == [[2, 11, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]]
    assert batch.lengths.tolist() == [2, 1]
    (micro,) = batch.micro
    assert micro.prompts.tolist() == [0, 1]
    assert micro.inputs.tolist() == [
        [12, 31, 32, 33, 34, 12, 41, 0],
        [21, 61, 62, 63, 21, 0, 0, 0],
    ]
    assert micro.targets.tolist() == [
        [31, 32, 33, 34, 35, 41, 42, 0],
        [61, 62, 63, 64, 51, 0, 0, 0],
    ]
    assert micro.positions.tolist() == [[2, 3, 4, 5, 6, 2, 3, 0], [1, 2, 3, 4, 1, 0, 0, 0]]
    assert micro.segment_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, -1], [3, 3, 3, 3, 2, -1, -1, -1]]


def test_log_probabilities_and_credit_are_laid_out_as_the_tokens() -> None:
    completions = [ints(31, 32, 33, 34, 35), ints(41, 42), ints(51), ints(61, 62, 63, 64)]
    # A token's log-probability is its negative number; the last completion's first is not known.
    logps = [-row.astype(np.float32) for row in completions]
    logps[3][0] = np.nan
    (batch,) = prompt_batches([[2, 11, 12], [2, 21]], completions, [True, True], SHAPES, PAD, logps)
    (micro,) = batch.micro
    expected = [[-31, -32, -33, -34, -35, -41, -42, NAN], [NAN, -62, -63, -64, -51, NAN, NAN, NAN]]
    np.testing.assert_array_equal(micro.rollout_logps, expected)

    credit = assign_credit(micro, np.array([1.0, -1, 0.5, 2]), np.array([0.1, 0.2, 0.0, 0.4]))
    advantages = [[1, 1, 1, 1, 1, -1, -1, 0], [2, 2, 2, 2, 0.5, 0, 0, 0]]
    weights = [[0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0], [0.4, 0.4, 0.4, 0.4, 0, 0, 0, 0]]
    np.testing.assert_array_equal(credit.advantages, np.float32(advantages))
    np.testing.assert_array_equal(credit.weights, np.float32(weights))


def read_back(
    batches: Sequence[PromptBatch], prompts: Sequence[list[int]]
) -> dict[int, tuple[int, list[int]]]:
    """Of each completion its prompt, found by its tokens, and its tokens; checks the rest."""
    found: dict[int, tuple[int, list[int]]] = {}
    for batch in batches:
        for micro in batch.micro:
            *fields, rollout_logps, places = micro
            assert places is None
            assert {field.dtype for field in fields} == {np.dtype("int32")}
            assert np.isnan(rollout_logps).all()
            for row in range(len(micro.inputs)):
                _read_row(batch, micro, row, prompts, found)
    return found


def _read_row(
    batch: PromptBatch,
    micro: MicroBatch,
    row: int,
    prompts: Sequence[list[int]],
    found: dict[int, tuple[int, list[int]]],
) -> None:
    at = micro.prompts[row]
    start = batch.prompts[at, : batch.lengths[at]].tolist()
    assert (batch.prompts[at, batch.lengths[at] :] == PAD).all()
    owners = micro.segment_ids[row]
    real = int((owners >= 0).sum())
    assert (owners[:real] >= 0).all(), "padding comes last"
    assert (micro.inputs[row, real:] == PAD).all() and (micro.targets[row, real:] == PAD).all()
    for owner in np.unique(owners[:real]):
        (slots,) = np.nonzero(owners == owner)
        assert slots.tolist() == list(range(slots[0], slots[-1] + 1)), "whole and in one piece"
        tokens = micro.targets[row, slots].tolist()
        prompt = [*start, int(micro.inputs[row, slots[0]])]
        assert micro.inputs[row, slots[1:]].tolist() == tokens[:-1]
        first = len(prompt) - 1
        assert micro.positions[row, slots].tolist() == list(range(first, first + len(slots)))
        assert owner not in found, "no completion comes twice"
        found[int(owner)] = (prompts.index(prompt), tokens)


@pytest.mark.parametrize("seed", range(40))
def test_random_batches(seed: int) -> None:
    random = np.random.default_rng(seed)
    group, count = int(random.integers(1, 7)), int(random.integers(1, 9))
    least = int(random.choice([1, 2, 4]))
    shapes = Shapes(
        prompts=int(random.integers(1, 5)),
        prompt_tokens=9,
        rows=least * int(random.integers(1, 6)),
        row_tokens=int(random.integers(3, 20)),
        least_rows=least,
    )
    # Prompts differ from the first token on; one may be nothing but its last.
    prompts = [
        [100 + i, *random.integers(1, 90, random.integers(0, 9)).tolist()] for i in range(count)
    ]
    completions = [
        random.integers(1, 90, random.integers(1, shapes.row_tokens + 1)).astype(np.int32)
        for _ in range(count * group)
    ]
    chosen = (random.random(count) < 0.7).tolist()
    batches = prompt_batches(prompts, completions, chosen, shapes, PAD)

    found = read_back(batches, prompts)
    expected = {i for i in range(count * group) if chosen[i // group]}
    assert found.keys() == expected
    for owner, (prompt, tokens) in found.items():
        assert prompt == owner // group
        assert tokens == completions[owner].tolist()

    sizes = {shapes.prompts} | {2**i for i in range(4) if 2**i < shapes.prompts}
    heights = {shapes.rows} | {least * 2**i for i in range(4) if least * 2**i < shapes.rows}
    assert {batch.prompts.shape[1] for batch in batches} <= {shapes.prompt_tokens}
    assert {len(batch.prompts) for batch in batches} <= sizes
    micros = [micro for batch in batches for micro in batch.micro]
    assert {micro.inputs.shape[1] for micro in micros} <= {shapes.row_tokens}
    assert {len(micro.inputs) for micro in micros} <= heights
    assert all(len(micro.inputs) % least == 0 for micro in micros)
    # All but the last of a kind are full.
    assert all(len(batch.prompts) == shapes.prompts for batch in batches[:-1])
    for batch in batches:
        assert all(len(micro.inputs) == shapes.rows for micro in batch.micro[:-1])


def test_nothing_chosen_is_no_batch() -> None:
    assert prompt_batches([[2, 3]], [ints(5), ints(6)], [False], SHAPES, PAD) == []


def test_rows_that_stand_for_nobody_have_no_owner() -> None:
    """A mesh wants at least so many rows, and three rows are filled up to four."""
    shapes = dataclasses.replace(SHAPES, rows=8, least_rows=4)
    completions = [np.full(8, i + 1, np.int32) for i in range(3)]
    (batch,) = prompt_batches([[2, 3]], completions, [True], shapes, PAD)
    (micro,) = batch.micro
    assert micro.segment_ids.tolist() == [[0] * 8, [1] * 8, [2] * 8, [-1] * 8]
    assert micro.prompts.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("group", "mesh", "batch", "expected"),
    [
        # A group of 16 at full length is one whole micro-batch; fewer rows are half of one.
        (16, (2, 4), (8, 200, 768), Shapes(8, 256, 8, 1536, 4)),
        # Half as long, more rows.
        (16, (2, 4), (8, 100, 300), Shapes(8, 128, 12, 1024, 6)),
        (16, (8, 1), (8, 200, 768), Shapes(8, 256, 8, 1536, 8)),
        # Short completions are not padded to the budget: 2 x 4 of them fill at most 4 rows.
        (4, (2, 4), (2, 150, 24), Shapes(2, 256, 4, 128, 2)),
        (5, (1, 1), (1, 9, 60), Shapes(1, 64, 4, 128, 2)),
        (2, (1, 1), (1, 9, 60), Shapes(1, 64, 2, 128, 1)),
    ],
)
def test_shapes_by_hand(
    group: int, mesh: tuple[int, int], batch: tuple[int, int, int], expected: Shapes
) -> None:
    flagship = load_config("gemma2-2b-v5e8")
    config = dataclasses.replace(
        flagship,
        model=dataclasses.replace(flagship.model, mesh_shape=mesh),
        rollout=dataclasses.replace(flagship.rollout, num_generations=group),
    )
    assert choose_shapes(config, *batch) == expected
