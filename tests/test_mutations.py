"""The tests of the graders are worth something: each layer, deliberately broken, fails some of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from math_corpus import COMPLETIONS, PAIRS
from restem.verifiers import math
from restem.verifiers.code import comparison
from restem.verifiers.math import extract as extraction
from restem.verifiers.math import structure, symbolic
from test_code_verifier import test_printed_text, test_returned_values
from test_math_corpus import MISSES


def wrong_pairs() -> list[tuple[str, str]]:
    return [(g, a) for g, a, equal, _ in PAIRS if math.equivalent(g, a) is not (equal and (g, a) not in MISSES)]


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    def clear() -> None:
        math._equivalent.cache_clear()
        structure.read.cache_clear()

    clear()
    yield
    clear()


def undecided(*_: Any) -> None:
    return None


LAYERS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "spellings are not normalised": (math, "normalise", str.strip),
    "texts that begin alike are equal": (math, "key", lambda text: text[:1]),
    "everything is sane": (math, "is_sane", lambda text: True),
    "structure knows nothing": (math, "same", undecided),
    "structure says yes": (math, "same", lambda gold, answer: True),
    "numbers and formulas know nothing": (structure, "_same_scalar", undecided),
    "numbers and formulas say yes": (structure, "_same_scalar", lambda gold, answer: True),
    "equations say yes": (structure, "same_equation", lambda gold, answer: True),
    "quantities say no": (structure, "same_quantity", lambda gold, answer: False),
    "lists say yes": (structure, "_same_in_any_order", lambda gold, answer: True),
    "labels say yes": (structure, "_same_labelled", lambda gold, answer: True),
    "the library says no": (symbolic, "same", lambda gold, answer: False),
    "the library says yes": (symbolic, "same", lambda gold, answer: True),
}
NOT_SHOWN_BY_PAIRS = {"everything is sane"}
"""What it guards against is tested by time and by None, in test_math_verifier.py."""


def test_the_corpus_passes_as_it_is() -> None:
    assert not wrong_pairs()


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in NOT_SHOWN_BY_PAIRS])
def test_a_broken_layer_of_the_mathematics_grader_fails_the_corpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, broken = LAYERS[name]
    assert hasattr(module, attribute)
    monkeypatch.setattr(module, attribute, broken)
    assert wrong_pairs()


def test_a_broken_box_search_fails_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules[extraction.__module__]
    monkeypatch.setattr(module, "last_box", lambda text: None)
    assert any(math.extract(text, style=style) != answer for style, text, answer in COMPLETIONS)


def cases_of(test: Any) -> Any:
    return next(mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")


@pytest.mark.parametrize(
    ("attribute", "broken"),
    [
        ("_words", lambda text: [text.split()]),
        ("_words", lambda text: [sorted(line.split()) for line in text.splitlines() if line.split()]),
        ("_same_word", lambda found, expected: found == expected),
        ("_same_word", lambda found, expected: True),
        ("_NUMBER", re.compile(".*")),
        ("_TOLERANCE", 1e-2),
        ("_same", lambda found, expected: found == expected),
        ("_same", lambda found, expected: True),
    ],
)
def test_a_broken_comparison_of_programs_fails_its_cases(attribute: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, attribute, broken)

    def differs() -> bool:
        printed = any(
            comparison.same_text(found, expected) is not same for found, expected, same, _ in cases_of(test_printed_text)
        )
        returned = any(
            comparison.same_value(found, expected) is not same for found, expected, same in cases_of(test_returned_values)
        )
        return printed or returned

    with contextlib.suppress(ValueError):  # a broken guard may also raise
        assert differs()
