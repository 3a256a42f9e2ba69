"""Tasks: splits that never meet, problems that are what they say, and errors that say what to do."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from restem.errors import MissingExtra, RestemError
from restem.tasks import Task, content_hash, load_task, names
from restem.tasks.arithmetic import EXEMPLARS, Options, generate
from restem.tasks.arithmetic_templates import TEMPLATES, Draw
from restem.tasks.gsm8k import read_answer
from restem.tasks.math import last_box
from restem.types import Problem

REAL = pytest.mark.skipif("RESTEM_DATA" not in os.environ, reason="RESTEM_DATA names no data folder")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(text)
    return path


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"What is {n} + 1?", "answer": n + 1} for n in range(start, start + count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with made-up rows in the layout of the real sets."""
    worked = [{"question": r["question"], "answer": f"Add <<1+1=2>>1.\nDone.\n#### {r['answer']},000"} for r in rows(60)]
    write(tmp_path / "gsm8k/train.jsonl.gz", worked[:40])
    write(tmp_path / "gsm8k/test.jsonl.gz", worked[40:])
    boxed = [
        {
            "problem": r["question"],
            "level": f"Level {n % 5 + 1}",
            "type": "Algebra",
            "solution": f"It is $\\boxed{{{r['answer']}}}$.",
            "unique_id": f"{'train' if n < 40 else 'test'}/algebra/{n}.json",
        }
        for n, r in enumerate(rows(60))
    ]
    write(tmp_path / "math/train.jsonl", [*boxed[:40], {**boxed[0], "problem": "Empty?", "solution": "$\\boxed{}$"}])
    write(tmp_path / "math/test.parquet", boxed[40:])
    write(tmp_path / "math500/test.json", [{**row, "answer": "9", "level": 3} for row in boxed[50:]])
    return tmp_path


def load_any(name: str, data: Path, **settings: Any) -> Task:
    if name == "own file":
        return load_task(write(data / "own.jsonl", rows(60)), **settings)
    return load_task(name, data=data, **settings)


ALL = ["arithmetic", "gsm8k", "math", "math500", "own file"]


def hashes(problems: tuple[Problem, ...]) -> set[str]:
    return {content_hash(problem.question) for problem in problems}


def assert_apart(task: Task) -> None:
    shots = {content_hash(exemplar.question) for exemplar in task.prompt.exemplars}
    groups = [shots, hashes(task.train), hashes(task.val), hashes(task.test)]
    assert sum(len(group) for group in groups) == len(set().union(*groups))
    problems = (*task.train, *task.val, *task.test)
    assert len({problem.id for problem in problems}) == len(problems)


@pytest.mark.parametrize("name", ALL)
def test_no_test_problem_meets_training_validation_or_few_shot(name: str, data: Path) -> None:
    task = load_any(name, data)
    assert task.test
    assert_apart(task)


@pytest.mark.parametrize("name", ALL)
def test_splits_are_the_same_every_time_and_a_limit_shows_their_first_problems(name: str, data: Path) -> None:
    whole, again, cut = load_any(name, data), load_any(name, data), load_any(name, data, limit=3)
    for split in ("train", "val", "test"):
        assert getattr(whole, split) == getattr(again, split)
        assert getattr(cut, split) == getattr(whole, split)[:3]


@pytest.mark.parametrize("name", ["arithmetic", "gsm8k", "math", "own file"])
def test_the_training_size_does_not_move_validation_or_test(name: str, data: Path) -> None:
    whole, cut = load_any(name, data), load_any(name, data, train=5)
    assert len(cut.train) == 5
    assert (cut.val, cut.test) == (whole.val, whole.test)


@pytest.mark.parametrize("name", ["gsm8k", "math", "own file"])
def test_a_smaller_validation_split_is_part_of_a_larger_one_and_frees_the_rest_for_training(name: str, data: Path) -> None:
    small, large = load_any(name, data, val=2, test=4), load_any(name, data, val=5, test=4)
    assert (len(small.val), len(large.val)) == (2, 5)
    assert hashes(small.val) < hashes(large.val)
    assert len(small.train) == len(large.train) + 3


def test_the_seed_moves_validation_but_never_the_official_test(data: Path) -> None:
    for name in ("gsm8k", "math"):
        one, other = load_task(name, data=data), load_task(name, data=data, seed=1)
        assert one.test == other.test
        assert hashes(one.val) != hashes(other.val)


def test_the_reference_and_meta_never_reach_a_prompt(tmp_path: Path) -> None:
    marked = [{"question": f"q{n}", "answer": f"GOLD{n}X", "note": f"META{n}X"} for n in range(30)]
    task = load_task(write(tmp_path / "own.jsonl", marked))
    for problem in (*task.train, *task.val, *task.test):
        assert "GOLD" in problem.reference
        assert "META" in problem.meta["note"]
        assert not re.search("GOLD|META", task.prompt.text(problem))


def test_arithmetic_is_the_same_on_every_machine() -> None:
    task = load_task("arithmetic")
    assert [len(split) for split in (task.train, task.val, task.test)] == [96, 48, 400]
    digest = content_hash(" ".join(p.question for p in (*task.train, *task.val, *task.test)))
    assert digest == "1cbec6914d0ce3af"


def test_arithmetic_splits_of_different_seeds_never_meet() -> None:
    one, other = load_task("arithmetic", seed=1, train=800), load_task("arithmetic", seed=2, train=800)
    assert not hashes(one.test) & hashes(other.train)
    assert not hashes(one.val) & hashes(other.train)
    assert hashes(one.train) != hashes(other.train)


def test_arithmetic_answers_follow_from_the_numbers() -> None:
    by_hand: dict[str, Callable[..., float]] = {
        "join": lambda a, b: a + b,
        "take": lambda a, b: a - b,
        "compare": lambda a, b: a - b,
        "groups": lambda a, b: a * b,
        "share": lambda a, b: a / b,
        "pack": lambda a, b: a / b,
        "groups, then fewer": lambda a, b, c: a * b - c,
        "groups, then more": lambda a, b, c: a * b + c,
        "join, then share": lambda a, b, c: (a + b) / c,
        "fewer twice": lambda a, b, c: a - b - c,
        "more than another": lambda a, b: a + a + b,
        "change": lambda a, b, c: a - b * c,
        "two kinds of groups": lambda a, b, c, d: a * b + c * d,
        "groups, more, share": lambda a, b, c, d: (a * b + c) / d,
        "join, groups, fewer": lambda a, b, c, d: (a + b) * c - d,
        "fewer, share, more": lambda a, b, c, d: (a - b) / c + d,
        "groups, fewer, more": lambda a, b, c, d: a * b - c + d,
    }
    assert set(by_hand) == {template.kind for template in TEMPLATES}
    draw = Draw(rng=random.Random(5), largest_added=40, largest_taken=40, largest_factor=9, largest_divisor=6)
    for template in TEMPLATES:
        assert 2 <= len(template.forms) <= 5
        for _ in range(300):
            values = template.values(draw)
            answer = values.pop("answer")
            assert by_hand[template.kind](**values) == answer
            assert answer >= 1
            assert min(values.values()) >= 2
            for form in template.forms:
                assert set(re.findall(r"{([a-d])}", form)) == set(values), form


def test_arithmetic_options_set_the_mix_and_the_sizes() -> None:
    task = load_task("arithmetic", options={"weights": [0, 0, 1], "largest_added": 5})
    assert {problem.meta["steps"] for problem in task.train} == {3}
    steps = [problem.meta["steps"] for problem in load_task("arithmetic").test]
    assert set(steps) == {1, 2, 3}


def test_arithmetic_problems_depend_on_seed_and_position_alone() -> None:
    one, other = generate(3, "s", Options()), generate(3, "s", Options())
    assert [next(one) for _ in range(20)] == [next(other) for _ in range(20)]


def test_exemplars_of_arithmetic_are_right() -> None:
    for exemplar in EXEMPLARS:
        for left, right in re.findall(r"([\d +\-*/]+) = (\d+)", exemplar.solution):
            assert eval(left) == int(right)  # digits and signs alone, by the pattern above
        assert exemplar.solution.endswith(
            f"= {exemplar.solution.split()[-1].strip('.')}. The answer is {exemplar.solution.split()[-1]}"
        )


@pytest.mark.parametrize("options", [{"weight": [1, 1, 1]}, {"weights": "x"}, {"weights": [0, 0, 0]}, {"largest_added": 1}])
def test_a_wrong_arithmetic_option_is_a_readable_error(options: dict[str, Any]) -> None:
    with pytest.raises(RestemError, match=r"weights|largest_added"):
        load_task("arithmetic", options=options)


def test_gsm8k_rows_become_problems(data: Path) -> None:
    problem = load_task("gsm8k", data=data).test[0]
    assert (problem.question, problem.reference) == ("What is 40 + 1?", "41000")
    assert problem.meta == {"steps": 2, "solution": "Add 1.\nDone."}
    assert problem.id == content_hash(problem.question)


@pytest.mark.parametrize(
    ("text", "answer"), [("a\n#### 1,234", "1234"), ("#### -5", "-5"), ("a #### 1\n#### 2 ", "2"), ("none", None)]
)
def test_gsm8k_answers_are_read_after_the_mark(text: str, answer: str | None) -> None:
    assert read_answer(text) == answer


def test_math_rows_become_problems_and_empty_boxes_are_counted(data: Path) -> None:
    task = load_task("math", data=data)
    problem = next(problem for problem in task.test if problem.id == "test/algebra/41.json")
    assert problem.reference == "42"
    assert (problem.meta["level"], problem.meta["subject"]) == (2, "Algebra")
    assert "train: 1 left out, without a reference" in task.notes
    assert len(task.train) + len(task.val) == 40


def test_math500_is_for_testing_only_and_uses_its_answer_column(data: Path) -> None:
    task = load_task("math500", data=data)
    assert (task.train, task.val) == ((), ())
    assert {problem.reference for problem in task.test} == {"9"}


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{2}.", "2"),
        (r"$\boxed 17$.", "17"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{3} or \boxed{4", "3"),
        (r"\fbox{5}", "5"),
        (r"\boxed {6}", "6"),
        (r"\boxed{}", ""),
        ("no box", None),
    ],
)
def test_the_last_complete_box_is_the_answer(solution: str, answer: str | None) -> None:
    assert last_box(solution) == answer


def test_a_data_folder_may_be_the_sets_own_folder(data: Path) -> None:
    assert load_task("gsm8k", data=data / "gsm8k").test == load_task("gsm8k", data=data).test


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_own_files_of_every_kind_give_the_same_task(tmp_path: Path, ending: str) -> None:
    task = load_task(write(tmp_path / f"own{ending}", rows(50)))
    assert task.name == "own"
    assert [len(split) for split in (task.train, task.val, task.test)] == [40, 5, 5]
    assert task.test == load_task(write(tmp_path / "plain.jsonl", rows(50))).test
    assert {int(p.question.split()[2]) + 1 for p in task.test} == {int(p.reference) for p in task.test}
    assert any("5 held out of the training problems" in note for note in task.notes)


def test_own_columns_verifier_and_other_columns_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", [{"n": i, "q": f"q{i}", "gold": [i], "level": i} for i in range(20)])
    task = load_task(path, question="q", answer="gold", id="n", verifier="choice")
    assert task.verifier_spec == "choice"
    problem = min(task.train, key=lambda problem: int(problem.id))
    assert problem == Problem(
        id=problem.id,
        question=f"q{problem.id}",
        reference=[int(problem.id)],
        meta={"level": int(problem.id)},
    )


def test_a_folder_of_splits_keeps_them_apart_and_in_order(tmp_path: Path) -> None:
    train = [*rows(10), *rows(3), *rows(2, start=100), *rows(1, start=200)]
    write(tmp_path / "train.jsonl", [{"id": n, **row} for n, row in enumerate(train)])
    write(tmp_path / "val.jsonl", [{"id": n, **row} for n, row in enumerate([*rows(2, start=100), *rows(1, start=200)])])
    write(tmp_path / "test.jsonl", [{"id": n, **row} for n, row in enumerate(rows(4, start=200))])
    task = load_task(tmp_path, id="id")
    assert_apart(task)
    assert [problem.question for problem in task.train] == [row["question"] for row in rows(10)]
    assert [len(split) for split in (task.train, task.val, task.test)] == [10, 2, 4]
    assert task.notes == (
        "val: 1 left out, also in test",
        "train: 1 left out, also in test",
        "train: 2 left out, also in val",
        "train: 3 left out, repeats of another train problem",
        "ids repeat between splits, so each has its split's name in front",
    )
    assert task.train[0].id == "train/0"


def test_a_folder_without_validation_holds_a_fifth_out(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(50))
    write(tmp_path / "test.jsonl", rows(5, start=100))
    task = load_task(tmp_path)
    assert [len(split) for split in (task.train, task.val, task.test)] == [40, 10, 5]


def test_rows_without_question_or_reference_are_left_out_and_counted(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"question": "a", "answer": None},
        {"question": "b", "answer": " "},
        {"question": "", "answer": 1},
    ]
    task = load_task(write(tmp_path / "own.jsonl", [*rows(20), *bad]))
    assert "train: 1 left out, without a question" in task.notes
    assert "train: 2 left out, without a reference" in task.notes
    assert len(task.train) + len(task.val) + len(task.test) == 20


def test_a_parquet_column_with_gaps_keeps_whole_numbers_whole(tmp_path: Path) -> None:
    table = [
        {"question": "a", "answer": 3.0},
        {"question": "b", "answer": 2.5},
        {"question": "c", "answer": float("nan")},
    ]
    task = load_task(write(tmp_path / "own.parquet", table))
    assert {problem.reference for problem in task.train} == {"3", "2.5"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"questoin": "a", "answer": 1}], r'no column "question"; did you mean "questoin"\? .*\n.*task.question = '),
        ([{"question": "a", "gold": 1}], r'no column "answer"\. There are: gold, question\.\n.*task.answer = '),
        (
            [{"question": "a", "answer": None}],
            r'none of the 1 rows .* column "answer"; the columns are: question, answer',
        ),
        ([{"question": ["a"], "answer": 1}], r"row 1: the question .* is a list, not text"),
        ([], "holds no rows"),
        ([3], "line 1 is a int, not an object"),
    ],
)
def test_wrong_columns_and_missing_references_are_readable_errors(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(RestemError, match=message):
        load_task(write(tmp_path / "own.jsonl", content))


def test_a_torn_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", rows(2))
    path.write_text(path.read_text() + '{"question": "to')
    with pytest.raises(RestemError, match=r"own\.jsonl, line 3 is not valid JSON"):
        load_task(path)


def test_a_torn_archive_or_a_false_ending_is_a_readable_error(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl.gz", rows(2000))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(RestemError, match=r"cannot read .*own\.jsonl\.gz"):
        load_task(path)
    for name in ("own.parquet", "own.json"):
        (tmp_path / name).write_text("no such thing")
        with pytest.raises(RestemError, match=f"cannot read .*{name}"):
            load_task(tmp_path / name)


def test_missing_files_folders_and_names_suggest_what_was_meant(tmp_path: Path, data: Path) -> None:
    write(tmp_path / "problems.jsonl", rows(5))
    with pytest.raises(RestemError, match=r'there is no file .*problem\.jsonl; did you mean "problems\.jsonl"'):
        load_task(tmp_path / "problem.jsonl")
    with pytest.raises(RestemError, match='no task and no file "gsm8"; did you mean "gsm8k"'):
        load_task("gsm8")
    with pytest.raises(RestemError, match="there is no such folder"):
        load_task("gsm8k", data=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RestemError, match=r"no train file of gsm8k in .*empty.*holds nothing"):
        load_task("gsm8k", data=tmp_path / "empty")
    with pytest.raises(RestemError, match="no problems in"):
        load_task(tmp_path / "empty")
    with pytest.raises(RestemError, match="what kind of file"):
        load_task(write(tmp_path / "own.csv", rows(2)))


def test_settings_that_would_be_ignored_are_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(RestemError, match=r"task\.question does not apply to gsm8k"):
        load_task("gsm8k", data=data, question="q")
    with pytest.raises(RestemError, match=r"task\.data does not apply"):
        load_task(write(tmp_path / "own.jsonl", rows(5)), data=tmp_path)
    with pytest.raises(RestemError, match='has no option "hub"; did you mean "hub_id"'):
        load_task("gsm8k", data=data, options={"hub": "x"})


def test_sizes_that_leave_nothing_or_are_negative_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", rows(10))
    with pytest.raises(RestemError, match=r"task\.test = 10, but there are only 10 problems"):
        load_task(path, test=10)
    with pytest.raises(RestemError, match=r"task\.limit = -1"):
        load_task(path, limit=-1)


def test_two_problems_with_one_id_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", [{**row, "id": "same"} for row in rows(10)])
    with pytest.raises(RestemError, match='problems have the id "same"'):
        load_task(path, id="id")


def test_without_data_a_set_comes_from_the_hub_by_its_documented_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(hub_id: str, config: str, *, split: str) -> list[dict[str, str]]:
        asked.append((hub_id, config, split))
        start = 100 if split == "test" else 0
        worked = [{"question": r["question"], "answer": f"#### {r['answer']}"} for r in rows(20, start)]
        return (
            worked
            if "gsm8k" in hub_id
            else [{"problem": f"{config} {r['question']}", "solution": r"\boxed{1}"} for r in worked]
        )

    hub = types.ModuleType("datasets")
    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    hub.get_dataset_config_names = lambda hub_id: ["algebra", "geometry"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert len(load_task("gsm8k").test) == 20
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    asked.clear()
    assert len(load_task("math", options={"hub_id": "someone/math"}).test) == 40
    assert ("someone/math", "geometry", "test") in asked


def test_a_hub_that_cannot_be_reached_says_to_give_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(hub_id: str, config: str, *, split: str) -> list[dict[str, str]]:
        raise ConnectionError("offline")

    hub = types.ModuleType("datasets")
    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(RestemError, match=r"offline\n.*task\.data = FOLDER"):
        load_task("gsm8k")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r'pip install "restem\[datasets\]"'):
        load_task("gsm8k")


def test_an_installed_package_can_bring_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "plug-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[restem.tasks]\ntoy = plug:load\nbad = plug:nothing\nodd = plug:odd\n")
    (tmp_path / "plug.py").write_text(
        "from restem.tasks import Task\nfrom restem.prompts import Prompt\ndef load(*, limit, seed, **rest):\n   "
        " return Task(name=f'toy {limit} {seed}', train=(), val=(), test=(), prompt=Prompt(),"
        " verifier_spec='math')\ndef odd(**rest):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert {"toy", "arithmetic"} <= set(names())
    assert load_task("toy", limit=4, seed=2).name == "toy 4 2"
    with pytest.raises(RestemError, match=r'"bad".*cannot be loaded'):
        load_task("bad")
    with pytest.raises(RestemError, match=r'"odd".*returned a int'):
        load_task("odd")


def test_the_verifier_of_a_task_can_be_called() -> None:
    task = load_task("arithmetic", limit=1)
    problem = task.test[0]
    assert task.verifier(problem, f" The answer is {problem.reference}.").reward == 1
    assert task.verifier(problem, f" The answer is {int(problem.reference) + 1}.").reward == 0


@REAL
@pytest.mark.parametrize(
    ("name", "train", "val", "test"), [("gsm8k", 6973, 500, 1319), ("math", 6996, 500, 5000), ("math500", 0, 0, 500)]
)
def test_the_real_sets_are_whole_and_apart(name: str, train: int, val: int, test: int) -> None:
    task = load_task(name, data=os.environ["RESTEM_DATA"])
    assert [len(split) for split in (task.train, task.val, task.test)] == [train, val, test]
    assert_apart(task)


@REAL
def test_the_box_rule_gives_the_official_answers_of_math500() -> None:
    task = load_task("math500", data=os.environ["RESTEM_DATA"])
    assert all(last_box(problem.meta["solution"]) == problem.reference for problem in task.test)


@REAL
def test_a_limited_mathematics_test_sees_every_subject() -> None:
    task = load_task("math", data=os.environ["RESTEM_DATA"], limit=100)
    assert len({problem.meta["subject"] for problem in task.test}) == 7
