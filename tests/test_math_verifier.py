"""What the mathematics verifier accepts and refuses: tables of ugly answers, both directions, and text from a
fuzzer."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restem.errors import RestemError
from restem.types import Problem
from restem.verifiers.math import equivalent, extract, symbolic, verify
from restem.verifiers.math.extract import last_box
from restem.verifiers.math.normalise import key, normalise
from restem.verifiers.math.structure import read, same

DATA = os.environ.get("RESTEM_DATA")

HALVES = [
    "1/2",
    "0.5",
    ".5",
    r"\frac12",
    r"\frac{1}{2}",
    r"\dfrac{1}{2}",
    r"\tfrac12",
    r"\frac 1 2",
    "$0.50$",
    "50%",
    r"50\%",
    "2/4",
    r"\frac{1}2",
    "5e-1",
    r"5\times10^{-1}",
    "2^{-1}",
    r"\sqrt{\frac14}",
    r"\left(\frac{1}{2}\right)",
    "x = 1/2",
    "\u00bd",
]


@pytest.mark.parametrize("answer", HALVES)
def test_a_half_is_accepted_in_every_spelling(answer: str) -> None:
    assert equivalent("1/2", answer) is True
    assert equivalent(r"\frac{1}{2}", answer) is True
    assert equivalent(r"\frac{1}{3}", answer) is False


SAME = [
    ("18", "18"),
    ("18", "18.0"),
    ("18", "$18"),
    ("18", r"\$18"),
    ("18", "18 dollars"),
    ("18", r"18\text{ dollars}"),
    ("29", "$29.00"),
    ("9500", "9,500"),
    ("9500", "9{,}500"),
    ("9500", r"9\,500"),
    ("9,500", "9500.00"),
    (r"10,\!000", "10000"),
    ("1234567", "1,234,567"),
    ("60", "60%"),
    ("60%", "60"),
    (r"60\%", "0.6"),
    ("0.6", "60%"),
    ("5", "5 apples"),
    ("5 million", "5000000"),
    ("5000", "5 thousand"),
    (r"90^\circ", "90"),
    ("90", r"90^{\circ}"),
    (r"90^\circ", "90 degrees"),
    ("5 cm", r"5\text{ centimeters}"),
    ("1.50 dollars", "150 cents"),
    (r"2\frac{1}{2}", "5/2"),
    (r"2\frac12", "2.5"),
    ("2 1/2", "2.5"),
    (r"-2\frac12", "-2.5"),
    ("1e3", "1000"),
    (r"0.\overline{3}", "1/3"),
    (r"\frac{-3}{4}", r"-\frac{3}{4}"),
    (r"\frac{3}{-4}", "-0.75"),
    ("--5", "5"),
    ("\u22125", "-5"),
    ("007", "7"),
    ("+3", "3"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\sqrt2", "sqrt(2)"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"2\pi", "2pi"),
    (r"2\pi", "\u03c0*2"),
    ("x^2+2x+1", "(x+1)^2"),
    ("a+b", "b+a"),
    ("3xy", r"3 \cdot y \cdot x"),
    (r"\frac{x}{2}", "x/2"),
    ("x = 5", "5"),
    ("5", "x=5"),
    ("y = 2x + 3", "2x+3"),
    ("x=5", "x = 2 + 3 = 5"),
    ("f(x) = x^2", "x^2"),
    (r"x \in [1,2]", "[1,2]"),
    ("(1,2)", r"\left( 1, 2 \right)"),
    (r"(\frac12, 3)", "(0.5,3)"),
    ("1,2,3", "3, 1, 2"),
    ("1, -2", "x=-2 or x=1"),
    ("1,2", r"1 \text{ and } 2"),
    ("x=1,2", r"x = 2 \text{ or } x = 1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\{1,2\}", "1, 2"),
    (r"1\pm\sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"\pm 3", "3, -3"),
    ("a=1, b=2", "b = 2, a = 1"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3, \infty) \cup (-\infty, 2)"),
    ("x > 3", r"(3,\infty)"),
    (r"[1,2)", r"1 \le x < 2"),
    ("1<x", "x>1"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 8/2 \end{bmatrix}"),
    ("y=2x+3", "2x - y + 3 = 0"),
    ("x^2+y^2=1", "1 = y^2 + x^2"),
    (r"1011_2", "1011"),
    ("1011_{2}", "1011_2"),
    (r"\text{(C)}", "C"),
    ("C", "(C)"),
    (r"\text{Monday}", "monday"),
    (r"\text{even}", "even"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    (r"\log_2 8", "3"),
    (r"e^{i\pi}", "-1"),
    (r"\sin 30x", r"\sin(30x)"),
    (r"x^{1/2}", r"\sqrt{x}"),
    (r"\sqrt[3]{-8}", "-2"),
    ("2^10", "1024"),
    ("9^{9^{9^9}}", "9^{9^{9^9}}"),
    ("**42**", "42"),
    ("42.", "42"),
    (r"\text{2340}", "2340"),
    (r"\text{A, B}", "B,A"),
    ("5 square inches", r"5\text{ in}^2"),
    (r"|x-1|", "|1-x|"),
    ("(5)", "5"),
    (r"20\text{ sq units}", "20"),
    ("3x > 6", "x > 2"),
    ("3x > 6", r"(2,\infty)"),
    ("x^2 < 4", "(-2,2)"),
]

DIFFERENT = [
    ("1/2", "1/3"),
    ("100000000000", "99999999999"),
    ("5", "-5"),
    ("5", "5.0000001"),
    ("0.333333", "1/3"),
    ("1/3", "0.33"),
    ("18", "180"),
    ("35", "3 5"),
    ("3 5", "35"),
    ("5", "5 million"),
    ("5000000", "5"),
    ("60", "0.6"),
    ("0.5", "0.5%"),
    ("500", "9{,}500"),
    ("1", "1,000"),
    ("5 cm", "5 inches"),
    ("5 dollars", "5 cents"),
    (r"4\%", r"\$4"),
    ("5 cm", r"5\text{ cm}^2"),
    ("1011_2", "1011_3"),
    ("1011_2", "11"),
    ("3", "11_2"),
    ("2^{-99}", "2^{-98}"),
    ("1/2004!", "1/2006!"),
    ("1-1/e", "1+1/e"),
    ("10^{-20}", "0"),
    (r"\sqrt{2}", "1.41421356"),
    (r"\pi", "3.14159"),
    ("4", r"4\sqrt(2)"),
    ("4", r"4\sqrt{2}"),
    ("n=2,3,4", "n=1,2,3"),
    ("D=(0,1)", "D=(0,1.5)"),
    ("8", "8,-112"),
    ("8,-112", "8"),
    ("A,B", "A,B,E"),
    ("x=5", "y=5"),
    ("7=11a+c", "11a+c"),
    ("7=11a+c", "8=11a+c"),
    ("x+y=1", "x-y=1"),
    ("0", "a^2+b=0"),
    ("x=x", "y=y"),
    ("1=1", "2=2"),
    ("x^2", "x^3"),
    (r"\sqrt{x^2}", "x"),
    ("|x|", "x"),
    ("2x", "x"),
    ("x_1", "x_2"),
    ("x_1", "x"),
    ("a", "b"),
    ("a", "A"),
    ("1,2", "1,2,3"),
    ("1,2,3", "1,2"),
    ("1,1,2", "1,2,2"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2]", "(1,2)"),
    ("(1,2)", "1"),
    ("a=1, b=2", "2, 1"),
    (r"\{1,2\}", r"\{1,3\}"),
    (r"\pm 3", "3"),
    (r"1\pm\sqrt{2}", r"1+\sqrt{2}"),
    ("x>3", "x<3"),
    ("x>3", r"x \ge 3"),
    ("x > 3", r"[3,\infty)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("A", "B"),
    (r"\text{(C)}", "(D)"),
    ("A", "A or B or C or D"),
    (r"\text{even}", "neve"),
    ("CAB", "ABC"),
    (r"\text{Monday}", "Tuesday"),
    ("Yes", "No"),
    ("5", "not 5"),
    ("5", "5 or 6"),
    ("5", "5 less than x"),
    ("0", "(lambda: 0)()"),
    ("0", "getattr(int, 'real') or 0"),
    ("0", "__import__('os').getpid()*0"),
    ("5", ""),
    ("5", r"\frac{5}"),
    ("5", "5)"),
    ("5", "9^{9^{9^{9^9}}}"),
    ("5", "5+0^{"),
    ("2", "7 - 5x"),
    (r"\infty", r"-\infty"),
    (r"\frac{2}{3}", r"\frac{3}{2}"),
    (r"2\frac12", "1"),
    (r"\log 2", r"\ln 2"),
    (r"\sin x", r"\cos x"),
    ("3:2", "2:3"),
    ("12:30", "12:31"),
    ("6", "3!!"),
    ("1/2x", r"\frac{1}{2x}"),
    ("5", "5" * 500),
    ("3", "3abc"),
    ("3xy", "3"),
    ("2x=x+x", "3x=x+2x"),
    ("x>x", "x>x+1"),
    (r"10^{60}", r"10^{60}+1"),
    ("x^2+1=0", "x^2+2=0"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_the_same_answer_is_accepted_however_it_is_written(gold: str, answer: str) -> None:
    assert equivalent(gold, answer) is True


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_a_different_answer_is_refused(gold: str, answer: str) -> None:
    assert equivalent(gold, answer) is False


@pytest.mark.parametrize("gold", ["", "  ", "9^{9^{9^9}}", r"\frac{1}{", "(" * 60 + ")" * 60, "1+" * 1500 + "1"])
def test_a_gold_that_nobody_can_read_is_undecided_not_wrong(gold: str) -> None:
    assert equivalent(gold, "5") is None
    grade = verify(Problem(id="p", question="q", reference=gold), "The answer is 5.")
    assert (grade.reward, grade.reason) == (None, "verifier_error")


COMPLETIONS = [
    # style, completion, answer
    ("auto", "Final Answer: The final answer is $3.5$. I hope it is correct.", "3.5"),
    (
        "auto",
        "Final Answer: The final answer is 7. I hope it is correct.\n\nProblem: next\n"
        "Final Answer: The final answer is 8. I hope it is correct.",
        "7",
    ),
    ("auto", r"Final Answer: The final answer is $\boxed{\frac{1}{2}}$. I hope it is correct.", r"\frac{1}{2}"),
    ("minerva", "Final Answer: The final answer is 7.", None),
    (
        "minerva",
        "Final Answer: The final answer is 7.\nFinal Answer: The final answer is 8. I hope it is correct.",
        None,
    ),
    ("minerva", r"So \boxed{7}.", None),
    ("boxed", r"so \boxed{3} and then \boxed{4}", "4"),
    ("boxed", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    ("boxed", r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
    ("boxed", r"\fbox{17}", "17"),
    ("boxed", r"thus \boxed 17.", "17"),
    ("boxed", r"thus $\boxed 17$ is it", "17"),
    ("boxed", r"\boxed{3} no wait, \boxed{4", None),
    ("auto", r"\boxed{3} no wait, \boxed{4", None),
    ("auto", r"The answer is 3. \boxed{", None),
    ("boxed", r"\boxed{}", None),
    ("boxed", r"\boxed", None),
    ("boxed", "no box", None),
    ("boxed", r"\boxed{\boxed{5}}", "5"),
    ("boxed", r"first \boxed is a macro; \boxed{5}", "5"),
    ("boxed", r"\boxed{\text{(B)}}", r"\text{(B)}"),
    ("boxed", r"\boxed{a\}b}", r"a\}b"),
    ("gsm8k", "She has 18.\n#### 18", "18"),
    ("gsm8k", "#### 18,", "18"),
    ("gsm8k", "#### $1,800.00.\nQ: next #### 5", "1,800.00"),
    ("gsm8k", "####   -7  \n", "-7"),
    ("gsm8k", "The answer is 7", None),
    ("answer-is", "The answer is 18.", "18"),
    ("answer-is", "The answer is 3.5.", "3.5"),
    ("answer-is", "The answer is 9,500.", "9,500"),
    ("answer-is", "The answer is $29.00.", "29.00"),
    ("answer-is", "The answer is 5, because 2+3=5.", "5"),
    ("answer-is", "The answer is 1, 2, 3.", "1, 2, 3"),
    ("answer-is", "The answer is 7. Wait, no. The answer is 8. Done.", "8"),
    ("answer-is", "The final answer is: **42**", "42"),
    ("answer-is", "**Answer:** 42", "42"),
    ("answer-is", "Answer: 42 dollars. That is all.", "42 dollars"),
    ("answer-is", "the answer is\n\n$$x = 5$$", "x = 5"),
    ("answer-is", r"The answer is \(5\).", "5"),
    ("answer-is", r"The answer is $\frac{1}{2}$.", r"\frac{1}{2}"),
    ("answer-is", "The answer is (B) because of it.", "(B) because of it"),
    ("answer-is", "The answer is", None),
    ("auto", "She has 3 apples and 4 pears, so 7 in all.", None),
    ("auto", "", None),
    ("auto", "answers are hard", None),
    ("auto", "so the answer is $9{,}500$.", "9{,}500"),
    ("auto", r"The answer is 4, so \boxed{5}.", "5"),
    ("auto", "The answer is 4.\n#### 5", "5"),
    ("auto", "####", None),
]


@pytest.mark.parametrize(("style", "completion", "answer"), COMPLETIONS)
def test_the_stated_answer_is_read_and_nothing_else(style: str, completion: str, answer: str | None) -> None:
    assert extract(completion, style=style) == answer


GRADES = [
    ("18", r"We get \boxed{18}.", "correct"),
    (18, "#### 18", "correct"),
    ("18", "The answer is 18 eggs.", "correct"),
    ("18", "The answer is 19.", "incorrect"),
    ("18", "She ends up with 18", "no_answer"),
    ("18", "", "no_answer"),
    ("18", r"\boxed{18", "no_answer"),
    ("18", r"\boxed{18} but then \boxed{17}", "incorrect"),
    ("18", "The answer is 17 or 18.", "incorrect"),
    (None, r"\boxed{18}", "verifier_error"),
    (True, r"\boxed{1}", "verifier_error"),
    (["18"], r"\boxed{18}", "verifier_error"),
]


@pytest.mark.parametrize(("reference", "completion", "reason"), GRADES)
def test_a_grade_tells_wrong_from_missing_from_ungradable(reference: Any, completion: str, reason: str) -> None:
    grade = verify(Problem(id="p", question="q", reference=reference), completion)
    assert grade.reason == reason
    assert grade.reward == {"correct": 1.0, "verifier_error": None}.get(reason, 0.0)
    assert (grade.answer is None) == (reason == "no_answer" or not isinstance(reference, str | int) or reference is True)


def test_an_unknown_style_names_the_styles() -> None:
    with pytest.raises(RestemError, match="minerva"):
        extract("x", style="last-number")


_PIECES = st.sampled_from(
    [r"\frac", r"\sqrt", "{", "}", "(", ")", "[", "]", "^", "_", "!", "|", "1", "23", ".", ",", "x", "pi", "e", "-",
     "+", "/", "=", "<", ">", r"\{", r"\}", r"\cup", r"\le", r"\pm", r"\boxed", r"\text{a b}", "%", "$", "\\", "&",
     r"\\", r"\begin{pmatrix}", r"\end{pmatrix}", " ", " or ", "answer is", "####", r"\log", r"\sin", r"\binom",
r"\overline{3}", "e9", "\u00b2", "\u0663", ":"] )  # fmt: skip
_FORMULAS = st.lists(_PIECES, max_size=14).map("".join) | st.text(max_size=30)


@given(_FORMULAS, _FORMULAS)
@settings(max_examples=600, deadline=None)
def test_no_text_makes_the_grader_raise_or_differ_from_itself(gold: str, answer: str) -> None:
    extract(gold + answer)
    left, right = normalise(gold), normalise(answer)
    assert same(read(left), read(right)) in (True, False, None)
    assert same(read(left), read(left)) is True
    assert key(left) == key(left + " ")


@pytest.mark.parametrize(
    "answer",
    [
        "1" + r"\frac{1" * 45 + "}{2}" * 45,
        "+".join(f"1/3^{{{n}}}" for n in range(1000, 1180)),
        "1/3^9999+" * 200 + "1",
        "2000!" * 1 + "*1999!" * 250,
        r"\sqrt{2}" * 240,
        "x+" * 900 + "x",
        "," * 1900,
        "1,2," * 450 + "3",
        r"\pm1" * 400,
        "=" * 1000 + "x" * 900,
        "{" * 45 + "x" + "}" * 45,
        r"\sin" * 400,
        " " * 1900 + "5 a",
        "5 " + "ab " * 600,
        r"\text{" * 300,
        "|" * 1000,
        "-" * 1900 + "1",
        "x^" * 900 + "2",
        "answer is " * 180,
        r"\boxed{" * 250,
    ],
)
def test_no_text_takes_long(answer: str) -> None:
    start = time.monotonic()
    extract(answer * 20)
    for gold in ("5", "x^2+1", "1,2", r"\{1,2\}", "x>3"):
        same(read(normalise(gold)), read(normalise(answer[:2000])))
    assert time.monotonic() - start < 2.0


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
@settings(max_examples=200, deadline=None)
def test_fractions_are_compared_exactly(p: Any, q: Any) -> None:
    spelled = rf"\frac{{{p.numerator}}}{{{p.denominator}}}"
    assert equivalent(spelled, f"{p.numerator}/{p.denominator}") is True
    assert equivalent(spelled, f"{q.numerator}/{q.denominator}") is (p == q)


def test_a_comparison_that_never_ends_is_killed_and_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    gold, answer = "x^{999} + x + 1 > 0", "x^{997} + 7x^{501} > x + 3"  # passes the guard, costs the library minutes
    monkeypatch.setattr(symbolic, "SECONDS", 0.3)
    symbolic.same("x > 1", "1 < x")  # the start of the process is not counted
    start = time.monotonic()
    assert symbolic.same(gold, answer) is None
    assert time.monotonic() - start < 2.0
    monkeypatch.setattr(symbolic, "SECONDS", 5.0)
    assert symbolic.same("3x > 6", "x > 2") is True  # a fresh process serves


def test_equal_by_the_library_alone_needs_every_number_and_letter_to_have_been_read() -> None:
    for gold, answer in [
        ("4", r"4\sqrt(2)"),
        ("n=2,3,4", "n=1,2,3"),
        ("x+1=0", "y+2=0"),
        ("2^{-99}", "2^{-98}"),
        ("0.1234567", "0.1234568"),
    ]:
        assert symbolic.same(gold, answer) is not True


@pytest.mark.parametrize(
    "text",
    ["9^{9^9}", "9^9^9", "x^{99999}", "200000!", "__import__", "a.b(", "'a'", "(lambda x: x)", "print", r"\input{x}"],
)
def test_the_library_never_sees_towers_or_code(text: str) -> None:
    assert not symbolic.is_safe(text)


def test_threads_can_grade() -> None:
    found: list[bool | None] = []
    threads = [threading.Thread(target=lambda: found.append(equivalent("4x > 8", "x > 2"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_importing_the_verifier_loads_neither_sympy_nor_torch() -> None:
    code = (
        "import sys, restem.verifiers.math as m; m.equivalent('1/2', '0.5'); "
        "print([n for n in ('sympy', 'math_verify', 'torch', 'mpmath') if n in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "[]"


def _rows(path: str) -> list[dict[str, str]]:
    assert DATA is not None
    with gzip.open(Path(DATA) / path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.skipif(DATA is None, reason="RESTEM_DATA names no folder")
def test_every_gsm8k_reference_is_correct_against_itself() -> None:
    rows = [*_rows("gsm8k/train.jsonl.gz"), *_rows("gsm8k/test.jsonl.gz")]
    assert len(rows) == 7473 + 1319
    golds = [row["answer"].rpartition("####")[2].strip() for row in rows]
    wrong = [
        row
        for gold, row in zip(golds, rows, strict=True)
        if verify(Problem(id="p", question="q", reference=gold), row["answer"]).reward != 1
    ]
    assert not wrong
    shifted = [equivalent(gold, str(int(gold.replace(",", "")) + 1)) for gold in golds]
    assert not any(shifted)


@pytest.mark.skipif(DATA is None, reason="RESTEM_DATA names no folder")
def test_math_solutions_are_correct_respelled_too_and_wrong_against_each_other() -> None:
    rows = random.Random(0).sample(_rows("math/test.jsonl.gz"), 400)
    golds = [last_box(row["solution"]) or "" for row in rows]
    rewards = [
        verify(Problem(id="p", question="q", reference=gold), row["solution"]).reward
        for gold, row in zip(golds, rows, strict=True)
    ]
    assert sum(reward == 1 for reward in rewards) >= 0.995 * len(rows)
    respelled = [
        re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"(\1/\2)", gold.replace(r"\left", "").replace("x^2", "x x")) for gold in golds
    ]
    kept = [(gold, other) for gold, other in zip(golds, respelled, strict=True) if not re.search(r"\d\(", other)]
    assert sum(equivalent(gold, other) is True for gold, other in kept) >= 0.99 * len(kept)
    crossed = [(left, right) for left, right in itertools.pairwise(golds) if left != right]
    assert sum(equivalent(left, right) is True for left, right in crossed) == 0
