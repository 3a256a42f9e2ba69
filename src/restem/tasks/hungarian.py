r"""The Hungarian national high-school finals in mathematics, 2023: 33 questions that a person grades, to test on only.

Published after the training data of the models that it was first used on, it shows whether a gain on MATH carries over to
questions that no one could have tuned for. The paper on ReST^EM asks with one worked example at temperature 0.1 and grades by
hand with the official rubric. There is no public key, and no verifier: every sample is "could not be graded", so nothing is
ever trained on it. `restem sheet` writes the answers out for a person and scores the points that come back.

The rubric's points per question are not part of the public set. Rows with a column "points" keep them; else they are filled in
on the sheet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restem.prompts import Exemplar, Prompt
from restem.tasks.files import Row, columns_of, find_split, read_rows
from restem.tasks.hub import Source, read_hub_id
from restem.tasks.splits import Sizes, divide
from restem.tasks.task import Task
from restem.types import Grade, Problem

HUB_ID = "keirp/hungarian_national_hs_finals_exam"

EXEMPLAR = Exemplar(
    question="A swimming pool is filled by two pumps. The first alone fills it in 6 hours, the second alone in 9 hours.\n\n"
    "In how many hours do both together fill it? Explain your answer.",
    solution="In one hour the first pump fills $\\frac{1}{6}$ of the pool and the second $\\frac{1}{9}$. Together they fill "
    "$\\frac{1}{6} + \\frac{1}{9} = \\frac{3}{18} + \\frac{2}{18} = \\frac{5}{18}$ of it in an hour.\n\n"
    "If they need $t$ hours, then $\\frac{5}{18} t = 1$, so $t = \\frac{18}{5} = 3.6$.\n\n"
    "Both pumps together fill the pool in 3.6 hours. The answer is 3.6.",
)
"""Its paragraphs keep a blank line from ending an answer: marks are given for the way, not for the result alone."""


def load(*, data: Path | None, sizes: Sizes, seed: int = 0, options: Mapping[str, Any] | None = None) -> Task:
    source = Source(name="hungarian", data=data, hub_id=read_hub_id(options, "hungarian", HUB_ID))
    rows, where = _rows(source)
    column = "question" if "question" in columns_of(rows, where) else "Question"
    columns_of(rows, where, column)
    problems = [_problem(row, str(row.get(column) or ""), number) for number, row in enumerate(rows, start=1)]
    splits = divide([], None, problems, sizes=sizes, seed=seed)
    return Task(
        name="hungarian",
        train=(),
        val=(),
        test=splits.test,
        prompt=Prompt(exemplars=(EXEMPLAR,), instruction="Solve the problem. Write down how you find the answer."),
        verifier_spec="restem.tasks.hungarian:by_hand",
        max_tokens=768,
        evaluation_only=True,
        notes=(*splits.notes, "a person grades the answers: restem sheet SHEET.csv --from RUN/iter-NN/eval/hungarian"),
    )


def by_hand(problem: Problem, completion: str) -> Grade:
    """The verifier of a set that only a person can grade: no reward, which is not the same as reward 0."""
    return Grade(reward=None, reason="verifier_error", note="graded by a person, not by a program: see restem sheet")


def _rows(source: Source) -> tuple[list[Row], str]:
    folders = (source.data / "hungarian_exam", source.data / "hungarian", source.data) if source.data else ()
    for folder in folders:
        if file := find_split(folder, "questions"):
            return read_rows(file), str(file)
    return source.rows("test"), source.where("test")


def _problem(row: Row, question: str, number: int) -> Problem:
    meta = {"points": row["points"]} if row.get("points") is not None else {}
    return Problem(id=f"hungarian/{row.get('index') or number}", question=question, meta=meta)
