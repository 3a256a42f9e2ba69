"""The regression corpus (math_corpus.py): no false positive at all, and at least 98% right; known misses are named."""

from __future__ import annotations

import pytest

from math_corpus import COMPLETIONS, PAIRS
from restem.verifiers.math import equivalent, extract
from test_math_verifier import COMPLETIONS as MORE_COMPLETIONS
from test_math_verifier import DIFFERENT, SAME

MISSES = {
    (r"\{2,4\}", r"\{2,4,4\}"): "a set that repeats an element",
    (r"[1,2]\cup[2,3]", "[1,3]"): "intervals that touch",
    ("2:3", "4:6"): "a ratio that is not reduced",
    ("B", r"\text{(B) } 12"): "a choice with its text",
}
"""Right answers that are refused. Better than the reverse: what is accepted is trained on."""


@pytest.mark.parametrize(("gold", "answer", "equal", "trap"), PAIRS, ids=[f"{n} {p[3]}" for n, p in enumerate(PAIRS)])
def test_a_pair_of_the_corpus(gold: str, answer: str, equal: bool, trap: str) -> None:
    assert equivalent(gold, answer) is (equal and (gold, answer) not in MISSES)


@pytest.mark.parametrize(("style", "completion", "answer"), COMPLETIONS)
def test_what_is_read_from_a_completion(style: str, completion: str, answer: str | None) -> None:
    assert extract(completion, style=style) == answer


def test_the_corpus_is_large_and_goes_both_ways() -> None:
    assert len(PAIRS) + len(SAME) + len(DIFFERENT) >= 300
    assert len(COMPLETIONS) + len(MORE_COMPLETIONS) >= 80
    equal = sum(pair[2] for pair in PAIRS)
    assert min(equal, len(PAIRS) - equal) > 80
    assert len(MISSES) <= 0.02 * len(PAIRS)
