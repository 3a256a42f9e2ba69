"""The templates of the arithmetic task: what is asked, how its numbers are drawn, and the ways to say it.

All wording is our own. Every intermediate result is a whole number above 0, and no operand is below 2, so that plurals
hold.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = (
    "Ada", "Bela", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "Jana", "Kofi", "Lena", "Milo", "Nora", "Otto",
    "Pia", "Quinn", "Rosa", "Sven", "Tara", "Umar", "Vera", "Wim", "Yara",
)  # fmt: skip
ITEMS = (
    "apples", "beads", "books", "buttons", "candles", "cards", "coins", "cups", "eggs", "flowers", "lemons", "marbles",
    "nails", "pears", "pencils", "plums", "seeds", "shells", "stamps", "stickers", "stones", "tickets", "tiles", "toys",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Draws the operands of one problem."""

    rng: random.Random
    largest_added: int
    largest_taken: int
    largest_factor: int
    largest_divisor: int

    def added(self) -> int:
        return self.rng.randint(2, self.largest_added)

    def taken(self) -> int:
        return self.rng.randint(2, self.largest_taken)

    def factor(self) -> int:
        return self.rng.randint(2, self.largest_factor)

    def divisor(self) -> int:
        return self.rng.randint(2, self.largest_divisor)


@dataclass(frozen=True, slots=True)
class Template:
    """One kind of problem: how its numbers are drawn, and two to five ways to say it."""

    kind: str
    steps: int
    values: Callable[[Draw], dict[str, int]]
    forms: tuple[str, ...]


def _join(d: Draw) -> dict[str, int]:
    a, b = d.added(), d.added()
    return {"a": a, "b": b, "answer": a + b}


def _take(d: Draw) -> dict[str, int]:
    left, b = d.added(), d.taken()
    return {"a": left + b, "b": b, "answer": left}


def _times(d: Draw) -> dict[str, int]:
    a, b = d.factor(), d.factor()
    return {"a": a, "b": b, "answer": a * b}


def _divide(d: Draw) -> dict[str, int]:
    b, each = d.divisor(), d.factor()
    return {"a": b * each, "b": b, "answer": each}


def _times_then_take(d: Draw) -> dict[str, int]:
    a, b = d.factor(), d.factor()
    c = min(d.taken(), a * b - 1)
    return {"a": a, "b": b, "c": c, "answer": a * b - c}


def _times_then_add(d: Draw) -> dict[str, int]:
    a, b, c = d.factor(), d.factor(), d.added()
    return {"a": a, "b": b, "c": c, "answer": a * b + c}


def _add_then_divide(d: Draw) -> dict[str, int]:
    c, each = d.divisor(), d.factor()
    b = min(d.added(), c * each - 2)
    return {"a": c * each - b, "b": b, "c": c, "answer": each}


def _take_twice(d: Draw) -> dict[str, int]:
    left, b, c = d.added(), d.taken(), d.taken()
    return {"a": left + b + c, "b": b, "c": c, "answer": left}


def _more_than_other(d: Draw) -> dict[str, int]:
    a, b = d.added(), d.taken()
    return {"a": a, "b": b, "answer": 2 * a + b}


def _pay(d: Draw) -> dict[str, int]:
    a, b, left = d.factor(), d.factor(), d.added()
    return {"a": a * b + left, "b": a, "c": b, "answer": left}


def _two_products(d: Draw) -> dict[str, int]:
    a, b, c, e = d.factor(), d.factor(), d.factor(), d.factor()
    return {"a": a, "b": b, "c": c, "d": e, "answer": a * b + c * e}


def _times_add_divide(d: Draw) -> dict[str, int]:
    a, b, parts = d.factor(), d.factor(), d.divisor()
    c = parts * d.factor() + -(a * b) % parts
    return {"a": a, "b": b, "c": c, "d": parts, "answer": (a * b + c) // parts}


def _add_times_take(d: Draw) -> dict[str, int]:
    a, b, c = d.factor(), d.factor(), d.divisor()
    e = min(d.taken(), (a + b) * c - 1)
    return {"a": a, "b": b, "c": c, "d": e, "answer": (a + b) * c - e}


def _take_divide_add(d: Draw) -> dict[str, int]:
    c, each, b, e = d.divisor(), d.factor(), d.taken(), d.added()
    return {"a": c * each + b, "b": b, "c": c, "d": e, "answer": each + e}


def _times_take_add(d: Draw) -> dict[str, int]:
    a, b, e = d.factor(), d.factor(), d.added()
    c = min(d.taken(), a * b - 1)
    return {"a": a, "b": b, "c": c, "d": e, "answer": a * b - c + e}


TEMPLATES = (
    Template(
        "join", 1, _join,
        (
            "{n} has {a} {item} and gets {b} more. How many {item} does {n} have now?",
            "There are {a} {item} on one shelf and {b} on another. How many {item} are there in all?",
            "{n} found {a} {item} on Monday and {b} on Tuesday. How many {item} did {n} find on both days?",
            "{n} brings {a} {item} and {m} brings {b}. How many {item} do they bring together?",
        ),
    ),
    Template(
        "take", 1, _take,
        (
            "{n} had {a} {item} and gave {b} to {m}. How many {item} does {n} still have?",
            "Of {a} {item} in a drawer, {b} are used up. How many {item} remain?",
            "A stall has {a} {item} in the morning and sells {b}. How many {item} are left at night?",
        ),
    ),
    Template(
        "compare", 1, _take,
        (
            "{n} owns {a} {item} and {m} owns {b}. How many more {item} does {n} own than {m}?",
            "{n} needs {a} {item} but has only {b}. How many {item} are missing?",
        ),
    ),
    Template(
        "groups", 1, _times,
        (
            "{n} fills {a} bags with {b} {item} each. How many {item} is that?",
            "A wall has {a} rows of {b} {item}. How many {item} are on the wall?",
            "{n} buys {b} {item} every day for {a} days. How many {item} does {n} buy?",
        ),
    ),
    Template(
        "share", 1, _divide,
        (
            "{a} {item} are shared equally by {b} friends. How many {item} does each friend get?",
            "{n} puts {a} {item} into {b} equal piles. How many {item} are in a pile?",
        ),
    ),
    Template(
        "pack", 1, _divide,
        (
            "One box holds {b} {item}. How many boxes does {n} need for {a} {item}?",
            "{n} uses {b} {item} a day. For how many days do {a} {item} last?",
        ),
    ),
    Template(
        "groups, then fewer", 2, _times_then_take,
        (
            "{n} has {a} boxes of {b} {item} and loses {c} of them. How many {item} are left?",
            "A shop gets {a} crates with {b} {item} each. {c} {item} are broken. How many {item} are whole?",
            "{n} collects {b} {item} a day for {a} days and gives {c} to {m}. How many {item} does {n} keep?",
        ),
    ),
    Template(
        "groups, then more", 2, _times_then_add,
        (
            "{n} has {a} jars of {b} {item} and {c} loose {item}. How many {item} does {n} have?",
            "There are {a} tables with {b} {item} each and {c} {item} on the floor. How many {item} are there?",
            "{n} had {c} {item}, then bought {a} packs of {b}. How many {item} does {n} have now?",
        ),
    ),
    Template(
        "join, then share", 2, _add_then_divide,
        (
            "{n} has {a} {item} and {m} has {b}. They put them into {c} equal bags. How many {item} are in a bag?",
            "{a} old and {b} new {item} are shared equally by {c} children. How many {item} does each child get?",
        ),
    ),
    Template(
        "fewer twice", 2, _take_twice,
        (
            "{n} had {a} {item}, lost {b} and sold {c}. How many {item} does {n} have now?",
            "A bin holds {a} {item}. {n} takes {b} and {m} takes {c}. How many {item} stay in the bin?",
            "{n} must sort {a} {item}. {b} are done before lunch and {c} after. How many {item} are still to sort?",
        ),
    ),
    Template(
        "more than another", 2, _more_than_other,
        (
            "{n} has {a} {item}. {m} has {b} more than {n}. How many {item} do they have together?",
            "{n} counted {a} {item} on Friday and {b} more than that on Sunday. How many {item} is that in all?",
        ),
    ),
    Template(
        "change", 2, _pay,
        (
            "{n} has {a} coins and buys {b} books for {c} coins each. How many coins are left?",
            "{n} has {a} metres of wire and cuts off {b} pieces of {c} metres. How many metres remain?",
        ),
    ),
    Template(
        "two kinds of groups", 3, _two_products,
        (
            "{n} buys {a} bags of {b} {item} and {c} bags of {d} {item}. How many {item} does {n} buy?",
            "{n} carries {b} {item} on each of {a} trips and {m} carries {d} on each of {c} trips. How many {item} is "
            "that?",
        ),
    ),
    Template(
        "groups, more, share", 3, _times_add_divide,
        (
            "{n} has {a} bags of {b} {item} and {c} more, and shares all of them equally among {d} friends. "
            "How many {item} does each friend get?",
            "{a} trays of {b} {item} and {c} single {item} are put into {d} equal boxes. How many {item} are in a box?",
        ),
    ),
    Template(
        "join, groups, fewer", 3, _add_times_take,
        (
            "Each of {c} bags holds {a} red and {b} blue {item}. {d} {item} are taken out. How many {item} are left?",
            "{n} collects {a} {item} every morning and {b} every evening. After {c} days {n} sells {d}. "
            "How many {item} does {n} have left?",
        ),
    ),
    Template(
        "fewer, share, more", 3, _take_divide_add,
        (
            "{n} has {a} {item}, keeps {b} and shares the rest equally among {c} friends. {m} is one of them and "
            "already had "
            "{d} {item}. How many {item} does {m} have now?",
            "Of {a} {item}, {b} are lost and the rest is packed into {c} equal boxes. {n} adds {d} to one box. "
            "How many {item} are in that box?",
        ),
    ),
    Template(
        "groups, fewer, more", 3, _times_take_add,
        (
            "{n} has {a} boxes of {b} {item}, gives away {c} and then finds {d}. How many {item} does {n} have?",
            "A hall has {a} rows of {b} seats. {c} seats are carried out and {d} are brought in. How many seats are "
            "there now?",
            "{n} earns {b} coins a day for {a} days, spends {c} and gets {d} from {m}. How many coins does {n} have?",
        ),
    ),
)  # fmt: skip
