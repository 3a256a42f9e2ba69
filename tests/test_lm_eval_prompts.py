"""`prompt.source = "lm-eval"`: the prompts of an installed lm-eval, to the letter, read without importing it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from restem.config import load_recipe
from restem.errors import MissingExtra, RestemError
from restem.prompts import Exemplar, Prompt
from restem.tasks import Task
from restem.tasks.of_recipe import prompt_of
from restem.types import Problem

COT = """
doc_to_text: 'Q: {{question}}

  A:'
fewshot_config:
  sampler: first_n
  samples:
  - question: Two and two?
    target: 2 + 2 = 4. The answer is 4.
  - question: Three and one?
    target: 3 + 1 = 4. The answer is 4.
  - question: Beyond num_fewshot.
    target: Not shown.
generation_kwargs:
  until:
  - 'Q:'
  - </s>
num_fewshot: 2
"""
TEMPLATE = """
doc_to_target: "{{target}}"
target_delimiter: ""
num_fewshot: 1
generation_kwargs:
  until:
    - "Q"
    - "\\n\\n"
"""
SUBTASK = """
description: "About %s.\\n\\n"
doc_to_text: "Q: {{input}}\\nA: Let's think step by step.\\n"
include: "_template_yaml"
fewshot_config:
  samples: [{"input": "Is %s so?", "target": "It is so.\\nSo the answer is Yes."}]
"""
MINERVA = '''
import a_package_that_nobody_has


def list_fewshot_samples() -> list[dict]:
    """A docstring."""
    return [{"problem": "What is $1 + 1$?", "solution": "It is $\\\\boxed{2}$.\\nFinal Answer: $2$.", "few_shot": "1"}]
'''
FILES = {
    "__init__.py": "raise RuntimeError('it was imported')",
    "tasks/gsm8k/gsm8k-cot.yaml": COT,
    "tasks/bbh/cot_fewshot/_template_yaml": TEMPLATE,
    "tasks/bbh/cot_fewshot/navigate.yaml": SUBTASK % ("walking", "walking"),
    "tasks/bbh/cot_fewshot/snarks.yaml": SUBTASK % ("mocking", "mocking"),
    "tasks/minerva_math/utils.py": MINERVA,
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An lm_eval with a few made-up exemplars, where Python finds it."""
    folder = tmp_path / "site" / "lm_eval"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def task(name: str, *questions: str, subtasks: tuple[str, ...] = ()) -> Task:
    problems = tuple(
        Problem(id=str(number), question=question, meta={"subtask": subtasks[number]} if subtasks else {})
        for number, question in enumerate(questions)
    )
    own = Prompt(exemplars=(Exemplar(question="Ours?", solution="Ours."),))
    return Task(name=name, train=(), val=(), test=problems, prompt=own, verifier_spec="math")


def prompt(of: Task, **settings: Any) -> Prompt:
    return prompt_of(load_recipe({"prompt": {"source": "lm-eval", **settings}}), of)


def test_the_prompt_of_gsm8k_is_that_of_lm_eval_to_the_letter(package: Path) -> None:
    sums = task("gsm8k", " Five  and five? ")
    found = prompt(sums)
    assert found.text(sums.test[0]) == (
        "Q: Two and two?\nA: 2 + 2 = 4. The answer is 4.\n\n"
        "Q: Three and one?\nA: 3 + 1 = 4. The answer is 4.\n\n"
        "Q:  Five  and five? \nA:"
    )
    assert found.stop == ("Q:", "</s>")


def test_each_sub_task_of_bbh_gets_the_description_and_the_exemplars_of_its_own(package: Path) -> None:
    both = task("bbh", "Left?", "Mock?", subtasks=("navigate", "snarks"))
    found = prompt(both)
    for problem, about in zip(both.test, ("walking", "mocking"), strict=True):
        assert found.text(problem) == (
            f"About {about}.\n\nQ: Is {about} so?\nA: Let's think step by step.\nIt is so.\nSo the answer is Yes.\n\n"
            f"Q: {problem.question}\nA: Let's think step by step.\n"
        )
    assert found.stop == ("Q", "\n\n")
    one = task("bbh-snarks", "Mock?", subtasks=("snarks",))
    assert prompt(one).text(one.test[0]) == found.text(both.test[1])
    assert prompt(one).stop == found.stop


@pytest.mark.parametrize("name", ["math", "math500"])
def test_minervas_exemplars_are_read_from_code_that_is_not_run(package: Path, name: str) -> None:
    maths = task(name, "What is $2 + 2$?")
    found = prompt(maths)
    assert found.text(maths.test[0]) == (
        "Problem:\nWhat is $1 + 1$?\n\nSolution: It is $\\boxed{2}$.\nFinal Answer: $2$.\n\n"
        "Problem:\nWhat is $2 + 2$?\n\nSolution:"
    )
    assert found.stop == ("Problem:",)


def test_the_other_keys_of_the_prompt_change_it_as_they_change_a_tasks_own(package: Path) -> None:
    sums = task("gsm8k", "Five and five?")
    text = prompt(sums, shots=1, instruction="Add.").text(sums.test[0])
    assert text == "Add.\n\nQ: Two and two?\nA: 2 + 2 = 4. The answer is 4.\n\nQ: Five and five?\nA:"
    both = task("bbh", "Left?", "Mock?", subtasks=("navigate", "snarks"))
    assert [prompt(both, shots=0).text(problem).count("Q:") for problem in both.test] == [1, 1]
    with pytest.raises(RestemError, match="only 2 exemplars"):
        prompt(sums, shots=3)
    assert prompt(sums, style="chat").stop == ()


def test_a_prompt_of_lm_eval_is_not_asked_for_unless_the_recipe_says_so(package: Path) -> None:
    sums = task("gsm8k", "Five and five?")
    assert prompt_of(load_recipe({}), sums) == sums.prompt


def test_without_lm_eval_the_error_holds_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r'pip install "restem\[lm-eval\]"'):
        prompt(task("gsm8k", "Five and five?"))


def test_a_task_without_exemplars_there_is_an_error_that_says_for_which_there_are_some(package: Path) -> None:
    with pytest.raises(RestemError, match="for gsm8k, bbh, math, math500, and none for arithmetic"):
        prompt(task("arithmetic", "1 + 1?"))


def test_two_sources_of_exemplars_are_one_too_many(package: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"question": "q", "solution": "s"}\n')
    with pytest.raises(RestemError, match="Remove one of them"):
        prompt(task("gsm8k", "Five and five?"), exemplars=str(tmp_path / "mine.jsonl"))


@pytest.mark.parametrize(
    ("name", "file", "text", "says"),
    [
        ("gsm8k", "gsm8k/gsm8k-cot.yaml", None, "No such file"),
        ("gsm8k", "gsm8k/gsm8k-cot.yaml", "a: [", "while parsing"),
        ("gsm8k", "gsm8k/gsm8k-cot.yaml", "- a list", "holds no keys"),
        ("gsm8k", "gsm8k/gsm8k-cot.yaml", COT.replace("A:'", "{{more}} A:'"), "not one column"),
        ("gsm8k", "gsm8k/gsm8k-cot.yaml", COT + 'fewshot_delimiter: "\\n"\n', "a blank line between"),
        ("gsm8k", "gsm8k/gsm8k-cot.yaml", COT + 'description: "Add."\n', "does not end in a blank line"),
        ("gsm8k", "gsm8k/gsm8k-cot.yaml", COT.replace("samples", "split"), "there is no 'samples'"),
        ("gsm8k", "gsm8k/gsm8k-cot.yaml", COT.replace("target:", "answer:"), 'no text under "target"'),
        ("gsm8k", "gsm8k/gsm8k-cot.yaml", COT.replace("2 + 2 = 4. The answer is 4.", "4"), 'no text under "target"'),
        ("math", "minerva_math/utils.py", None, "No such file"),
        ("math", "minerva_math/utils.py", "def (", "invalid syntax"),
        ("math", "minerva_math/utils.py", "x = 1", "no function list_fewshot_samples"),
        ("math", "minerva_math/utils.py", "def list_fewshot_samples():\n    return read()", "not literals"),
    ],
)
def test_files_written_in_another_way_are_one_clear_error(
    package: Path, name: str, file: str, text: str | None, says: str
) -> None:
    path = package / "tasks" / file
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    with pytest.raises(RestemError, match=says) as caught:
        prompt(task(name, "Five and five?"))
    assert str(path) in str(caught.value) and "prompt.exemplars" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "config", "row", "needs"),
    [
        ("gsm8k", "gsm8k/gsm8k-cot.yaml", {"question": " Five  and five?", "answer": "#### 10"}, ()),
        ("bbh-snarks", "bbh/cot_fewshot/snarks.yaml", {"input": "Mock? ", "target": "(A)"}, ()),
        ("bbh-word_sorting", "bbh/cot_fewshot/word_sorting.yaml", {"input": "b a", "target": "a b"}, ()),
        (
            "math",
            "minerva_math/minerva_math_algebra.yaml",
            {"problem": "What is $2 + 2$?", "solution": r"$\boxed{4}$"},
            ("antlr4", "sympy", "math_verify"),
        ),
    ],
)
def test_the_installed_lm_eval_renders_the_same_text(
    tmp_path: Path, name: str, config: str, row: dict[str, str], needs: tuple[str, ...]
) -> None:
    for module in ("lm_eval", "datasets", *needs):
        pytest.importorskip(module)
    import lm_eval
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    own = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / config),
        "task": "here",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
    }
    (tmp_path / "here.yaml").write_text(json.dumps(own))  # JSON is YAML
    theirs = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["here"])["tasks"]["here"]
    subtask = name.partition("-")[2]
    ours = task(name, next(iter(row.values())), subtasks=(subtask,) if subtask else ())
    text = prompt(ours).text(ours.test[0])
    assert text == theirs.fewshot_context(theirs.eval_docs[0], num_fewshot=theirs.config.num_fewshot)
    assert list(prompt(ours).stop) == theirs.config.generation_kwargs["until"]
