"""Several comparisons, and how small a difference can be seen: against hand-computed values and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from restem.evaluation import majority_at, variety
from restem.significance import detectable_difference, holm
from restem.statistics import paired_test
from restem.types import Sample
from restem.verifiers.math import canonical


def test_holm_by_hand() -> None:
    """Four tests: 0.01 x 4, 0.02 x 3, 0.03 x 2 (not below the one before), 0.9 x 1."""
    assert holm([0.02, 0.9, 0.01, 0.03]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert holm([]) == [] and holm([0.2]) == [0.2]
    with pytest.raises(ValueError, match=r"p-value lies between"):
        holm([1.2])


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_lies_between_the_p_value_and_bonferroni(values: list[float]) -> None:
    adjusted = holm(values)
    assert all(p <= a <= min(1.0, len(values) * p) + 1e-12 for p, a in zip(values, adjusted, strict=True))
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_holm_seldom_raises_a_false_alarm() -> None:
    """Five true hypotheses at once: at most 5% of the families see any rejected."""
    chance = np.random.default_rng(0)
    alarms = [min(holm(list(chance.random(5)))) <= 0.05 for _ in range(4000)]
    assert 0.035 < np.mean(alarms) < 0.06


@pytest.mark.parametrize(("n", "changed"), [(400, 0.2), (100, 0.3), (1000, 0.1)])
def test_a_detectable_difference_is_found_about_as_often_as_it_says(n: int, changed: float) -> None:
    """80% of the time, within what McNemar's exact test and the approximation differ by."""
    d = detectable_difference(n, changed)
    chance = np.random.default_rng(1)
    found = 0
    for _ in range(400):
        kind = chance.choice(3, size=n, p=[(changed + d) / 2, (changed - d) / 2, 1 - changed])
        wins, losses = int((kind == 0).sum()), int((kind == 1).sum())
        before, after = [0.0] * wins + [1.0] * losses, [1.0] * wins + [0.0] * losses
        found += paired_test(before, after).p_value < 0.05 if wins + losses else 0
    assert 0.70 < found / 400 < 0.88


def test_detectable_differences_at_the_edges() -> None:
    assert math.isnan(detectable_difference(0, 0.2)) and math.isnan(detectable_difference(100, 0.0))
    assert detectable_difference(3, 0.2) == pytest.approx(0.2)
    assert detectable_difference(4000, 0.2) < detectable_difference(400, 0.2) < detectable_difference(40, 0.2)
    with pytest.raises(ValueError, match=r"share of changes"):
        detectable_difference(10, 1.5)


def sample(problem: str, index: int, answer: str | None, reward: float | None, text: str = "t") -> Sample:
    return Sample(
        problem_id=problem, index=index, token_ids=(1, 2), text=text, finish="stop", logprob=-1.5, reward=reward, answer=answer
    )


def test_spellings_of_one_answer_vote_together() -> None:
    votes = [
        sample("p", 0, "1/2", 1.0),
        sample("p", 1, "0.5", 1.0),
        sample("p", 2, "3", 0.0),
        sample("p", 3, "3", 0.0),
        sample("p", 4, r"\frac12", 1.0),
    ]
    assert majority_at(votes, 5, canonical).value == 1.0
    assert majority_at(votes, 5).value == 0.0
    assert majority_at([*votes, sample("q", 0, "1", None)], 5, canonical).n == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0.5", r"\frac{1}{2}", True),
        ("1,000", "1000", True),
        (r"x^{2}", "x^2", True),
        ("5 cm", "5", False),
        ("7", "8", False),
        ("(1,2)", "(1, 2)", True),
    ],
)
def test_canonical_answers(one: str, other: str, same: bool) -> None:
    assert (canonical(one) == canonical(other)) is same


def test_variety_by_hand() -> None:
    found = variety(
        [
            sample("p", 0, "1", 1.0, "a"),
            sample("p", 1, "1", 1.0, "a"),
            sample("q", 0, "1", 1.0, "b"),
            sample("q", 1, None, 0.0, "c"),
        ]
    )
    assert found == {"distinct": 0.75, "tokens": 3.0, "entropy": 0.5, "truncated": 0.0, "no_answer": 0.0}
