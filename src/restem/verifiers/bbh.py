r"""Answers to BIG-Bench Hard: letters, yes or no, true or false, valid or invalid, numbers, sorted words, brackets.

The published grading compares texts, so "(B) because ..." and "Yes." can count as wrong. `verify` reads what was meant, by the
form of the reference, and says in its note when the published rule (`strict`) disagrees. What a newcomer would get wrong: the
form is read off the reference alone, so nothing here depends on the sub-task's name; and a hedge ("A or B", "yes and no") is
incorrect even when half of it is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from restem.types import Grade, Problem
from restem.verifiers import choice
from restem.verifiers.math.extract import extract

CLOSED = (("yes", "no"), ("true", "false"), ("valid", "invalid"))
BRACKETS = "()[]{}<>"
_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
_WORDS = {word: number for number, word in enumerate((_SMALL + "eighteen nineteen twenty").split())}

_ANSWER_IS = re.compile(r"\banswer(?:\*\*)?\s*(?:is\b|:|=)\s*:?[ \t]*", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\s*\{(.*)\}")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"\([A-Z]\)")
_OPTION = re.compile(r"^\(([A-Z])\)[ \t]*(.+)$", re.MULTILINE)
_INPUT = re.compile(r"Input:(.*)$", re.DOTALL)
_NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\d])")
_SUM = re.compile(r"[+*/^=<>~\d]|(?<![A-Za-z])-")
"""What makes a text with one number more than that number."""


def verify(problem: Problem, completion: str) -> Grade:
    """Grade tolerantly. The note says when `strict` would have graded otherwise. Reward None without a reference text."""
    gold = _gold(problem)
    if gold is None:
        return _no_reference(problem)
    grade = _reader(gold)(problem, gold, completion)
    exact = strict(problem, completion)
    if grade.reward == exact.reward:
        return grade
    read = "no answer" if exact.answer is None else f"{exact.answer!r:.80}"
    return replace(grade, note=f"strict extraction disagrees: it reads {read}")


def strict(problem: Problem, completion: str) -> Grade:
    """Grade as published: what stands between the first "answer is" and the line's end, without one full stop, must be the
    reference to the letter. Without "answer is", the whole completion must be. An answer that is taken back counts as given."""
    gold = _gold(problem)
    if gold is None:
        return _no_reference(problem)
    _, mark, rest = completion.partition("answer is")
    answer = (rest.lstrip().partition("\n")[0] if mark else completion).strip().removesuffix(".")
    return _graded(answer == gold, answer) if answer else Grade(reward=0.0, reason="no_answer")


Reader = Callable[[Problem, str, str], Grade]


def _reader(gold: str) -> Reader:
    """How a reference of this form is compared."""
    if _LETTER.fullmatch(gold):
        return _choice
    if any(gold.casefold() in pair for pair in CLOSED):
        return _closed
    if _NUMBER.fullmatch(gold):
        return _number
    return _brackets if not gold.translate(str.maketrans("", "", f"{BRACKETS} ")) else _list


def _choice(problem: Problem, gold: str, completion: str) -> Grade:
    """A letter, as `restem.verifiers.choice` reads it; or one option by its text."""
    grade = choice.verify(problem, completion)
    if grade.reward or (grade.answer and len(grade.answer) == 1):
        return grade
    stated = extract(completion) or _one_line(completion)
    named = [letter for letter, text in _OPTION.findall(problem.question) if stated and _fold(text) == _fold(stated)]
    return _graded(f"({named[0]})" == gold, named[0]) if len(named) == 1 else grade


def _closed(problem: Problem, gold: str, completion: str) -> Grade:
    """One of two words, alone or at the head of a sentence that does not hold the other one."""
    stated = extract(completion)
    text = stated if stated is not None else _one_line(completion)
    said = _first_of(next(pair for pair in CLOSED if gold.casefold() in pair), text or "")
    if said is None:
        return Grade(reward=0.0, answer=stated, reason="no_answer" if stated is None else "incorrect")
    return _graded(said == gold.casefold(), said)


def _first_of(pair: tuple[str, str], text: str) -> str | None:
    words = _TEXT.sub(r"\1", text).replace("*", "").replace("$", "").casefold().strip(" \t\"'`([-").removeprefix("deductively ")
    for said, other in (pair, pair[::-1]):
        head = re.match(rf"{said}(?:$|[\s\"'`\])]*(?:$|[.,;:!\u2013\u2014-]|\((?=\w)|(?:because|since)\b))", words)
        if head:
            return None if re.search(rf"\b{other}\b", words[len(said) :]) else said
    return None


def _number(problem: Problem, gold: str, completion: str) -> Grade:
    """The one number of the stated answer, or what stands behind its last "="; "eight" is 8 and "1,234" is 1234."""
    stated = extract(completion)
    text = stated if stated is not None else _short(completion)
    if text is None:
        return Grade(reward=0.0, reason="no_answer")
    found = _one_number(text.rpartition("=")[2])
    if found is None:
        return Grade(reward=0.0, answer=stated, reason="no_answer" if stated is None else "incorrect")
    return _graded(found == _value(gold), str(found))


def _one_number(text: str) -> Fraction | None:
    numbers = list(_NUMBER.finditer(text))
    if len(numbers) == 1:
        rest = text[: numbers[0].start()] + " " + text[numbers[0].end() :]
        return None if _SUM.search(rest) else _value(numbers[0].group())
    words = [word for word in re.findall(r"[a-z]+", text.casefold()) if word in _WORDS] if not numbers else []
    return Fraction(_WORDS[words[0]]) if len(words) == 1 else None


def _value(number: str) -> Fraction:
    return Fraction(number.replace(",", "").replace("\u2212", "-"))


def _list(problem: Problem, gold: str, completion: str) -> Grade:
    """The same words in the same order, whatever parts them: blanks, commas, arrows, lines, numbers in front."""
    text = _stated_lines(completion)
    if text is None:
        return Grade(reward=0.0, reason="no_answer")
    words, wanted = _items(text), _items(gold)
    if len(words) == len(wanted) + 1 and words[-2] == "and":
        words = [*words[:-2], words[-1]]
    return _graded(words == wanted, " ".join(words))


def _items(text: str) -> list[str]:
    parts = re.split(r"->|\u2192|[\s,;<]+", _TEXT.sub(r"\1", text))
    stripped = [part.strip("\"'`*[](){}.:").casefold() for part in parts if not re.fullmatch(r"\d+[.)]|[-*]", part)]
    return [part for part in stripped if part]


def _brackets(problem: Problem, gold: str, completion: str) -> Grade:
    """The same brackets, whatever stands between them; the whole sequence, input included, is right too."""
    text = _stated_lines(completion)
    if text is None:
        return Grade(reward=0.0, reason="no_answer")
    if re.search(r"\w", text):
        return _graded(False, text)
    answer, wanted = _only_brackets(text), _only_brackets(gold)
    given = _INPUT.search(problem.question)
    return _graded(answer == wanted or (given is not None and answer == _only_brackets(given[1]) + wanted), " ".join(answer))


def _only_brackets(text: str) -> str:
    return "".join(character for character in text if character in BRACKETS)


def _stated_lines(completion: str) -> str | None:
    """The rest of the line behind the last "answer is", or the lines below if it is empty; else a box, or the only line."""
    marks = list(_ANSWER_IS.finditer(completion))
    if marks:
        rest = completion[marks[-1].end() :]
        line, _, below = rest.partition("\n")
        text = line if line.strip(" *:.") else below.strip().partition("\n\n")[0]
        boxed = _BOX.search(text)
        return (boxed[1] if boxed else text).strip() or None
    boxes = _BOX.findall(completion)
    return boxes[-1].strip() if boxes else _one_line(completion)


def _one_line(completion: str) -> str | None:
    text = completion.strip()
    return text if text and "\n" not in text else None


def _short(completion: str) -> str | None:
    text = _one_line(completion)
    return text if text and len(text.split()) <= 3 else None


def _fold(text: str) -> str:
    words = _TEXT.sub(r"\1", text).casefold().strip(" .,;:!?\"'`*$").split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def _gold(problem: Problem) -> str | None:
    reference = problem.reference
    return reference.strip() if isinstance(reference, str) and reference.strip() else None


def _graded(is_correct: bool, answer: str) -> Grade:
    return Grade(reward=float(is_correct), answer=answer, reason="correct" if is_correct else "incorrect")


def _no_reference(problem: Problem) -> Grade:
    return Grade(reward=None, reason="verifier_error", note=f"the reference must be a text, not {problem.reference!r:.80}")
