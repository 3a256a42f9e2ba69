r"""Compare answers that are more than one formula: lists, tuples, intervals, sets, unions, matrices, equations,
inequalities.

Order: the parts of a bare list, of a set and of a union may come in any order; the parts of `( )`, `[ ]` and of a
matrix may not. The number of parts must agree. None means that this layer does not know.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from restem.verifiers.math.normalise import key
from restem.verifiers.math.numbers import same_equation
from restem.verifiers.math.quantity import read as read_quantity
from restem.verifiers.math.quantity import same_quantity

_SEPARATOR = re.compile(r",\s*\\text\{\s*(?:and|or)\s*\}|\\text\{\s*,?\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+|[,;]")
_CUP = re.compile(r"\\cup(?![A-Za-z])")
_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx)(?![A-Za-z])|[=<>]")
_LABEL = re.compile(
    r"(?:\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)|"
    r"\\?[A-Za-z]+|[A-Za-z](?:_\{?\w+\}?)?|[A-Za-z]\(\s*[A-Za-z]\s*\)|\\text\{[A-Za-z ]+\})"
)
_MATRIX = re.compile(r"\\begin\{(p|b|v|B|V|)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?![\d,])")
_SPOKEN = re.compile(r"\\text\s*\{([^{}]*)\}")
_MAX_PARTS = 64
_FLIP = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


@dataclass(frozen=True, slots=True)
class Shape:
    """A read answer: `scalar`, `list`, `set`, `union`, `tuple`, `matrix`, `label`, `equation` or `inequality`."""

    kind: str
    text: str
    parts: tuple[Shape, ...] = ()
    marks: tuple[str, ...] = ()
    """Brackets of a tuple, relations of an inequality, shape of a matrix, name of a label."""


@lru_cache(maxsize=8192)
def read(text: str) -> Shape:
    """Read normalised text into its outermost structure, recursively."""
    text = text.strip()
    spoken = _SPOKEN.fullmatch(text)
    if spoken and re.search(r"[\d,]", spoken[1]):
        return read(spoken[1])
    matrix = _MATRIX.fullmatch(text)
    if matrix and r"\begin" not in matrix[2]:
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2].strip()) if row.strip()]
        marks = ("det" if matrix[1] in ("v", "V") else "", ",".join(str(len(row)) for row in rows))
        return Shape("matrix", text, tuple(read(cell) for row in rows for cell in row), marks)
    pieces = split(text, _CUP)
    if len(pieces) > 1:
        return Shape("union", text, tuple(map(read, pieces)))
    pieces = split(text, _SEPARATOR)
    if len(pieces) > 1:
        return _read_list(text, pieces)
    inner = _enclosed(text)
    if inner is not None:
        return _read_bracket(text, *inner)
    if _RELATION.search(text):
        return _read_relation(text)
    if re.search(r"\\(?:pm|mp)(?![A-Za-z])", text):
        plus = re.sub(r"\\pm(?![A-Za-z])", "+", re.sub(r"\\mp(?![A-Za-z])", "-", text))
        minus = re.sub(r"\\pm(?![A-Za-z])", "-", re.sub(r"\\mp(?![A-Za-z])", "+", text))
        return Shape("list", text, (read(plus), read(minus)))
    return Shape("scalar", text)


def _read_list(text: str, pieces: list[str]) -> Shape:
    parts = [read(piece) for piece in pieces]
    flat = [inner for part in parts for inner in (part.parts if part.kind == "list" else (part,))]
    labels = {part.marks[0] for part in flat if part.kind == "label"}
    if len(labels) == 1 and flat[0].kind == "label" and (len(flat) == 1 or all(p.kind in ("label", "scalar") for p in flat)):
        # "x = 1, 2" and "x = 1 or x = 2" are one label for all parts.
        values = tuple(part.parts[0] if part.kind == "label" else part for part in flat)
        bare = Shape("list", ",".join(value.text for value in values), values)
        return Shape("label", text, (bare,), (flat[0].marks[0],))
    return Shape("list", text, tuple(flat))


def _read_bracket(text: str, left: str, inside: str, right: str) -> Shape:
    if left == "{":
        return read(inside)
    pieces = [piece for piece in split(inside, _SEPARATOR, thousands=False) if piece.strip()]
    if left == r"\{":
        return Shape("set", text, tuple(map(read, pieces)))
    if len(pieces) > 1:
        return Shape("tuple", text, tuple(map(read, pieces)), (left, right))
    return read(inside) if left == "(" and right == ")" and inside.strip() else Shape("scalar", text)


def _read_relation(text: str) -> Shape:
    pieces = split(text, _RELATION)
    marks = tuple(match.group() for match in _top_level(text, _RELATION))
    if len(pieces) < 2 or not all(piece.strip() for piece in pieces):
        return Shape("scalar", text)
    name = pieces[0].strip()
    if set(marks) <= {"=", r"\in", r"\approx"}:
        if _LABEL.fullmatch(name) and (len(marks) == 1 or set(marks) == {"="}):
            return Shape("label", text, (read(pieces[-1]), *map(read, pieces[:1])), (key(name),))
        if marks == ("=",):
            return Shape("equation", text, tuple(Shape("scalar", piece.strip()) for piece in pieces))
    if set(marks) <= set(_FLIP):
        if marks[0] in (">", r"\ge"):
            pieces, marks = pieces[::-1], tuple(_FLIP[mark] for mark in reversed(marks))
        return Shape("inequality", text, tuple(map(read, pieces)), marks)
    return Shape("relation", text, tuple(map(read, pieces)), marks)


def same(gold: Shape, answer: Shape) -> bool | None:
    """Whether two read answers are the same; True and False are certain, None is not known here."""
    if key(gold.text) == key(answer.text):
        return True
    if gold.kind == "label" or answer.kind == "label":
        return _same_labelled(gold, answer)
    if gold.kind == "scalar" and answer.kind == "scalar":
        return _same_scalar(gold.text, answer.text)
    loose = ("list", "set", "union")
    if gold.kind in loose and answer.kind in loose:
        return _same_in_any_order(gold, answer)
    if gold.kind == "equation" and answer.kind == "equation":
        return same_equation(_sides(gold), _sides(answer))
    if gold.kind == answer.kind:
        if len(gold.parts) != len(answer.parts) or (gold.marks != answer.marks and gold.kind != "inequality"):
            return None if gold.kind in ("inequality", "relation") else False
        if gold.marks == answer.marks:
            verdict = _all(same(left, right) for left, right in zip(gold.parts, answer.parts, strict=True))
            return verdict or (None if gold.kind in ("inequality", "relation") else verdict)
        return None
    left, right = interval(gold), interval(answer)
    if left and right:
        return same(left, right)
    unknown = {"relation", "inequality", "equation"}
    return None if {gold.kind, answer.kind} & unknown else False


def interval(shape: Shape) -> Shape | None:
    r"""Read "a < x \le b" or "x > a" as an interval; an interval is itself."""
    if shape.kind == "tuple" and len(shape.parts) == 2:
        return shape
    if shape.kind != "inequality":
        return None
    parts, marks = list(shape.parts), list(shape.marks)
    names = [bool(re.fullmatch(r"[a-zA-Z]", part.text)) and part.text != "e" for part in parts]
    if len(parts) == 2 and names == [True, False]:
        parts, marks, names = [read(r"-\infty"), *parts], ["<", *marks], [False, *names]
    elif len(parts) == 2 and names == [False, True]:
        parts, marks, names = [*parts, read(r"\infty")], [*marks, "<"], [*names, False]
    if len(parts) != 3 or not names[1]:
        return None
    brackets = ("(" if marks[0] == "<" else "[", ")" if marks[1] == "<" else "]")
    return Shape("tuple", f"{brackets[0]}{parts[0].text},{parts[2].text}{brackets[1]}", (parts[0], parts[2]), brackets)


def _same_labelled(gold: Shape, answer: Shape) -> bool | None:
    if gold.kind == answer.kind:
        if gold.marks == answer.marks:
            return same(gold.parts[0], answer.parts[0])
        return _same_as_equations(gold, answer)
    labelled, other = (gold, answer) if gold.kind == "label" else (answer, gold)
    if other.kind == "equation":
        return _same_as_equations(gold, answer)
    if other.kind in ("inequality", "relation"):
        return same(labelled.parts[0], other)
    return same(gold.parts[0], answer) if labelled is gold else same(gold, answer.parts[0])


def _same_as_equations(gold: Shape, answer: Shape) -> bool | None:
    sides = [split(shape.text, re.compile("=")) for shape in (gold, answer)]
    if any(len(pair) != 2 for pair in sides):
        return False
    return same_equation((sides[0][0], sides[0][1]), (sides[1][0], sides[1][1]))


def _same_in_any_order(gold: Shape, answer: Shape) -> bool | None:
    if len(gold.parts) != len(answer.parts):
        return False
    if len(gold.parts) > _MAX_PARTS:
        return None
    labels = [[part.kind == "label" for part in shape.parts] for shape in (gold, answer)]
    if any(map(any, labels)) and labels[0] != labels[1]:
        # "a = 1, b = 2" against "1, 2": without names the order is all that there is.
        return _all(same(left, right) for left, right in zip(gold.parts, answer.parts, strict=True))
    left_over = list(answer.parts)
    unknown = False
    for part in gold.parts:
        verdicts = [same(part, other) for other in left_over]
        if True in verdicts:
            left_over.pop(verdicts.index(True))
        elif None in verdicts:
            unknown = True
        else:
            return False
    return None if unknown else True


def _same_scalar(gold: str, answer: str) -> bool | None:
    if not gold or not answer:
        return False
    return same_quantity(read_quantity(gold), read_quantity(answer))


def _sides(equation: Shape) -> tuple[str, str]:
    return equation.parts[0].text, equation.parts[1].text


def _all(verdicts: object) -> bool | None:
    result: bool | None = True
    for verdict in verdicts:  # type: ignore[attr-defined]
        if verdict is False:
            return False
        result = result if verdict else None
    return result


def _top_level(text: str, pattern: re.Pattern[str], thousands: bool = True) -> list[re.Match[str]]:
    skip = {p for m in _THOUSANDS.finditer(text) for p in range(*m.span())} if thousands else set()
    found = []
    depth = position = 0
    while position < len(text):
        match = pattern.match(text, position) if depth == 0 else None
        if match and not (position in skip and text[position] == ","):
            found.append(match)
            position = match.end()
            continue
        if text[position] == "\\":
            depth += text.startswith((r"\{", r"\langle", r"\begin"), position)
            depth -= text.startswith((r"\}", r"\rangle", r"\end"), position)
            position += 2
            continue
        depth += (text[position] in "{([") - (text[position] in "})]")
        position += 1
    return found


def split(text: str, pattern: re.Pattern[str], *, thousands: bool = True) -> list[str]:
    """Split at matches of `pattern` outside all brackets; with `thousands`, the comma of 9,500 is part of the
    number."""
    pieces, start = [], 0
    for match in _top_level(text, pattern, thousands):
        pieces.append(text[start : match.start()])
        start = match.end()
    return [*pieces, text[start:]]


def _enclosed(text: str) -> tuple[str, str, str] | None:
    """Return (left, inside, right) when one pair of brackets encloses the whole text. Half-open pairs count."""
    for left in (r"\{", r"\langle", "{", "(", "["):
        if not text.startswith(left):
            continue
        depth = position = 0
        while position < len(text):
            step = 1
            if text[position] == "\\":
                opening = text.startswith((r"\{", r"\langle"), position)
                closing = text.startswith((r"\}", r"\rangle"), position)
                step = 7 if text.startswith((r"\langle", r"\rangle"), position) else 2
            else:
                opening, closing = text[position] in "{([", text[position] in "})]"
            depth += opening - closing
            position += step
            if depth == 0:
                break
        right = text[position - step : position]
        if position != len(text) or (left in ("(", "[")) != (right in (")", "]")):
            return None
        return left, text[len(left) : position - step], right
    return None
