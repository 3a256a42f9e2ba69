"""Whether what a program printed or returned is what was expected.

"exact", the default. Text: line by line, blanks at the ends of lines and empty lines do not count; word by word, in order; a
word is equal if it is the same, or if the expected one has a decimal point or an exponent and both are the same number to 1e-6.
Values: Python's equality between plain data, tuples counting as lists; a float that is no whole number to 1e-6.

"apps", for comparison with published numbers only: the rules of APPS' own script (hendrycks/apps, testing_util.py), which
forget order and repeats, take numbers for equal to 1e-5, and accept a value where a list of it is expected.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

Comparison = Literal["exact", "apps"]
_TOLERANCE = 1e-6
_DECIMAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)  # float() also reads "4_2" and other alphabets


def same_text(printed: str, expected: Any, how: Comparison = "exact") -> bool:
    """`expected`: a text, or a list of lines as some of APPS' files have it."""
    text = "\n".join(map(str, expected)) if isinstance(expected, list | tuple) else str(expected)
    if how == "apps" and _loosely_same(printed, text):
        return True
    ours, theirs = _words(printed), _words(text)
    return len(ours) == len(theirs) and all(
        len(a) == len(b) and all(map(_same_word, a, b)) for a, b in zip(ours, theirs, strict=True)
    )


def same_value(found: Any, expected: Any, how: Comparison = "exact") -> bool:
    """Both are plain data."""
    if _same(found, expected):
        return True
    return how == "apps" and isinstance(expected, list) and len(expected) > 0 and _same(found, expected[0])


def _words(text: str) -> list[list[str]]:
    return [words for line in text.splitlines() if (words := line.split())]


def _same_word(found: str, expected: str) -> bool:
    if found == expected:
        return True
    if not _DECIMAL.fullmatch(expected) or not _NUMBER.fullmatch(found):
        return False
    return math.isclose(float(found), float(expected), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, list | tuple):
        return isinstance(found, list | tuple) and len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(expected, dict):
        return (
            isinstance(found, dict) and found.keys() == expected.keys() and all(_same(found[k], v) for k, v in expected.items())
        )
    if isinstance(expected, float) and isinstance(found, int | float) and not isinstance(found, bool):
        if math.isnan(expected):
            return math.isnan(found)
        return found == expected or (
            not expected.is_integer() and math.isclose(found, expected, rel_tol=_TOLERANCE, abs_tol=1e-9)
        )
    try:
        return bool(found == expected)
    except Exception:  # plain data of odd kinds; not equal
        return False


def _loosely_same(printed: str, expected: str) -> bool:
    """The last resorts of APPS' script: numbers to 1e-5 (np.allclose), then words as sets of sets."""
    ours, theirs = _words(printed), _words(expected)
    if [" ".join(words) for words in ours] == [" ".join(words) for words in theirs]:
        return True
    if len(ours) == len(theirs) and all(len(w) == 1 and _NUMBER.fullmatch(w[0]) for w in (*ours, *theirs)):
        numbers = [(float(a[0]), float(b[0])) for a, b in zip(ours, theirs, strict=True)]
        if all(abs(a - b) <= 1e-8 + 1e-5 * abs(b) for a, b in numbers):
            return True
    return {frozenset(words) for words in ours} == {frozenset(words) for words in theirs}
