"""The tasks that a recipe names: the run's own, and others that models are tested on."""

from __future__ import annotations

from dataclasses import replace

from restem.config import PromptConfig, Recipe
from restem.errors import RestemError
from restem.prompts import Prompt, load_exemplars
from restem.tasks import Task, content_hash, load_task
from restem.tasks.lm_eval_prompts import lm_eval_prompt
from restem.types import Problem


def task_of(recipe: Recipe) -> Task:
    """Load the task that a recipe names, with the prompt that the recipe wants, and without the problems which that shows."""
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
    task = _without_exemplars(replace(task, prompt=prompt_of(recipe, task)))
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


def prompt_of(recipe: Recipe, task: Task) -> Prompt:
    """The task's prompt, or lm-eval's for the task, with the recipe's changes."""
    if recipe.prompt.source == "task":
        return _changed(task.prompt, recipe.prompt)
    if recipe.prompt.exemplars is not None:
        raise RestemError(
            'prompt.source = "lm-eval" and prompt.exemplars both say which exemplars to show.\nRemove one of them.'
        )
    return _changed(lm_eval_prompt(task), recipe.prompt)


def _changed(prompt: Prompt, settings: PromptConfig) -> Prompt:
    if settings.exemplars is not None:  # one file for all sub-tasks
        prompt = replace(prompt, exemplars=load_exemplars(settings.exemplars), variants={})
    if settings.shots is not None and not prompt.variants:
        if settings.shots > len(prompt.exemplars):
            raise RestemError(
                f"prompt.shots = {settings.shots}, but there are only {len(prompt.exemplars)} exemplars. "
                "Lower it, or give more in a file with prompt.exemplars."
            )
        prompt = replace(prompt, exemplars=prompt.exemplars[: settings.shots])
    if settings.style != "auto":
        prompt = replace(prompt, style=settings.style)
    if settings.instruction is not None:
        prompt = replace(prompt, instruction=settings.instruction)
    return replace(prompt, variants={name: _changed(variant, settings) for name, variant in prompt.variants.items()})


def _without_exemplars(task: Task) -> Task:
    """Leave out of every split the problems that the prompt shows worked out."""
    shown = {content_hash(exemplar.question) for exemplar in task.prompt.shown}
    splits: dict[str, tuple[Problem, ...]] = {"train": task.train, "val": task.val, "test": task.test}
    kept = {name: tuple(p for p in problems if content_hash(p.question) not in shown) for name, problems in splits.items()}
    left_out = {name: len(problems) - len(kept[name]) for name, problems in splits.items()}
    notes = tuple(f"{name}: {count} left out, shown in the prompt" for name, count in left_out.items() if count)
    if not notes:
        return task
    return replace(task, train=kept["train"], val=kept["val"], test=kept["test"], notes=(*task.notes, *notes))
