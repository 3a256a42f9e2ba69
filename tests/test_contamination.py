"""Runs of 13 words that two groups share are found, whatever their spelling, and nothing else: by hand and by brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restem.contamination import shared_ngrams
from restem.preflight import check
from restem.prompts import Exemplar, Prompt
from restem.show import check_text
from restem.tasks import Task
from restem.types import Problem

THIRTEEN = "a farmer sells nine dozen brown eggs on each market day of the"
LOUD = 'Once: A FARMER sells nine-dozen, brown "eggs" -- on each (market) day; of THE...'


def problem(name: str, question: str, **meta: object) -> Problem:
    return Problem(id=name, question=question, reference="4", meta=meta)


def numbered(count: int, text: str) -> list[Problem]:
    return [problem(f"p{number}", f"number {number}: {text} {number} end") for number in range(count)]


def test_the_text_of_these_tests_has_thirteen_words() -> None:
    assert len(THIRTEEN.split()) == 13


def test_thirteen_equal_words_are_found_whatever_their_capitals_and_punctuation() -> None:
    loud = LOUD.replace("nine-dozen", "nine dozen")
    groups = {"train": [problem("other", "something else"), problem("t", loud)], "test": [problem("q", f"So {THIRTEEN} week")]}
    assert shared_ngrams(groups) == {"train and test": ("t",)}


def test_a_word_is_what_stands_between_blanks() -> None:
    """As in GPT-3's rule: a hyphen goes without leaving a blank, so "nine-dozen" is one word."""
    groups = {"train": [problem("t", LOUD)], "test": [problem("q", THIRTEEN)]}
    assert shared_ngrams(groups) == {"train and test": ()}
    groups = {"train": [problem("t", LOUD)], "test": [problem("q", THIRTEEN.replace("nine dozen", "ninedozen") + " once")]}
    assert shared_ngrams(groups, size=12) == {"train and test": ("t",)}


def test_twelve_equal_words_are_not_enough() -> None:
    first_twelve, last_twelve = " ".join(THIRTEEN.split()[:12]), " ".join(THIRTEEN.split()[1:])
    for twelve in (first_twelve, last_twelve):
        groups = {"train": [problem("t", f"so {twelve} so")], "test": [problem("q", THIRTEEN)]}
        assert shared_ngrams(groups) == {"train and test": ()}
        assert shared_ngrams(groups, size=12) == {"train and test": ("t",)}


def test_the_same_words_in_another_order_are_not_the_same() -> None:
    turned = " ".join(reversed(THIRTEEN.split()))
    assert shared_ngrams({"train": [problem("t", turned)], "test": [problem("q", THIRTEEN)]}) == {"train and test": ()}


def test_wording_of_more_than_ten_problems_of_a_group_is_left_out() -> None:
    test = [problem("q", THIRTEEN)]
    assert shared_ngrams({"train": numbered(10, THIRTEEN), "test": test})["train and test"] == tuple(f"p{n}" for n in range(10))
    assert shared_ngrams({"train": numbered(11, THIRTEEN), "test": test})["train and test"] == ()
    assert shared_ngrams({"train": test, "test": numbered(11, THIRTEEN)})["train and test"] == ()
    assert len(shared_ngrams({"train": numbered(11, THIRTEEN), "test": test}, boilerplate=11)["train and test"]) == 11


def test_a_problem_that_repeats_itself_counts_once() -> None:
    train = numbered(10, f"{THIRTEEN} and again: {THIRTEEN}")
    assert len(shared_ngrams({"train": train, "test": [problem("q", THIRTEEN)]})["train and test"]) == 10


def test_what_follows_the_template_is_found_beside_it() -> None:
    """Boilerplate hides itself only, not the rest of a problem that holds it."""
    own = " ".join(f"own{n}" for n in range(13))
    train = [*numbered(11, THIRTEEN), problem("leaked", f"{THIRTEEN} {own}")]
    assert shared_ngrams({"train": train, "test": [problem("q", own)]})["train and test"] == ("leaked",)


def test_a_solution_counts_unless_the_group_is_asked_by_its_questions_only() -> None:
    groups = {
        "train": [problem("t", "short", solution=f"since {THIRTEEN} year")],
        "val": [problem("v", THIRTEEN)],
        "test": [problem("q", "brief", solution=THIRTEEN)],
    }
    assert shared_ngrams(groups, question_only=("val", "test")) == {
        "train and val": ("t",),
        "train and test": (),
        "val and test": (),
    }
    assert shared_ngrams(groups)["train and test"] == ("t",)


def test_no_run_goes_from_a_question_into_its_solution_or_from_problem_to_problem() -> None:
    begin, end = " ".join(THIRTEEN.split()[:7]), " ".join(THIRTEEN.split()[7:])
    test = [problem("q", THIRTEEN)]
    assert shared_ngrams({"train": [problem("t", begin, solution=end)], "test": test}) == {"train and test": ()}
    assert shared_ngrams({"train": [problem("t", begin), problem("u", end)], "test": test}) == {"train and test": ()}
    assert shared_ngrams({"train": [problem("t", f"{begin} {end}")], "test": test}) == {"train and test": ("t",)}


def test_short_texts_and_empty_groups_share_nothing() -> None:
    groups = {"train": [problem("t", ""), problem("u", "a b")], "val": [], "test": [problem("q", "a b")]}
    assert shared_ngrams(groups) == {"train and val": (), "train and test": (), "val and test": ()}
    assert shared_ngrams({}) == {}


TEXTS = st.lists(st.lists(st.sampled_from(["red", "blue"]), max_size=18).map(" ".join), max_size=5)


def runs(text: str, size: int) -> set[tuple[str, ...]]:
    found = text.split()
    return {tuple(found[start : start + size]) for start in range(len(found) - size + 1)}


def by_brute_force(groups: dict[str, list[str]], size: int, boilerplate: int) -> dict[str, tuple[str, ...]]:
    held = {name: [runs(text, size) for text in texts] for name, texts in groups.items()}
    everything = set().union(*(run for texts in held.values() for run in texts))
    common = {r for r in everything if any(sum(r in text for text in texts) > boilerplate for texts in held.values())}
    return {
        f"{one} and {other}": tuple(
            str(place) for place, text in enumerate(held[one]) if any((text & another) - common for another in held[other])
        )
        for one, other in combinations(groups, 2)
    }


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.sampled_from([1, 2, 3, 5, 13]), st.integers(0, 4))
def test_random_texts_share_what_brute_force_finds(
    train: list[str], val: list[str], test: list[str], size: int, boilerplate: int
) -> None:
    texts = {"train": train, "val": val, "test": test}
    groups = {name: [problem(str(place), text) for place, text in enumerate(given)] for name, given in texts.items()}
    assert shared_ngrams(groups, size=size, boilerplate=boilerplate) == by_brute_force(texts, size, boilerplate)


@pytest.fixture
def task() -> Task:
    return Task(
        name="mine",
        train=(problem("t", "How many?", solution=f"As {THIRTEEN} month, it is four."), problem("u", "What is 2 + 2?")),
        val=(problem("v", "What is 3 + 1?"),),
        test=(problem("q", f"{THIRTEEN}?"), problem("r", "What is 1 + 3?")),
        prompt=Prompt(exemplars=(Exemplar(question="What is 5 - 1?", solution=f"{THIRTEEN.upper()}! The answer is 4."),)),
        verifier_spec="math",
    )


def test_a_check_names_them_and_is_still_ok(task: Task) -> None:
    report = check(task)
    assert {pair: ids for pair, ids in report.shared_13grams.items() if ids} == {
        "train and test": ("t",),
        "train and exemplars": ("t",),
        "test and exemplars": ("q",),
    }
    assert report.shared_13grams.keys() == report.overlap.keys()
    assert report.is_clean and report.ok


def test_the_text_of_a_check_has_a_line_for_every_pair_with_a_few_ids(task: Task) -> None:
    text = check_text(check(task).as_dict())
    assert "13 words in a row in train and test: 1 problems of train (t); worth a look" in text
    assert "13 words in a row in test and exemplars: 1 problems of test (q); worth a look" in text
    assert "in train and val" not in text
    assert text.endswith("\nok")


def test_the_text_of_a_check_says_that_nothing_was_found() -> None:
    task = Task(name="mine", train=(problem("t", "What is 2 + 2?"),), val=(), test=(), prompt=Prompt(), verifier_spec="math")
    assert "13 words in a row in two of train, val, test and exemplars: none" in check_text(check(task).as_dict())
