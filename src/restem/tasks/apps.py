"""APPS (Hendrycks et al. 2021, arXiv 2105.09938), introductory problems: programs that read and print, or functions.

Two public layouts are read: the archive's folders (train/0000/question.txt, input_output.json, solutions.json, metadata.json)
and the hub's JSON lines. The paper on ReST^EM does not say how it prompts; here two exemplars of our own, one of each kind.
Problems without tests are left out, and named: without tests nothing can be correct.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from restem.errors import RestemError
from restem.prompts import Exemplar, Prompt
from restem.tasks.files import KINDS, Columns, Row, columns_of, listing, problems_of, read_rows
from restem.tasks.hub import Source
from restem.tasks.splits import Sizes, closest, divide, hash_order
from restem.tasks.task import Task
from restem.types import Problem
from restem.verifiers.code.tests import CodeTests

HUB_ID = "codeparrot/apps"
DIFFICULTIES = ("introductory", "interview", "competition", "all")
_READS = "Read from standard input and print to standard output."

EXEMPLARS = (
    Exemplar(
        question="A shop sells boxes of n eggs. Given n and the number of eggs that a baker needs, print how many boxes she "
        "has to buy.\n\nInput: one line with two integers.\n"
        f"Output: one integer.\n\nExample\nInput\n6 20\nOutput\n4\n\n{_READS}",
        solution="```python\nn, needed = map(int, input().split())\n\nprint((needed + n - 1) // n)\n```",
    ),
    Exemplar(
        question="Return the letters of a word that occur exactly once, in their order.\n\nUse this code:\ndef once(word):",
        solution="```python\ndef once(word):\n    return [letter for letter in word if word.count(letter) == 1]\n```",
    ),
)
PROMPT = Prompt(
    style="few-shot",
    instruction="Solve each problem with a Python program.",
    exemplars=EXEMPLARS,
    question_label="Problem:",
    answer_label="Solution:",
)


def load(*, data: Path | None, sizes: Sizes, seed: int = 0, options: Mapping[str, Any] | None = None) -> Task:
    """Options: `difficulty` (introductory), `hub_id`."""
    settings = {"difficulty": "introductory", "hub_id": HUB_ID, **(options or {})}
    for key in settings:
        if key not in ("difficulty", "hub_id"):
            raise RestemError(f'apps has no option "{key}"{closest(key, ["difficulty", "hub_id"])}')
    if settings["difficulty"] not in DIFFICULTIES:
        raise RestemError(f'apps has no difficulty "{settings["difficulty"]}". There are: {", ".join(DIFFICULTIES)}.')
    notes: list[str] = []
    train, test = (
        _problems(data, str(settings["hub_id"]), split, settings["difficulty"], notes) for split in ("train", "test")
    )
    splits = divide(hash_order(train, seed), None, hash_order(test, 0), sizes=sizes, seed=seed)
    return Task(
        name="apps",
        train=splits.train,
        val=splits.val,
        test=splits.test,
        prompt=PROMPT,
        verifier_spec="code",
        samples=64,
        max_tokens=768,
        notes=(*notes, *splits.notes),
    )


def _problems(data: Path | None, hub_id: str, split: str, difficulty: str, notes: list[str]) -> list[Problem]:
    where = f"apps/{split} in {data}" if data else f"{split} of {hub_id}"
    rows = _unrepeated(_folder_rows(data, split) if data else Source(name="apps", data=None, hub_id=hub_id).rows(split))
    if not rows:
        return []
    columns_of(rows, where, "question", "input_output")
    wanted = [row for row in rows if difficulty == "all" or row.get("difficulty") in (difficulty, None)]
    normal = [_normal(row) for row in wanted]
    tested = [row for row in normal if row["answer"] is not None]
    if len(tested) < len(normal):
        names = ", ".join(str(row["id"]) for row in normal if row["answer"] is None)[:200]
        notes.append(f"{split}: {len(normal) - len(tested)} left out, without tests: {names}")
    return problems_of(tested, Columns(id="id"), where, split, notes) if tested else []


def _folder_rows(data: Path, split: str) -> list[Row]:
    for folder in (data / "apps", data):
        if (folder / split).is_dir():
            return list(_archive_rows(folder / split))
        files = sorted(f for f in folder.glob(f"{split}*") if f.name.endswith(KINDS)) if folder.is_dir() else []
        if files:
            return [row for file in files for row in read_rows(file) if "question" in row and "input_output" in row]
    raise RestemError(
        f"no {split} problems of apps in {data}: looked for apps/{split}/0000/question.txt and apps/{split}*.jsonl; the folder "
        f"holds {listing(data)}.\nSet task.data to a folder that has them."
    )


def _archive_rows(folder: Path) -> Iterator[Row]:
    for problem in sorted(path for path in folder.iterdir() if (path / "question.txt").is_file()):

        def text(name: str, problem: Path = problem) -> str:
            file = problem / name
            return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

        metadata = json.loads(text("metadata.json") or "{}")
        yield {
            "problem_id": problem.name,
            "question": text("question.txt"),
            "input_output": text("input_output.json"),
            "solutions": text("solutions.json"),
            "starter_code": text("starter_code.py"),
            "difficulty": metadata.get("difficulty"),
            "url": metadata.get("url"),
        }


def _unrepeated(rows: list[Row]) -> list[Row]:
    return list({str(row.get("problem_id", number)): row for number, row in enumerate(rows)}.values())


def _normal(row: Row) -> Row:
    starter = str(row.get("starter_code") or "").strip("\n")
    solutions = _json(row.get("solutions"))
    return {
        "question": f"{str(row['question']).strip()}\n\n" + (f"Use this code:\n{starter}" if starter else _READS),
        "answer": tests_of(row.get("input_output")),
        "id": f"apps/{row.get('problem_id')}",
        "difficulty": row.get("difficulty"),
        "url": row.get("url"),
        "solution": solutions[0] if isinstance(solutions, list) and solutions else None,
    }


def tests_of(text: Any) -> dict[str, Any] | None:
    """The tests of a problem's input_output; None if it has none that can be used."""
    found = _json(text)
    inputs, outputs = (found.get(key) or [] for key in ("inputs", "outputs")) if isinstance(found, dict) else ([], [])
    if not inputs or len(inputs) != len(outputs):
        return None
    entry = found.get("fn_name")
    if entry:
        wrapped = all(isinstance(output, list) and len(output) == 1 for output in outputs)
        tests = CodeTests(kind="call", entry_point=entry, inputs=inputs, outputs=outputs, wrapped=wrapped)
    else:
        inputs, outputs = (
            ["\n".join(map(str, v)) if isinstance(v, list) else str(v) for v in values] for values in (inputs, outputs)
        )
        tests = CodeTests(kind="stdin", inputs=inputs, outputs=outputs)
    return tests.as_dict()


def _json(text: Any) -> Any:
    if not isinstance(text, str) or not text.strip():
        return text
    try:
        return json.loads(text)
    except ValueError:
        return None
