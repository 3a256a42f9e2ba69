"""Difficulty buckets: whose success rate, which bucket a boundary belongs to, and what the report shows of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restem.difficulty import BUCKETS, buckets
from restem.report import render
from restem.statistics import interval, pass_at_k
from restem.types import Sample
from test_report import Page, graded
from toy_runs import result, run


def samples(problem: str, rewards: Sequence[float | None]) -> list[Sample]:
    return [
        Sample(problem_id=problem, index=index, token_ids=(1,), text="t", finish="stop", reward=reward)
        for index, reward in enumerate(rewards)
    ]


def bucket_of(rewards: Sequence[float | None]) -> list[str]:
    return [name for name, found in buckets(samples("p", rewards)).items() if "p" in found]


@pytest.mark.parametrize(
    ("right", "of", "name"),
    [
        (0, 4, "very hard"),
        (1, 4, "hard"),
        (2, 4, "medium"),
        (3, 4, "easy"),
        (4, 4, "easy"),
        (15, 64, "very hard"),
        (16, 64, "hard"),
        (31, 64, "hard"),
        (32, 64, "medium"),
        (47, 64, "medium"),
        (48, 64, "easy"),
        (3, 12, "hard"),
        (9, 12, "easy"),
    ],
)
def test_a_rate_on_a_threshold_belongs_to_the_easier_bucket_row_43(right: int, of: int, name: str) -> None:
    assert bucket_of([1.0] * right + [0.0] * (of - right)) == [name]


def test_thresholds_are_met_by_rates_that_are_no_binary_fractions() -> None:
    found = buckets([s for n in range(11) for s in samples(str(n), [1.0] * n + [0.0] * (10 - n))], (0.1, 0.3, 0.7))
    assert found == {
        "easy": {"7", "8", "9", "10"},
        "medium": {"3", "4", "5", "6"},
        "hard": {"1", "2"},
        "very hard": {"0"},
    }


def test_what_could_not_be_graded_counts_neither_for_nor_against() -> None:
    assert bucket_of([1.0, None, None, None]) == ["easy"]
    assert bucket_of([1.0, 0.0, None, 0.0, 0.0]) == ["hard"]
    assert bucket_of([None, None]) == []
    assert buckets([]) == {name: set() for name in BUCKETS}


def test_any_reward_above_0_is_a_success() -> None:
    assert bucket_of([0.1, 0.0]) == ["medium"]


@given(st.dictionaries(st.text(max_size=3), st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=20), max_size=20))
def test_every_graded_problem_is_in_exactly_one_bucket(rewards: dict[str, list[float]]) -> None:
    found = buckets([sample for name, own in rewards.items() for sample in samples(name, own)])
    assert list(found) == ["easy", "medium", "hard", "very hard"]
    assert sorted(name for group in found.values() for name in group) == sorted(rewards)


@pytest.mark.parametrize("thresholds", [(0.5, 0.25, 0.75), (0.25, 0.25, 0.5), (0.0, 0.5, 0.75), (0.25, 0.5, 1.0)])
def test_thresholds_must_rise(thresholds: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="rise strictly"):
        buckets(samples("p", [1.0]), thresholds)


def test_the_samples_that_chose_a_bucket_overstate_it_and_others_do_not() -> None:
    """The trap that the report names: 2,000 problems, all solved half of the time, 8 samples each."""
    random_ = random.Random(0)
    first, second = ({str(n): [float(random_.random() < 0.5) for _ in range(8)] for n in range(2000)} for _ in range(2))
    found = buckets([sample for name, rewards in first.items() for sample in samples(name, rewards)])

    def rate(rewards: dict[str, list[float]], bucket: str) -> float:
        own = [reward for name in found[bucket] for reward in rewards[name]]
        return sum(own) / len(own)

    assert len(found["easy"]) > 200 and rate(first, "easy") >= 0.75
    assert len(found["very hard"]) > 50 and rate(first, "very hard") < 0.25
    assert rate(second, "easy") == pytest.approx(0.5, abs=0.06)
    assert rate(second, "very hard") == pytest.approx(0.5, abs=0.1)


# --- in the report ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pass@K sees only the first 30 of its 40 test problems."""
    settings = ("improve.learning_rate=0.9", "improve.val_samples=16", "task.test=40", "evaluate.problems=30")
    return run(tmp_path_factory.mktemp("difficulty") / "run", *settings)


def cell(values: list[float]) -> str:
    found = interval(values)
    return f"{found.value:.1%} [{100 * found.low:.1f}, {100 * found.high:.1f}], n = {found.n}" if values else "-"


def test_the_report_has_the_buckets_of_the_base_for_both_models_row_43(done: Path) -> None:
    accepted = result(done)["accepted"]["iteration"]
    assert accepted, "the run learnt something, so there are two models to compare"
    rewards = {
        (number, how): graded(done / f"iter-{number:02d}" / "eval" / "arithmetic" / how)
        for number in (0, accepted)
        for how in ("greedy", "sampled")
    }
    base = {name: sum(own) / len(own) for name, own in rewards[0, "sampled"].items()}
    ends = {"easy": (0.75, 1.1), "medium": (0.5, 0.75), "hard": (0.25, 0.5), "very hard": (0.0, 0.25)}
    wanted = []
    for name, (low, high) in ends.items():
        group = [problem for problem, rate in base.items() if low <= rate < high]
        row = [name]
        row += [cell([rewards[number, "greedy"][problem][0] for problem in group]) for number in (0, accepted)]
        for number in (0, accepted):
            own = [rewards[number, "sampled"][problem] for problem in group]
            row.append(cell([pass_at_k(len(found), int(sum(found)), 4) for found in own]))
        wanted.append(row)
    table = next(table for table in Page(render(done)).tables.values() if table[0][0] == "for the base")
    after = f"iteration {accepted}"
    assert table[0] == ["for the base", "pass@1, base", f"pass@1, {after}", "pass@4, base", f"pass@4, {after}"]
    assert table[1:] == wanted
    assert len(base) == 30 and sum(row[1] != "-" for row in wanted) > 1


def test_the_report_says_what_the_buckets_are_and_warns_of_their_trap(done: Path) -> None:
    page = render(done)
    assert "how often the base was right in 4 samples at T 1, drawn for 30 of the 40 test problems" in page
    assert "easy from 75%, medium from 50%, hard from 25%, very hard below" in page
    assert "pass@4 comes from the same samples, so it is too high in easy and too low in very hard" in page
    assert "Greedy answers had no part in the grouping" in page
