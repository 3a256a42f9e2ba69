"""Estimators against brute force, intervals and tests against scipy, and figures worked out by hand."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from restem.statistics import describe, interval, majority_at_k, paired_test, pass_at_k


def pass_by_enumeration(n: int, c: int, k: int) -> float:
    subsets = list(itertools.combinations([i < c for i in range(n)], k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def majority_by_enumeration(answers: list[str | None], rewards: list[float | None], k: int) -> float:
    correct = {answer: rewards[answers.index(answer)] == 1 for answer in answers if answer is not None}
    total = 0.0
    subsets = list(itertools.combinations(answers, k))
    for subset in subsets:
        votes = [answer for answer in subset if answer is not None]
        most = max((votes.count(answer) for answer in votes), default=0)
        tied = {answer for answer in votes if votes.count(answer) == most}
        total += sum(correct[answer] for answer in tied) / len(tied) if tied else 0.0
    return total / len(subsets)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                assert pass_at_k(n, c, k) == pytest.approx(pass_by_enumeration(n, c, k), abs=1e-14)


def test_pass_at_k_keeps_its_digits_for_large_n():
    exact = 1 - math.comb(99_999, 50_000) / math.comb(100_000, 50_000)
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(exact, rel=1e-12)
    assert 0 < pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 5, 2), (4, -1, 2), (-1, 0, 1), (4, 2, 0), (0, 0, 1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n: int, c: int, k: int):
    with pytest.raises(ValueError, match=f"n={n}|c={c}"):
        pass_at_k(n, c, k)


@given(st.integers(1, 200), st.data())
def test_pass_at_k_grows_with_k_and_stays_a_probability(n: int, data: st.DataObject):
    c = data.draw(st.integers(0, n))
    values = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert values[0] == pytest.approx(c / n)
    assert all(0 <= value <= 1 for value in values)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert values[-1] == (1 if c else 0)


def test_majority_by_hand():
    # Pairs of a, a, b: aa is right, the two ab are ties worth 1/2 each.
    assert majority_at_k(["a", "a", "b"], [1, 1, 0], 2) == pytest.approx(2 / 3)
    # No answer does not vote: of the pairs of a, None, None two hold the right answer, one has no vote and counts 0.
    assert majority_at_k(["a", None, None], [1, 0, 0], 2) == pytest.approx(2 / 3)
    # Two right answers and a wrong one tie three ways: 2/3.
    assert majority_at_k(["a", "b", "c"], [1, 1, 0], 3) == pytest.approx(2 / 3)
    assert majority_at_k([None, None], [0, 0], 2) == 0


def test_only_the_first_sample_says_whether_an_answer_is_correct():
    assert majority_at_k(["a", "a"], [1, 0], 1) == 1
    assert majority_at_k(["a", "a"], [None, 1], 1) == 0


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.sampled_from([0, 1])), min_size=1, max_size=8))
def test_majority_is_the_average_over_all_subsets(samples: list[tuple[str | None, int]]):
    answers, rewards = [a for a, _ in samples], [float(r) for _, r in samples]
    for k in range(1, len(samples) + 1):
        assert majority_at_k(answers, rewards, k) == pytest.approx(majority_by_enumeration(answers, rewards, k))


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_majority_at_1_is_the_mean_reward_and_order_does_not_matter(answers: list[str | None], rng: random.Random):
    rewards = [float(answer == "b") for answer in answers]
    assert majority_at_k(answers, rewards, 1) == pytest.approx(sum(rewards) / len(rewards))
    k = (len(answers) + 1) // 2
    value = majority_at_k(answers, rewards, k)
    assert 0 <= value <= 1
    shuffled = rng.sample(answers, len(answers))
    assert majority_at_k(shuffled, [float(answer == "b") for answer in shuffled], k) == value


def test_majority_of_64_matches_simulation():
    rng = random.Random(0)
    answers = ["right"] * 20 + ["wrong"] * 18 + [None] * 10 + [f"odd {i % 8}" for i in range(16)]
    rewards = [float(answer == "right") for answer in answers]
    total = 0.0
    for _ in range(4000):
        votes = [answer for answer in rng.sample(answers, 16) if answer is not None]
        most = max(votes.count(answer) for answer in set(votes))
        tied = [answer for answer in set(votes) if votes.count(answer) == most]
        total += ("right" in tied) / len(tied)
    assert majority_at_k(answers, rewards, 16) == pytest.approx(total / 4000, abs=0.03)  # 4 standard errors


@pytest.mark.parametrize(
    ("answers", "rewards", "k"),
    [(["a"], [1], 2), ([], [], 1), (["a"], [1], 0), (["a", "b"], [1], 1)],
)
def test_majority_refuses_too_few_samples(answers: list[str | None], rewards: list[float], k: int):
    with pytest.raises(ValueError, match="majority@k"):
        majority_at_k(answers, rewards, k)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (3, 10), (41, 500)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_binary_values_get_the_wilson_interval(successes: int, n: int, level: float):
    got = interval([1] * successes + [0] * (n - successes), level=level)
    expected = binomtest(successes, n).proportion_ci(level, method="wilson")
    assert got == pytest.approx((successes / n, expected.low, expected.high, n), abs=1e-12)


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    trials = 200
    covered = 0
    for trial in range(trials):
        rates_P = rng.beta(0.5, 1.5, size=60)  # true mean 0.25
        values_P = rng.binomial(8, rates_P) / 8
        got = interval(values_P.tolist(), seed=trial)
        covered += got.low <= 0.25 <= got.high
    assert 0.89 <= covered / trials <= 0.99


def test_bootstrap_interval_is_as_wide_as_the_normal_one_for_many_problems():
    values = [i % 9 / 8 for i in range(900)]
    got = interval(values)
    half = 1.96 * np.std(values) / 30
    assert (got.low, got.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.03 * half)


def test_intervals_depend_on_values_and_seed_alone():
    values = [i % 7 / 6 for i in range(50)]
    assert interval(values, seed=3) == interval(values, seed=3) != interval(values, seed=4)
    before, after = values, values[1:] + values[:1]
    assert paired_test(before, after, seed=3) == paired_test(before, after, seed=3)


def test_degenerate_intervals():
    nothing = interval([])
    assert nothing.n == 0 and all(math.isnan(x) for x in nothing[:3])
    assert interval([0.4]) == (0.4, 0.4, 0.4, 1)
    with pytest.raises(ValueError, match="finite"):
        interval([0.5, math.nan])
    with pytest.raises(ValueError, match="level"):
        interval([0.5], level=95)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_interval_holds_its_mean_and_stays_within_the_values(values: list[float]):
    got = interval(values)
    assert got.low <= got.value + 1e-9 and got.value <= got.high + 1e-9
    assert got.low >= 0 and got.high <= 1


@pytest.mark.parametrize(("wins", "losses", "same"), [(9, 1, 10), (5, 5, 0), (0, 6, 30), (0, 0, 7), (40, 22, 100)])
def test_binary_rewards_get_the_exact_mcnemar_test(wins: int, losses: int, same: int):
    got = paired_test([0] * wins + [1] * losses + [1] * same, [1] * wins + [0] * losses + [1] * same)
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert got.method == "mcnemar"
    assert got.p_value == pytest.approx(expected)
    assert (got.wins, got.losses, got.n) == (wins, losses, wins + losses + same)
    assert got.difference == pytest.approx((wins - losses) / got.n)
    assert got.low <= got.difference <= got.high


def test_few_differences_get_the_exact_sign_flip_test():
    # All 5 differences are positive: only all-plus and all-minus of the 32 patterns are as extreme.
    got = paired_test([0.0] * 7, [0.1, 0.2, 0.3, 0.1, 0.7, 0.0, 0.0])
    assert (got.method, got.p_value) == ("sign-flip-exact", 2 / 32)
    # Differences .5, .25, -.25: sums of at least .5 in size are +-(1, .5, .5), 6 of the 8 patterns.
    assert paired_test([0.0, 0.0, 0.25], [0.5, 0.25, 0.0]).p_value == 6 / 8


def test_random_sign_flips_agree_with_the_exact_test():
    rng = np.random.default_rng(1)
    differences = rng.normal(0.3, 0.5, size=13)
    signs = np.array(list(itertools.product([-1, 1], repeat=13)))
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean()
    got = paired_test([0.0] * 13, differences.tolist())
    assert got.method == "sign-flip"
    assert got.p_value == pytest.approx(exact, abs=0.01)


def test_random_sign_flips_never_give_zero():
    assert paired_test([0.0] * 100, [0.5] * 100).p_value == 1 / 20_001


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 0.5, 1]), st.sampled_from([0, 0.25, 1])), min_size=1, max_size=40))
def test_swapping_the_sides_turns_the_difference_around(pairs: list[tuple[float, float]]):
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    there, back = paired_test(before, after), paired_test(after, before)
    assert there.difference == -back.difference
    assert (there.wins, there.losses) == (back.losses, back.wins)
    assert there.p_value == back.p_value
    assert 0 < there.p_value <= 1


def test_a_paired_test_needs_pairs():
    with pytest.raises(ValueError, match="3 values before and 2 after"):
        paired_test([0, 1, 1], [0, 1])
    nothing = paired_test([], [])
    assert nothing.n == 0 and nothing.p_value == 1 and math.isnan(nothing.difference)
    assert describe(nothing) == "nothing to compare: no problems"


def test_describe_says_how_sure_it_is():
    better = describe(paired_test([0] * 80, [0] * 60 + [1] * 20))
    assert better.startswith("better: +25.0 points (95% interval +") and "p = 1.9e-06, n = 80; 20 better, 0" in better
    assert describe(paired_test([1] * 80, [1] * 60 + [0] * 20)).startswith("worse: -25.0 points")
    noise = describe(paired_test([0, 1, 0, 0], [1, 0, 1, 0]))
    assert noise.startswith("within noise: +25.0 points") and "p = 1, n = 4; 2 better, 1 worse" in noise
    assert describe(paired_test([0.5, 1], [0.5, 1])).startswith("within noise: 0.0 points (95% interval 0.0 to 0.0")
