"""Any data set of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760): made from a seed, graded by its own scorer.

`task.name = "reasoning-gym:chain_sum"`; `task.options` are the settings of that data set. What a newcomer would get wrong: the
library seeds problem i with seed + i, so two neighbouring seeds give nearly the same problems. Here the hash of a question's
text decides which split may hold it, so that the test problems of one seed never meet the training problems of another.

A problem keeps where it came from (data set, settings, seed, position), not the library's entry: the verifier makes the entry
again, and refuses to grade if another version of the library makes another question.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restem.errors import MissingExtra, RestemError
from restem.prompts import Prompt
from restem.tasks.splits import Sizes, closest, content_hash
from restem.tasks.task import Task
from restem.types import Grade, Problem
from restem.verifiers.math.extract import extract

with contextlib.suppress(ImportError):  # already here, so that importing it is no part of a grading's time limit
    importlib.import_module("reasoning_gym")

SIZES = {"train": 512, "val": 128, "test": 256}
"""Problems per split when no size is asked for."""
BUCKETS = {"test": range(0, 6), "val": range(6, 8), "train": range(8, 16)}
"""The first hexadecimal digit of a question's content hash says which split may hold it."""
LENGTH = 20_000
"""The size that the library is told, always the same: what it makes must not depend on how many problems are wanted. A few data
sets make all of it at once, so it is not larger; half of it at most is for training."""
STEP = 10_000_000
"""Between the seeds that the library is given for two of our seeds."""

PROMPT = Prompt(
    style="few-shot",
    instruction="Solve the problem step by step. Then write the answer, and nothing else, between <answer> and </answer>.",
    ends=("</answer>",),
)
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_ANSWER_IS = re.compile(r".*\banswer\s*(?:is\b|:)(.+)", re.DOTALL | re.IGNORECASE)


def load(*, data: Path | None, sizes: Sizes, seed: int = 0, options: Mapping[str, Any] | None = None) -> Task:
    """Options: `dataset`, the part of the task's name after the colon, and the settings of that data set.

    A smaller size is a prefix of a larger one. `data` is not needed: nothing is read.
    """
    settings = dict(options or {})
    name = str(settings.pop("dataset", ""))
    for key in ("seed", "size"):
        if key in settings:
            other = "seed" if key == "seed" else "task.train, task.val and task.test"
            raise RestemError(f"{_title(name)}: task.options.{key} does not apply.\nSet {other} instead.")
    origin = {"dataset": name, "seed": seed * STEP % 2**31, "options": json.dumps(settings, sort_keys=True)}
    splits = _fill(origin, {split: sizes.of(split, size) for split, size in SIZES.items()})
    return Task(
        name=f"reasoning-gym-{name}",
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        prompt=PROMPT,
        verifier_spec="restem.tasks.reasoning_gym:verify",
        answer_style="answer-is",
    )


def verify(problem: Problem, completion: str) -> Grade:
    """Reward 1 for full marks by the data set's own scorer, else 0; the note says what the scorer gave.

    Scorers give a few hundredths for any text at all; rewarding them would train on wrong answers. The answer is what stands
    between the last <answer> and </answer>, or without these behind "the answer is". Reward None if the scorer fails.
    """
    grade = partial(problem, completion)
    if grade.reward is None or grade.answer is None:
        return grade
    right = grade.reward >= 1
    return Grade(
        reward=float(right), answer=grade.answer, reason="correct" if right else "incorrect", note="" if right else grade.note
    )


def partial(problem: Problem, completion: str) -> Grade:
    """The scorer's own number as the reward. Wants `select.threshold`, and makes pass@K count every number above 0."""
    found = _candidates(completion)
    if not found:
        return Grade(reward=0.0, reason="no_answer")
    try:
        dataset, entry = _entry(**{key: problem.meta.get(key) for key in ("dataset", "seed", "options", "index")})
        if entry["question"] != problem.question:
            return _failed("this version of reasoning-gym makes another question from the same seed")
        scores = {answer: float(dataset.score_answer(answer=answer, entry=entry)) for answer in found}
    except Exception as error:  # a scorer that fails has not said that the answer is wrong
        return _failed(f"{type(error).__name__}: {error}"[:300])
    answer = max(scores, key=lambda text: scores[text])
    score = max(0.0, scores[answer])
    return Grade(
        reward=score, answer=answer, reason="correct" if score >= 1 else "incorrect", note=f"the scorer gave {score:.4g}"
    )


def _candidates(completion: str) -> list[str]:
    """The tagged answer; without tags, the sentence that states one, and all the text behind it, for answers of many lines."""
    if tagged := _TAGGED.findall(completion):
        return [tagged[-1].strip()] if tagged[-1].strip() else []
    behind = _ANSWER_IS.match(completion)
    texts = [extract(completion), behind[1].strip().removesuffix(".") if behind else None]
    return list(dict.fromkeys(text for text in texts if text))


def _fill(origin: Mapping[str, Any], wanted: Mapping[str, int]) -> dict[str, tuple[Problem, ...]]:
    dataset = _dataset(origin["dataset"], origin["seed"], origin["options"])
    found: dict[str, dict[str, Problem]] = {split: {} for split in wanted}
    for index in range(min(LENGTH, 1000 + 20 * sum(wanted.values()))):
        if all(len(found[split]) >= size for split, size in wanted.items()):
            break
        entry = _make(dataset, index)
        problem = _problem(entry, {**origin, "index": index})
        split = next(split for split, digits in BUCKETS.items() if int(problem.id[0], 16) in digits)
        if len(found[split]) < wanted[split]:
            found[split].setdefault(problem.id, problem)
    for split, size in wanted.items():
        if len(found[split]) < size:
            raise RestemError(
                f"{_title(origin['dataset'])}: only {len(found[split])} different {split} problems of the {size} asked for "
                f"were found with the settings {origin['options']}.\nLower task.{split}, or widen the settings in task.options."
            )
    return {split: tuple(problems.values()) for split, problems in found.items()}


def _problem(entry: Mapping[str, Any], origin: Mapping[str, Any]) -> Problem:
    question, answer = str(entry["question"]), entry["answer"]
    # Without one right answer the scorer judges alone; None would mean that the problem cannot be graded.
    reference = str(answer) if answer is not None else {"scorer": origin["dataset"]}
    return Problem(id=content_hash(question), question=question, reference=reference, meta=dict(origin))


@functools.lru_cache(maxsize=8)
def _dataset(name: str, seed: int, options: str) -> Any:
    library = _library()
    known = getattr(importlib.import_module("reasoning_gym.factory"), "DATASETS", {})
    if name not in known:
        raise RestemError(
            f'reasoning-gym has no data set "{name}"{closest(name, known)}\nName one: task.name = "reasoning-gym:NAME".'
        )
    try:
        return library.create_dataset(name, seed=seed, size=LENGTH, **json.loads(options))
    except Exception as error:  # unknown settings, values out of range: each data set has its own ways to say so
        raise RestemError(
            f"{_title(name)} cannot be made with task.options = {options}: {type(error).__name__}: {error}"
        ) from error


@functools.lru_cache(maxsize=64)
def _entry(dataset: str, seed: int, options: str, index: int) -> tuple[Any, Any]:
    """The data set and the entry at a position; the samples of one problem follow each other, so few are kept."""
    made = _dataset(dataset, seed, options)
    return made, _make(made, index)


def _make(dataset: Any, index: int) -> Any:
    """Make an entry. Some data sets draw from Python's common generator too, so it is set for each entry, and put back."""
    before = random.getstate()
    random.seed(index)
    try:
        return dataset[index]
    finally:
        random.setstate(before)


def _library() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        package = (error.name or "reasoning_gym").replace("_", "-")  # the library's own needs may be what is absent
        raise MissingExtra(package, "reasoning-gym", "A task of reasoning-gym") from error


def _title(name: str) -> str:
    return f"reasoning-gym:{name}"


def _failed(note: str) -> Grade:
    return Grade(reward=None, reason="verifier_error", note=note)
