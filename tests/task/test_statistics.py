"""Intervals, pass@k and maj@k against brute force and published values."""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from gemma2_grpo.task.statistics import (
    Paired,
    compare_paired,
    interval_over_problems,
    majority_at_k,
    pass_at_k,
    powers_up_to,
    wilson_interval,
)

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
    assert paired == Paired(num_both_right=2, num_both_wrong=1, num_fixed=4, num_broken=1)
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
    p_value = Paired(num_both_right=0, num_both_wrong=0, num_fixed=fixed, num_broken=broken).p_value
    if counts is None:
        assert p_value == pytest.approx(2 * (1 + 21) / 2**21)
    else:
        extreme = sum(abs(2 * ones - flips) >= distance for ones in counts)
        assert p_value == pytest.approx(extreme / len(counts))


# --- Several samples of each problem ---


def test_the_interval_over_problems_by_hand() -> None:
    """Two problems always right, two never, one half the time: the pseudo-problems are z^2."""
    z2 = _Z * _Z
    low, high = interval_over_problems([4, 4, 0, 0, 2], 4)
    # The mean is 1/2; four observed and z^2 pseudo-problems lie 1/2 from it, one lies on it.
    half = _Z * math.sqrt((4 + z2) / 4) / (5 + z2)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
    with pytest.raises(ValueError, match="at least one problem"):
        interval_over_problems([], 4)


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (81, 263), (250, 256), (9, 9)])
def test_with_one_sample_it_holds_wilsons_interval(successes: int, trials: int) -> None:
    low, high = interval_over_problems([1] * successes + [0] * (trials - successes), 1)
    wilson_low, wilson_high = wilson_interval(successes, trials)
    assert low <= wilson_low and high >= wilson_high
    assert high - low < 1.25 * (wilson_high - wilson_low)


@pytest.mark.parametrize("samples", [2, 8])
@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (3, 1), (0.2, 4), (50, 50), (2, 0.05)])
def test_the_interval_over_problems_covers_the_truth(samples: int, a: float, b: float) -> None:
    """Problems of all kinds of difficulty are drawn anew; the truth is known."""
    rng = np.random.default_rng(0)
    truth, trials, problems = a / (a + b), 1000, 100
    covered = 0
    for _ in range(trials):
        correct = rng.binomial(samples, rng.beta(a, b, problems))
        low, high = interval_over_problems(correct.tolist(), samples)
        covered += low <= truth <= high
    assert 0.93 <= covered / trials <= 0.98


def test_the_interval_over_problems_is_that_of_a_bootstrap_over_problems() -> None:
    rng = np.random.default_rng(1)
    correct = rng.binomial(8, rng.beta(1, 1, 400))
    means = rng.choice(correct / 8, (4000, 400)).mean(axis=1)
    expected = np.quantile(means, [0.025, 0.975])
    assert interval_over_problems(correct.tolist(), 8) == pytest.approx(expected, abs=2e-3)
    # Taking each sample for a problem of its own would tell more than is known.
    low, high = wilson_interval(int(correct.sum()), 8 * 400)
    assert high - low < 0.6 * (expected[1] - expected[0])


def by_every_vote(answers: Sequence[str | None], right: str, k: int) -> Fraction:
    """Asks every subset of k answers who wins, and shares a tie."""
    chance, subsets = Fraction(0), list(combinations(answers, k))
    for subset in subsets:
        votes = Counter(answer for answer in subset if answer is not None)
        level = [answer for answer, count in votes.items() if count == max(votes.values())]
        chance += Fraction(right in level, max(len(level), 1))
    return chance / len(subsets)


@pytest.mark.parametrize(
    "answers",
    [
        "r",
        "a",
        "-",
        "rrrr",
        "ra",
        "rab-",
        "rraab",
        "rraabb--",
        "rrraaab-",
        "raaa----",
        "aabbccdd",
        "rrabcd--",
        "rraaabbbc",
    ],
)
def test_a_majority_is_that_of_every_vote(answers: str) -> None:
    given = [None if answer == "-" else answer for answer in answers]
    for k in range(1, len(given) + 1):
        expected = float(by_every_vote(given, "r", k))
        assert majority_at_k(given, "r", k) == pytest.approx(expected)


def test_a_majority_of_random_answers_is_that_of_every_vote() -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        drawn = rng.choice(list("rrabcd-"), int(rng.integers(1, 10)))
        given = [None if answer == "-" else str(answer) for answer in drawn]
        for k in range(1, len(given) + 1):
            expected = float(by_every_vote(given, "r", k))
            assert majority_at_k(given, "r", k) == pytest.approx(expected)


def test_a_majority_by_hand() -> None:
    assert majority_at_k(["4", "4", "5", None], "4", 4) == 1.0
    assert majority_at_k(["4", "4", "5", "5"], "4", 4) == 0.5, "a tie is decided by lot"
    assert majority_at_k(["4", "5", "6", None], "4", 4) == pytest.approx(1 / 3)
    assert majority_at_k([None, None], "4", 2) == 0.0, "nobody votes"
    assert majority_at_k(["4", None, None, None], "4", 4) == 1.0, "who is silent has no vote"
    assert majority_at_k(["4", "4", "5", "5", "5"], "4", 1) == pytest.approx(2 / 5)
    for k in (0, 3):
        with pytest.raises(ValueError, match="needs as many answers, not 2"):
            majority_at_k(["4", "5"], "4", k)


def test_a_majority_of_many_answers_stays_exact() -> None:
    """With one rival the votes are hypergeometric, which sums of fractions give exactly."""
    right, rival, k = 70, 58, 32
    given = ["r"] * right + ["a"] * rival
    ways = [math.comb(right, i) * math.comb(rival, k - i) for i in range(k + 1)]
    expected = Fraction(sum(ways[k // 2 + 1 :]) * 2 + ways[k // 2], 2 * math.comb(128, k))
    assert majority_at_k(given, "r", k) == pytest.approx(float(expected), rel=1e-12)


def test_which_k_are_told() -> None:
    told = {samples: powers_up_to(samples) for samples in (1, 2, 3, 4, 8, 12)}
    assert told == {
        1: [1],
        2: [1, 2],
        3: [1, 2, 3],
        4: [1, 2, 4],
        8: [1, 2, 4, 8],
        12: [1, 2, 4, 8, 12],
    }
