"""restem export: what it copies, what it says of it, and what it refuses."""

import shutil
from pathlib import Path

import pytest

import toy_runs
from restem.errors import RestemError
from restem.estep import read_stage
from restem.export import export_run
from restem.files import read_json, read_rows, write_json
from restem.rundir import read_problems
from restem.toy import fingerprint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = ("iterations=1", "improve.learning_rate=0.9", "improve.epochs=1", "improve.val_samples=16")
    return toy_runs.run(tmp_path_factory.mktemp("export") / "run", *changes)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run to change."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_the_exported_model_is_the_accepted_one(run: Path, tmp_path: Path):
    text = export_run(run, tmp_path / "out")
    accepted = read_json(run / "result.json")["accepted"]
    assert accepted["iteration"] == 1
    assert fingerprint(str(tmp_path / "out" / "model")) == accepted["fingerprint"]
    assert str(tmp_path / "out" / "model") in text and "iteration 1" in text


def test_every_exported_row_is_a_correct_sample_of_its_problem(run: Path, tmp_path: Path):
    export_run(run, tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "data" / "train.parquet")
    samples = {(s.problem_id, s.index): s for s in read_stage(run / "iter-01")}
    questions = {p.id: p.question for p in read_problems(run / "problems" / "train.parquet")}
    examples = {(e["problem_id"], e["index"]): e for e in read_rows(run / "iter-01" / "examples.parquet")}
    assert rows and {(r["problem_id"], r["index"]) for r in rows} == examples.keys()
    for row in rows:
        key = (row["problem_id"], row["index"])
        sample, example = samples[key], examples[key]
        assert (row["completion"], row["reward"], row["answer"]) == (sample.text, 1.0, sample.answer)
        assert row["question"] == questions[sample.problem_id] and row["logprob"] == sample.logprob
        assert row["completion_ids"] == example["completion_ids"] and row["completion_ids"][:-1] == list(sample.token_ids)
        assert row["prompt_ids"] == example["prompt_ids"] and row["weight"] == example["weight"]


def test_the_cards_name_base_scores_warnings_and_origin(run: Path, tmp_path: Path):
    export_run(run, tmp_path / "out")
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    result, facts = read_json(run / "result.json"), read_json(run / "run.json")
    assert card.startswith('---\nbase_model: "toy"\n')
    assert "pass@1" in card and "pass@4" in card and "n = 20" in card and "seed 0" in card
    assert result["accepted"]["fingerprint"] in card and facts["base_fingerprint"] in card
    assert "self-generated and verifier-filtered" in card
    assert all(warning in card for warning in result["warnings"])
    data = (tmp_path / "out" / "data" / "README.md").read_text(encoding="utf-8")
    counts = read_json(run / "iter-01" / "selection.json")["counts"]
    assert "temperature 0.7" in data and "4 samples of each problem" in data and "verifier" in data
    assert all(f"| {name} | {count} |" in data for name, count in counts.items()) and "| all | 48 |" in data


def test_a_license_is_taken_from_the_bases_own_card(copy: Path, tmp_path: Path):
    facts, base = read_json(copy / "run.json"), copy / "toy-base"
    facts["base"] = facts["recipe"]["model"]["base"] = str(base)
    write_json(copy / "run.json", facts)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# toy\n", encoding="utf-8")
    export_run(copy, tmp_path / "out")
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert "\nlicense: apache-2.0\n" in card and 'base_model: "toy-base"' in card
    assert str(tmp_path) not in card.split("## Recipe")[0], "a path of this machine is nobody else's business"


def test_a_directory_that_holds_something_is_refused_and_untouched(run: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RestemError, match="is not empty, and nothing is overwritten"):
        export_run(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(RestemError, match="is a file"):
        export_run(run, tmp_path / "mine.txt")


def test_an_empty_directory_is_accepted(run: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    export_run(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "model"]


def test_an_unfinished_run_is_refused_with_the_command_that_finishes_it(copy: Path, tmp_path: Path):
    (copy / "result.json").unlink()
    (copy / "iter-01" / "iteration.json").unlink()
    with pytest.raises(RestemError, match=r"not finished \(0 of 1 iterations\).*--resume"):
        export_run(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_deleted_is_named(copy: Path, tmp_path: Path):
    shutil.rmtree(copy / "iter-01" / "model")
    with pytest.raises(RestemError, match=r"model of .* is gone"):
        export_run(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(RestemError, match="holds no run"):
        export_run(tmp_path, tmp_path / "out")


def test_where_the_base_was_accepted_the_export_says_so_and_holds_no_data(tmp_path: Path):
    run = toy_runs.run(tmp_path / "run", "iterations=0")
    text = export_run(run, tmp_path / "out")
    assert "the base, unchanged" in text and "none" in text
    assert not (tmp_path / "out" / "data").exists()
    assert fingerprint(str(tmp_path / "out" / "model")) == read_json(run / "run.json")["base_fingerprint"]
    assert "unchanged" in (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
