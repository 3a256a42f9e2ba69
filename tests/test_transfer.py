"""`evaluate.tasks`: every model is tested on other tasks as well, which never meet training; majority votes and breakdowns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from restem.config import load_recipe
from restem.errors import RestemError
from restem.files import read_json
from restem.rundir import read_problems
from restem.tasks import load_task
from toy_runs import cli, result, run


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Problems of another kind, of which two are training problems of the run's own task."""
    known = load_task("arithmetic", train=12).train[:2]
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n), "level": n % 3} for n in range(8)]
    rows += [{"question": problem.question, "answer": problem.reference} for problem in known]
    folder = tmp_path / "doubles"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_every_model_is_tested_on_the_other_tasks_too(tmp_path: Path, other: Path) -> None:
    where = run(tmp_path / "run", f'evaluate.tasks=["{other}"]')
    found = result(where)
    for row in found["iterations"]:
        assert list(row["test"]) == ["arithmetic", "doubles"]
        scores = row["test"]["doubles"]
        assert scores["n"] == 8 and scores["metrics"]["pass@4"]["n"] == 8
    assert found["iterations"][1]["paired"]["task"] == "arithmetic"
    problems = read_problems(where / "problems" / "test-doubles.parquet")
    trained = {problem.question for problem in read_problems(where / "problems" / "train.parquet")}
    assert len(problems) == 8 and not trained & {problem.question for problem in problems}
    assert "doubles: 2 left out, also trained on" in read_json(where / "run.json")["notes"]
    report = (where / "report.html").read_text()
    assert "doubles" in report and "arithmetic" in report


def test_they_resume_and_are_limited(tmp_path: Path, other: Path) -> None:
    settings = (f'evaluate.tasks=["{other}"]', "evaluate.limit=3")
    where = run(tmp_path / "run", *settings)
    before = result(where)
    (where / "iter-02" / "eval" / "doubles" / "scores.json").unlink()
    assert result(run(where, *settings, resume=True))["iterations"] == before["iterations"]
    assert before["iterations"][0]["test"]["doubles"]["n"] <= 3


def test_a_task_that_tests_nothing_new_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RestemError, match=r'evaluate\.tasks names "arithmetic", which is the task itself'):
        run(tmp_path / "run", 'evaluate.tasks=["arithmetic"]')


def test_majority_votes_and_the_variety_of_samples_are_in_the_scores(tmp_path: Path) -> None:
    where = run(tmp_path / "run", "evaluate.majority=[4, 8]", "iterations=1")
    scores = read_json(where / "iter-01" / "eval" / "arithmetic" / "scores.json")
    assert scores["metrics"]["majority@8"]["n"] == scores["metrics"]["pass@4"]["n"] == 20
    assert scores["metrics"]["majority@8"]["value"] <= 1
    assert set(scores["sampled"]) == {"distinct", "tokens", "entropy", "truncated", "no_answer"}


def test_compare_says_how_small_a_difference_can_be_seen(tmp_path: Path) -> None:
    where = run(tmp_path / "run", "task.test=60")
    done = cli("compare", where / "iter-00" / "eval" / "arithmetic", where)
    assert "is missed more often than one time in five" in done.stdout


@pytest.mark.parametrize(("recipe", "neighbour"), [("math", "gsm8k"), ("apps", "humaneval")])
def test_the_paper_s_recipes_test_a_neighbour_and_an_unrelated_task_row_44(recipe: str, neighbour: str) -> None:
    assert load_recipe(recipe).evaluate.tasks == (neighbour, "bbh")
