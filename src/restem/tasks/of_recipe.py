"""The tasks that a recipe names: the run's own, and others that models are tested on."""

from __future__ import annotations

from dataclasses import replace

from restem.config import Recipe
from restem.errors import RestemError
from restem.tasks import Task, content_hash, load_task


def task_of(recipe: Recipe) -> Task:
    """Load the task that a recipe names."""
    t = recipe.task
    task = load_task(
        t.name,
        data=t.data,
        question=t.question,
        answer=t.answer,
        id=t.id,
        verifier=t.verifier,
        train=t.train,
        val=t.val,
        test=t.test,
        seed=recipe.seed,
        options=t.options,
    )
    if task.evaluation_only and recipe.iterations > 0:
        raise RestemError(
            f"{task.name} is to be evaluated on only, so nothing is trained on it: set iterations = 0, or name it in "
            "evaluate.tasks of a recipe that trains on another task."
        )
    for name, needed in (("train", recipe.iterations > 0), ("val", recipe.iterations > 0), ("test", True)):
        if needed and not getattr(task, name):
            raise RestemError(f"the task {task.name} has no {name} problems, and a run needs some.")
    return task


def more_tests(recipe: Recipe, task: Task) -> list[Task]:
    """The other tasks that models are tested on, without the problems that they share with training or D_val."""
    used = {content_hash(problem.question) for problem in (*task.train, *task.val)}
    found = []
    for name in recipe.evaluate.tasks:
        other = load_task(name, data=recipe.task.data, test=recipe.evaluate.limit, seed=recipe.seed)
        apart = tuple(problem for problem in other.test if content_hash(problem.question) not in used)
        if other.name == task.name or not apart:
            raise RestemError(f'evaluate.tasks names "{name}", which is the task itself or has no test problems of its own.')
        notes = list(other.notes)
        if len(apart) < len(other.test):
            notes.append(f"{other.name}: {len(other.test) - len(apart)} left out, also trained on")
        found.append(replace(other, train=(), val=(), test=apart, notes=tuple(notes)))
    return found
