"""Measuring: the right numbers, the same numbers again, and no trace in the training."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gemma2_grpo.config import RewardConfig
from gemma2_grpo.run.measure import measure
from gemma2_grpo.sampling.rollout import Completions
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.task.rewards import score_completion
from gemma2_grpo.task.scoring import Scorer
from gemma2_grpo.training.learner import Stream, fold_key

EXAMPLES = [Example(f"How many eggs are {i} eggs and 2 more?", str(i + 2)) for i in range(7)]


def solution(answer: int, equation: str) -> str:
    return (
        f"<reasoning>\nStep 1: {equation}\nTherefore, the answer is {answer}.\n</reasoning>\n"
        f"<answer>\n{answer}\n</answer>"
    )


def answer_of(prompt: str, draw: int) -> str:
    """Right for even problems; a second draw is right for problem 1, too; problem 5 is cut off."""
    found = re.search(r"(\d+) eggs and 2 more", prompt)
    assert found is not None
    i = int(found[1])
    if i == 5:
        return "<reasoning>"
    right = i % 2 == 0 or (i == 1 and draw == 1)
    return solution(i + 2 if right else 99, f"{i} + 2 = {i + 2 if right else 99}")


class FakeLearner:
    """Answers from a table, and writes down what it was asked."""

    def __init__(self, eval_batch_prompts: int) -> None:
        run = SimpleNamespace(seed=0, eval_batch_prompts=eval_batch_prompts)
        self.config = SimpleNamespace(run=run)
        self.calls: list[tuple[list[str], int, bool]] = []

    def sample(self, prompts: list[str], group: int, key: Any, *, greedy: bool) -> Completions:
        del key
        self.calls.append((list(prompts), group, greedy))
        texts = [answer_of(prompt, draw) for prompt in prompts for draw in range(group)]
        is_truncated = np.array([text == "<reasoning>" for text in texts])
        return Completions(texts, [np.arange(len(text)) for text in texts], is_truncated)


SCORE = Scorer(RewardConfig())


def test_measurement_by_hand():
    learner: Any = FakeLearner(eval_batch_prompts=8)
    measured = measure(learner, EXAMPLES, SCORE, samples=2)
    lengths = [len(answer_of(render_prompt(e.question), 0)) for e in EXAMPLES]
    texts = [(e, answer_of(render_prompt(e.question), d)) for e in EXAMPLES for d in range(2)]
    greedy = [score_completion(t, e.answer, e.question).total for e, t in texts[::2]]
    reward = np.mean([score_completion(t, e.answer, e.question).total for e, t in texts])
    official = measured.greedy.num_official_correct
    assert measured.greedy.model_dump() == {
        "num_problems": 7,
        "num_correct": 4,
        "num_official_correct": official,
        "correct_fraction": 4 / 7,
        "correct_fraction_interval": measured.greedy.correct_fraction_interval,
        "official_correct_fraction": official / 7,
        "perfect_format_fraction": 6 / 7,
        "true_equations_fraction": 4 / 6,
        "mean_completion_tokens": pytest.approx(np.mean(lengths)),
        "truncated_fraction": 1 / 7,
        "mean_reward": pytest.approx(np.mean(greedy)),
        "by_solution_steps": (),
    }
    low, high = measured.greedy.correct_fraction_interval
    assert 0.2 < low < 4 / 7 < high < 0.85
    lengths = [len(text) for _, text in texts]
    assert measured.sampled is not None
    assert measured.sampled.model_dump() == {
        "num_samples": 2,
        "correct_fraction": pytest.approx((4 + 0.5) / 7),
        "correct_fraction_interval": measured.sampled.correct_fraction_interval,
        "pass_at_k": {1: pytest.approx((4 + 0.5) / 7), 2: pytest.approx(5 / 7)},
        "maj_at_k": {1: pytest.approx((4 + 0.5) / 7), 2: pytest.approx((4 + 0.5) / 7)},
        "perfect_format_fraction": 12 / 14,
        "true_equations_fraction": pytest.approx(9 / 12),
        "truncated_fraction": 2 / 14,
        "mean_completion_tokens": pytest.approx(np.mean(lengths)),
        "mean_reward": pytest.approx(reward),
    }


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 20])
def test_batches_of_any_size_measure_the_same(batch):
    whole, cut = FakeLearner(7), FakeLearner(batch)
    assert measure(cut, EXAMPLES, SCORE, samples=2) == measure(whole, EXAMPLES, SCORE, samples=2)
    greedy = [len(prompts) for prompts, _, is_greedy in cut.calls if is_greedy]
    sampled = [(len(prompts), group) for prompts, group, is_greedy in cut.calls if not is_greedy]
    assert greedy == [batch] * -(-7 // batch), "every batch is full, so that one program serves all"
    size = max(1, batch // 2)
    assert sampled == [(size, 2)] * -(-7 // size)


def test_a_last_batch_of_one_is_not_filled_with_copies_of_it():
    learner: Any = FakeLearner(eval_batch_prompts=3)
    measure(learner, EXAMPLES, SCORE)
    prompts, _, _ = learner.calls[-1]
    assert len(set(prompts)) == 3


def test_progress_counts_each_problem_once():
    learner: Any = FakeLearner(eval_batch_prompts=4)
    done: list[int] = []
    measure(learner, EXAMPLES, SCORE, samples=2, on_batch=done.append)
    assert done == [4, 3, 2, 2, 2, 1]


def test_completions_are_handed_out_in_the_order_of_their_examples():
    learner: Any = FakeLearner(eval_batch_prompts=4)
    seen: list[tuple[str, float | None]] = []
    measure(
        learner,
        EXAMPLES,
        SCORE,
        samples=2,
        on_greedy=lambda records: seen.extend((r.completion, r.reward) for r in records),
    )
    texts = [answer_of(render_prompt(e.question), 0) for e in EXAMPLES]
    assert seen == [
        (text, score_completion(text, example.answer, example.question).total)
        for example, text in zip(EXAMPLES, texts, strict=True)
    ]


def test_a_mean_of_nothing_is_no_warning_and_no_number():
    learner: Any = FakeLearner(eval_batch_prompts=4)
    unscored = Scorer(RewardConfig(), lambda questions, *_: [None] * len(questions))
    measured = measure(learner, EXAMPLES, unscored, samples=2)
    assert measured.sampled is not None
    assert measured.greedy.mean_reward is None and measured.sampled.mean_reward is None, (
        "which is not 0"
    )
    partly = Scorer(
        RewardConfig(format_weight=0, logic_weight=0, accuracy_weight=0, length_weight=0),
        lambda questions, *_: [2.0, *[None] * (len(questions) - 1)],
    )
    measured = measure(learner, EXAMPLES, partly, samples=2)
    assert measured.sampled is not None
    assert measured.sampled.mean_reward == 2.0


# --- With a real policy ---


def test_a_recorded_measurement_is_what_its_completions_say(straight_run):
    completions = straight_run.records("completions.jsonl")
    evaluations = straight_run.records("evaluations.jsonl")
    assert [record["step"] for record in evaluations] == [0, 2, 4, 5]
    for record in evaluations:
        rows = [r for r in completions if r["kind"] == "held_out" and r["step"] == record["step"]]
        greedy = record["greedy"]
        assert len(rows) == greedy["num_problems"] == 3
        scores = [score_completion(r["completion"], r["answer"], r["question"]) for r in rows]
        equations = sum(len(s.equations) for s in scores)
        true = sum(e.is_true for s in scores for e in s.equations)
        assert greedy["num_correct"] == sum(s.correct for s in scores)
        assert greedy["num_official_correct"] == sum(s.official_correct for s in scores)
        assert greedy["perfect_format_fraction"] == sum(s["format"] == 1 for s in scores) / 3
        assert greedy["true_equations_fraction"] == true / max(equations, 1)
        assert greedy["correct_fraction"] == greedy["num_correct"] / 3


def test_the_same_seed_measures_the_same_and_training_draws_are_left_alone(session):
    learner, prompts = session.learner, [render_prompt(e.question) for e in session.train[:2]]

    def training_draw() -> list[str]:
        return learner.sample(prompts, 4, fold_key(0, Stream.TRAIN, 0)).texts

    seen: list[list[str]] = [[], []]
    before, first = training_draw(), None
    for texts in seen:
        again = measure(
            learner,
            session.held_out,
            SCORE,
            samples=4,
            on_greedy=lambda records, texts=texts: texts.extend(r.completion for r in records),
        )
        assert first in (None, again)
        first = again
    assert seen[0] == seen[1]
    assert training_draw() == before
    assert len(set(before)) > 1, "completions of a group differ"


def test_sampled_completions_differ_between_problems_samples_and_seeds(session):
    learner, drawn = session.learner, []
    original = learner.sample

    def spy(*args: Any, **options: Any) -> Completions:
        drawn.append(original(*args, **options))
        return drawn[-1]

    for seed in (0, 1):
        run = dataclasses.replace(learner.config.run, seed=seed)
        config = dataclasses.replace(learner.config, run=run)
        spied: Any = SimpleNamespace(config=config, sample=spy)
        measure(spied, session.held_out, SCORE, samples=4)
    texts = [tuple(completions.texts) for completions in drawn]
    # One greedy and two sampled batches for each seed.
    assert texts[0] == texts[3], "greedy decoding knows no seed"
    sampled = [text for batch in (texts[1], texts[2], texts[4], texts[5]) for text in batch]
    assert len(set(sampled)) > len(sampled) // 2
    assert texts[1:3] != texts[4:6]
