"""What scripts outside the project may use: names, commands, flags, recipes and the JSON they print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import restem
from restem import load_recipe
from restem.cli import app
from restem.config import describe_fields, recipe_files
from restem.errors import RestemError
from toy_runs import cli, write_recipe, write_verifiers


def loaded_by(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after some code."""
    heavy = ("torch", "transformers", "pyarrow", "scipy", "sympy", "pydantic", "duckdb", "rich", "numpy")
    program = f"import sys; {code}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.replace("'", '"')))


def test_importing_restem_loads_no_torch() -> None:
    assert loaded_by("import restem") == set()
    assert "torch" not in loaded_by("import restem; restem.rest_em, restem.Run, restem.load_task, restem.sampling")
    assert "torch" not in loaded_by("import restem.cli, restem.show, restem.report, restem.preflight")


def test_the_documented_names_exist() -> None:
    for name in ("rest_em", "Problem", "Sample", "Grade", "Example", "load_task", "Task", "Recipe", "load_recipe", "Run"):
        assert getattr(restem, name) is not None
    for name in ("pass_at_k", "majority_at_k", "interval", "paired_test"):
        assert callable(getattr(restem.statistics, name))
    import restem.verifiers.math as math_verifier

    assert math_verifier.equivalent("1/2", "0.5") is True
    assert math_verifier.extract("so \\boxed{7}", style="auto") == "7"
    assert math_verifier.verify(restem.Problem(id="p", question="?", reference="7"), "The answer is 7.").reward == 1
    assert callable(restem.sampling.TreeSampler) and callable(restem.training.TreeTrainer)
    task = restem.load_task("arithmetic", limit=2)
    assert [len(split) for split in (task.train, task.val, task.test)] == [2, 2, 2]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = restem.nothing


def test_the_documented_commands_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {"run", "evaluate", "check", "report", "compare", "export", "list", "doctor"} <= set(commands)


def test_run_grows_no_flag_since_every_setting_is_a_key_of_the_recipe() -> None:
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    flags = {flag for parameter in command.params for flag in parameter.opts if flag.startswith("-")}
    assert flags == {"--out", "--set", "--resume", "--dry-run", "--json"}


def test_every_recipe_that_is_shipped_can_be_read_and_opens_with_what_it_is() -> None:
    assert {"toy", "arithmetic"} <= set(recipe_files())
    for path in recipe_files().values():
        load_recipe(path)
        assert path.read_text(encoding="utf-8").startswith("# ")


def test_an_unknown_key_is_an_error_in_every_section() -> None:
    sections = {key.rpartition(".")[0] for key in describe_fields()}
    assert sections >= {"", "model", "task", "prompt", "generate", "select", "improve", "evaluate", "engine"}
    for section in sections:
        with pytest.raises(RestemError, match="no such key"):
            load_recipe({}, [f"{section}.nonsense=1".lstrip(".")])


def test_every_key_says_what_it_is() -> None:
    assert [key for key, text in describe_fields().items() if len(text) < 10] == []


def test_json_is_one_line_with_the_documented_keys(tmp_path: Path) -> None:
    quick = ("--set", f"task.verifier={write_verifiers(tmp_path)}:ends", "--set", "iterations=1")
    done = cli("run", write_recipe(tmp_path), *quick, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert {"run", "iterations", "best_iteration", "paired"} <= set(result)
    assert [row["iteration"] for row in result["iterations"]] == [0, 1]
    for row in result["iterations"]:
        assert {"iteration", "kept", "coverage", "train", "val", "test"} <= set(row)
        scores = row["test"]["arithmetic"]
        assert {"model", "task", "split", "n", "decoding", "metrics", "counts"} <= set(scores)
        assert {"value", "low", "high", "n"} == set(scores["metrics"]["pass@1"])
        assert sum(scores["counts"].values()) == scores["n"] == 20
    assert {"difference", "low", "high", "n", "p_value"} <= set(result["paired"])


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path: Path) -> None:
    done = cli("run", write_recipe(tmp_path), "--out", tmp_path / "run", "--dry-run")
    assert done.returncode == 0
    assert "12 train, 8 D_val, 20 test" in done.stdout and "12 x 4 = 48 samples" in done.stdout
    assert not (tmp_path / "run").exists()
