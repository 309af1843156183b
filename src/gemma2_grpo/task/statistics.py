"""Statistics of a measurement: intervals, pass@k, maj@k and paired comparison."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cache

import numpy as np
from pydantic import BaseModel, ConfigDict, computed_field

# Two-sided 95 % of the normal distribution.
_Z = 1.959963984540054


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion.

    Source: Wilson (1927), Journal of the American Statistical Association 22, 209-212.

    Raises:
        ValueError: without trials.
    """
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    share, z2 = successes / trials, _Z * _Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials)
    half *= math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def interval_over_problems(correct: Sequence[int], samples: int) -> tuple[float, float]:
    """95 % interval of the share of right samples, with problems and not samples as the unit.

    Samples of one problem are alike, so that n problems with K samples each tell less than n * K
    problems would. What varies here is the mean of each problem. As in Wilson's interval, z^2 / 2
    problems that are always right and as many that never are are added to those observed; so the
    interval does not vanish where all problems agree.

    Source: Agresti and Coull (1998), The American Statistician 52, 119-126, with means of problems
    in place of single trials.

    Args:
        correct: Right samples of each problem.
        samples: Samples drawn per problem.

    Raises:
        ValueError: without problems.
    """
    if not len(correct):
        raise ValueError("an interval needs at least one problem")
    means, pseudo = np.array(correct) / samples, _Z * _Z / 2
    problems = len(means) + 2 * pseudo
    centre = float(means.sum() + pseudo) / problems
    squares = float(((means - centre) ** 2).sum()) + pseudo * ((1 - centre) ** 2 + centre**2)
    half = _Z * math.sqrt(squares) / problems
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(correct: Sequence[int], samples: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, over problems.

    Source: Chen et al. (arXiv:2107.03374), equation 1: 1 - C(n - c, k) / C(n, k).

    Args:
        correct: Right samples of each problem.
        samples: Samples drawn per problem.
        k: At most `samples`.
    """
    misses = [math.comb(samples - c, k) / math.comb(samples, k) for c in correct]
    return 1.0 - float(np.mean(misses))


def powers_up_to(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself: for which k to tell pass@k and maj@k."""
    return [*(2**i for i in range((samples - 1).bit_length())), samples]


def majority_at_k(answers: Sequence[Hashable | None], right: Hashable, k: int) -> float:
    """Chance that the right answer wins a vote among k of one problem's answers.

    The mean over all subsets of k answers, counted and not drawn: of a tie between n answers,
    each wins 1/n of the time; None does not vote, and without any vote nothing wins.

    Source: Wang et al. (arXiv:2203.11171), with the ties and subsets that it leaves open.

    Args:
        answers: Answers, equal where they count as the same answer.
        right: The right answer.
        k: At most the number of answers.

    Raises:
        ValueError: if there are fewer than k answers.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"a vote of {k} needs as many answers, not {len(answers)}")
    counts = Counter(answer for answer in answers if answer is not None)
    rivals = tuple(sorted(count for answer, count in counts.items() if answer != right))
    return _majorities(counts[right], rivals, len(answers))[k - 1]


@cache  # Most problems are answered in one of a few ways.
def _majorities(right: int, rivals: tuple[int, ...], total: int) -> list[float]:
    """The chance for k = 1, ..., total, by the number of times that each answer was given."""
    silent = total - right - sum(rivals)
    wins = [0.0] * total
    for votes in range(1, right + 1):
        # ways[k, n]: in how many ways k answers fall to the rivals and to none, with no rival
        # above `votes` and n of them at it.
        ways = np.zeros((total + 1, len(rivals) + 1))
        ways[: silent + 1, 0] = [math.comb(silent, i) for i in range(silent + 1)]
        for rival in rivals:
            ways = _with_rival(ways, rival, votes)
        # Split between those that are level, the right answer among them.
        won = ways @ (1 / np.arange(1, len(rivals) + 2)) * math.comb(right, votes)
        for k in range(votes, total + 1):
            wins[k - 1] += won[k - votes]
    return [win / math.comb(total, k) for k, win in enumerate(wins, start=1)]


def _with_rival(ways: np.ndarray, rival: int, votes: int) -> np.ndarray:
    """The ways with one more answer, which was given `rival` times."""
    summed = np.zeros_like(ways)
    for taken in range(min(rival, votes) + 1):
        shifted = math.comb(rival, taken) * ways[: len(ways) - taken]
        if taken < votes:
            summed[taken:] += shifted
        else:
            summed[taken:, 1:] += shifted[:, :-1]
    return summed


class Paired(BaseModel):
    """Paired comparison of the answers of two systems to the same problems."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    num_both_right: int
    """Problems that both solve."""
    num_both_wrong: int
    """Problems that neither solves."""
    num_fixed: int
    """Problems that only the second solves."""
    num_broken: int
    """Problems that only the first solves."""

    @computed_field
    @property
    def p_value(self) -> float:
        """Two-sided exact p-value for fixed and broken being equally likely.

        Source: McNemar (1947), Psychometrika 12, 153-157, with the binomial distribution instead
        of its approximation.
        """
        flips, rarer = self.num_fixed + self.num_broken, min(self.num_fixed, self.num_broken)
        tail = sum(math.comb(flips, i) for i in range(rarer + 1))
        return min(1.0, tail / 2 ** (flips - 1)) if flips else 1.0


def compare_paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Counts how the answers to the same problems, in the same order, have changed.

    Raises:
        ValueError: if they are not as many.
    """
    kinds = Counter(zip(map(bool, before), map(bool, after), strict=True))
    return Paired(
        num_both_right=kinds[True, True],
        num_both_wrong=kinds[False, False],
        num_fixed=kinds[False, True],
        num_broken=kinds[True, False],
    )
