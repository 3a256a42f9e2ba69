"""`restem evaluate`: one model's scores on one task's test problems, kept by content so that asking again costs nothing.

An evaluation is a run of 0 iterations in a folder of its own: in the user's cache, under a hash of all that its scores depend
on (settings, weights, problems, a verifier's file, restem's version), or where the user says. One that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from restem import __version__, toy
from restem.config import Recipe, flatten
from restem.files import read_json
from restem.rundir import FREE_TO_CHANGE, problem_digests
from restem.tasks import Task
from restem.tasks.of_recipe import task_of


def evaluate_model(
    recipe: Recipe, *, out: Path | None = None, fresh: bool = False, command: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """The content of scores.json for a recipe's model and task. `out`: None = in the cache. `fresh`: sample again."""
    from restem.run import Run

    task = task_of(recipe)
    folder = out or cached(recipe, task)
    if fresh and out is None:
        shutil.rmtree(folder, ignore_errors=True)
    scores = folder / "iter-00" / "eval" / task.name / "scores.json"
    if out is None and scores.is_file():
        say(f"evaluated before, with these weights, problems and settings: read from {folder} (--fresh samples again)")
        return dict(read_json(scores))
    with Run(recipe, folder, resume=True, command=command, task=task) as opened:
        opened.test(opened.unmeasured(opened.base), 0)
    say(f"samples and grades: {scores.parent}")
    return dict(read_json(scores))


def cached(recipe: Recipe, task: Task) -> Path:
    """The folder of an evaluation in the user's cache, named by a hash of all that the scores depend on."""
    from restem.embedded import cache_dir

    settings = {key: value for key, value in flatten(recipe).items() if key not in FREE_TO_CHANGE}
    files = [recipe.task.verifier, task.verifier_spec, recipe.prompt.exemplars]
    parts = [settings, _weights(recipe), problem_digests([task]), repr(task.prompt), [_content(f) for f in files], __version__]
    name = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=10).hexdigest()
    return cache_dir() / "evaluations" / f"{task.name.replace('/', '-').replace(':', '-')}-{name}"


def _weights(recipe: Recipe) -> str:
    base = recipe.model.base
    if base.partition(":")[0] == "toy":
        return base
    if (Path(base) / "toy.json").is_file():
        return toy.fingerprint(base)
    from restem import models

    return models.fingerprint(models.locate(base))


def _content(file: str | None) -> str:
    """A hash of a file that a setting names, "file.py:function" included; "" if it names none."""
    path = Path((file or "").rpartition(":")[0] or file or "")
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest() if path.is_file() else ""
