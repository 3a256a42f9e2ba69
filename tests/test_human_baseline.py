"""The baseline on human solutions: a run that differs in the source of what is trained on, and in nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from restem.config import flatten
from restem.errors import RestemError
from restem.files import read_json, read_rows
from restem.prompts import Exemplar, Prompt
from restem.sampling.human import human_solution
from restem.tasks import Task
from restem.types import Problem
from toy_runs import part_rows, recipe, result, run, write_verifiers

ONE = "iterations=1"
HUMAN = "generate.source=human"
WITH_FENCE = Prompt(exemplars=(Exemplar(question="q", solution="```python\nprint(1)\n\nprint(2)\n```"),))
PLAIN = Prompt(exemplars=(Exemplar(question="q", solution="1. The answer is 1."),))


def task_with_solutions(folder: Path, *, without: int = 0) -> Task:
    """`without`: training problems that have no solution."""

    def problems(split: str, count: int) -> tuple[Problem, ...]:
        return tuple(
            Problem(
                id=f"{split} {i}",
                question=f"{split} {i}?",
                reference=str(i),
                meta={} if split == "train" and i < without else {"solution": f"it is {i}."},
            )
            for i in range(count)
        )

    splits = {"train": problems("train", 12), "val": problems("val", 8), "test": problems("test", 8)}
    verifier = f"{write_verifiers(folder)}:ends"
    return Task(name="worked", prompt=PLAIN, verifier_spec=verifier, answer_style="answer-is", **splits)


def test_the_recipe_differs_in_the_source_alone_and_the_run_in_what_is_trained_on_row_37(tmp_path: Path) -> None:
    task = task_with_solutions(tmp_path)
    own, human = run(tmp_path / "own", ONE, task=task), run(tmp_path / "human", ONE, HUMAN, task=task)
    before, after = flatten(recipe(ONE)), flatten(recipe(ONE, HUMAN))
    assert {key for key in before if before[key] != after[key]} == {"generate.source"}
    examples = read_rows(human / "iter-01" / "examples.parquet")
    assert [row["problem_id"] for row in examples] == [f"train {i}" for i in range(12)], "one a problem"
    texts = [row["text"] for row in part_rows(human / "iter-01" / "samples")]
    assert texts == [f" it is {i}. The answer is {i}." for i in range(12)]
    starts = [read_json(out / "iter-01" / "improve" / "start.json")["fingerprint"] for out in (own, human)]
    assert starts[0] == starts[1], "both start from the base"
    stages = ("iter-00/val", "iter-00/eval/worked/greedy", "iter-01/eval/worked/greedy")
    for stage in stages:  # measured on the same problems, with as many samples
        rows = [[(row["problem_id"], row["index"]) for row in part_rows(out / stage / "samples")] for out in (own, human)]
        assert rows[0] == rows[1] != []


def test_the_base_s_train_accuracy_is_not_that_of_humans(tmp_path: Path) -> None:
    out = run(tmp_path / "human", ONE, HUMAN, task=task_with_solutions(tmp_path))
    base = result(out)["iterations"][0]["train"]
    assert base["n"] == 12 and base["value"] < 1, "humans are always right here, the base is not"


def test_the_run_is_resumed_like_any_other(tmp_path: Path) -> None:
    task = task_with_solutions(tmp_path)
    out = run(tmp_path / "human", ONE, HUMAN, task=task)
    before = result(out)
    assert result(run(out, ONE, HUMAN, task=task, resume=True)) == before


def test_a_problem_without_a_solution_is_counted_and_not_trained_on(tmp_path: Path) -> None:
    out = run(tmp_path / "human", ONE, HUMAN, task=task_with_solutions(tmp_path, without=2))
    selection = read_json(out / "iter-01" / "selection.json")
    assert selection["kept"] == 10 and sum(selection["counts"].values()) == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [(("iterations=2",), "Set iterations = 1"), ((ONE,), "comes with a worked solution")],
)
def test_what_cannot_be_a_baseline_is_refused_before_anything_is_written(
    tmp_path: Path, changes: tuple[str, ...], words: str
) -> None:
    task = task_with_solutions(tmp_path, without=12)
    with pytest.raises(RestemError, match=words):
        run(tmp_path / "human", *changes, HUMAN, task=task)
    assert not (tmp_path / "human" / "run.json").exists()


@pytest.mark.parametrize(
    ("changes", "solution", "expected"),
    [
        ({}, "6 and 1.\n\nSo 7.", " 6 and 1.\nSo 7. The answer is 7."),
        ({}, "So the answer is 7.", " So the answer is 7."),
        ({"answer_style": "minerva"}, "It is $\\boxed{7}$.", None),
        ({"answer_style": "auto", "prompt": WITH_FENCE}, "a = 7\n\nprint(a)", " ```python\na = 7\n\nprint(a)\n```"),
        ({"answer_style": "auto", "prompt": Prompt(style="plain")}, "    return 7\n", "    return 7\n"),
        ({"answer_style": "auto", "prompt": Prompt(style="chat")}, " 7 \n", "7"),
        ({}, "  ", ""),
        ({}, None, ""),
    ],
)
def test_a_solution_is_written_as_the_exemplars_teach(
    tmp_path: Path, changes: dict[str, Any], solution: str | None, expected: str | None
) -> None:
    task = replace(task_with_solutions(tmp_path), **changes)
    problem = Problem(id="p", question="?", reference="7", meta={"solution": solution})
    minerva = " It is $\\boxed{7}$.\nFinal Answer: The final answer is $7$. I hope it is correct."
    assert (human_solution(task, problem) or "") == (minerva if expected is None else expected)
