"""The well-known few-shot prompts, read from an installed lm-eval (`prompt.source = "lm-eval"`); restem holds none of them.

GSM8K: the eight of its `gsm8k_cot` (Wei et al. 2022, arXiv 2201.11903). BIG-Bench Hard: the three of each sub-task in its
`bbh_cot_fewshot` (Suzgun et al. 2022, arXiv 2210.09261). MATH: the four of its `minerva_math` (Lewkowycz et al. 2022, arXiv
2206.14858), all of which are training problems of MATH.

Files of the package are read; nothing of it is imported, since it would load torch and data-set libraries. What a newcomer
would get wrong: a prompt is lm-eval's to the letter, and so are the texts that end a completion, but the longest completion
stays the task's own (lm-eval's: 256 tokens, for BBH 1,024).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restem.errors import MissingExtra, RestemError
from restem.prompts import Exemplar, Frame, Prompt
from restem.tasks.task import Task

TASKS = ("gsm8k", "bbh", "math", "math500")
"""The tasks whose exemplars are read."""

_BLANK_LINE = "\n\n"
_TEMPLATE = re.compile(r"([^{}]*)\{\{\s*(\w+)\s*\}\}([^{}]*)")
"""A template with one column in it: "Q: {{question}}"."""


def lm_eval_prompt(task: Task, package: Path | None = None) -> Prompt:
    """The prompt that lm-eval puts the problems of a task with. `package`: the folder of lm_eval; None = the installed one.

    Raises MissingExtra without lm-eval, and RestemError for a task whose exemplars are not read from it, or for files that are
    not written as restem knows them.
    """
    family = "bbh" if task.name.startswith("bbh-") else task.name
    if family not in TASKS:
        raise RestemError(
            f'prompt.source = "lm-eval": there are exemplars for {", ".join(TASKS)}, and none for {task.name}.\n'
            "Remove prompt.source, or give exemplars in a file with prompt.exemplars."
        )
    folder = (_installed() if package is None else package) / "tasks"
    if family == "gsm8k":
        return _from_config(folder / "gsm8k" / "gsm8k-cot.yaml")
    if family == "bbh":
        return _of_subtasks(task, folder / "bbh" / "cot_fewshot")
    return _minerva(folder / "minerva_math" / "utils.py")


def _installed() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("lm-eval", "lm-eval", 'prompt.source = "lm-eval"')
    return Path(next(iter(spec.submodule_search_locations)))


def _of_subtasks(task: Task, folder: Path) -> Prompt:
    names = dict.fromkeys(str(problem.meta.get("subtask")) for problem in task.test)
    prompts = {name: _from_config(folder / f"{name}.yaml") for name in names}
    first = next(iter(prompts.values()))
    return first if len(prompts) == 1 else Prompt(frame=first.frame, ends=first.ends, variants=prompts)


def _from_config(file: Path) -> Prompt:
    """The prompt of a task's YAML file: the template of a question, and the exemplars that fill it."""
    config = _read_config(file)
    template = _TEMPLATE.fullmatch(str(config.get("doc_to_text")))
    about = str(config.get("description") or "")
    if template is None or config.get("fewshot_delimiter", _BLANK_LINE) != _BLANK_LINE:
        raise _unreadable(file, "its template is not one column with text around it, and a blank line between questions")
    if about and about != about.strip() + _BLANK_LINE:
        raise _unreadable(file, "its description does not end in a blank line")
    before, column, after = template.groups()
    try:
        rows = config["fewshot_config"]["samples"][: config["num_fewshot"]]
        ends = tuple(str(end) for end in config["generation_kwargs"]["until"])
    except (KeyError, TypeError) as error:
        raise _unreadable(file, f"there is no {error}") from None
    return Prompt(
        instruction=about.strip(),
        exemplars=tuple(_exemplar(row, column, "target", file) for row in rows),
        frame=Frame(before, after, str(config.get("target_delimiter", " "))),
        ends=ends,
    )


def _minerva(file: Path) -> Prompt:
    """The prompt of `minerva_math`. Its form is code, repeated here; its exemplars are what a function returns as a literal."""
    functions = {node.name: node for node in _parsed(file).body if isinstance(node, ast.FunctionDef)}
    last = functions["list_fewshot_samples"].body[-1] if "list_fewshot_samples" in functions else None
    if not isinstance(last, ast.Return) or last.value is None:
        raise _unreadable(file, "no function list_fewshot_samples returns its exemplars")
    try:
        rows = ast.literal_eval(last.value)
    except ValueError as error:
        raise _unreadable(file, f"its exemplars are not literals ({error})") from None
    return Prompt(
        exemplars=tuple(_exemplar(row, "problem", "solution", file) for row in rows),
        frame=Frame("Problem:\n", "\n\nSolution:", " "),
        ends=("Problem:",),
    )


def _exemplar(row: Any, question: str, solution: str, file: Path) -> Exemplar:
    for key in (question, solution):
        if not isinstance(row, Mapping) or not isinstance(row.get(key), str):
            raise _unreadable(file, f'an exemplar has no text under "{key}"')
    return Exemplar(question=row[question], solution=row[solution])


def _read_config(file: Path) -> dict[str, Any]:
    """A YAML file with the one that it includes; its own keys win."""
    yaml = importlib.import_module("yaml")  # lm-eval needs it too
    try:
        config = yaml.safe_load(_text(file))
    except yaml.YAMLError as error:
        raise _unreadable(file, str(error)) from None
    if not isinstance(config, dict):
        raise _unreadable(file, "it holds no keys")
    include = config.pop("include", None)
    return config if include is None else {**_read_config(file.parent / str(include)), **config}


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(_text(file))
    except SyntaxError as error:
        raise _unreadable(file, str(error)) from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, str(error)) from None


def _unreadable(file: Path, why: str) -> RestemError:
    return RestemError(
        f"no prompt can be read from {file}, as it is written in lm-eval 0.4.13: {why}.\n"
        "Install that version, or give exemplars in a file with prompt.exemplars."
    )
