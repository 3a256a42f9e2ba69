"""Estimators, intervals and paired tests for rewards: the only place where a figure gets its error bar.

The problem is the unit throughout: several samples of one problem are not independent, so intervals and tests take one
value per problem (its reward, or its mean over samples). What a newcomer would get wrong: an interval from
`interval` is about *these problems as a draw from many like them*; two models on the same problems are compared by
`paired_test`, never by whether their intervals overlap.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 10_000
"""Bootstrap resamples: the percentiles of a 95% interval then vary by about 2% of its width."""
FLIPS = 20_000
"""Random sign flips of a permutation test; the smallest p-value it can give is 1 / (FLIPS + 1)."""
EXACT_FLIPS_UP_TO = 12
"""With so few non-zero differences all 2**12 sign patterns are enumerated instead."""
COST_OF_A_COUNT = 10
"""How many drawn problems cost as much time as one drawn count of a distinct value."""
NOISE_LEVEL = 0.05
"""A difference whose p-value is at least this is described as within noise."""


class Interval(NamedTuple):
    """A mean over problems with its confidence limits, in the unit of the values."""

    value: float
    low: float
    high: float
    n: int
    """How many problems."""


class PairedTest(NamedTuple):
    """How `after` differs from `before` on the same problems; differences are after minus before."""

    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided, of the hypothesis that there is no difference."""
    n: int
    """How many problems."""
    wins: int
    """Problems on which `after` is higher."""
    losses: int
    """Problems on which `after` is lower."""
    method: str
    """"mcnemar" (exact), "sign-flip-exact" or "sign-flip"."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate, from n samples of which c are correct, the chance that at least one of k samples is correct.

    The unbiased estimator 1 - C(n-c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, equation 1), computed as
    1 - prod_{i=n-c+1..n} (1 - k/i), which neither overflows nor loses the small ratios. It is 1 where every set of k
    holds a correct sample (n - c < k).

    Raises ValueError for k below 1 or above n (no unbiased estimate exists), and for c outside 0..n.
    """
    _check_k(n, k, "pass@k")
    if not 0 <= c <= n:
        raise ValueError(f"pass@k needs a number of correct samples between 0 and n; got c={c} of n={n}")
    if n - c < k:
        return 1.0
    none_correct = math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))
    return 1.0 - none_correct


def majority_at_k(answers: Sequence[str | None], rewards: Sequence[float | None], k: int) -> float:
    """Compute the chance that the most frequent answer among k of the n samples is a correct one.

    The exact expectation over all C(n, k) subsets, with no sampling and no dependence on the order of the samples.
    Samples with equal answers form a group; None is no answer and does not vote. A tie is shared: with t groups at the
    top of which s are correct the subset counts s/t. A subset without a single vote counts 0.

    `answers[i]` and `rewards[i]` belong to sample i; make answers that mean the same equal as text beforehand. A
    group is correct if the reward of its first sample is 1; a reward of None (not graded) is not 1.

    How: fix the top count v. Groups smaller than v cannot reach it; their samples, and those without an answer, fill up
    the subset in any way. Drawing j of a larger group of size g contributes C(g, j) x^j, j at most v, to a product over
    the groups, kept apart by how many of them give v: s correct and u wrong ones. The coefficient of x^k is the number of
    such subsets, each of which counts s / (s + u). All arithmetic is on exact integers and fractions.

    Raises ValueError for k below 1 or above n, and for sequences of different lengths.
    """
    if len(answers) != len(rewards):
        raise ValueError(f"majority@k needs one reward per answer; got {len(answers)} answers, {len(rewards)} rewards")
    n = len(answers)
    _check_k(n, k, "majority@k")

    sizes: dict[str, int] = {}
    is_correct: dict[str, bool] = {}
    for answer, reward in zip(answers, rewards, strict=True):
        if answer is not None:
            sizes[answer] = sizes.get(answer, 0) + 1
            is_correct.setdefault(answer, reward == 1)
    if not any(is_correct.values()):
        return 0.0
    right = [size for answer, size in sizes.items() if is_correct[answer]]
    wrong = [size for answer, size in sizes.items() if not is_correct[answer]]

    # By how many groups share the top: the correct ones among them, summed over the subsets.
    right_by_tied: Counter[int] = Counter()
    for top in range(1, min(k, max(right)) + 1):
        rest = n - sum(size for size in sizes.values() if size >= top)
        wrong_at_top = _at_top(wrong, top, n, k)
        for s, right_ways in enumerate(_at_top(right, top, n, k)[1:], start=1):
            ways = right_ways * _draws(rest, k, n)
            for u, wrong_ways in enumerate(wrong_at_top):
                subsets = ((ways * wrong_ways) >> (n * k)) & ((1 << n) - 1)
                right_by_tied[s + u] += s * subsets
    expectation = sum((Fraction(total, tied) for tied, total in right_by_tied.items()), Fraction(0))
    return float(expectation / math.comb(n, k))


def interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Give the mean over problems with a confidence interval; `values` holds one number per problem.

    All values 0 or 1: the Wilson score interval (Wilson 1927), which stays inside [0, 1] and is not empty at 0% or
    100%. Otherwise the percentile bootstrap over problems (the clusters) with 10,000 resamples, a function of `values`
    and `seed` alone.

    No values: nan throughout, n = 0. Values that are all equal but not 0/1 give an interval of width 0, and so does a
    single such value: the bootstrap knows no variation beyond what it was shown, so read n beside it. With fewer than
    about 20 problems the bootstrap is too narrow.

    Raises ValueError for a level outside (0, 1) or a value that is not finite (leave ungraded problems out first).
    """
    import numpy as np

    if not 0 < level < 1:
        raise ValueError(f"the confidence level lies strictly between 0 and 1; got {level}")
    values_P = _finite(values, "interval")
    n = values_P.size
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(values_P.mean())
    if _is_binary(values_P):
        low, high = _wilson(int(values_P.sum()), n, level)
    else:
        low, high = _bootstrap(values_P, level, np.random.default_rng(seed))
    return Interval(mean, low, high, n)


def paired_test(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> PairedTest:
    """Test whether `after` differs from `before`: one value per problem, the same problems in the same order.

    All values 0 or 1: the exact McNemar test, a two-sided binomial test with p = 1/2 of the wins among the problems
    whose reward changed. Otherwise a sign-flip permutation test of the mean difference: exact over all 2**m sign
    patterns for up to 12 non-zero differences, else 20,000 random patterns and p = (b + 1) / (m + 1) (Phipson and Smyth
    2010), seeded. The interval is the 95% percentile bootstrap over problems in all cases, so it may disagree with the
    p-value at the margin; `describe` goes by the p-value.

    No problems: nan difference and limits, p = 1. No differences: p = 1.

    Raises ValueError for sequences of different lengths or values that are not finite.
    """
    import numpy as np

    if len(before) != len(after):
        raise ValueError(
            f"a paired test needs the same problems on both sides; got {len(before)} values before and {len(after)} after"
        )
    before_P, after_P = _finite(before, "paired_test"), _finite(after, "paired_test")
    differences_P = after_P - before_P
    n = differences_P.size
    wins, losses = int((differences_P > 0).sum()), int((differences_P < 0).sum())
    changed = differences_P[differences_P != 0]

    # Independent streams, so that the interval does not depend on whether the test needed random numbers.
    rng_flips, rng_bootstrap = np.random.default_rng(seed).spawn(2)
    if _is_binary(before_P) and _is_binary(after_P):
        method, p_value = "mcnemar", _mcnemar(wins, losses)
    elif changed.size <= EXACT_FLIPS_UP_TO:
        method, p_value = "sign-flip-exact", _sign_flip_exact(changed)
    else:
        method, p_value = "sign-flip", _sign_flip_random(changed, rng_flips)

    if n == 0:
        return PairedTest(math.nan, math.nan, math.nan, p_value, 0, 0, 0, method)
    low, high = _bootstrap(differences_P, 0.95, rng_bootstrap)
    return PairedTest(float(differences_P.mean()), low, high, p_value, n, wins, losses, method)


def describe(test: PairedTest) -> str:
    """Say in words what a paired test found, for values that are rewards in [0, 1]; points are percentage points.

    "within noise" where p is at least 0.05, else "better" or "worse". For example:
    `better: +6.2 points (95% interval +2.1 to +10.4, p = 0.0031, n = 240; 25 better, 10 worse)`.
    """
    if test.n == 0:
        return "nothing to compare: no problems"
    if test.p_value >= NOISE_LEVEL or test.difference == 0:
        verdict = "within noise"
    else:
        verdict = "better" if test.difference > 0 else "worse"
    points, low, high = (_signed_points(x) for x in (test.difference, test.low, test.high))
    return (
        f"{verdict}: {points} points (95% interval {low} to {high}, p = {test.p_value:.2g}, n = {test.n}; "
        f"{test.wins} better, {test.losses} worse)"
    )


def _check_k(n: int, k: int, name: str) -> None:
    if n < 0 or k < 1:
        raise ValueError(f"{name} needs n >= 0 samples and k >= 1; got n={n}, k={k}")
    if k > n:
        raise ValueError(f"{name} needs at least k samples per problem; got n={n} samples for k={k}: draw more or lower k")


def _at_top(sizes: list[int], top: int, n: int, k: int) -> list[int]:
    """Count, for groups of at least `top` samples, the draws in which exactly t give `top` and the others fewer.

    [t] is a polynomial in the number of votes, powers above k dropped. A polynomial is held as one integer, its value at
    x = 2**n (Kronecker substitution): a coefficient counts subsets of n samples and stays below 2**n, so each has n bits
    of its own, and a product of polynomials is one product of integers.
    """
    kept = (1 << (n * (k + 1))) - 1
    ways = [1]
    for size in sizes:
        if size >= top:
            fewer, at_top = _draws(size, top - 1, n), math.comb(size, top) << (n * top)
            stay = [(poly * fewer) & kept for poly in ways]
            join = [(poly * at_top) & kept for poly in ways]
            ways = [a + b for a, b in zip([*stay, 0], [0, *join], strict=True)]
            if not ways[-1]:  # so many groups at the top are more than k votes
                ways.pop()
    return ways


@lru_cache(maxsize=4096)
def _draws(size: int, most: int, n: int) -> int:
    """The polynomial of drawing at most `most` of `size` samples, the sum of C(size, j) x^j, at x = 2**n."""
    return sum(math.comb(size, j) << (n * j) for j in range(min(size, most) + 1))


def _finite(values: Sequence[float], name: str) -> NDArray[np.float64]:
    import numpy as np

    array = np.asarray(list(values), dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} needs finite values; leave out problems that could not be graded")
    return array


def _is_binary(values: NDArray[np.float64]) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _wilson(successes: int, n: int, level: float) -> tuple[float, float]:
    """(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), with z the normal quantile of (1 + level) / 2."""
    from scipy.special import ndtri

    z = float(ndtri((1 + level) / 2))
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the limit is 0 and 1 by algebra; rounding would leave it a hair inside or outside.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def _bootstrap(values: NDArray[np.float64], level: float, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile limits of the mean over RESAMPLES draws of all problems with replacement."""
    import numpy as np

    # Problems with equal values are interchangeable: drawing how often each distinct value occurs is the same
    # distribution as drawing problems, and cheaper when values are means of few samples.
    distinct, counts = np.unique(values, return_counts=True)
    if distinct.size == 1:
        return float(distinct[0]), float(distinct[0])
    repeats = distinct.size * COST_OF_A_COUNT < values.size
    sums = np.empty(RESAMPLES)
    chunk = max(1, 4_000_000 // (distinct.size if repeats else values.size))  # 32 MB of numbers at a time
    for start in range(0, RESAMPLES, chunk):
        rows = slice(start, min(start + chunk, RESAMPLES))
        if repeats:
            sums[rows] = rng.multinomial(values.size, counts / values.size, size=rows.stop - start) @ distinct
        else:
            sums[rows] = values[rng.integers(values.size, size=(rows.stop - start, values.size))].sum(1)
    low, high = np.quantile(sums / values.size, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mcnemar(wins: int, losses: int) -> float:
    from scipy.stats import binomtest

    return 1.0 if wins + losses == 0 else float(binomtest(wins, wins + losses, 0.5).pvalue)


def _sign_flip_exact(differences: NDArray[np.float64]) -> float:
    import numpy as np

    m = differences.size
    signs = 1 - 2 * ((np.arange(2**m)[:, None] >> np.arange(m)) & 1)
    return float(_at_least_as_far(signs @ differences, differences).mean())


def _sign_flip_random(differences: NDArray[np.float64], rng: np.random.Generator) -> float:
    import numpy as np

    extreme = 0
    chunk = max(1, 4_000_000 // differences.size)
    for start in range(0, FLIPS, chunk):
        rows = min(chunk, FLIPS - start)
        signs = 1 - 2 * rng.integers(0, 2, size=(rows, differences.size), dtype=np.int8)
        extreme += int(_at_least_as_far(signs @ differences, differences).sum())
    return (extreme + 1) / (FLIPS + 1)


def _at_least_as_far(sums: NDArray[np.float64], differences: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Sums of flipped differences at least as far from 0 as the observed one; equal sums count despite rounding."""
    import numpy as np

    slack = 1e-12 * np.abs(differences).sum()
    return np.asarray(np.abs(sums) >= abs(differences.sum()) - slack)


def _signed_points(fraction: float) -> str:
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("-0.0", "+0.0") else text
