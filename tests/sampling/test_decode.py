"""A group's completions are drawn as if each were alone, however the batch shrinks and grows."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from scipy.special import log_softmax
from tunix.models.gemma import model as gemma

from gemma2_grpo.config import Config
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.lora import add_lora
from gemma2_grpo.model.mesh import batch_sharding
from gemma2_grpo.model.tokenizer import pad_right
from gemma2_grpo.model.weights import Forward, split_model
from gemma2_grpo.sampling import decode, decoding_batch
from gemma2_grpo.sampling.decode import Completed, complete
from gemma2_grpo.sampling.draw import Sampling

WIDTH, LIMIT = 28, 12
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, stop_ids=(-1,), pad_id=0)
# So many stop tokens that some completions end.
WARM = dataclasses.replace(GREEDY, temperature=0.7, stop_ids=tuple(range(3, 40)))


@pytest.fixture(scope="module")
def policy(make_policy: Callable[..., gemma.Gemma]) -> gemma.Gemma:
    return make_policy(filled=3)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Prompts shorter and longer than the window of 10."""
    random = np.random.default_rng(11)
    return [random.integers(3, 496, length).tolist() for length in (26, 5, 14, 28)]


@cache
def forward_of(model: gemma.Gemma) -> Forward:
    """Programs are compiled per forward."""
    return split_model(model)[0]


def draw(
    model: gemma.Gemma,
    prompts: list[list[int]],
    sampling: Sampling,
    mesh: Mesh,
    *,
    group: int = 1,
    limits: Any = LIMIT,
    key: int = 0,
    width: int = WIDTH,
    on_tokens: decode.OnTokens | None = None,
) -> Completed:
    """Completes each prompt `group` times; padding after the end of a completion is zeroed."""
    sharding = batch_sharding(mesh, len(prompts))
    lengths = np.array([len(row) for row in prompts], np.int32)
    done = complete(
        forward_of(model),
        split_model(model)[1],
        jax.device_put(pad_right(prompts, width, sampling.pad_id), sharding),
        jax.device_put(lengths, sharding),
        np.broadcast_to(np.asarray(limits, np.int32), len(prompts) * group),
        jax.random.key(key),
        max_tokens=LIMIT,
        sampling=sampling,
        mesh=mesh,
        on_tokens=on_tokens,
    )
    is_real = np.arange(LIMIT) < done.lengths[:, None]
    return done._replace(
        tokens=np.where(is_real, done.tokens, 0), logps=np.where(is_real, done.logps, 0)
    )


def check_same(actual: Completed, expected: Completed, atol: float = 3e-5) -> None:
    np.testing.assert_array_equal(actual.lengths, expected.lengths)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_allclose(actual.logps, expected.logps, atol=atol)


def row_logits(
    full_logits: Callable[..., np.ndarray],
    model: gemma.Gemma,
    prompts: list[list[int]],
    completions: np.ndarray,
) -> np.ndarray:
    """Logits [R, T, V] that predict each completion token, from one whole right-padded pass."""
    tokens = np.zeros((len(prompts), WIDTH + LIMIT), np.int32)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens[i, : len(prompt) + len(completion)] = [*prompt, *completion]
    logits = full_logits(model, tokens)
    width = completions.shape[1]
    return np.stack(
        [logits[i, len(p) - 1 : len(p) - 1 + width] for i, p in enumerate(prompts)]
    ).astype(np.float64)


def plain_greedy(
    full_logits: Callable[..., np.ndarray], model: gemma.Gemma, prompts: list[list[int]]
) -> np.ndarray:
    """Greedy completions by a whole pass per token, with Tunix's attention and no cache."""
    completions = np.zeros((len(prompts), 0), np.int32)
    for _ in range(LIMIT):
        blank = np.concatenate([completions, np.zeros((len(prompts), 1), np.int32)], axis=1)
        last = row_logits(full_logits, model, prompts, blank)[:, -1]
        completions = np.concatenate([completions, last.argmax(-1)[:, None]], axis=1)
    return completions


class TestGreedy:
    @pytest.fixture(scope="class")
    @classmethod
    def together(cls, policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh) -> Completed:
        return draw(policy, prompts, GREEDY, mesh)

    def test_is_the_argmax_of_whole_passes(
        self,
        together: Completed,
        policy: gemma.Gemma,
        prompts: list[list[int]],
        full_logits: Callable[..., np.ndarray],
    ) -> None:
        """With a window that binds, in the prompt and across its end."""
        expected = plain_greedy(full_logits, policy, prompts)
        assert len({tuple(row) for row in expected}) == 4
        np.testing.assert_array_equal(together.tokens, expected)
        logits = row_logits(full_logits, policy, prompts, expected)
        logps = np.take_along_axis(log_softmax(logits, -1), expected[..., None], -1)[..., 0]
        np.testing.assert_allclose(together.logps, logps, atol=1e-4)

    def test_does_not_depend_on_padding_or_company(
        self, together: Completed, policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh
    ) -> None:
        for i, prompt in enumerate(prompts):
            alone = draw(policy, [prompt], GREEDY, mesh)
            check_same(alone, Completed(*(field[i : i + 1] for field in together)))
        alone = draw(policy, prompts[1:2], GREEDY, mesh, width=5)
        check_same(alone, Completed(*(field[1:2] for field in together)))

    def test_limits_end_rows(
        self, together: Completed, policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh
    ) -> None:
        for limits in ([0, 1, 7, 12], [0, 0, 0, 0]):
            limited = draw(policy, prompts, GREEDY, mesh, limits=limits)
            assert limited.lengths.tolist() == limits
            kept = np.arange(LIMIT) < np.array(limits)[:, None]
            np.testing.assert_array_equal(limited.tokens, together.tokens * kept)
            np.testing.assert_allclose(limited.logps, together.logps * kept, atol=1e-5)

    @pytest.mark.oracle
    def test_is_that_of_transformers(
        self, base: gemma.Gemma, tiny_directory: Path, prompts: list[list[int]], mesh: Mesh
    ) -> None:
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        model = transformers.Gemma2ForCausalLM.from_pretrained(
            tiny_directory, attn_implementation="eager"
        )
        tokens = draw(base, prompts, GREEDY, mesh).tokens
        for prompt, row in zip(prompts, tokens, strict=True):
            output = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                do_sample=False,
                max_new_tokens=LIMIT,
                eos_token_id=None,
            )
            assert output[0, len(prompt) :].tolist() == row.tolist()

    def test_bfloat16_is_near_float32(
        self,
        base: gemma.Gemma,
        tiny_directory: Path,
        prompts: list[list[int]],
        mesh: Mesh,
        full_logits: Callable[..., np.ndarray],
    ) -> None:
        """Of the tokens that bfloat16 takes, float32 gives log-probabilities within 0.3.

        The logits have a deviation of 2; 8 bits of the largest are 0.03.
        """
        done = draw(load_weights(tiny_directory, "bfloat16", mesh), prompts, GREEDY, mesh)
        logits = row_logits(full_logits, base, prompts, done.tokens)
        expected = log_softmax(logits, -1)
        logps = np.take_along_axis(expected, done.tokens[..., None], -1)[..., 0]
        off = abs(done.logps - logps)
        print(off.max(), off.mean(), logits.std())
        assert logits.std() > 1.5
        assert off.max() < 0.3 and off.mean() < 0.05
        assert (expected.max(-1) - logps).max() < 0.3


class TestSampled:
    @pytest.fixture(scope="class")
    @classmethod
    def pairs(cls, policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh) -> Completed:
        return draw(policy, prompts, WARM, mesh, group=2)

    def test_completions_end_with_their_first_stop_token(self, pairs: Completed) -> None:
        ended = 0
        for tokens, length in zip(pairs.tokens, pairs.lengths, strict=True):
            is_stop = np.isin(tokens[:length], WARM.stop_ids)
            assert not is_stop[:-1].any()
            assert is_stop[-1] or length == LIMIT
            ended += is_stop[-1]
        assert 3 <= ended < 8
        assert len(set(pairs.lengths.tolist())) >= 3

    @pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (30, 0.8)], ids=str)
    def test_logps_are_those_of_a_whole_pass(
        self,
        top_k: int,
        top_p: float,
        pairs: Completed,
        policy: gemma.Gemma,
        prompts: list[list[int]],
        mesh: Mesh,
        full_logits: Callable[..., np.ndarray],
        truncated_logps: Callable[..., np.ndarray],
    ) -> None:
        """Under the distribution that was drawn from, the stop token's included."""
        sampling = dataclasses.replace(WARM, top_k=top_k, top_p=top_p)
        done = pairs if sampling == WARM else draw(policy, prompts, sampling, mesh, group=2)
        assert (done.lengths < LIMIT).sum() >= 3
        repeated = [prompt for prompt in prompts for _ in range(2)]
        logits = row_logits(full_logits, policy, repeated, done.tokens)
        for row, end in enumerate(done.lengths):
            for t in range(end):
                expected = truncated_logps(logits[row, t], sampling)[done.tokens[row, t]]
                assert done.logps[row, t] == pytest.approx(expected, abs=1e-4)

    def test_one_key_one_outcome(
        self, pairs: Completed, policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh
    ) -> None:
        same, other = (draw(policy, prompts, WARM, mesh, group=2, key=key) for key in (0, 1))
        check_same(same, pairs, atol=0)
        assert (pairs.tokens != other.tokens).any(axis=1).all()

    def test_rows_of_a_group_differ(self, pairs: Completed) -> None:
        assert len({tuple(row) for row in pairs.tokens}) == 8

    def test_a_row_does_not_depend_on_the_others(
        self, pairs: Completed, policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh
    ) -> None:
        first, second, third, fourth = prompts
        other = draw(policy, [fourth, second, first, third], WARM, mesh, group=2)
        check_same(Completed(*(x[2:4] for x in other)), Completed(*(x[2:4] for x in pairs)))
        # The same prompt in another row draws anew.
        assert pairs.tokens[0].tolist() != other.tokens[4].tolist()

    def test_a_group_draws_as_if_each_row_were_a_prompt(
        self, pairs: Completed, policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh
    ) -> None:
        repeated = draw(policy, [p for p in prompts for _ in range(2)], WARM, mesh)
        check_same(repeated, pairs)

    def test_does_not_depend_on_the_mesh(
        self,
        pairs: Completed,
        prompts: list[list[int]],
        wide_base: gemma.Gemma,
        wide_mesh: Mesh,
        config: Config,
        fill_adapters: Callable[..., None],
    ) -> None:
        wide = add_lora(wide_base, config.model, wide_mesh, 0)
        fill_adapters(wide, 3)
        for count in (4, 3):  # Three prompts do not divide over fsdp, but their rows do.
            actual = draw(wide, prompts[:count], WARM, wide_mesh, group=2)
            check_same(actual, Completed(*(x[: 2 * count] for x in pairs)), atol=1e-4)


class TestDecodingBatch:
    """Where and when rows are moved changes nothing of what they draw."""

    # A prompt whose completions are not wanted, one whose end together, and rows that end apart.
    LIMITS = (0, 0, 0, 0, 3, 12, 1, 8, 2, 2, 2, 2, 5, 9, 5, 5)

    @pytest.fixture
    def moves(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
        """Prompts, rows per prompt and cache length of each batch that rows are moved to."""
        seen: list[tuple[int, int, int]] = []
        real = decode.resize

        def record(batch: Any, kept: Any, *, shape: Any, length: int, mesh: Mesh) -> Any:
            seen.append((*shape, length))
            return real(batch, kept, shape=shape, length=length, mesh=mesh)

        monkeypatch.setattr(decode, "resize", record)
        return seen

    def test_shrinking_and_growing_change_nothing(
        self,
        policy: gemma.Gemma,
        prompts: list[list[int]],
        mesh: Mesh,
        moves: list[tuple[int, int, int]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sampling = dataclasses.replace(WARM, stop_ids=(-1,))

        def drawn(least_rows: int, first_length: int) -> Completed:
            monkeypatch.setattr(decoding_batch, "_LEAST_ROWS", least_rows)
            monkeypatch.setattr(decoding_batch, "_FIRST_LENGTH", first_length)
            return draw(policy, prompts, sampling, mesh, group=4, limits=self.LIMITS)

        whole = drawn(1000, 64)
        assert moves == []
        assert whole.lengths.tolist() == list(self.LIMITS)
        assert len({tuple(row) for row in whole.tokens}) == 12 + 1
        check_same(drawn(1, 3), whole)
        # When the cache is full, after 5 tokens, when it is full again, and after 8.
        assert moves == [(4, 4, 6), (4, 2, 6), (4, 2, 12), (4, 1, 12)]

    def test_fit_by_hand(self) -> None:
        stopped = np.array([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]], bool)
        # At most two rows of a prompt are left: the busier prompt first, unfinished rows first.
        rows, shape = decoding_batch.smallest_fit(stopped, 4, 1)
        assert shape == (4, 2)
        assert rows.tolist() == [8, 9, 1, 0, 4, 5, 12, 13]
        # Of one row each, half of the prompts.
        rows, shape = decoding_batch.smallest_fit(np.array([[1], [0], [1], [0]], bool), 1, 1)
        assert shape == (2, 1)
        assert rows.tolist() == [1, 3]

    @pytest.mark.parametrize(
        ("shape", "least", "fsdp", "smaller"),
        [
            ((4, 4), 4, 1, (4, 2)),
            ((4, 2), 4, 1, (4, 1)),
            ((4, 1), 1, 1, (2, 1)),
            ((3, 5), 1, 1, (3, 3)),
            ((5, 1), 1, 1, (3, 1)),
            ((1, 1), 1, 1, None),
            ((4, 1), 4, 1, None),  # Fewer rows than the least.
            ((3, 5), 1, 2, None),  # Nine rows do not divide.
            ((4, 5), 1, 2, (4, 3)),
        ],
    )
    def test_one_way_down_by_hand(
        self, shape: tuple[int, int], least: int, fsdp: int, smaller: tuple[int, int] | None
    ) -> None:
        assert decoding_batch.smaller_shape(shape, least, fsdp) == smaller


def test_tokens_can_be_seen_as_they_come(
    policy: gemma.Gemma, prompts: list[list[int]], mesh: Mesh
) -> None:
    seen: list[np.ndarray] = []
    streamed = draw(policy, prompts, WARM, mesh, group=2, on_tokens=lambda t: seen.append(t.copy()))
    check_same(streamed, draw(policy, prompts, WARM, mesh, group=2), atol=0)
    assert [rows.shape[1] for rows in seen] == [4, 8, 12]
    for rows in seen:
        is_real = np.arange(rows.shape[1]) < streamed.lengths[:, None]
        np.testing.assert_array_equal(
            np.where(is_real, rows, 0), streamed.tokens[:, : rows.shape[1]]
        )


def test_lengths_count_the_first_stop_token() -> None:
    tokens = np.array([[5, 6, 7, 8], [5, 1, 7, 1], [9, 6, 7, 5], [3, 3, 3, 9], [3, 3, 1, 0]])
    limits = np.array([4, 4, 4, 4, 2])
    assert decode._lengths(tokens, limits, (1, 9)).tolist() == [4, 2, 1, 4, 2]
