import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.tokens import SPECIAL_TOKENS, load_backend, write_tokenizer
from benchmarks.workload import (
    MIN_COMPLETION_TOKENS,
    Batch,
    Sizes,
    Workload,
    draw_lengths,
    make_batches,
    read_questions,
)

from gemma2_grpo.errors import UserError
from gemma2_grpo.task.prompts import render_prompt

SIZES = Sizes(prompts=2, generations=4)


def test_lengths_have_the_mean_and_the_bounds() -> None:
    lengths = draw_lengths(SIZES, 500, seed=0)
    assert lengths.shape == (500, 8)
    assert lengths.min() >= MIN_COMPLETION_TOKENS
    assert lengths.max() == SIZES.max_completion_tokens
    # Cutting off the longest lowers the mean a little.
    assert 0.93 * SIZES.mean_completion_tokens < lengths.mean() < SIZES.mean_completion_tokens


def test_short_lengths_are_cut_off_below() -> None:
    short = dataclasses.replace(SIZES, mean_completion_tokens=5.0)
    assert draw_lengths(short, 10, seed=0).min() == MIN_COMPLETION_TOKENS
    tiny = dataclasses.replace(short, max_completion_tokens=4)
    assert (draw_lengths(tiny, 10, seed=0) == 4).all()


def test_lengths_are_a_function_of_the_seed() -> None:
    np.testing.assert_array_equal(draw_lengths(SIZES, 3, seed=1), draw_lengths(SIZES, 3, seed=1))
    assert (draw_lengths(SIZES, 3, seed=1) != draw_lengths(SIZES, 3, seed=2)).any()


def test_more_steps_begin_with_the_same_lengths() -> None:
    np.testing.assert_array_equal(
        draw_lengths(SIZES, 2, seed=0), draw_lengths(SIZES, 5, seed=0)[:2]
    )


def test_full_length_is_the_maximum() -> None:
    assert (draw_lengths(SIZES, 2, seed=0, full=True) == SIZES.max_completion_tokens).all()


def test_batches_keep_to_the_prompts_that_fit(tmp_path: Path) -> None:
    questions = ["How many?", "How many " * 100, "How much is 12 and 7?"]
    write_tokenizer(tmp_path, map(render_prompt, questions), SIZES.vocab)
    batches = make_batches(SIZES, questions, tmp_path, 2, seed=0, full_length=False)
    assert [batch.questions for batch in batches] == [(questions[0], questions[2])] * 2
    assert batches[0].prompts[0] == render_prompt(questions[0])
    assert all(max(batch.prompt_tokens) <= SIZES.max_prompt_tokens for batch in batches)
    assert all(len(batch.limits) == len(batch.rewards) == SIZES.rows for batch in batches)


def test_no_prompt_that_fits_is_a_users_mistake(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ["How many?"], SIZES.vocab)
    with pytest.raises(UserError, match="at most 128 tokens"):
        make_batches(SIZES, ["How many " * 100], tmp_path, 1, seed=0, full_length=False)


def test_the_tokenizer_has_exactly_the_ids_of_the_model(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, [render_prompt("Tom has 12 apples.")], 300)
    backend = load_backend(tmp_path)
    assert backend.get_vocab_size() == 300
    assert [backend.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(6))
    ids = backend.encode("<bos><start_of_turn>user\nTom has 12", add_special_tokens=False).ids
    assert ids[:2] == [2, 4]
    assert backend.token_to_id("<unk>") not in ids
    assert all(backend.decode([i]) for i in range(6, 300))


def test_warm_up_replays_the_first_measured_steps() -> None:
    batches = tuple(Batch((str(i),), (1,), (8,), (0.0,)) for i in range(3))
    workload = Workload(SIZES, Path(), batches, warmup=4, seed=0)
    seen = [workload.batch(step).questions[0] for step in range(workload.steps)]
    assert seen == ["0", "1", "2", "0", "0", "1", "2"]


def test_questions_come_from_a_file_or_from_the_test_file_of_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": "Why?", "answer": "1"}) + "\n\n", encoding="utf-8")
    assert read_questions(path, 0) == read_questions(tmp_path, 0) == ["Why?"]
    assert len(read_questions(None, 0)) == 64


@pytest.mark.parametrize("text", ["{}", "not JSON", "[]"])
def test_data_that_cannot_be_read_is_a_users_mistake(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"--data .*question"):
        read_questions(path, 0)


def test_sizes_are_those_of_the_measured_model() -> None:
    assert dataclasses.replace(SIZES, prompts=3).rows == 12
