"""Choices and exact answers: what is read as a choice, and that a hedge earns nothing."""

from __future__ import annotations

from typing import Any

import pytest

from restem.errors import RestemError
from restem.types import Problem, Verifier
from restem.verifiers import load, names
from restem.verifiers.choice import exact, verify

GRADES = [
    ("(B)", "So the answer is (B).", "correct"),
    ("(B)", "So the answer is B.", "correct"),
    ("(B)", "So the answer is b", "correct"),
    ("B", "The answer is (B) because it fits.", "correct"),
    ("B", "The answer is B) Paris", "correct"),
    ("B", "The answer is B: Paris", "correct"),
    ("B", "The answer is **(B)**", "correct"),
    ("B", r"Thus $\boxed{B}$.", "correct"),
    ("B", r"Thus \boxed{\text{B}}", "correct"),
    ("B", r"Thus \boxed{\textbf{(B)}\ 12}", "correct"),
    ("B", r"\boxed{(\text{B})}", "correct"),
    (r"\text{(B)}", "Answer: B", "correct"),
    ("B", "The answer is option B.", "correct"),
    ("B", "(B)", "correct"),
    ("B", " b. ", "correct"),
    ("B", "Both look right.\nI take (B).", "correct"),
    ("B", "The answer is (A). No: the answer is (B).", "correct"),
    ("A", "The answer is (A), because (A) is the only one left.", "correct"),
    ("B", "The answer is (C).", "incorrect"),
    ("B", "The answer is (B) or (C).", "incorrect"),
    ("B", "The answer is B or C.", "incorrect"),
    ("A", "The answer is A or B or C or D.", "incorrect"),
    ("A", "The answer is A, B.", "incorrect"),
    ("A", "The answer is A/B.", "incorrect"),
    ("A", "The answer is A and B.", "incorrect"),
    ("A", r"\boxed{A \text{ or } B}", "incorrect"),
    ("A", "The answer is a matter of taste.", "incorrect"),
    ("A", "The answer is Apple.", "incorrect"),
    ("I", "The answer is I think (C).", "incorrect"),
    ("B", "The answer is 7.", "incorrect"),
    ("B", r"\boxed{B", "no_answer"),
    ("B", "", "no_answer"),
    ("B", "Between (A) and (B) it is hard to say.", "no_answer"),
    ("B", "But I do not know.", "no_answer"),
    ("valid", "So the argument is fine. The answer is valid.", "correct"),
    ("valid", "So the answer is Valid", "correct"),
    ("Yes", "So the answer is yes.", "correct"),
    ("No", r"\boxed{\text{No}}", "correct"),
    ("True", "True", "correct"),
    ("valid", "So the answer is invalid.", "incorrect"),
    ("Yes", "The answer is yes or no.", "incorrect"),
    ("Yes", "The answer is not yes.", "incorrect"),
    ("Yes", "Well, yes, in a way, I would say so.", "no_answer"),
    ("plausible", "So the answer is yes.", "incorrect"),
    (None, "The answer is (B).", "verifier_error"),
    (3, "The answer is (B).", "verifier_error"),
]


@pytest.mark.parametrize(("reference", "completion", "reason"), GRADES)
def test_one_choice_is_read_and_a_hedge_is_wrong(reference: Any, completion: str, reason: str) -> None:
    grade = verify(Problem(id="p", question="q", reference=reference), completion)
    assert grade.reason == reason
    assert grade.reward == {"correct": 1.0, "verifier_error": None}.get(reason, 0.0)


EXACT = [
    ("a b", "The answer is a  b.", "correct"),
    ("a b", " a\n b ", "correct"),
    (12, "#### 12", "correct"),
    ("] ] )", "] ] )", "correct"),
    ("oct tin", "So the answer is oct tin", "correct"),
    ("a b", "The answer is A b.", "incorrect"),
    ("a b", "a b c", "incorrect"),
    ("1/2", "The answer is 0.5.", "incorrect"),
    ("a b", "  ", "no_answer"),
    (None, "a", "verifier_error"),
]


@pytest.mark.parametrize(("reference", "completion", "reason"), EXACT)
def test_exact_means_every_letter_and_no_blank(reference: Any, completion: str, reason: str) -> None:
    assert exact(Problem(id="p", question="q", reference=reference), completion).reason == reason


def test_every_name_loads_a_verifier() -> None:
    assert {"math", "choice", "exact"} <= set(names())
    for name in ("math", "choice", "exact"):
        assert isinstance(load(name), Verifier)
    assert load("restem.verifiers.choice:exact") is exact


def test_a_function_in_a_file_is_a_verifier(tmp_path: Any) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def judge(problem, completion):\n    return completion == problem.reference\n")
    verifier = load(f"{path}:judge")
    assert verifier(Problem(id="p", question="q", reference="a"), "a")
    assert load(f"{path}:judge") is verifier


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("maths", 'Did you mean "math"'),
        ("nonsense", "bbh, bbh-strict, choice, code, exact, math"),
        ("restem.verifiers.choice:exakt", 'Did you mean "exact"'),
        ("no_such_package.module:f", "no_such_package"),
        ("no/such/file.py:f", "there is no file"),
        ("restem.verifiers.choice:_TEXT", "not a function"),
        (":", "there is no verifier"),
    ],
)
def test_an_unknown_verifier_is_explained(spec: str, says: str) -> None:
    with pytest.raises(RestemError, match=says):
        load(spec)
