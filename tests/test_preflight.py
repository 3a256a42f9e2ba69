"""The pre-flight check finds what would be silently lost: rejected references and problems in two places."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from restem.preflight import check
from restem.prompts import Exemplar, Prompt
from restem.tasks import Task, load_task
from restem.types import Problem

VERIFIER = """
from restem.types import Grade

def verify(problem, completion):
    if problem.reference == "raise":
        raise ValueError("no such thing")
    if problem.reference == "none":
        return Grade(reward=None, reason="verifier_error", note="cannot say")
    if problem.reference == "reject":
        return Grade(reward=0.0, answer="something else", reason="incorrect")
    assert str(problem.reference) in completion or "WORKED" in completion
    return Grade(reward=1.0, answer="ok", reason="correct")
"""


def problem(question: str, reference: object = "4", **meta: object) -> Problem:
    return Problem(id=f"id {question}", question=question, reference=reference, meta=meta)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (tmp_path / "mine.py").write_text(VERIFIER)
    return Task(
        name="mine",
        train=(problem("a"), problem("b")),
        val=(problem("c"),),
        test=(problem("d"),),
        prompt=Prompt(exemplars=(Exemplar(question="e", solution="s"),)),
        verifier_spec=f"{tmp_path / 'mine.py'}:verify",
    )


def test_a_sound_task_is_ok_and_every_problem_is_counted(task: Task) -> None:
    report = check(task)
    assert report.ok
    assert (report.splits["train"].problems, report.splits["train"].accepted) == (2, 2)
    assert set(report.overlap) == {
        "train and val", "train and test", "train and exemplars", "val and test", "val and exemplars", "test and "
        "exemplars",
    }  # fmt: skip
    assert not any(report.overlap.values())


def test_rejected_ungradable_and_failing_references_are_told_apart(task: Task) -> None:
    bad = (problem("r", "reject"), problem("n", "none"), problem("x", "raise"), problem("t", ["tests"]))
    report = check(replace(task, test=bad))
    counts = report.splits["test"]
    assert (counts.accepted, counts.rejected, counts.ungradable, counts.unchecked) == (0, 1, 2, 1)
    assert [(f.problem_id, f.reason) for f in report.findings] == [
        ("id r", "incorrect"),
        ("id n", "verifier_error"),
        ("id x", "verifier_error"),
    ]
    assert [f.note for f in report.findings] == ["read as 'something else'", "cannot say", "ValueError: no such thing"]
    assert not report.is_gradable
    assert report.is_clean


def test_a_reference_that_is_no_text_is_checked_through_its_solution(task: Task) -> None:
    report = check(replace(task, test=(problem("t", ["tests"], solution="WORKED"),)))
    assert report.splits["test"].accepted == 1


def test_only_the_first_twenty_findings_are_listed_and_all_are_counted(task: Task) -> None:
    report = check(replace(task, train=tuple(problem(f"q{i}", "reject") for i in range(30))))
    assert len(report.findings) == 20
    assert report.splits["train"].rejected == 30


def test_overlap_is_found_whatever_the_blanks_and_capitals(task: Task) -> None:
    report = check(replace(task, train=(problem("A "), problem("E")), test=(problem("a"),), val=(problem(" e\n"),)))
    assert report.overlap["train and test"] == ("id A ",)
    assert report.overlap["train and exemplars"] == ("id E",)
    assert report.overlap["train and val"] == ("id E",)
    assert report.overlap["val and exemplars"] == ("id  e\n",)
    assert report.overlap["val and test"] == ()
    assert not report.is_clean


def test_repeats_within_a_split_are_listed(task: Task) -> None:
    assert check(replace(task, train=(problem("a"), problem("A")))).splits["train"].repeated == ("id A",)


def test_the_report_is_plain_json(task: Task) -> None:
    read = json.loads(json.dumps(check(task).as_dict()))
    assert read["ok"] is True
    assert read["splits"]["test"]["accepted"] == 1
    assert read["overlap"]["train and test"] == []


def test_the_mathematics_verifier_accepts_every_arithmetic_reference() -> None:
    report = check(load_task("arithmetic"))
    assert report.ok, report.findings


@pytest.mark.skipif("RESTEM_DATA" not in os.environ, reason="RESTEM_DATA names no data folder")
@pytest.mark.parametrize("name", ["gsm8k", "math", "math500"])
def test_the_mathematics_verifier_accepts_references_of_real_sets(name: str) -> None:
    report = check(load_task(name, data=os.environ["RESTEM_DATA"], limit=100))
    assert report.ok, report.findings
