"""The regression corpus (math_corpus.py): no false positive at all, and at least 98% right; known misses are named."""

from __future__ import annotations

import re
from pathlib import Path

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
LABELLED = [
    *((gold, answer, equal) for gold, answer, equal, _ in PAIRS),
    *((gold, answer, True) for gold, answer in SAME),
    *((gold, answer, False) for gold, answer in DIFFERENT),
]
PAGE = Path(__file__).parents[1] / "docs" / "math.md"


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


def test_no_different_answer_is_accepted_and_the_equal_ones_that_are_refused_are_named() -> None:
    assert {(gold, answer) for gold, answer, equal in LABELLED if not equal and equivalent(gold, answer) is not False} == set()
    assert {(gold, answer) for gold, answer, equal in LABELLED if equal and equivalent(gold, answer) is not True} == set(MISSES)


def test_the_rates_in_the_documentation_are_those_of_the_labelled_pairs() -> None:
    assert len({(gold, answer) for gold, answer, _ in LABELLED}) == len(LABELLED), "no pair is counted twice"
    accepted = {equal: [equivalent(g, a) is True for g, a, label in LABELLED if label is equal] for equal in (True, False)}
    wrong = {"false negatives": (accepted[True], False), "false positives": (accepted[False], True)}
    computed = {
        name: (str(len(found)), str(found.count(bad)), f"{found.count(bad) / len(found):.1%}")
        for name, (found, bad) in wrong.items()
    }
    rows = re.findall(
        r"^\| (false \w+): [^|]+ \| (\d+) \| (\d+) \| ([\d.]+%) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {name: tuple(figures) for name, *figures in rows} == computed
