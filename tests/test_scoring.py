"""`restem evaluate`: what was evaluated before is read, and anything that could change a score is evaluated anew."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from toy_runs import cli, write_verifiers


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "RESTEM_CACHE": str(tmp_path / "cache")}


def evaluate(environment: dict[str, str], *options: str) -> tuple[dict[str, Any], bool]:
    """The scores, and whether they were read."""
    done = cli("evaluate", "toy", "--task", "arithmetic", "--limit", "12", "--json", *options, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), "evaluated before" in done.stderr


def test_the_second_evaluation_is_read_and_says_so_and_fresh_samples_again(environment: dict[str, str]) -> None:
    first, was_read = evaluate(environment)
    assert not was_read
    assert evaluate(environment) == (first, True)
    again, was_read = evaluate(environment, "--fresh")
    assert again == first and not was_read


def test_what_could_change_a_score_is_evaluated_anew(environment: dict[str, str], tmp_path: Path) -> None:
    evaluate(environment)
    verifiers = write_verifiers(tmp_path)
    own = ("--set", f"task.verifier={verifiers}:ends")
    assert not evaluate(environment, "--set", "seed=1")[1]
    assert not evaluate(environment, "--set", "evaluate.k=[1, 4]")[1]
    assert not evaluate(environment, *own)[1]
    assert evaluate(environment, *own)[1]
    verifiers.write_text(verifiers.read_text().replace("The answer is", "The answer was"))
    assert not evaluate(environment, *own)[1], "its verifier has changed"
    assert evaluate(environment, "--set", "engine.grade_workers=2")[1], "this changes no score"


def test_an_evaluation_that_was_stopped_goes_on(environment: dict[str, str]) -> None:
    first, _ = evaluate(environment)
    (folder,) = (Path(environment["RESTEM_CACHE"]) / "evaluations").iterdir()
    (folder / "iter-00" / "eval" / "arithmetic" / "scores.json").unlink()
    shutil.rmtree(folder / "iter-00" / "eval" / "arithmetic" / "sampled")
    part = next(folder.glob("iter-00/eval/arithmetic/greedy/samples/part-*.parquet"))
    before = part.stat().st_mtime_ns
    assert evaluate(environment) == (first, False)
    assert part.stat().st_mtime_ns == before, "what was drawn is not drawn again"


def test_scores_as_markdown(environment: dict[str, str]) -> None:
    done = cli("evaluate", "toy", "--task", "arithmetic", "--limit", "12", "--markdown", env=environment)
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[:2] == ["| metric | value | n |", "| --- | --- | --- |"]
    assert rows[2].startswith("| pass@1 |") and {row.count("|") for row in rows} == {4}
