"""Reading rows from files, and the user's own data as a task.

A row becomes a problem through named columns; a row without a question or a reference is left out and counted, never
guessed.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
import tomllib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restem.errors import RestemError
from restem.prompts import Prompt
from restem.tasks.splits import Sizes, closest, content_hash, divide
from restem.tasks.task import Task
from restem.types import Problem

Row = Mapping[str, Any]
KINDS = (".jsonl.gz", ".jsonl", ".json", ".parquet")
"""Endings of the files that hold problems, in order of preference."""
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Where a problem's parts are in a row."""

    question: str = "question"
    reference: str = "answer"
    id: str | None = None
    """None = ids come from the content."""


def load(path: Path, *, columns: Columns, sizes: Sizes, seed: int = 0, verifier: str | None = None) -> Task:
    """Load the user's own problems: one file, or a folder of train, val and test files."""
    if path.is_dir():
        found = {name: file for name in SPLITS if (file := find_split(path, name)) is not None}
        if not found:
            raise RestemError(
                f"no problems in {path}: it holds {listing(path)}.\n"
                f"Name the files train, val and test, each ending in one of {', '.join(KINDS)}."
            )
    else:
        found = {"train": path}
    notes: list[str] = []
    problems = {name: problems_of(read_rows(file), columns, str(file), name, notes) for name, file in found.items()}
    splits = divide(problems.get("train", []), problems.get("val"), problems.get("test"), sizes=sizes, seed=seed)
    return Task(
        name=path.name.removesuffix(next((kind for kind in KINDS if path.name.endswith(kind)), "")),
        train=splits.train,
        val=splits.val,
        test=splits.test,
        prompt=Prompt(style="few-shot", instruction='Solve the problem. End with "The answer is X.", X being the answer.'),
        verifier_spec=verifier or "math",
        max_tokens=512,
        notes=(*notes, *splits.notes),
    )


def problems_of(rows: list[Row], columns: Columns, where: str, split: str, notes: list[str]) -> list[Problem]:
    """Turn rows into problems; adds to the notes what was left out. Columns that have no role are kept in the meta."""
    present = columns_of(rows, where)
    named = {"question": columns.question, "answer": columns.reference, **({"id": columns.id} if columns.id else {})}
    for role, column in named.items():
        if column not in present:
            raise RestemError(
                f'{where} has no column "{column}"{closest(column, present)}\n'
                f'Set task.{role} = "COLUMN" to the one that holds the {"reference" if role == "answer" else role}.'
            )
    problems = [
        problem for number, row in enumerate(rows, start=1) if (problem := _problem(row, columns, f"{where}, row {number}"))
    ]
    graded = [problem for problem in problems if problem.reference is not None]
    if not graded:
        raise RestemError(
            f'none of the {len(rows)} rows of {where} has a reference in the column "{columns.reference}"; the '
            f'columns are: {", ".join(present)}.\nSet task.answer = "COLUMN" to the one that holds it.'
        )
    for count, what in ((len(rows) - len(problems), "question"), (len(problems) - len(graded), "reference")):
        if count:
            notes.append(f"{split}: {count} left out, without a {what}")
    return graded


def columns_of(rows: list[Row], where: str, *needed: str) -> list[str]:
    """List the columns of all rows, in order of appearance; an error if there are no rows or a needed one is absent."""
    if not rows:
        raise RestemError(f"{where} holds no rows.")
    present = list({key: None for row in rows for key in row})
    for column in needed:
        if column not in present:
            raise RestemError(
                f'{where} has no column "{column}"{closest(column, present)}\n'
                "Use the set's own files, or give this file's path as the task, with task.question and task.answer."
            )
    return present


def split_rows(folder: Path, name: str, split: str) -> list[Row]:
    """Read a split of a set: from FOLDER/NAME/SPLIT.* or, if the folder is the set's own, from FOLDER/SPLIT.*."""
    if not folder.is_dir():
        raise RestemError(
            f"task.data = {folder}: there is no such folder.\nIt should hold one folder per set, such as {name}/."
        )
    for place in (folder / name, folder):
        if file := find_split(place, split):
            return read_rows(file)
    raise RestemError(
        f"no {split} file of {name} in {folder}: looked for {name}/{split} and {split}, ending in one of "
        f"{', '.join(KINDS)}; the folder holds {listing(folder)}.\nSet task.data to a folder that has them."
    )


def find_split(folder: Path, split: str) -> Path | None:
    """Find a split's file in a folder, or None."""
    return next((path for kind in KINDS if (path := folder / f"{split}{kind}").is_file()), None)


def read_rows(path: Path) -> list[Row]:
    """Read all rows of a .jsonl, .jsonl.gz, .json, .parquet or .toml file; a broken one is an error that says where."""
    if not path.is_file():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RestemError(f"there is no file {path}{closest(path.name, near)}")
    readers: dict[str, Callable[[Path], list[Row]]] = {
        ".jsonl.gz": lambda path: list(_json_lines(path)),
        ".jsonl": lambda path: list(_json_lines(path)),
        ".json": _json,
        ".parquet": _parquet,
        ".toml": _toml,
    }
    for kind, read in readers.items():
        if path.name.endswith(kind):
            try:
                return read(path)
            except (OSError, EOFError, zlib.error, UnicodeDecodeError, ValueError) as error:
                raise RestemError(
                    f"cannot read {path}: {error}.\nThe file may be cut short, or not be what its name says."
                ) from error
    raise RestemError(f"cannot tell what kind of file {path} is.\nName it with one of these endings: {', '.join(readers)}.")


def listing(folder: Path) -> str:
    """Say what a folder holds, for an error message."""
    entries = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(entries[:12]) + (", ..." if len(entries) > 12 else "") if entries else "nothing"


def _problem(row: Row, columns: Columns, where: str) -> Problem | None:
    question = row.get(columns.question)
    if question is None or (isinstance(question, str) and not question.strip()):
        return None
    if not isinstance(question, str):
        raise RestemError(
            f'{where}: the question in column "{columns.question}" is a {type(question).__name__}, not text.\n'
            'Set task.question = "COLUMN" to the one that holds the question as text.'
        )
    own_id = row.get(columns.id) if columns.id else None
    return Problem(
        id=content_hash(question) if own_id is None else str(own_id),
        question=question,
        reference=_reference(row.get(columns.reference)),
        meta={key: value for key, value in row.items() if key not in (columns.question, columns.reference, columns.id)},
    )


def _reference(value: Any) -> Any:
    """Numbers become text, as verifiers expect; lists and objects stay, for the user's own verifier. None = missing."""
    if value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a Parquet column of whole numbers with gaps is read as 3.0
    if isinstance(value, str | int | float):
        return str(value).strip()
    return value


def _json_lines(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rt", encoding="utf-8-sig") if path.name.endswith(".gz") else path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise RestemError(
                    f"{path}, line {number} is not valid JSON: {error.msg} at column {error.colno}: "
                    f"{line.strip()[:60]!r}.\nThe line may be torn: mend or remove it."
                ) from error
            yield _object(row, f"{path}, line {number}")


def _json(path: Path) -> list[Row]:
    return _records(json.loads(path.read_text(encoding="utf-8-sig")), path)


def _toml(path: Path) -> list[Row]:
    return _records(tomllib.loads(path.read_text(encoding="utf-8")), path)


def _parquet(path: Path) -> list[Row]:
    rows: list[Row] = importlib.import_module("pyarrow.parquet").read_table(path).to_pylist()
    return rows


def _records(content: Any, path: Path) -> list[Row]:
    """Accept a list of objects, or an object whose only list is that list."""
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else [content]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise RestemError(f'{path} does not hold one list of objects, such as [{{"question": ...}}, ...].')
    return [_object(row, f"{path}, entry {number}") for number, row in enumerate(lists[0], start=1)]


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise RestemError(f'{where} is a {type(row).__name__}, not an object such as {{"question": "...", "answer": "..."}}.')
    return row
