"""How to read several comparisons, and how small a difference this many problems can show.

Beside `restem.statistics`, which has the single comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests (Holm 1979): reject those that are at most alpha, and the chance that any true
    hypothesis is rejected is at most alpha, whatever their dependence. In the order given; each at least its own p-value.
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"a p-value lies between 0 and 1; got {p}")
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def detectable_difference(n: int, changed: float, *, power: float = 0.8, level: float = 0.05) -> float:
    """The least difference of two success rates that a paired test on n problems finds with this power.

    `changed`: the share of problems on which the two differ, in either direction. The normal approximation of McNemar's test
    (Connor 1987): n = (z_a sqrt(c) + z_b sqrt(c - d^2))^2 / d^2, solved for d. It is at most `changed`, where all changes go
    one way; nan without problems or changes.
    """
    if n < 0 or not 0 <= changed <= 1:
        raise ValueError(f"detectable_difference needs n >= 0 and a share of changes in [0, 1]; got {n} and {changed}")
    if not n or not changed:
        return math.nan
    alpha, beta = NormalDist().inv_cdf(1 - level / 2), NormalDist().inv_cdf(power)
    low, high = 0.0, changed
    for _ in range(60):
        d = (low + high) / 2
        needed = (alpha * math.sqrt(changed) + beta * math.sqrt(max(0.0, changed - d * d))) ** 2
        low, high = (low, d) if n * d * d >= needed else (d, high)
    return high
