"""BIG-Bench Hard, the Hungarian exam, reasoning-gym: test sets are never trained on, and what was meant is what is graded."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from restem.config import load_recipe
from restem.errors import MissingExtra, RestemError
from restem.preflight import check
from restem.prompts import Exemplar, Prompt
from restem.sheet import Entry, entries, read_sheet, score, score_text, write_sheet
from restem.tasks import content_hash, load_task, names
from restem.tasks.bbh import SUBTASKS
from restem.tasks.bbh_exemplars import WORKED
from restem.tasks.of_recipe import prompt_of, task_of
from restem.types import Problem, Sample
from restem.verifiers import load
from restem.verifiers.bbh import strict, verify
from restem.verifiers.pool import VerifierPool

DATA = os.environ.get("RESTEM_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="RESTEM_DATA names no data folder")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- BIG-Bench Hard: the verifier ---------------------------------------------------------------------------------------------

ROUND = "Which is round?\nOptions:\n(A) a box\n(B) a ball\n(C) a square box"
OPEN = "Complete the rest of the sequence. Input: ( ["

# reference, question, completion, what verify says, what strict says
GRADES = [
    ("(B)", ROUND, "It rolls. So the answer is (B).", "correct", "correct"),
    ("(B)", ROUND, " (B)", "correct", "correct"),
    ("(B)", ROUND, " B", "correct", "incorrect"),
    ("(B)", ROUND, "So the answer is (B) because it rolls.", "correct", "incorrect"),
    ("(B)", ROUND, "So the answer is (B) a ball.", "correct", "incorrect"),
    ("(B)", ROUND, "The answer is the ball.", "correct", "incorrect"),
    ("(B)", ROUND, "So the answer is (A). No: the answer is (B).", "correct", "incorrect"),
    ("(B)", ROUND, "ball", "correct", "incorrect"),
    ("(B)", ROUND, "The answer is a box.", "incorrect", "incorrect"),
    ("(B)", ROUND, "The answer is (A) or (B).", "incorrect", "incorrect"),
    ("(B)", ROUND, "It is hard to say.", "no_answer", "incorrect"),
    ("(B)", ROUND, "", "no_answer", "no_answer"),
    ("Yes", "?", "So the answer is Yes.", "correct", "correct"),
    ("Yes", "?", "So the answer is yes", "correct", "incorrect"),
    ("yes", "?", "So the answer is Yes.", "correct", "incorrect"),
    ("No", "?", "The answer is No, Mia lies.", "correct", "incorrect"),
    ("No", "?", " No. She lies.", "correct", "incorrect"),
    ("No", "?", "The answer is yes and no.", "incorrect", "incorrect"),
    ("Yes", "?", "The answer is yes, or rather no.", "incorrect", "incorrect"),
    ("Yes", "?", "The answer is not yes.", "incorrect", "incorrect"),
    ("No", "?", "No one knows.", "no_answer", "incorrect"),
    ("Yes", "?", "That is a long story about a yes", "no_answer", "incorrect"),
    ("True", "?", " True", "correct", "correct"),
    ("True", "?", "The answer is **True**.", "correct", "incorrect"),
    ("False", "?", "The answer is True.", "incorrect", "incorrect"),
    ("valid", "?", "It holds. The answer is deductively valid.", "correct", "incorrect"),
    ("valid", "?", "So the answer is invalid.", "incorrect", "incorrect"),
    ("24", "?", "So the answer is 24.", "correct", "correct"),
    ("24", "?", " = 24", "correct", "incorrect"),
    ("-35", "?", "The answer is \u221235.", "correct", "incorrect"),
    ("1234", "?", "The answer is 1,234.", "correct", "incorrect"),
    ("8", "?", "The answer is eight.", "correct", "incorrect"),
    ("8", "?", "The answer is 8 flutes.", "correct", "incorrect"),
    ("8", "?", "The answer is 3 + 5 = 8.", "correct", "incorrect"),
    ("8", "?", r"Thus \boxed{8}", "correct", "incorrect"),
    ("8", "?", "The answer is 8 or 9.", "incorrect", "incorrect"),
    ("-8", "?", "The answer is -(-8).", "incorrect", "incorrect"),
    ("8", "?", "I count 3 and then 5, so 8 in all.", "no_answer", "incorrect"),
    ("barn damp dot", "?", "So the answer is barn damp dot.", "correct", "correct"),
    ("barn damp dot", "?", " barn damp dot", "correct", "correct"),
    ("barn damp dot", "?", "The answer is: barn, damp, dot", "correct", "incorrect"),
    ("barn damp dot", "?", "The answer is barn, damp, and dot.", "correct", "incorrect"),
    ("barn damp dot", "?", "The answer is:\n1. barn\n2. damp\n3. dot\n\nDone.", "correct", "incorrect"),
    ("barn damp dot", "?", "The answer is barn -> Damp -> dot", "correct", "incorrect"),
    ("barn damp dot", "?", "The answer is barn dot damp.", "incorrect", "incorrect"),
    ("barn damp dot", "?", "The answer is barn damp.", "incorrect", "incorrect"),
    ("barn damp dot", "?", "First barn.\nThen damp.", "no_answer", "incorrect"),
    ("] )", OPEN, "So the answer is ] ).", "correct", "correct"),
    ("] )", OPEN, "The answer is ])", "correct", "incorrect"),
    ("] )", OPEN, "The answer is ( [ ] )", "correct", "incorrect"),
    ("] )", OPEN, "The answer is ) ]", "incorrect", "incorrect"),
    ("] )", OPEN, "The answer is to close both.", "incorrect", "incorrect"),
    (")", "Input: (", " )", "correct", "correct"),
    ("Left, Right", "?", "The answer is Left, Right.", "correct", "correct"),
    (None, "?", "The answer is 3.", "verifier_error", "verifier_error"),
    (3, "?", "The answer is 3.", "verifier_error", "verifier_error"),
]


@pytest.mark.parametrize(("reference", "question", "completion", "tolerant", "exact"), GRADES)
def test_answers_are_read_by_their_form_beside_the_published_rule(
    reference: Any, question: str, completion: str, tolerant: str, exact: str
) -> None:
    problem = Problem(id="p", question=question, reference=reference)
    grade, published = verify(problem, completion), strict(problem, completion)
    assert (grade.reason, published.reason) == (tolerant, exact)
    assert grade.reward == {"correct": 1.0, "verifier_error": None}.get(tolerant, 0.0)
    assert ("strict extraction disagrees" in grade.note) == (grade.reward != published.reward)


def test_the_note_shows_what_the_published_rule_read() -> None:
    grade = verify(Problem(id="p", question="?", reference="Yes"), "The answer is yes, of course.")
    assert grade.note == "strict extraction disagrees: it reads 'yes, of course'"


def test_both_rules_have_a_name() -> None:
    assert load("bbh") is verify and load("bbh-strict") is strict


# --- BIG-Bench Hard: the task -------------------------------------------------------------------------------------------------

CANARY = "BENCHMARK MADE UP FOR THIS TEST. canary GUID 0"
ABOUT = {"navigate": "Follow the way.", "web_of_lies": "Find the liar."}


@pytest.fixture
def bbh(tmp_path: Path) -> Path:
    """Made-up rows in the layout of one file."""
    rows = [{"task": "navigate", "input": f"Go {n} left. Back?\nOptions:\n- Yes\n- No", "target": "No"} for n in range(4)]
    rows += [{"task": "web_of_lies", "input": f"Mia says {n}. True?", "target": "Yes"} for n in range(3)]
    rows += [
        {"task": "word_sorting", "input": "Sort: b a", "target": "a b"},
        {"task": "word_sorting", "input": "x", "target": ""},
    ]
    rows += [{"task": "web_of_lies", "input": "Mia says 0. True?", "target": "Yes"}]
    write(tmp_path / "bbh" / "bbh.jsonl", rows)
    shots = "\n\n".join(f"Q: Shot {n}?\nA: Let's think step by step.\nBecause. So the answer is {n}." for n in range(2))
    shots += "\n\nQ: Mia says 2. True?\nA: Let's think step by step. So the answer is Yes."
    prompts = [{"task": name, "prompt": f"{CANARY}\n-----\n{text}\n\n{shots}"} for name, text in ABOUT.items()]
    write(tmp_path / "bbh" / "cot_prompts.jsonl", prompts)
    (tmp_path / "bbh" / "CANARY.txt").write_text(CANARY)
    return tmp_path


def test_a_subtask_is_named_after_a_colon_or_in_the_options(bbh: Path) -> None:
    one, same = load_task("bbh:navigate", data=bbh), load_task("bbh", data=bbh, options={"subtask": "navigate"})
    assert one == same and one.name == "bbh-navigate"
    assert {problem.meta["subtask"] for problem in one.test} == {"navigate"}
    assert {problem.id for problem in one.test} == {f"bbh/navigate/{n}" for n in range(4)}
    assert not one.prompt.variants and len(one.prompt.exemplars) == 3
    many = load_task("bbh", data=bbh, options={"subtask": ["navigate", "web_of_lies", "word_sorting"]})
    assert many.name == "bbh" and len(many.test) == 4 + 3 + 1
    assert "test: 1 left out, repeats of another test problem" in many.notes
    assert "test: 1 left out, without a reference" in many.notes
    assert any("means over sub-tasks" in note for note in many.notes)


def test_every_subtask_is_shown_exemplars_of_its_own_form_of_answer(bbh: Path) -> None:
    task = load_task("bbh", data=bbh, options={"subtask": ["navigate", "word_sorting"]})
    texts = {problem.meta["subtask"]: task.prompt.text(problem) for problem in task.test}
    assert "lamp post" in texts["navigate"] and "lantern" not in texts["navigate"]
    assert "lantern" in texts["word_sorting"] and texts["word_sorting"].endswith("\n\nQ: Sort: b a\nA:")
    assert task.prompt.stop == ("\n\n", "\nQ:")
    direct = load_task("bbh", data=bbh, options={"subtask": ["navigate", "word_sorting"], "prompt": "direct"})
    assert {shot.solution for shot in direct.prompt.of(direct.test[0]).exemplars} <= {"Yes", "No", *_answers("words")}
    assert task.max_tokens > direct.max_tokens


def _answers(form: str) -> set[str]:
    return {worked.answer for worked in WORKED[form]}


def test_subtasks_with_the_same_exemplars_share_one_prompt(bbh: Path) -> None:
    assert not load_task("bbh", data=bbh, options={"subtask": ["navigate", "web_of_lies"]}).prompt.variants


def test_the_set_is_never_trained_on_and_says_so(bbh: Path) -> None:
    task = load_task("bbh:navigate", data=bbh)
    assert task.evaluation_only and (task.train, task.val) == ((), ())
    assert any("never be trained on" in note and CANARY in note for note in task.notes)
    for sizes in ({"train": 2}, {"val": 2}):
        with pytest.raises(RestemError, match="evaluated on only"):
            load_task("bbh:navigate", data=bbh, **sizes)


def test_published_exemplars_come_from_the_users_folder_without_the_canary(bbh: Path) -> None:
    options = {"subtask": ["navigate", "web_of_lies"], "exemplars": "published"}
    task = load_task("bbh", data=bbh, options=options)
    lies = next(problem for problem in task.test if problem.meta["subtask"] == "web_of_lies")
    text = task.prompt.text(lies)
    assert text.startswith("Find the liar.\n\nQ: Shot 0?\nA: Let's think step by step.\nBecause. So the answer is 0.\n\nQ: ")
    assert CANARY not in text and text.endswith(f"Q: {lies.question}\nA:")
    assert "test: 1 left out, shown as exemplars" in task.notes
    direct = load_task("bbh", data=bbh, options={**options, "prompt": "direct"})
    assert [shot.solution for shot in direct.prompt.of(lies).exemplars] == ["0", "1", "Yes"]


def test_the_authors_own_layout_is_read(tmp_path: Path) -> None:
    examples = [{"input": f"Mia says {n}.", "target": "Yes"} for n in range(3)]
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh" / "web_of_lies.json").write_text(json.dumps({"canary": CANARY, "examples": examples}))
    (tmp_path / "cot-prompts").mkdir()
    (tmp_path / "cot-prompts" / "web_of_lies.txt").write_text(f"{CANARY}\n-----\nAbout.\n\nQ: S?\nA: So the answer is No.")
    assert len(load_task("bbh:web_of_lies", data=tmp_path).test) == 3
    task = load_task("bbh:web_of_lies", data=tmp_path, options={"exemplars": "published"})
    assert task.prompt.exemplars == (Exemplar(question="S?", solution="So the answer is No."),)


def test_a_broken_published_prompt_is_an_error_and_not_a_shorter_prompt(bbh: Path) -> None:
    for text in ("About.", "About.\n\nQ: One?\nA: Yes."):
        write(bbh / "bbh" / "cot_prompts.jsonl", [{"task": "navigate", "prompt": f"{CANARY}\n-----\n{text}"}])
        with pytest.raises(RestemError, match="not what it should be"):
            load_task("bbh:navigate", data=bbh, options={"exemplars": "published"})


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("bbh:navigat", {}, 'did you mean "navigate"'),
        ("bbh:", {}, "bbh:NAME"),
        ("bbh:navigate", {"subtask": "navigate"}, "say the same"),
        ("bbh", {"subtask": []}, "Leave it out for all"),
        ("bbh", {"prompt": "none"}, '"cot" or "direct"'),
        ("bbh", {"shots": 3}, 'no option "shots"'),
        ("bbh:word_sorting", {"exemplars": "published"}, "no published prompt of word_sorting"),
        ("bbh:navigate", {"exemplars": "publish"}, '"own" or "published"'),
        ("bbh:snarks", {}, "holds no rows"),
    ],
)
def test_wrong_options_say_what_there_is(bbh: Path, name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RestemError, match=says):
        load_task(name, data=bbh, options=options)


def test_a_recipe_changes_the_prompts_of_all_subtasks(bbh: Path, tmp_path: Path) -> None:
    task = load_task("bbh", data=bbh, options={"subtask": ["navigate", "word_sorting"]})
    prompt = prompt_of(load_recipe({"prompt": {"shots": 1, "instruction": "Think."}}), task)
    for problem in task.test:
        assert prompt.text(problem).count("Q:") == 2 and prompt.text(problem).startswith("Think.")
    write(tmp_path / "mine.jsonl", [{"question": "Mine?", "solution": "So the answer is mine."}])
    mine = prompt_of(load_recipe({"prompt": {"exemplars": str(tmp_path / "mine.jsonl")}}), task)
    assert {shot.question for problem in task.test for shot in mine.of(problem).exemplars} == {"Mine?"}
    with pytest.raises(RestemError, match="only 3 exemplars"):
        prompt_of(load_recipe({"prompt": {"shots": 4}}), task)


def test_a_prompt_with_variants_is_the_same_key_as_its_equal() -> None:
    one, same = (Prompt(variants={"a": Prompt(instruction="x")}) for _ in range(2))
    assert {one: 1}[same] == 1 and one != Prompt(variants={"a": Prompt(instruction="y")})


def test_a_blank_line_ends_answers_only_if_no_subtask_teaches_one() -> None:
    short, long = (Prompt(exemplars=(Exemplar(question="q", solution=text),)) for text in ("one", "one\n\ntwo"))
    assert "\n\n" in Prompt(variants={"a": short, "b": short}).stop
    assert "\n\n" not in Prompt(variants={"a": short, "b": long}).stop


def test_every_subtask_has_three_exemplars_whose_answers_pass_both_rules() -> None:
    assert set(SUBTASKS.values()) == set(WORKED)
    for worked in WORKED.values():
        assert len(worked) == 3 and len({one.answer for one in worked}) > 1
        for one in worked:
            problem = Problem(id="p", question=one.question, reference=one.answer)
            for completion in (f" {one.thought} So the answer is {one.answer}.", f" {one.answer}"):
                assert verify(problem, completion).reason == strict(problem, completion).reason == "correct", one
            assert "\n\n" not in one.thought


@needs_data
def test_the_real_set_is_whole_apart_from_our_exemplars_and_its_references_pass() -> None:
    task = load_task("bbh", data=DATA)
    assert len(task.test) == 6511 - 4 and {problem.meta["subtask"] for problem in task.test} == set(SUBTASKS)
    assert not {content_hash(shot.question) for shot in task.prompt.shown} & {content_hash(p.question) for p in task.test}
    report = check(task)
    assert report.ok and report.splits["test"].accepted == len(task.test), report.findings


@needs_data
def test_the_published_prompts_are_read_and_none_shows_the_canary() -> None:
    task = load_task("bbh", data=DATA, options={"exemplars": "published"})
    assert set(task.prompt.variants) == set(SUBTASKS)
    assert {len(prompt.exemplars) for prompt in task.prompt.variants.values()} == {3}
    canary = (Path(DATA) / "bbh" / "CANARY.txt").read_text().split()[-1]
    assert not any(canary in task.prompt.text(problem) for problem in task.test[:200])
    assert "\n\n" in task.prompt.stop
    for name, prompt in task.prompt.variants.items():
        for shot in prompt.exemplars:
            reference = shot.solution.rpartition("So the answer is ")[2].rstrip(".")
            problem = Problem(id="p", question=shot.question, reference=reference)
            assert verify(problem, f" {shot.solution}").reason == "correct", (name, reference)


# --- the Hungarian exam -------------------------------------------------------------------------------------------------------


@pytest.fixture
def exam(tmp_path: Path) -> Path:
    rows = [{"index": n, "question": f"Prove that {n} is {n}.", **({"points": n + 1} if n < 3 else {})} for n in (1, 2, 3)]
    write(tmp_path / "hungarian_exam" / "questions.jsonl", rows)
    return tmp_path


def test_the_exam_is_for_testing_only_and_no_program_grades_it(exam: Path) -> None:
    task = load_task("hungarian", data=exam)
    assert task.evaluation_only and [problem.id for problem in task.test] == ["hungarian/1", "hungarian/2", "hungarian/3"]
    grade = task.verifier(task.test[0], "It is. The answer is 1.")
    assert (grade.reward, grade.reason) == (None, "verifier_error") and "restem sheet" in grade.note
    report = check(task)
    assert report.ok and report.splits["test"].unchecked == 3
    assert "\n\n" not in task.prompt.stop, "an answer may have paragraphs"
    with pytest.raises(RestemError, match="evaluated on only"):
        load_task("hungarian", data=exam, val=1)


@needs_data
def test_the_real_exam_has_33_questions_none_of_them_our_example() -> None:
    task = load_task("hungarian", data=DATA)
    assert len(task.test) == 33 and len({problem.id for problem in task.test}) == 33
    assert not any(check(task).overlap.values())


def answers(exam: Path) -> list[Entry]:
    texts = {1: "=1+1", 2: "Since ```` closes ```\n## hungarian/9\n\x1b[2J", 3: "Yes."}
    samples = [
        Sample(problem_id=f"hungarian/{n}", index=0, token_ids=(), text=text, finish="length" if n == 3 else "stop")
        for n, text in texts.items()
    ]
    return entries(load_task("hungarian", data=exam).test, samples)


def fill(path: Path, points: dict[str, str], *, possible: dict[str, str] | None = None, delimiter: str = ",") -> None:
    """Fill in a sheet as a spreadsheet would."""
    rows = list(csv.DictReader(path.open(encoding="utf-8-sig", newline="")))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            row["points"] = points.get(row["id"], row["points"])
            row["possible"] = (possible or {}).get(row["id"], row["possible"])
            writer.writerow(row)


def test_a_sheet_goes_out_and_its_points_come_back(exam: Path, tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    write_sheet(path, answers(exam))
    assert score(read_sheet(path)).graded == 0
    fill(path, {"hungarian/1": "2", "hungarian/2": "1,5"}, delimiter=";")
    found = score(read_sheet(path))
    assert (found.points, found.possible, found.graded, found.questions) == (3.5, 5.0, 2, 3)
    assert found.share is not None and found.share.value == pytest.approx(0.7) and found.share.n == 2
    assert found.share.low <= 0.7 <= found.share.high
    assert "3.5 points of 5: 70.0% [" in score_text(found) and "1 of 3 questions have no points yet" in score_text(found)
    assert json.loads(json.dumps(found.as_dict()))["share"]["n"] == 2


def test_without_the_rubric_there_is_a_sum_and_no_share(exam: Path, tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    write_sheet(path, answers(exam))
    fill(path, {"hungarian/1": "2", "hungarian/3": "0.5"})
    found = score(read_sheet(path))
    assert (found.points, found.possible, found.share) == (2.5, None, None)
    assert 'column "possible"' in score_text(found)
    fill(path, {}, possible={"hungarian/3": "4"})
    assert score(read_sheet(path)).possible == 6.0


def test_several_answers_to_a_question_count_by_their_mean() -> None:
    sheet = [Entry(id="a", sample=n, possible=4, points=points) for n, points in enumerate((4.0, 0.0, None))]
    found = score([*sheet, Entry(id="b", sample=0, possible=1, points=1.0)])
    assert (found.points, found.possible, found.graded) == (3.0, 5.0, 2)
    assert found.share is not None and found.share.value == pytest.approx(3 / 5)


def test_no_answer_can_compute_escape_or_forge_anything_on_a_sheet(exam: Path, tmp_path: Path) -> None:
    write_sheet(tmp_path / "sheet.csv", answers(exam))
    write_sheet(tmp_path / "sheet.md", answers(exam))
    rows = list(csv.DictReader((tmp_path / "sheet.csv").open(encoding="utf-8-sig", newline="")))
    assert rows[0]["answer"] == "'=1+1" and "\x1b" not in rows[1]["answer"]
    assert rows[2]["answer"].endswith("[cut off at the longest length]")
    text = (tmp_path / "sheet.md").read_text()
    assert "`````text\nSince ```` closes ```\n## hungarian/9\n" in text and "\x1b" not in text
    assert text.count("\nPoints: ____") == 3 and "(2 points possible)" in text


def test_a_sheet_is_never_replaced_and_a_wrong_one_is_explained(exam: Path, tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    write_sheet(path, answers(exam))
    with pytest.raises(RestemError, match="may hold grades"):
        write_sheet(path, answers(exam))
    with pytest.raises(RestemError, match=r"\.csv .* or \.md"):
        write_sheet(tmp_path / "sheet.xls", answers(exam))
    for cell, says in (("two", "'two', which is no number"), ("-1", "0 or more"), ("nan", "0 or more"), ("9", "2 at most")):
        fill(path, {"hungarian/1": cell})
        with pytest.raises(RestemError, match=f"row 2: .*{says}"):
            read_sheet(path)
    path.write_text("id,answer\na,b\n")
    with pytest.raises(RestemError, match="no column possible, points"):
        read_sheet(path)
    path.write_text("id,sample,possible,points\na,0,1,1\na,0,1,0\n")
    with pytest.raises(RestemError, match="twice"):
        read_sheet(path)
    with pytest.raises(RestemError, match=r"restem sheet absent\.csv --from RUN"):
        read_sheet(tmp_path / "absent.csv")


@needs_data
def test_the_published_gradings_add_up() -> None:
    with gzip.open(Path(DATA) / "hungarian_exam" / "model_answers_graded.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sheets: dict[str, list[Entry]] = {}
    for row in rows:
        entry = Entry(id=str(row["index"]), sample=0, answer=row["answer"], points=float(row["Points"]))
        sheets.setdefault(row["model"], []).append(entry)
    points = {model: score(sheet).points for model, sheet in sheets.items()}
    assert points["DeepSeek-66B"] == 65 and points["Qwen-14B-Chat"] == 38.5
    assert all(score(sheet).graded == 33 for sheet in sheets.values())


# --- reasoning-gym ------------------------------------------------------------------------------------------------------------

GYM = """
import random
from reasoning_gym.factory import DATASETS, create_dataset
"""
FACTORY = '''
import random


class Sums:
    """Like the library's data sets: problem i is seeded with seed + i."""

    def __init__(self, *, seed, size, largest=500):
        if largest < 2:
            raise AssertionError("largest must be 2 or more")
        self.seed, self.size, self.largest = seed, size, largest

    def __getitem__(self, index):
        rng = random.Random(self.seed + index)
        a, b = rng.randrange(self.largest), rng.randrange(self.largest)
        return {"question": f"What is {a} + {b}?", "answer": str(a + b), "metadata": {"pair": (a, b)}}

    def score_answer(self, answer, entry):
        a, b = entry["metadata"]["pair"]
        if answer == "boom":
            raise ValueError("no such answer")
        return 1.0 if answer.strip() == str(a + b) else 0.01


class Column(Sums):
    """An answer of two lines."""

    def __getitem__(self, index):
        entry = super().__getitem__(index)
        a, b = entry["metadata"]["pair"]
        return {**entry, "question": f"Write {a} above {b}.", "answer": f"{a}\\n{b}"}

    def score_answer(self, answer, entry):
        return 1.0 if answer == entry["answer"] else 0.0


class Larger(Sums):
    """No single right answer."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "answer": None}

    def score_answer(self, answer, entry):
        return float(int(answer) > sum(entry["metadata"]["pair"]))


class Careless(Sums):
    """Draws from the common generator."""

    def __getitem__(self, index):
        entry = super().__getitem__(index)
        return {**entry, "question": f"{entry['question']} ({random.random()})"}


DATASETS = {"sums": (Sums,), "column": (Column,), "larger": (Larger,), "careless": (Careless,)}


def create_dataset(name, **settings):
    return DATASETS[name][0](**settings)
'''


@pytest.fixture
def gym(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small package that stands in for the library, in this process and in those that it starts."""
    import restem.tasks.reasoning_gym as module

    package = tmp_path / "path" / "reasoning_gym"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(GYM)
    (package / "factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(package.parent)
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    for cached in (module._dataset, module._entry):
        cached.cache_clear()
    yield package
    for cached in (module._dataset, module._entry):
        cached.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        del sys.modules[name]


SIZES: dict[str, int] = {"train": 30, "val": 8, "test": 20}


def test_a_data_set_becomes_three_splits_that_never_meet_whatever_the_seeds(gym: Path) -> None:
    one, other = (load_task("reasoning-gym:sums", seed=seed, **SIZES) for seed in (0, 1))
    assert [len(split) for split in (one.train, one.val, one.test)] == [30, 8, 20]
    assert one == load_task("reasoning-gym:sums", **SIZES)
    assert load_task("reasoning-gym:sums", limit=5).test == one.test[:5]
    ids = [{problem.id for problem in (*one.train, *other.train)}, {p.id for p in (*one.val, *other.val)}]
    ids.append({problem.id for problem in (*one.test, *other.test)})
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]
    assert len(ids[0]) > 55, "another seed makes other problems"
    assert one.name == "reasoning-gym-sums" and not one.evaluation_only
    assert check(one).ok


def test_its_own_scorer_grades_and_only_full_marks_are_correct(gym: Path) -> None:
    task = load_task("reasoning-gym:sums", **SIZES)
    problem = task.train[3]
    right = problem.reference
    for completion in (f" I add.\n<answer>{right}", f"<answer>{right}</answer> Done.", f" So the answer is {right}."):
        assert task.verifier(problem, completion).reward == 1, completion
    wrong = task.verifier(problem, "<answer>-1</answer>")
    assert (wrong.reward, wrong.reason, wrong.note) == (0.0, "incorrect", "the scorer gave 0.01")
    assert load("restem.tasks.reasoning_gym:partial")(problem, "<answer>-1</answer>").reward == 0.01
    assert task.verifier(problem, f" {right} or so").reason == "no_answer"
    assert task.verifier(problem, f"The answer is {right}. <answer></answer>").reason == "no_answer"
    failed = task.verifier(problem, "<answer>boom</answer>")
    assert (failed.reward, failed.reason) == (None, "verifier_error") and "no such answer" in failed.note


def test_a_worker_process_grades_problems_that_went_through_a_run(gym: Path) -> None:
    task = load_task("reasoning-gym:sums", options={"largest": 50}, train=2, val=1, test=1)
    problem = task.train[1]
    stored = Problem(
        id=problem.id,
        question=problem.question,
        reference=json.loads(json.dumps(problem.reference)),
        meta=json.loads(json.dumps(dict(problem.meta))),
    )
    with VerifierPool(task.verifier_spec) as pool:
        grades = [pool.submit(stored, f"<answer>{text}").result() for text in (problem.reference, "7777")]
    assert [grade.reward for grade in grades] == [1.0, 0.0]


def test_answers_of_many_lines_and_without_a_key_are_graded(gym: Path) -> None:
    column = load_task("reasoning-gym:column", train=1, val=1, test=3)
    assert check(column).ok
    assert column.verifier(column.test[0], f"<answer>\n{column.test[0].reference}\n</answer>").reward == 1
    larger = load_task("reasoning-gym:larger", train=1, val=1, test=1)
    assert check(larger).splits["test"].unchecked == 1
    assert larger.verifier(larger.test[0], "<answer>99999</answer>").reward == 1


def test_a_data_set_that_draws_from_the_common_generator_is_made_again_all_the_same(gym: Path) -> None:
    random.seed(5)
    before = random.getstate()
    task = load_task("reasoning-gym:careless", train=4, val=1, test=1)
    assert random.getstate() == before
    random.random()
    assert check(task).ok and task == load_task("reasoning-gym:careless", train=4, val=1, test=1)


def test_another_version_of_the_library_grades_nothing_rather_than_wrongly(gym: Path) -> None:
    problem = load_task("reasoning-gym:sums", train=1, val=1, test=1).test[0]
    changed = Problem(id=problem.id, question="What is 1 + 1?", reference="2", meta=problem.meta)
    grade = load("restem.tasks.reasoning_gym:verify")(changed, "<answer>2</answer>")
    assert grade.reward is None and "another question from the same seed" in grade.note


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("reasoning-gym:sum", {}, 'no data set "sum"; did you mean "sums"'),
        ("reasoning-gym", {}, 'task.name = "reasoning-gym:NAME"'),
        ("reasoning-gym:sums", {"largest": 1}, "cannot be made .* largest must be 2 or more"),
        ("reasoning-gym:sums", {"smallest": 1}, "cannot be made .*'smallest'"),
        ("reasoning-gym:sums", {"seed": 1}, "Set seed instead"),
        ("reasoning-gym:sums", {"size": 1}, "task.train, task.val and task.test"),
        ("reasoning-gym:sums", {"largest": 3}, "only . different"),
    ],
)
def test_wrong_names_and_settings_are_readable_errors(gym: Path, name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RestemError, match=says):
        load_task(name, options=options, **SIZES)


def test_without_the_library_the_line_that_installs_it_is_shown(gym: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtra, match=r'pip install "restem\[reasoning-gym\]"'):
        load_task("reasoning-gym:sums")


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
@pytest.mark.parametrize("name", ["chain_sum", "leg_counting", "spell_backward", "number_sorting"])
def test_data_sets_of_the_real_library_grade_their_own_answers(name: str) -> None:
    task = load_task(f"reasoning-gym:{name}", train=8, val=4, test=4)
    assert check(task).ok
    assert task.verifier(task.test[0], f"<answer>{task.test[0].reference}</answer>").reward == 1


def test_the_new_names_are_listed() -> None:
    assert {"bbh", "hungarian", "reasoning-gym:NAME"} <= set(names())


def test_a_problem_that_the_prompt_shows_worked_out_is_in_no_split(tmp_path: Path) -> None:
    """The recipe's own exemplars may come from the data; what is shown with its solution is neither trained nor tested on."""
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(40)]
    data, mine = tmp_path / "sums.jsonl", tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine.write_text("".join(json.dumps({"question": r["question"], "solution": "The answer is 1."}) + "\n" for r in rows[:5]))
    plain, shown = ({"task": {"name": str(data)}, "prompt": prompt} for prompt in ({}, {"exemplars": str(mine)}))
    whole, apart = task_of(load_recipe(plain)), task_of(load_recipe(shown))

    def questions(task: Any) -> set[str]:
        return {problem.question for problem in (*task.train, *task.val, *task.test)}

    assert questions(whole) - questions(apart) == {row["question"] for row in rows[:5]}
    assert any("left out, shown in the prompt" in note for note in apart.notes)
