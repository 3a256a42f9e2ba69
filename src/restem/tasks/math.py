r"""MATH (Hendrycks et al. 2021, arXiv 2103.03874) and MATH-500: competition problems, answers in LaTeX.

The prompt has the form of Minerva's (arXiv 2206.14858) with four exemplars of our own. The reference is the last
complete box of the solution. The set's first home on the hub was closed after a rights notice: give a folder of your
own, or without one `hub_id` names a copy. The files are sorted by subject, so all splits are put in hash order, for a
limit to see every subject.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restem.prompts import Exemplar, Prompt
from restem.tasks.files import Columns, Row, columns_of, problems_of
from restem.tasks.hub import Source, read_hub_id
from restem.tasks.splits import Sizes, divide, hash_order
from restem.tasks.task import Task
from restem.types import Problem

HUB_ID = "EleutherAI/hendrycks_math"
"""The copy that the evaluation harness of EleutherAI loads: one configuration per subject."""
HUB_ID_500 = "HuggingFaceH4/MATH-500"


def _ending(answer: str) -> str:
    return f"\nFinal Answer: The final answer is ${answer}$. I hope it is correct."


EXEMPLARS = (
    Exemplar(
        question=r"What is the sum of the two solutions of $2x^2 - 14x + 5 = 0$?",
        solution=r"The solutions of $ax^2 + bx + c = 0$ add up to $-\frac{b}{a}$. Here $a = 2$ and $b = -14$, so the "
        r"sum is $-\frac{-14}{2} = 7$." + _ending("7"),
    ),
    Exemplar(
        question="A bag holds $4$ white and $6$ black balls. Two balls are drawn without putting any back. What is the "
        "probability that both are white? Write it as a fraction in lowest terms.",
        solution=r"The first ball is white with probability $\frac{4}{10}$. Then $3$ of the $9$ balls left are white, "
        r"so the second is white with probability $\frac{3}{9}$. The product is $\frac{4}{10} \cdot \frac{3}{9} = "
        r"\frac{12}{90} = \frac{2}{15}$." + _ending(r"\frac{2}{15}"),
    ),
    Exemplar(
        question="A right triangle has legs of length $5$ and $10$. What is the length of its hypotenuse, in simplest "
        "radical form?",
        solution=r"By the theorem of Pythagoras the hypotenuse is $\sqrt{5^2 + 10^2} = \sqrt{125}$. Since "
        r"$125 = 25 \cdot 5$, this is $5\sqrt{5}$." + _ending(r"5\sqrt{5}"),
    ),
    Exemplar(
        question="What is the remainder when $7^{50}$ is divided by $5$?",
        solution=r"Modulo $5$ we have $7 \equiv 2$, and the powers of $2$ are $2, 4, 3, 1$ and then repeat with period "
        r"$4$. Since $50 = 4 \cdot 12 + 2$, the remainder is the second of them, $4$." + _ending("4"),
    ),
)
PROMPT = Prompt(style="few-shot", exemplars=EXEMPLARS, question_label="Problem:", answer_label="Solution:")


def load(*, data: Path | None, sizes: Sizes, seed: int = 0, options: Mapping[str, Any] | None = None) -> Task:
    """Load MATH; validation is held out of the 7,500 training problems."""
    source = Source(name="math", data=data, hub_id=read_hub_id(options, "math", HUB_ID))
    notes: list[str] = []
    train, test = _problems(source, "train", notes), _problems(source, "test", notes)
    splits = divide(hash_order(train, seed), None, hash_order(test, 0), sizes=sizes, seed=seed)
    return _task("math", splits.train, splits.val, splits.test, (*notes, *splits.notes))


def load_500(*, data: Path | None, sizes: Sizes, seed: int = 0, options: Mapping[str, Any] | None = None) -> Task:
    """Load MATH-500 (Lightman et al. 2023, arXiv 2305.20050): 500 of the MATH test problems, to test on only."""
    source = Source(name="math500", data=data, hub_id=read_hub_id(options, "math500", HUB_ID_500))
    notes: list[str] = []
    splits = divide([], None, _problems(source, "test", notes), sizes=sizes, seed=seed)
    return _task("math500", splits.train, splits.val, splits.test, (*notes, *splits.notes))


def last_box(solution: str) -> str | None:
    r"""Read the content of the last complete \boxed{...} (or \fbox{...}, or "\boxed 17"); None if there is none.

    Braces are counted, escaped ones (\{) not. A box that is never closed does not count.
    """
    for start in reversed([match.end() for match in re.finditer(r"\\boxed|\\fbox", solution)]):
        rest = solution[start:].lstrip()
        if not rest.startswith("{"):
            bare = re.match(r"[^\s${}\\]+", rest)
            if bare and solution[start : start + 1].isspace():
                return bare.group().rstrip(".,;")
            continue
        depth = 0
        for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0 and brace.group() == "}":
                return rest[1 : brace.start()].strip()
    return None


def _task(
    name: str, train: tuple[Problem, ...], val: tuple[Problem, ...], test: tuple[Problem, ...], notes: tuple[str, ...]
) -> Task:
    return Task(
        name=name,
        train=train,
        val=val,
        test=test,
        prompt=PROMPT,
        verifier_spec="math",
        max_tokens=512,
        answer_style="minerva",
        evaluation_only=name == "math500",
        notes=notes,
    )


def _problems(source: Source, split: str, notes: list[str]) -> list[Problem]:
    rows = source.rows(split)
    present = columns_of(rows, source.where(split), "problem", "solution")
    columns = Columns(id="id" if "unique_id" in present else None)
    return problems_of([_normal(row) for row in rows], columns, source.where(split), split, notes)


def _normal(row: Row) -> Row:
    solution = str(row.get("solution") or "")
    level = re.search(r"\d", str(row.get("level")))
    return {
        "question": row.get("problem"),
        "answer": row.get("answer") or last_box(solution),
        "id": row.get("unique_id"),
        "level": int(level.group()) if level else None,
        "subject": row.get("type") or row.get("subject"),
        "solution": solution,
    }
