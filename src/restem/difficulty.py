"""How hard problems are for a model: buckets of its success rate over sampled completions.

The paper's difficulty figure (section 5.3) puts test problems into four buckets by the *base's* success rate at T 1.0, and asks
in which of them training helped. What a newcomer would get wrong: a rate that chose the buckets cannot be compared across them.
Of problems that are equally hard, the lucky ones land in "easy" and the unlucky ones in "very hard".
"""

from __future__ import annotations

from collections.abc import Iterable

from restem.evaluation import rewards_by_problem
from restem.types import Sample

BUCKETS = ("easy", "medium", "hard", "very hard")
"""The paper's names, from the highest rate to the lowest."""
THRESHOLDS = (0.25, 0.5, 0.75)
"""The paper's lower ends of hard, medium and easy."""


def buckets(samples: Iterable[Sample], thresholds: tuple[float, float, float] = THRESHOLDS) -> dict[str, set[str]]:
    """Put problem ids into buckets by success rate: the share of a problem's graded samples with a reward above 0.

    By default easy is [0.75, 1], medium [0.5, 0.75), hard [0.25, 0.5) and very hard [0, 0.25): the paper says "75-100 %" and
    "50-75", and leaves open where 75% itself belongs; here a rate on a threshold belongs to the easier bucket. All four names
    are keys, from easy to very hard, whether or not a problem is there. A problem without a graded sample is in none.

    Raises ValueError for thresholds that do not rise strictly within (0, 1).
    """
    hard, medium, easy = thresholds
    if not 0 < hard < medium < easy < 1:
        raise ValueError(f"thresholds rise strictly between 0 and 1; got {thresholds}")
    found: dict[str, set[str]] = {name: set() for name in BUCKETS}
    for problem, rewards in rewards_by_problem(samples).items():
        rate = sum(reward > 0 for reward in rewards) / len(rewards)
        passed = sum(rate >= threshold for threshold in thresholds)
        found[BUCKETS[3 - passed]].add(problem)
    return found
