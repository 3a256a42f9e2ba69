"""Tasks: problems in three splits, the prompt that asks them and the verifier that grades the answers.

`load_task` is the one way in. What is in which split never depends on a limit: a smaller run sees the first part of a
larger one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from restem.errors import RestemError
from restem.tasks import files
from restem.tasks.splits import Sizes, closest, content_hash
from restem.tasks.task import Task

__all__ = ["Task", "content_hash", "load_task", "names"]

BUILT_IN = ("apps", "arithmetic", "bbh", "gsm8k", "humaneval", "hungarian", "math", "math500", "mbpp")
PARTS = {"bbh": "subtask", "reasoning-gym": "dataset"}
"""Tasks of many parts: "NAME:PART" sets this option."""
GROUP = "restem.tasks"
"""The entry point group of other packages' tasks: functions with the keywords of `load_task` that return a Task."""


def load_task(
    name_or_path: str | Path,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    question: str = "question",
    answer: str = "answer",
    id: str | None = None,
    verifier: str | None = None,
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Task:
    """Load a task by name, or the user's own problems from a file or a folder with train, val and test files.
    "bbh:NAME" is one sub-task, "reasoning-gym:NAME" one of that library's data sets.

    `data`: a folder with one folder per set, for named sets (default: the Hugging Face hub). `limit` cuts each split to
    its first n; `train`, `val` and `test` are sizes of one split. Where the data has no validation split, `val`
    problems (500, or a fifth of a small set) are held out of training by the hash of content and `seed`; a single file
    is divided 80/10/10. `question`, `answer`, `id`: columns of the user's own data. `options`: what else the task can
    be told.
    """
    name = str(name_or_path)
    folder = None if data is None else Path(data).expanduser()
    sizes = Sizes(limit=limit, train=train, val=val, test=test)
    family, colon, part = name.partition(":")
    if name in BUILT_IN or family in PARTS:
        _refuse(name, {"question": question != "question", "answer": answer != "answer", "id": id is not None})
        options = {**(options or {}), **_part(family, part, options or {})} if colon else options
        task = _built_in(family)(data=folder, sizes=sizes, seed=seed, options=options)
        if task.evaluation_only and (train or val):
            raise RestemError(
                f"{task.name} is to be evaluated on only: it has no training and no D_val problems.\n"
                "Remove task.train and task.val, and evaluate with: restem evaluate MODEL --task NAME"
            )
        return task if verifier is None else replace(task, verifier_spec=verifier)
    if name in (plugins := _plugins()):
        return _from_plugin(
            plugins[name],
            {"data": folder, "limit": limit, "question": question, "answer": answer, "id": id, "verifier": verifier}
            | {"train": train, "val": val, "test": test, "seed": seed, "options": options},
        )
    _refuse(name, {"data": data is not None, "options": bool(options)})
    columns = files.Columns(question=question, reference=answer, id=id)
    return files.load(_own_path(name), columns=columns, sizes=sizes, seed=seed, verifier=verifier)


def names() -> list[str]:
    """List the tasks that have a name: the built-in ones, then those of installed packages."""
    return [*BUILT_IN, "reasoning-gym:NAME", *sorted(name for name in _plugins() if name not in BUILT_IN)]


def _built_in(name: str) -> Callable[..., Task]:
    module = importlib.import_module(f"restem.tasks.{'math' if name == 'math500' else name.replace('-', '_')}")
    load: Callable[..., Task] = module.load_500 if name == "math500" else module.load
    return load


def _part(family: str, part: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The option that a name such as "bbh:navigate" sets."""
    if not part:
        raise RestemError(f'"{family}:" names no part of {family}.\nWrite it as {family}:NAME.')
    if PARTS[family] in options:
        raise RestemError(f'task.options.{PARTS[family]} and the part "{part}" of the name say the same.\nRemove one of them.')
    return {PARTS[family]: part}


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _from_plugin(point: EntryPoint, keywords: Mapping[str, Any]) -> Task:
    try:
        load = point.load()
    except (ImportError, AttributeError) as error:
        raise RestemError(
            f'the task "{point.name}" of an installed package cannot be loaded from {point.value}: {error}.\n'
            "Mend or remove that package."
        ) from error
    task = load(**keywords)
    if not isinstance(task, Task):
        raise RestemError(f'the task "{point.name}" ({point.value}) returned a {type(task).__name__}, not a restem.tasks.Task.')
    return task


def _own_path(name: str) -> Path:
    """Tell a misspelt task from a missing file."""
    path = Path(name).expanduser()
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    raise RestemError(
        f'there is no task and no file "{name}"{closest(name, names())}\n'
        f"For problems of your own give a path that ends in one of {', '.join(files.KINDS)}, or a folder of such files."
    )


def _refuse(name: str, given: Mapping[str, bool]) -> None:
    """Refuse settings that would be ignored: named sets know their columns; own files have no folder or options."""
    for setting, is_given in given.items():
        if is_given:
            other = "" if setting in ("data", "options") else ", or give the path of the file in place of the name"
            raise RestemError(f"task.{setting} does not apply to {name}.\nRemove it{other}.")
