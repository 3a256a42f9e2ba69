"""Training on another run's samples: distillation, and one model solution against one human solution of the same problems."""

from __future__ import annotations

from pathlib import Path

import pytest

from restem import load_recipe
from restem.errors import RestemError
from restem.export import export_run
from restem.files import read_json, read_rows
from restem.sampling import Decoding, Owed
from restem.sampling.given import RunSolutions, read_last_samples
from restem.types import Problem, Sample
from test_human_baseline import task_with_solutions
from toy_runs import part_rows, result, run

ONE = "iterations=1"
SINGLE = "select.max_per_problem=1"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations with a verifier under which it solves some problems, and not others."""
    folder = tmp_path_factory.mktemp("teacher")
    return run(folder / "run", task=task_with_solutions(folder))


def examples(out: Path) -> list[tuple[str, int]]:
    return [(row["problem_id"], row["index"]) for row in read_rows(out / "iter-01" / "examples.parquet")]


def test_one_model_and_one_human_solution_of_the_same_problems_row_39(teacher: Path, tmp_path: Path) -> None:
    task = task_with_solutions(tmp_path)
    setting = f"generate.run={teacher}"
    model = run(tmp_path / "model", ONE, SINGLE, "generate.source=run", setting, task=task)
    human = run(tmp_path / "human", ONE, SINGLE, "generate.source=human", setting, task=task)
    of_model, of_human = ([problem for problem, _ in examples(out)] for out in (model, human))
    solved = {row["problem_id"] for row in part_rows(teacher / "iter-02" / "grades") if row["reward"] == 1}
    assert of_model == of_human and set(of_model) == solved, "the same problems"
    assert 0 < len(solved) < 12, "some problems are left out"
    assert len(of_model) == len(set(of_model)), "one solution each"
    texts = {(row["problem_id"], row["text"]) for row in part_rows(teacher / "iter-02" / "samples")}
    drawn = {(row["problem_id"], row["index"]): row["text"] for row in part_rows(model / "iter-01" / "samples")}
    assert all((problem, drawn[problem, index]) in texts for problem, index in examples(model))
    assert all(row["text"].startswith(" it is") for row in part_rows(human / "iter-01" / "samples"))


@pytest.mark.parametrize(("most", "limit"), [(10, 4), (1, 1)])
def test_a_student_is_trained_on_the_last_iteration_of_its_teacher_row_40(
    teacher: Path, tmp_path: Path, most: int, limit: int
) -> None:
    out = run(
        tmp_path / "student",
        ONE,
        f"select.max_per_problem={most}",
        "generate.source=run",
        f"generate.run={teacher}",
        task=task_with_solutions(tmp_path),
    )
    samples, teachers = (part_rows(folder / "samples") for folder in (out / "iter-01", teacher / "iter-02"))
    assert [(r["problem_id"], r["index"], r["text"]) for r in samples] == [
        (r["problem_id"], r["index"], r["text"]) for r in teachers
    ]
    kept = examples(out)
    assert max(sum(problem == name for problem, _ in kept) for name, _ in kept) <= limit
    start = read_json(out / "iter-01" / "improve" / "start.json")["fingerprint"]
    assert start == read_json(out / "run.json")["base_fingerprint"], "from the student's own base"


def test_it_is_resumed_like_any_other(teacher: Path, tmp_path: Path) -> None:
    settings = (ONE, "generate.source=run", f"generate.run={teacher}")
    out = run(tmp_path / "student", *settings, task=task_with_solutions(tmp_path))
    before = result(out)
    assert result(run(out, *settings, task=task_with_solutions(tmp_path), resume=True)) == before


def test_the_base_s_train_accuracy_is_its_own_and_not_the_teacher_s(teacher: Path, tmp_path: Path) -> None:
    out = run(tmp_path / "s", ONE, "generate.source=run", f"generate.run={teacher}", task=task_with_solutions(tmp_path))
    rows = part_rows(out / "iter-00" / "train" / "samples")
    assert len(rows) == 12 * 2, "drawn from the base, train_samples of each problem"


def test_the_cards_say_whose_solutions_they_are(teacher: Path, tmp_path: Path) -> None:
    for source, words in (("run", "sampled by another run (run)"), ("human", "the human solutions that come with")):
        settings = (ONE, f"generate.source={source}", f"generate.run={teacher}")
        out = run(tmp_path / source, *settings, task=task_with_solutions(tmp_path))
        assert result(out)["best_iteration"] == 1, "there is a data set to describe"
        export_run(out, tmp_path / f"{source}-export")
        data = (tmp_path / f"{source}-export" / "data" / "README.md").read_text(encoding="utf-8")
        model = (tmp_path / f"{source}-export" / "model" / "README.md").read_text(encoding="utf-8")
        assert words in data and "no human solution is among them" not in data
        assert "temperature 0.7" not in data.split("## Recipe")[0] and "at most 10 kept of each problem" in data
        assert "self-training" not in model and "self-generated" not in model


class Codes:
    """A tokenizer of characters, shifted: another one reads its ids as other text."""

    def __init__(self, shift: int) -> None:
        self.shift = shift

    end_id = 0

    def encode(self, problem: Problem) -> tuple[int, ...]:
        return ()

    def encode_completion(self, text: str) -> tuple[int, ...]:
        return tuple(ord(c) + self.shift for c in text)

    def decode(self, ids: tuple[int, ...]) -> str:
        return "".join(chr(i - self.shift) for i in ids)


def test_sampled_ids_are_kept_by_the_same_tokenizer_and_text_is_tokenised_anew_by_another(tmp_path: Path) -> None:
    task = task_with_solutions(tmp_path)
    name = task.train[0].id
    drawn = {name: [Sample(problem_id=name, index=0, token_ids=(104, 105), text="hi", finish="stop")]}
    for shift, ids in ((0, (104, 105)), (3, (107, 108))):
        given = RunSolutions(drawn, Codes(shift), "a teacher", task)
        (sample,) = given.sample(task.train, [Owed(name, 0)], Decoding(max_tokens=4), stream="s")
        assert (sample.token_ids, sample.text, sample.finish) == (ids, "hi", "stop")


def test_a_run_of_other_problems_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(RestemError, match="not one is of a training problem"):
        run(tmp_path / "out", ONE, "generate.source=run", f"generate.run={teacher}")
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RestemError, match="holds no run that has sampled"):
        read_last_samples(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["generate.source=run"], 'source = "run" needs generate.run'),
        (["generate.run=runs/x"], "this recipe samples its own model"),
    ],
)
def test_a_source_and_a_run_that_do_not_fit_are_refused(settings: list[str], words: str) -> None:
    with pytest.raises(RestemError, match=words) as caught:
        load_recipe("toy", settings)
    assert "temperature" not in str(caught.value), "the message is about the setting, not a print of the section"
