"""Selection keeps correct, finished samples, at most so many a problem, and accounts for every sample."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from restem.config import SelectConfig
from restem.selection import Selection, select
from restem.types import Problem, Sample

END = 99
PROBLEMS = [Problem(id=name, question=f"{name}?") for name in ("a", "b", "c")]


class Numbers:
    """Prompts of one token: the problem's place in the alphabet."""

    end_id = END

    def encode(self, problem: Problem) -> tuple[int, ...]:
        return (ord(problem.id) - ord("a"),)


def sample(problem: str, index: int, *, reward: float | None = 1.0, **fields: Any) -> Sample:
    reason = "correct" if reward else "verifier_error" if reward is None else "incorrect"
    known = {"token_ids": (index, index + 1), "text": f"{problem} {index}", "finish": "stop", "reason": reason}
    return Sample(problem_id=problem, index=index, reward=reward, **{**known, **fields})


def chosen(samples: Sequence[Sample], *, stream: str = "s", **settings: Any) -> Selection:
    return select(PROBLEMS, samples, Numbers(), SelectConfig(**settings), stream=stream)


def names(selection: Selection) -> list[tuple[str, int]]:
    return [(example.problem_id, example.index) for example in selection.examples]


def test_at_most_ten_are_kept_and_fewer_than_ten_all_row_12() -> None:
    samples = [sample("a", i) for i in range(13)] + [sample("b", i) for i in range(10)] + [sample("c", i) for i in range(3)]
    selection = chosen(samples)
    assert Counter(name for name, _ in names(selection)) == {"a": 10, "b": 10, "c": 3}
    assert names(selection)[10:] == [("b", i) for i in range(10)] + [("c", i) for i in range(3)]
    assert (selection.covered, selection.at_limit, selection.coverage) == (3, 2, 1.0)


def test_the_choice_among_more_than_ten_is_seeded_and_random_row_13() -> None:
    samples = [sample("a", i) for i in range(100)]
    assert names(chosen(samples, stream="seed 0")) == names(chosen(samples, stream="seed 0"))
    assert names(chosen(samples, stream="seed 0")) != names(chosen(samples, stream="seed 1"))
    often = Counter(i for seed in range(400) for _, i in names(chosen(samples, stream=f"seed {seed}")))
    assert len(often) == 100  # every sample has its chance
    assert min(often.values()) > 10 and max(often.values()) < 90  # 40 expected, 6 the standard deviation


def test_the_choice_of_one_problem_does_not_depend_on_the_others_row_13() -> None:
    many = [sample("a", i) for i in range(30)]
    alone = names(chosen(many))
    assert names(chosen([*many, *(sample("b", i) for i in range(30))]))[:10] == alone


def test_only_correct_samples_are_kept_with_their_reward_as_weight_row_14() -> None:
    samples = [sample("a", i, reward=float(i % 2)) for i in range(8)] + [sample("b", 0, reward=0.25)]
    selection = chosen(samples)
    assert names(selection) == [("a", 1), ("a", 3), ("a", 5), ("a", 7), ("b", 0)]
    assert [example.weight for example in selection.examples] == [1.0, 1.0, 1.0, 1.0, 0.25]
    assert selection.counts == {"incorrect": 4, "kept": 5}


@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.99])
def test_with_binary_rewards_every_threshold_selects_the_same_row_16(threshold: float) -> None:
    samples = [sample(name, i, reward=float(i % 3 == 0)) for name in "abc" for i in range(40)]
    assert chosen(samples, threshold=threshold) == chosen(samples)


def test_a_truncated_sample_is_never_kept_whatever_its_reward_row_22() -> None:
    cut = sample("a", 0, finish="length", reason="correct")
    selection = chosen([cut, sample("a", 1)])
    assert names(selection) == [("a", 1)]
    assert selection.counts == {"kept": 1, "truncated": 1}


def test_an_example_is_the_sampled_tokens_and_the_end_token_row_22() -> None:
    (example,) = chosen([sample("b", 0, token_ids=(7, 8, 9), text="not what 7 8 9 say")]).examples
    assert (example.prompt_ids, example.completion_ids) == ((1,), (7, 8, 9, END))


def test_a_sample_that_could_not_be_graded_is_neither_kept_nor_incorrect() -> None:
    selection = chosen([sample("a", 0, reward=None), sample("a", 1, reward=None, reason="timeout"), sample("a", 2, reward=0.0)])
    assert selection.examples == ()
    assert selection.counts == {"incorrect": 1, "timeout": 1, "verifier_error": 1}
    assert selection.covered == 0


def test_shortest_keeps_the_fewest_tokens_and_of_equals_the_first() -> None:
    lengths = [5, 2, 3, 2, 9, 1]
    samples = [sample("a", i, token_ids=(1,) * length) for i, length in enumerate(lengths)]
    assert names(chosen(samples, choose="shortest", max_per_problem=3)) == [("a", 1), ("a", 3), ("a", 5)]
    assert names(chosen(samples, choose="shortest", max_per_problem=2)) == [("a", 1), ("a", 5)]


def test_first_keeps_the_first_drawn() -> None:
    samples = [sample("a", i, reward=float(i not in (0, 2))) for i in range(9)]
    assert names(chosen(samples, choose="first", max_per_problem=3)) == [("a", 1), ("a", 3), ("a", 4)]


def test_repeats_are_removed_only_when_asked_and_before_the_limit_row_50() -> None:
    texts = ["2 + 2", "2 + 2", "2  + 2\n", "TWO", "two", "other"]
    samples = [sample("a", i, text=text) for i, text in enumerate(texts)] + [sample("b", 0, text="2 + 2")]
    kept = {how: names(chosen(samples, dedup=how, max_per_problem=5)) for how in ("off", "exact", "normalised")}
    assert len([name for name, _ in kept["off"] if name == "a"]) == 5
    assert kept["exact"] == [*(("a", i) for i in (0, 2, 3, 4, 5)), ("b", 0)]
    assert kept["normalised"] == [*(("a", i) for i in (0, 3, 5)), ("b", 0)]
    assert chosen(samples, dedup="normalised").counts == {"duplicate": 3, "kept": 4}


def test_the_counts_sum_to_all_samples() -> None:
    draw = random.Random(0)
    samples = [
        sample(
            name,
            i,
            reward=draw.choice([0.0, 1.0, 1.0, None]),
            finish=draw.choice(["stop", "stop", "length"]),
            text=draw.choice("xyzw") * 3,
        )
        for name in "ab"
        for i in range(60)
    ]
    selection = chosen(samples, dedup="exact", max_per_problem=2)
    assert sum(selection.counts.values()) == len(samples)
    assert selection.counts["kept"] == len(selection.examples) == 4
    assert set(selection.counts) == {"duplicate", "incorrect", "kept", "over_the_limit", "truncated", "verifier_error"}
    assert (selection.problems, selection.covered) == (3, 2)


def test_the_result_does_not_depend_on_the_order_of_the_samples() -> None:
    samples = [sample(name, i, text=f"{i % 15}") for name in "abc" for i in range(40)]
    mixed = random.Random(1).sample(samples, len(samples))
    for settings in ({}, {"dedup": "exact"}, {"choose": "shortest"}, {"choose": "first"}):
        assert chosen(mixed, **settings) == chosen(samples, **settings)


def test_no_samples_make_no_examples_and_no_coverage() -> None:
    assert chosen([]) == Selection(examples=(), counts={}, problems=3, covered=0, at_limit=0)
    assert replace(chosen([]), problems=0).coverage == 0.0
