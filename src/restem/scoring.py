"""A model's scores on one task's test problems: drawn, computed, and kept so that asking again costs nothing.

Within a run the same weights are scored once. `restem evaluate` is a run of 0 iterations in a folder of its own: in the user's
cache, under a hash of all that its scores depend on (settings, weights, problems, a verifier's file, restem's version), or
where the user says. One that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from restem import __version__, evaluation, toy
from restem.candidate import Candidate, relative
from restem.config import Recipe, flatten
from restem.files import finish_directory, read_json, write_json
from restem.rundir import FREE_TO_CHANGE, problem_digests
from restem.sampling import Decoding
from restem.stages import Stages
from restem.tasks import Task
from restem.tasks.of_recipe import task_of


def score_on_test(stages: Stages, run: Path, policy: Candidate, iteration: int, task: Task) -> dict[str, Any]:
    """The content of scores.json after an iteration of a run; samples what is not known yet."""
    folder = run / f"iter-{iteration:02d}" / "eval" / task.name
    if not (folder / "scores.json").is_file():
        known = _of_the_same_weights(run, policy, task)
        if known is None:
            write_json(folder / "scores.json", _scores(stages, run, policy, iteration, task, folder))
        else:
            with finish_directory(folder) as temporary:
                shutil.copytree(known, temporary, dirs_exist_ok=True)
    return dict(read_json(folder / "scores.json"))


def _scores(stages: Stages, run: Path, policy: Candidate, iteration: int, task: Task, folder: Path) -> dict[str, Any]:
    settings = stages.recipe.evaluate
    own = stages.decoding if task is stages.task else Decoding(max_tokens=task.max_tokens, stop=task.prompt.stop)
    decoding = {"greedy": evaluation.greedy(own), "sampled": evaluation.sampled(own, settings)}
    problems = {"greedy": task.test, "sampled": task.test[: settings.problems]}
    count = {"greedy": 1, "sampled": evaluation.samples_for(settings)}
    drawn = {
        how: stages.draw(
            f"iteration {iteration}: {'test' if task is stages.task else task.name}, {how}",
            folder / how,
            policy,
            problems[how],
            count[how],
            decoding[how],
            stream=f"test {task.name} {how}",
            task=task,
        )
        for how in decoding
    }
    scores = evaluation.score(
        model=relative(run, policy.model),
        task=task.name,
        split="test",
        greedy_samples=drawn["greedy"],
        sampled_samples=drawn["sampled"],
        decoding=decoding,
        ks=settings.k,
        majority=settings.majority,
        canonical=evaluation.canonical_of(task.verifier_spec),
        problems=task.test,
    )
    return {**scores, "fingerprint": policy.fingerprint}


def _of_the_same_weights(run: Path, policy: Candidate, task: Task) -> Path | None:
    for file in sorted(run.glob(f"iter-*/eval/{task.name}/scores.json")):
        if read_json(file)["fingerprint"] == policy.fingerprint:
            return file.parent
    return None


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
