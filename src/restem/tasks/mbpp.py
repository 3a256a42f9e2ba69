"""MBPP (Austin et al. 2021, arXiv 2108.07732): short Python functions, each with three asserts.

Splits by number, as published: 11 to 510 test, 511 to 600 validation, 601 to 974 training; 1 to 10 are the paper's own
exemplars and are left out. Our exemplars are not from the set. The asserts are part of the question, as in the paper: they name
the function.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restem.prompts import Exemplar, Prompt
from restem.tasks.files import Columns, Row, columns_of, find_split, problems_of, read_rows
from restem.tasks.hub import Source, read_hub_id
from restem.tasks.splits import Sizes, divide
from restem.tasks.task import Task
from restem.types import Problem
from restem.verifiers.code.tests import CodeTests

HUB_ID = "google-research-datasets/mbpp"
_NUMBERS = {"test": range(11, 511), "val": range(511, 601), "train": range(601, 975)}


def _question(text: str, tests: list[str]) -> str:
    return f"{text.strip()}\nThese asserts must hold:\n" + "\n".join(tests)


EXEMPLARS = (
    Exemplar(
        question=_question(
            "Write a function that counts how many words of a text begin with a given letter, whatever its case.",
            ['assert count_words("Ann ate an egg", "a") == 3', 'assert count_words("", "b") == 0'],
        ),
        solution="```python\ndef count_words(text, letter):\n"
        "    return sum(word.lower().startswith(letter.lower()) for word in text.split())\n```",
    ),
    Exemplar(
        question=_question(
            "Write a function that returns the running maximum of a list of numbers.",
            ["assert running_max([3, 1, 4, 1, 5]) == [3, 3, 4, 4, 5]", "assert running_max([]) == []"],
        ),
        solution="```python\ndef running_max(numbers):\n    found = []\n\n    for number in numbers:\n"
        "        found.append(number if not found else max(found[-1], number))\n\n    return found\n```",
    ),
    Exemplar(
        question=_question(
            "Write a function that swaps keys and values of a dictionary.",
            ['assert swap({"a": 1, "b": 2}) == {1: "a", 2: "b"}', "assert swap({}) == {}"],
        ),
        solution="```python\ndef swap(table):\n    return {value: key for key, value in table.items()}\n```",
    ),
)
PROMPT = Prompt(
    style="few-shot",
    instruction="Write a Python function for each task.",
    exemplars=EXEMPLARS,
    question_label="Task:",
    answer_label="Solution:",
)


def load(*, data: Path | None, sizes: Sizes, seed: int = 0, options: Mapping[str, Any] | None = None) -> Task:
    source = Source(name="mbpp", data=data, hub_id=read_hub_id(options, "mbpp", HUB_ID), configs=("full",))
    notes: list[str] = []
    found = {split: _problems(source, split, notes) for split in _NUMBERS}
    splits = divide(found["train"], found["val"], found["test"], sizes=sizes, seed=seed)
    return Task(
        name="mbpp",
        train=splits.train,
        val=splits.val,
        test=splits.test,
        prompt=PROMPT,
        verifier_spec="code",
        samples=64,
        max_tokens=384,
        notes=(*notes, *splits.notes),
    )


def _problems(source: Source, split: str, notes: list[str]) -> list[Problem]:
    rows, where = _rows(source, split)
    columns_of(rows, where, "text", "test_list")
    own = [row for row in rows if int(row["task_id"]) in _NUMBERS[split]]
    return problems_of([_normal(row) for row in own], Columns(id="id"), where, split, notes)


def _rows(source: Source, split: str) -> tuple[list[Row], str]:
    """One file has all; the hub has them apart."""
    for folder in (source.data / "mbpp", source.data) if source.data else ():
        if file := find_split(folder, "mbpp"):
            return read_rows(file), str(file)
    name = {"val": "validation"}.get(split, split)
    return source.rows(name), source.where(name)


def _normal(row: Row) -> Row:
    tests = [str(test) for test in row["test_list"]]
    return {
        "question": _question(str(row["text"]), tests),
        "answer": CodeTests(kind="check", setup=str(row.get("test_setup_code") or ""), check="\n".join(tests)).as_dict(),
        "id": f"mbpp/{row['task_id']}",
        "solution": str(row.get("code") or "").replace("\r\n", "\n"),
    }
