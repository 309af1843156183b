"""Intervals and pass@k against brute force and published values."""

import math
from itertools import combinations

import pytest

from gemma2_grpo.task.statistics import Paired, compare_paired, pass_at_k, wilson_interval

_Z = 1.959963984540054


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_published_intervals(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(3, 10), (64, 128), (250, 256)])
def test_wilson_ends_where_the_score_test_does(successes, trials):
    share = successes / trials
    for bound in wilson_interval(successes, trials):
        deviation = math.sqrt(bound * (1 - bound) / trials)
        assert abs(share - bound) / deviation == pytest.approx(_Z)


def test_wilson_stays_within_0_and_1_and_mirrors():
    for trials in (1, 3, 50):
        for successes in range(trials + 1):
            low, high = wilson_interval(successes, trials)
            assert 0 <= low <= successes / trials <= high <= 1
            mirrored = wilson_interval(trials - successes, trials)
            assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))


def test_wilson_without_trials_is_an_error():
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0, 0)


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples):
    for correct in range(samples + 1):
        outcomes = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = list(combinations(outcomes, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k([correct], samples, k) == pytest.approx(expected)


def test_pass_at_k_is_the_mean_over_problems():
    correct = [0, 1, 4, 2]
    for k in (1, 2, 4):
        each = [pass_at_k([c], 4, k) for c in correct]
        assert pass_at_k(correct, 4, k) == pytest.approx(sum(each) / 4)
    assert pass_at_k(correct, 4, 1) == pytest.approx(sum(correct) / 16)
    assert pass_at_k(correct, 4, 4) == pytest.approx(3 / 4)


def test_paired_by_hand() -> None:
    before = [True, True, True, False, False, False, False, False]
    after = [True, True, False, True, True, True, True, False]
    paired = compare_paired(before, after)
    assert paired == Paired(both_right=2, both_wrong=1, fixed=4, broken=1)
    # Of 5 flips at most 1 goes the rarer way: (1 + 5) / 32, and as much on the other side.
    assert paired.p_value == 12 / 32
    with pytest.raises(ValueError, match="shorter"):
        compare_paired([True], [])


@pytest.mark.parametrize(("fixed", "broken"), [(0, 0), (3, 3), (0, 1), (7, 2), (1, 9), (20, 1)])
def test_mcnemar_against_all_outcomes(fixed: int, broken: int) -> None:
    """Every way in which the flips could fall, each as likely."""
    flips = fixed + broken
    distance = abs(fixed - broken)
    counts = [outcome.bit_count() for outcome in range(2**flips)] if flips <= 12 else None
    p_value = Paired(0, 0, fixed, broken).p_value
    if counts is None:
        assert p_value == pytest.approx(2 * (1 + 21) / 2**21)
    else:
        extreme = sum(abs(2 * ones - flips) >= distance for ones in counts)
        assert p_value == pytest.approx(extreme / len(counts))
