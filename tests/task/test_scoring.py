"""Scores of a batch, and what a user's own reward may and may not do."""

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2_grpo.config import RewardConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.rewards import score_completion
from gemma2_grpo.task.scoring import COMPONENTS, Scorer, check_rewards, load_reward

QUESTION = "Ann has 12 eggs. She finds 7 more, and then gives 4 away. How many eggs are left?"
RIGHT = (
    "<reasoning>\nStep 1: 12 + 7 = 19\nStep 2: 19 - 4 = 15\nTherefore, the answer is 15.\n"
    "</reasoning>\n<answer>\n15\n</answer>"
)
WRONG = RIGHT.replace("19 - 4 = 15", "19 - 4 = 13").replace("\n15\n", "\n13\n")
COMPLETIONS = [RIGHT, WRONG, "15", ""]
EXAMPLES = [Example(QUESTION, "15")] * 4
MEND = "return one finite number, or None if unscorable, for each of 4 completions"


def message(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


def score(reward: Any, **weights: Any) -> dict[str, np.ndarray]:
    return dict(Scorer(RewardConfig(**weights), reward)(EXAMPLES, COMPLETIONS))


def test_a_weight_by_name_is_that_of_the_field():
    by_field = Scorer(RewardConfig(logic_weight=0.7))(EXAMPLES, COMPLETIONS)
    by_name = Scorer(RewardConfig(weights={"logic": 0.7}))(EXAMPLES, COMPLETIONS)
    np.testing.assert_array_equal(by_field["total"], by_name["total"])
    assert (
        by_name["total"].tolist() != Scorer(RewardConfig())(EXAMPLES, COMPLETIONS)["total"].tolist()
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"style": 0.1}, "weights: no component 'style'; there are format, logic, accuracy, "),
        ({"logic": -0.1}, "weights: logic = -0.1 must be at least 0"),
        ({"logic": float("inf")}, "weights: logic = inf must be at least 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float], message: str):
    with pytest.raises(UserError) as caught:
        Scorer(RewardConfig(weights=weights))
    assert str(caught.value).startswith(message)


def test_columns_are_the_scores_of_each_completion():
    weights = RewardConfig(format_weight=0.5, logic_weight=0.1)
    table = Scorer(weights)(EXAMPLES, COMPLETIONS)
    columns = {*COMPONENTS, "correct", "official_correct", "total", "equations", "true_equations"}
    assert set(table) == columns
    for i, text in enumerate(COMPLETIONS):
        single = score_completion(text, "15", QUESTION, weights)
        for name in COMPONENTS:
            assert table[name][i] == single[name], (i, name)
        for name in ("correct", "official_correct", "total"):
            assert table[name][i] == float(getattr(single, name)), (i, name)
        assert table["equations"][i] == len(single.equations)
        assert table["true_equations"][i] == sum(e.is_true for e in single.equations)
    assert {column.dtype for column in table.values()} == {np.dtype(np.float64)}
    assert table["equations"].tolist() == [2, 2, 0, 0]
    assert table["true_equations"].tolist() == [2, 1, 0, 0]
    assert table["correct"].tolist() == [1, 0, 0, 0]


def test_truncated_completions_are_told_apart():
    table = Scorer(RewardConfig())(EXAMPLES, [RIGHT] * 4, np.array([False, True, False, True]))
    assert table["format"].tolist() == [1.0, 0.6, 1.0, 0.6]
    assert table["accuracy"].tolist() == [1.0] * 4


def test_each_completion_is_scored_by_its_own_example():
    examples = [Example(QUESTION, "15"), Example(QUESTION, "13")]
    assert Scorer(RewardConfig())(examples, [WRONG] * 2)["correct"].tolist() == [0, 1]


def test_examples_and_completions_must_be_aligned():
    with pytest.raises(ValueError, match="longer"):
        Scorer(RewardConfig())(EXAMPLES[:2], COMPLETIONS)


# --- A user's own reward ---


def test_a_custom_reward_is_added_with_its_weight():
    plain = score(None)
    table = score(lambda questions, completions, answers: [1, 0.5, -1.0, True], reward_weight=0.2)
    assert table["custom"].tolist() == [1, 0.5, -1, 1]
    assert table["total"] == pytest.approx(plain["total"] + 0.2 * table["custom"])
    assert all((table[name] == plain[name]).all() for name in plain if name != "total")


def test_a_custom_reward_sees_questions_completions_and_answers():
    seen = []

    def reward(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
        seen.append((questions, completions, answers))
        return [0.0] * 4

    score(reward)
    assert seen == [([QUESTION] * 4, COMPLETIONS, ["15"] * 4)]


@pytest.mark.parametrize("unscored", [None, math.nan, np.float32("nan")])
def test_no_score_is_not_zero(unscored):
    """Stock Tunix sums rewards with nansum, so that None and NaN become 0."""
    table = score(lambda *_: [1.0, unscored, 0.0, unscored])
    assert np.isnan(table["total"]).tolist() == [False, True, False, True]
    assert np.isnan(table["custom"]).tolist() == [False, True, False, True]
    assert np.isfinite(table["format"]).all()


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        # Stock Tunix spreads one number, or a list of one, over the whole batch.
        (1.0, "returned float"),
        (np.float64(1.0), "returned an array of shape ()"),
        (np.array(1.0), "returned an array of shape ()"),
        ([1.0], "returned 1 values"),
        ([1.0] * 5, "returned 5 values"),
        ([], "returned 0 values"),
        (None, "returned NoneType"),
        ("1.0", "returned str"),
        (b"1234", "returned bytes"),
        ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, "returned dict"),
        ({0.1, 0.2, 0.3, 0.4}, "returned set"),
        ((x for x in [1.0] * 4), "returned generator"),
        (np.ones((4, 1)), "returned an array of shape (4, 1)"),
        ([0.0, "1.0", 0.0, 0.0], "value 1 is '1.0'"),
        ([0.0, b"1", 0.0, 0.0], "value 1 is b'1'"),
        ([0.0, 0.0, [1.0], 0.0], "value 2 is [1.0]"),
        ([0.0, 0.0, 0.0, 1j], "value 3 is 1j"),
        # Stock Tunix trains on infinity, and then saves weights that are NaN.
        ([0.0, math.inf, 0.0, 0.0], "value 1 is inf"),
        ([-math.inf, 0.0, 0.0, 0.0], "value 0 is -inf"),
        ([0.0, 0.0, 0.0, 10**400], f"value 3 is {10**400}"),
    ],
)
def test_what_is_not_one_number_per_completion_is_refused(values, fault):
    assert message(score, lambda *_: values) == f"reward <lambda>: {fault}; {MEND}"


@pytest.mark.parametrize(
    "values", [(1, 2, 3, 4), np.arange(1, 5), np.arange(1, 5, dtype=np.float16), [1, 2.0, 3, 4]]
)
def test_what_is_one_number_per_completion_passes(values):
    assert check_rewards(values, 4).tolist() == [1, 2, 3, 4]


def test_a_reward_cannot_change_what_is_trained_on():
    """Stock Tunix hands out its own list of completions."""

    def vandal(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
        for arguments in (questions, completions, answers):
            arguments[:] = ["changed"] * len(arguments)
            arguments.pop()
        return [0.0] * 4

    completions, examples = list(COMPLETIONS), list(EXAMPLES)
    table = Scorer(RewardConfig(), vandal)(examples, completions)
    assert (completions, examples) == (COMPLETIONS, EXAMPLES)
    assert table["total"] == pytest.approx(score(None)["total"])


class Lengths:
    def __call__(self, questions: Any, completions: list[str], answers: Any) -> list[float]:
        del questions, answers
        return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    "reward",
    [
        functools.partial(lambda scale, q, c, a: [scale * len(text) for text in c], 1),
        Lengths(),
        Lengths().__call__,
    ],
    ids=["partial", "object", "method"],
)
def test_any_callable_will_do(reward):
    """Stock Tunix asks a reward for its __name__, which these have not."""
    assert score(reward)["custom"].tolist() == [len(text) for text in COMPLETIONS]


def test_a_nameless_callable_is_named_all_the_same():
    assert message(score, functools.partial(max, [1])).startswith("reward functools.partial(")


def test_a_raising_reward_is_named_with_its_place(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def broken(questions, completions, answers):\n    return [1 / 0]\n")
    spec = f"{file}:broken"
    reward, _ = load_reward(spec)
    expected = f"reward {spec}: raised ZeroDivisionError: division by zero ({file}:2)"
    assert message(Scorer(RewardConfig(reward=spec), reward), EXAMPLES, COMPLETIONS) == expected


def test_a_reward_cannot_end_a_run_as_if_it_had_succeeded(tmp_path):
    file = write(tmp_path / "mine.py", "def mine(q, c, a):\n    raise SystemExit(0)\n")
    spec = f"{file}:mine"
    scorer = Scorer(RewardConfig(reward=spec), load_reward(spec)[0])
    said = message(scorer, EXAMPLES, COMPLETIONS)
    assert said == f"reward {spec}: raised SystemExit: 0 ({file}:2)"
    write(file, "raise SystemExit\n")
    assert message(load_reward, spec) == f"reward = {spec!r}: SystemExit: "


# --- Loading path.py:function ---


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_reward_is_loaded_with_its_hash(tmp_path):
    text = "OFFSET = 2\ndef mine(questions, completions, answers):\n    return [OFFSET] * 4\n"
    file = write(tmp_path / "mine.py", text)
    reward, sha256 = load_reward(f"{file}:mine")
    assert score(reward)["custom"].tolist() == [2] * 4
    assert sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "spec", "fault"),
    [
        (None, "", "{}/absent.py:mine", "no such file; write path/to/file.py:function"),
        (None, "", "{}:mine", "no such file; write path/to/file.py:function"),
        ("mine.py", "", "{}/mine.py", "no such file; write path/to/file.py:function"),
        (None, "", "mine", "no such file; write path/to/file.py:function"),
        ("mine.txt", "", "{}/mine.txt:mine", "not a Python file"),
        ("mine.py", "mine = 3", "{}/mine.py:mine", "{}/mine.py has no function 'mine'"),
        ("mine.py", "", "{}/mine.py:mine", "{}/mine.py has no function 'mine'"),
        ("mine.py", "", "{}/mine.py:", "{}/mine.py has no function ''"),
        ("mine.py", "import absent_package", "{}/mine.py:mine", None),
        ("mine.py", "def mine(:", "{}/mine.py:mine", None),
        ("mine.py", "raise ValueError('no')", "{}/mine.py:mine", "ValueError: no"),
    ],
)
def test_what_cannot_be_loaded_is_refused(name, content, spec, fault, tmp_path):
    if name:
        write(tmp_path / name, content)
    spec = spec.format(tmp_path)
    said = message(load_reward, spec)
    assert said.startswith(f"reward = {spec!r}: ")
    assert "\n" not in said
    if fault:
        assert said == f"reward = {spec!r}: {fault.format(tmp_path)}"
