"""Who may be in which split: identity by content, duplicates out, validation held out of training.

Everything here is decided before any limit cuts a split, so a smaller run sees a part of the larger one. Test wins over
validation, validation over training: a problem that two splits hold stays in the first of these alone.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from restem.errors import RestemError
from restem.types import Problem

HELD_OUT = 500
"""Validation problems held out of training by default; a fifth of the problems where that is less."""


def content_hash(question: str) -> str:
    """Name a question by its content: 16 hexadecimal digits of sha256, blind to blanks and to upper or lower case."""
    return hashlib.sha256(" ".join(question.split()).casefold().encode()).hexdigest()[:16]


def hash_order(problems: Iterable[Problem], seed: int) -> list[Problem]:
    """Shuffle by content and seed: the order does not depend on the order or the number of the problems."""
    return sorted(problems, key=lambda p: hashlib.sha256(f"{seed}:{content_hash(p.question)}".encode()).digest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many problems of each split are wanted."""

    limit: int | None = None
    """Cut every split to its first n; None = do not cut."""
    train: int | None = None
    """Size of the training split; None = all there are."""
    val: int | None = None
    """Size of the validation split, also where it is held out of training; None = the task's default."""
    test: int | None = None
    """Size of the test split; None = all there are."""

    def __post_init__(self) -> None:
        for name in ("limit", "train", "val", "test"):
            size = getattr(self, name)
            if size is not None and size < 0:
                raise RestemError(f"task.{name} = {size}: a size cannot be negative")

    def of(self, split: str, default: int) -> int:
        """The size of one split, given its full or default size."""
        size: int | None = getattr(self, split)
        size = default if size is None else size
        return size if self.limit is None else min(size, self.limit)


class Splits(NamedTuple):
    train: tuple[Problem, ...]
    val: tuple[Problem, ...]
    test: tuple[Problem, ...]
    notes: tuple[str, ...]
    """What was left out or held out, with counts."""


def divide(
    train: Sequence[Problem],
    val: Sequence[Problem] | None,
    test: Sequence[Problem] | None,
    *,
    sizes: Sizes,
    seed: int,
) -> Splits:
    """Make clean splits out of what the data has. None = the data has no such split.

    A missing validation split is held out of training. With neither validation nor test, both are, a tenth each.
    """
    notes: list[str] = []
    kept_test = _clean("test", test or (), {}, notes)
    kept_val = _clean("val", val or (), {"test": kept_test}, notes)
    kept_train = _clean("train", train, {"test": kept_test, "val": kept_val}, notes)
    if train and test is None and val is None:
        tenth = len(kept_train) // 10
        kept_train, kept_test = _hold_out("test", kept_train, sizes.test, tenth, seed, notes)
        kept_train, kept_val = _hold_out("val", kept_train, sizes.val, tenth, seed, notes)
    elif train and val is None:
        default = min(HELD_OUT, len(kept_train) // 5)
        kept_train, kept_val = _hold_out("val", kept_train, sizes.val, default, seed, notes)
    elif train and test is None:
        notes.append("test: the data has no test split, so nothing is tested on")
    kept_train, kept_val, kept_test = _distinct_ids(kept_train, kept_val, kept_test, notes)
    return Splits(
        train=tuple(kept_train[: sizes.of("train", len(kept_train))]),
        val=tuple(kept_val[: sizes.of("val", len(kept_val))]),
        test=tuple(kept_test[: sizes.of("test", len(kept_test))]),
        notes=tuple(notes),
    )


def closest(word: str, known: Iterable[str]) -> str:
    """End an error message: the likely spelling, and all there are."""
    known = sorted(known)
    match = difflib.get_close_matches(word, known, n=1)
    return (f'; did you mean "{match[0]}"?' if match else ".") + (f" There are: {', '.join(known)}." if known else "")


def _clean(name: str, problems: Sequence[Problem], others: dict[str, list[Problem]], notes: list[str]) -> list[Problem]:
    """Leave out what an earlier split holds, then repeats."""
    for other, members in others.items():
        hashes = {content_hash(problem.question) for problem in members}
        apart = [problem for problem in problems if content_hash(problem.question) not in hashes]
        if len(apart) < len(problems):
            notes.append(f"{name}: {len(problems) - len(apart)} left out, also in {other}")
        problems = apart
    first = {content_hash(problem.question): problem for problem in reversed(problems)}
    kept = [problem for problem in problems if first[content_hash(problem.question)] is problem]
    if len(kept) < len(problems):
        notes.append(f"{name}: {len(problems) - len(kept)} left out, repeats of another {name} problem")
    return kept


def _hold_out(
    name: str, problems: list[Problem], wanted: int | None, default: int, seed: int, notes: list[str]
) -> tuple[list[Problem], list[Problem]]:
    """Take the first of the hash order out of the problems: a smaller held-out split is a part of a larger one."""
    size = default if wanted is None else wanted
    if size and size >= len(problems):
        raise RestemError(
            f"task.{name} = {size}, but there are only {len(problems)} problems to hold it out of, and none would be "
            "left to "
            f"train on.\nLower task.{name}, or give a file of its own for this split."
        )
    held = hash_order(problems, seed)[:size]
    notes.append(f"{name}: {size} held out of the training problems by content hash, seed {seed}")
    names = {id(problem) for problem in held}
    return [problem for problem in problems if id(problem) not in names], held


def _distinct_ids(
    train: list[Problem], val: list[Problem], test: list[Problem], notes: list[str]
) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Make ids unique over the whole task: files that number their rows from 0 each get the split's name in front."""
    splits = {"train": train, "val": val, "test": test}
    for name, problems in splits.items():
        seen: set[str] = set()
        for problem in problems:
            if problem.id in seen:
                raise RestemError(
                    f'two different {name} problems have the id "{problem.id}".\n'
                    "Give each its own, or leave task.id unset: ids then come from the content."
                )
            seen.add(problem.id)
    total = sum(len(problems) for problems in splits.values())
    if len({problem.id for problems in splits.values() for problem in problems}) == total:
        return train, val, test
    notes.append("ids repeat between splits, so each has its split's name in front")
    named = {name: [replace(p, id=f"{name}/{p.id}") for p in problems] for name, problems in splits.items()}
    return named["train"], named["val"], named["test"]
