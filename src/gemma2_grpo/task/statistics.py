"""Statistics of a measurement: intervals and pass@k."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


@dataclass(frozen=True)
class Paired:
    """Two systems on the same problems."""

    both_right: int
    both_wrong: int
    fixed: int
    """Wrong by the first and right by the second."""
    broken: int
    """Right by the first and wrong by the second."""

    @property
    def p_value(self) -> float:
        """Two-sided exact test of whether the flips fall either way alike.

        Source: McNemar (1947), Psychometrika 12, 153-157, with the binomial distribution instead
        of its approximation.
        """
        flips, rarer = self.fixed + self.broken, min(self.fixed, self.broken)
        tail = sum(math.comb(flips, i) for i in range(rarer + 1))
        return min(1.0, tail / 2 ** (flips - 1)) if flips else 1.0


def compare_paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Counts how the answers to the same problems, in the same order, have changed.

    Raises:
        ValueError: if they are not as many.
    """
    kinds = Counter(zip(map(bool, before), map(bool, after), strict=True))
    return Paired(
        both_right=kinds[True, True],
        both_wrong=kinds[False, False],
        fixed=kinds[False, True],
        broken=kinds[True, False],
    )
