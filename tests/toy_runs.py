"""Runs of the toy model that take about a second, and ways to look at what they leave. Shared by the tests of the loop."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from restem import Recipe, Run, load_recipe, rest_em
from restem.files import read_json, read_rows
from restem.prompts import Prompt
from restem.tasks import Task
from restem.types import Problem

MINI = """
iterations = 2

[model]
base = "toy"

[task]
name = "arithmetic"
train = 12
val = 8
test = 20

[generate]
samples = 4
top_k = 0

[improve]
learning_rate = 0.5
epochs = 2
val_samples = 8

[evaluate]
k = [1, 4]
train_samples = 2

[engine]
shard_samples = 16
"""

VERIFIERS = '''
"""The toy says "Habit 3 says so. ..."; these grade which habit spoke, or nothing at all."""


def likes(problem, completion):
    return completion.startswith(f"Habit {problem.meta['likes']} ")


def ends(problem, completion):
    return completion.endswith(f"The answer is {problem.reference}.")


def never(problem, completion):
    return False


def always(problem, completion):
    return True


def fails(problem, completion):
    raise ValueError("a verifier that always fails")
'''


def recipe(*overrides: str) -> Recipe:
    return load_recipe(tomllib.loads(MINI), overrides)


def run(out: Path, *overrides: str, resume: bool = False, task: Task | None = None) -> Path:
    with Run(recipe(*overrides), out, resume=resume, quiet=True, task=task) as opened:
        rest_em(opened)
    return out


def write_recipe(folder: Path, text: str = MINI) -> Path:
    path = folder / "mini.toml"
    path.write_text(text)
    return path


def write_verifiers(folder: Path) -> Path:
    path = folder / "graders.py"
    path.write_text(VERIFIERS)
    return path


def task_that_likes(folder: Path, *, train: int, val: int) -> Task:
    """A task that rewards one habit on training problems and one on the others, so that a test can steer what is learnt."""
    splits = {"train": (12, train), "val": (8, val), "test": (8, val)}
    problems = {
        name: tuple(Problem(id=f"{name} {i}", question=f"{name} {i}?", reference="1", meta={"likes": habit}) for i in range(n))
        for name, (n, habit) in splits.items()
    }
    return Task(name="liking", prompt=Prompt(), verifier_spec=f"{write_verifiers(folder)}:likes", **problems)


def cli(*arguments: object, **keywords: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "restem.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **keywords)


def result(run: Path) -> dict[str, Any]:
    return dict(read_json(run / "result.json"))


def part_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of the parts of a folder such as iter-01/samples."""
    return [row for part in sorted(folder.glob("part-*.parquet")) for row in read_rows(part)]


def content(run: Path) -> dict[str, Any]:
    """Every file of a run by its path, without what tells when, where and how often it was started."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if name in ("lock", "log.txt", "report.html"):
            continue
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in line.items() if key != "time"} for line in lines]
        elif name in ("run.json", "result.json"):
            left_out = ("run", "base", "argv", "created", "commit")
            found[name] = {key: value for key, value in read_json(path).items() if key not in left_out}
        else:
            found[name] = path.read_bytes()
    return found
