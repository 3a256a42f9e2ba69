"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems whose answers are whole numbers.

The exemplars are our own; none comes from the set or from a paper. Validation is held out of the 7,473 training
problems.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restem.prompts import Exemplar, Prompt
from restem.tasks.files import Columns, Row, columns_of, problems_of
from restem.tasks.hub import Source, read_hub_id
from restem.tasks.splits import Sizes, divide
from restem.tasks.task import Task
from restem.types import Problem

HUB_ID = "openai/gsm8k"

EXEMPLARS = (
    Exemplar(
        question=(
            "A beekeeper fills 14 jars of honey from each of 6 hives. She keeps 9 jars and sells the rest for 5 euros"
            " each. How many euros does she take in?"
        ),
        solution=(
            "The beekeeper fills 14 * 6 = 84 jars. She sells 84 - 9 = 75 jars. She takes in 75 * 5 = 375 euros. The"
            " answer is 375."
        ),
    ),
    Exemplar(
        question=(
            "Oskar repaired 8 bicycles in March. In April he repaired 3 fewer than twice as many. How many bicycles did"
            " he repair in the two months?"
        ),
        solution=(
            "Twice as many is 2 * 8 = 16. In April Oskar repaired 16 - 3 = 13 bicycles. Together that is 8 + 13 = 21"
            " bicycles. The answer is 21."
        ),
    ),
    Exemplar(
        question=(
            "A ferry has 240 seats. Three eighths of them are taken by tourists and 65 by commuters. How many seats are empty?"
        ),
        solution=(
            "One eighth of 240 is 240 / 8 = 30, so tourists take 3 * 30 = 90 seats. 90 + 65 = 155 seats are taken. 240"
            " - 155 = 85 seats are empty. The answer is 85."
        ),
    ),
    Exemplar(
        question=(
            "Milena knits 25 rows in 10 minutes. A scarf has 300 rows, and she has already knitted a quarter of it. How"
            " many minutes does the rest take her?"
        ),
        solution=(
            "A quarter of 300 is 75 rows, so 300 - 75 = 225 rows remain. That is 225 / 25 = 9 times 25 rows. It takes"
            " her 9 * 10 = 90 minutes. The answer is 90."
        ),
    ),
    Exemplar(
        question=(
            "A printer costs 180 dollars and is reduced by 15%. Rashid also buys 4 packs of paper at 6 dollars each."
            " How much does he pay?"
        ),
        solution=(
            "The reduction is 180 * 15 / 100 = 27 dollars, so the printer costs 180 - 27 = 153 dollars. The paper costs"
            " 4 * 6 = 24 dollars. He pays 153 + 24 = 177 dollars. The answer is 177."
        ),
    ),
    Exemplar(
        question="Ines is 4 years older than Joel. In 6 years their ages will add up to 40. How old is Joel now?",
        solution=(
            "Now their ages add up to 40 - 6 - 6 = 28. Without the 4 years that Ines is older, that is 28 - 4 = 24."
            " Joel is 24 / 2 = 12. The answer is 12."
        ),
    ),
)

_MARK = re.compile(r"####\s*(.+)")
_ANNOTATION = re.compile(r"<<.*?>>")


def load(*, data: Path | None, sizes: Sizes, seed: int = 0, options: Mapping[str, Any] | None = None) -> Task:
    source = Source(name="gsm8k", data=data, hub_id=read_hub_id(options, "gsm8k", HUB_ID), configs=("main",))
    notes: list[str] = []
    splits = divide(_problems(source, "train", notes), None, _problems(source, "test", notes), sizes=sizes, seed=seed)
    return Task(
        name="gsm8k",
        train=splits.train,
        val=splits.val,
        test=splits.test,
        prompt=Prompt(style="few-shot", exemplars=EXEMPLARS),
        verifier_spec="math",
        max_tokens=256,
        answer_style="answer-is",
        notes=(*notes, *splits.notes),
    )


def read_answer(solution: str) -> str | None:
    """Read the final number after the last "####" mark, without the commas of thousands."""
    found = _MARK.findall(solution)
    return found[-1].strip().replace(",", "") if found else None


def _problems(source: Source, split: str, notes: list[str]) -> list[Problem]:
    rows = source.rows(split)
    columns_of(rows, source.where(split), "question", "answer")
    return problems_of([_normal(row) for row in rows], Columns(), source.where(split), split, notes)


def _normal(row: Row) -> Row:
    worked = str(row.get("answer") or "")
    solution = _ANNOTATION.sub("", worked).partition("####")[0].strip()
    return {
        "question": row.get("question"),
        "answer": read_answer(worked),
        "steps": len(solution.splitlines()),
        "solution": solution,
    }
