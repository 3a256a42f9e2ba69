r"""Answers from a closed set: a letter such as (B), or a word such as "valid" or "Yes"; and answers that must match to
the letter.

Case rule: letters and words are compared without case ("b" is B, "YES" is Yes). `exact` keeps case. A hedged answer
("A or B") is incorrect even when one of the two is right: a guess at both would otherwise always be rewarded.
"""

from __future__ import annotations

import re

from restem.types import Grade, Problem
from restem.verifiers.math.extract import extract

_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textrm)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"[\[(]\s*([A-Za-z])\s*[\])]|([A-Za-z])\s*[).:]|([A-Za-z])")
_LEADING = re.compile(r"(?:[\[(]\s*([A-Za-z])\s*[\])]|([B-HJ-Z])\b(?!['\u2019])|([A-Za-z])(?=[).:]))(?P<rest>.*)", re.DOTALL)
_ALONE = re.compile(r"(?:^|\s)\(([A-Za-z])\)(?=$|[\s.,;!])")
_HEDGE = re.compile(
    r"^\W*(?:or\b|and\b|/|,|&|nor\b)\s*(?:option\s+|maybe\s+|perhaps\s+|possibly\s+)*[\[(]?\s*[A-Za-z]\s*(?:[\])]|\W|$)",
    re.I,
)
_PREFIX = re.compile(r"(?:option|choice|answer|letter)\s*:?\s+(?=\W?[A-Za-z]\W?)", re.IGNORECASE)


def verify(problem: Problem, completion: str) -> Grade:
    r"""Grade against a choice: `problem.reference` is "(B)", "B" or a word.

    Read from the stated answer (see `restem.verifiers.math.extract`, style auto): "the answer is (B)", "(B) because
    ...", `\boxed{\text{B}}`, "B. Paris". Without any, the whole text if it is a choice alone, else its last bracketed
    letter, if all bracketed letters of the last line agree. Reward None when the reference is not a text.
    """
    if not isinstance(problem.reference, str) or not problem.reference.strip():
        return _no_reference(problem)
    gold = _clean(problem.reference)
    letter = _LETTER.fullmatch(gold)
    stated = extract(completion)
    if letter is None:
        return _grade_word(gold, stated if stated is not None else _short(completion))
    answer = _read_letter(stated) if stated is not None else _unstated_letter(completion)
    if answer is None:
        return Grade(reward=0.0, answer=stated, reason="no_answer" if stated is None else "incorrect")
    return _graded(_one_of(letter).upper() == answer, answer)


def exact(problem: Problem, completion: str) -> Grade:
    """Grade by equality of text: the stated answer, or else the whole completion, against `str(problem.reference)`.

    Runs of blanks count as one, blanks at the ends do not count; everything else, case and punctuation included, does.
    The end of the sentence is no part of a stated answer.
    """
    if problem.reference is None or not str(problem.reference).strip():
        return _no_reference(problem)
    gold = " ".join(str(problem.reference).split())
    stated = extract(completion)
    whole = " ".join(completion.split())
    if not whole:
        return Grade(reward=0.0, reason="no_answer")
    answer = " ".join(stated.split()) if stated is not None else whole
    return _graded(gold in (answer, whole), answer)


def _read_letter(stated: str) -> str | None:
    """The one letter of a stated answer, upper case; "A or B" gives "A or B" back, which equals no letter."""
    text = _PREFIX.sub("", _clean(stated), count=1).strip()
    whole = _LETTER.fullmatch(text)
    if whole:
        return _one_of(whole).upper()
    leading = _LEADING.match(text)
    if leading is None:
        bracketed = {letter.upper() for letter in _ALONE.findall(text)}
        return bracketed.pop() if len(bracketed) == 1 else None
    letter = (leading[1] or leading[2] or leading[3]).upper()
    rest = leading["rest"]
    others = {other.upper() for other in _ALONE.findall(rest)} - {letter}
    return text if _HEDGE.match(rest) or others else letter


def _unstated_letter(completion: str) -> str | None:
    text = _clean(completion)
    whole = _LETTER.fullmatch(text)
    if whole:
        return _one_of(whole).upper()
    lines = text.splitlines()
    found = {letter.upper() for letter in _ALONE.findall(lines[-1])} if lines else set()
    return found.pop() if len(found) == 1 else None


def _grade_word(gold: str, stated: str | None) -> Grade:
    if stated is None:
        return Grade(reward=0.0, reason="no_answer")
    answer = _clean(stated)
    return _graded(_fold(answer) == _fold(gold), answer)


def _short(completion: str) -> str | None:
    text = _clean(completion)
    return text if text and len(text.split()) <= 3 else None


def _fold(text: str) -> str:
    return " ".join(text.casefold().strip(" .,;:!?\"'").split())


def _clean(text: str) -> str:
    text = _TEXT.sub(r"\1", text.replace("$", " ").replace("**", "").replace("`", ""))
    return text.strip().strip("\"'").rstrip(".,;:! \n").strip()


def _one_of(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group)


def _graded(is_correct: bool, answer: str) -> Grade:
    return Grade(reward=float(is_correct), answer=answer, reason="correct" if is_correct else "incorrect")


def _no_reference(problem: Problem) -> Grade:
    note = f"the reference must be a text, not {problem.reference!r:.80}"
    return Grade(reward=None, reason="verifier_error", note=note)
