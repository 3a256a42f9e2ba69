"""BIG-Bench Hard (Suzgun et al. 2022, arXiv 2210.09261): 27 tasks of 146 to 250 questions, to test on only.

The paper on ReST^EM tests general capability with it, by direct and by chain-of-thought prompts with three exemplars. Each
sub-task is shown exemplars of its own: by default ours, chosen by the form of its answers; or the published ones, read from the
user's folder. What a newcomer would get wrong: the published figure is the mean over sub-tasks, and pass@1 over all problems is
not; `restem.evaluation.by_group(problems, samples, "subtask")` gives the parts. The authors ask that the set never be trained
on, and mark it with a canary text: restem refuses to train on it, keeps the canary with every run that tests on it, and never
shows it to a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from restem.errors import RestemError
from restem.prompts import Exemplar, Prompt
from restem.tasks.bbh_exemplars import WORKED
from restem.tasks.files import Columns, Row, columns_of, find_split, listing, problems_of, read_rows
from restem.tasks.hub import Source
from restem.tasks.splits import Sizes, closest, content_hash, divide, hash_order
from restem.tasks.task import Task

HUB_ID = "lukaemon/bbh"
"""The copy that the evaluation harness of EleutherAI loads: one configuration per sub-task."""

SUBTASKS = {
    "boolean_expressions": "true or false",
    "causal_judgement": "yes or no",
    "date_understanding": "choice",
    "disambiguation_qa": "choice",
    "dyck_languages": "brackets",
    "formal_fallacies": "validity",
    "geometric_shapes": "choice",
    "hyperbaton": "choice",
    "logical_deduction_five_objects": "choice",
    "logical_deduction_seven_objects": "choice",
    "logical_deduction_three_objects": "choice",
    "movie_recommendation": "choice",
    "multistep_arithmetic_two": "number",
    "navigate": "yes or no",
    "object_counting": "number",
    "penguins_in_a_table": "choice",
    "reasoning_about_colored_objects": "choice",
    "ruin_names": "choice",
    "salient_translation_error_detection": "choice",
    "snarks": "choice",
    "sports_understanding": "plausible",
    "temporal_sequences": "choice",
    "tracking_shuffled_objects_five_objects": "choice",
    "tracking_shuffled_objects_seven_objects": "choice",
    "tracking_shuffled_objects_three_objects": "choice",
    "web_of_lies": "yes or no",
    "word_sorting": "words",
}
"""The form in which each sub-task is answered; a key of the exemplars."""

_CHOICES = {"prompt": ("cot", "direct"), "exemplars": ("own", "published")}
_ENDING = re.compile(r"So the answer is (.+?)\.?\s*$")


def load(*, data: Path | None, sizes: Sizes, seed: int = 0, options: Mapping[str, Any] | None = None) -> Task:
    """Options: `subtask` (a name or a list; all), `prompt` ("cot" or "direct"), `exemplars` ("own" or "published"), `hub_id`.

    "cot" exemplars reason before they answer, "direct" ones only answer.
    """
    settings: dict[str, Any] = {"subtask": list(SUBTASKS), "prompt": "cot", "exemplars": "own", "hub_id": HUB_ID}
    settings |= options or {}
    names = _read(settings)
    notes: list[str] = []
    problems = []
    for name, (rows, where) in _rows(data, names, str(settings["hub_id"])).items():
        columns_of(rows, where, "input", "target")
        normal = [_normal(row, name, number) for number, row in enumerate(rows)]
        problems += problems_of(normal, Columns(id="id"), where, "test", notes)
    prompt = _prompt(names, settings["prompt"] == "cot", data if settings["exemplars"] == "published" else None, settings)
    hashes = {content_hash(exemplar.question) for exemplar in prompt.shown}
    apart = [problem for problem in problems if content_hash(problem.question) not in hashes]
    if len(apart) < len(problems):
        notes.append(f"test: {len(problems) - len(apart)} left out, shown as exemplars")
    splits = divide([], None, hash_order(apart, 0), sizes=sizes, seed=seed)
    if len(names) > 1:
        notes.append(f"{len(names)} sub-tasks: published figures are means over sub-tasks, scores here are over problems")
    return Task(
        name="bbh" if len(names) != 1 else f"bbh-{names[0]}",
        train=(),
        val=(),
        test=splits.test,
        prompt=prompt,
        verifier_spec="bbh",
        max_tokens=512 if settings["prompt"] == "cot" else 96,
        answer_style="answer-is",
        evaluation_only=True,
        notes=(*notes, *splits.notes, _canary(data)),
    )


def _read(settings: Mapping[str, Any]) -> list[str]:
    """Check the options; the names of the sub-tasks, each once."""
    for key in settings:
        if key not in ("subtask", "prompt", "exemplars", "hub_id"):
            raise RestemError(f'bbh has no option "{key}"{closest(key, ["subtask", "prompt", "exemplars", "hub_id"])}')
    for key, known in _CHOICES.items():
        if settings[key] not in known:
            raise RestemError(f'bbh: task.options.{key} is "{known[0]}" or "{known[1]}", not {settings[key]!r}.')
    wanted = settings["subtask"]
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(wanted, list | tuple) or not wanted:
        raise RestemError(f"bbh: task.options.subtask is a name or a list of names, not {wanted!r}. Leave it out for all.")
    for name in wanted:
        if name not in SUBTASKS:
            raise RestemError(f'bbh has no sub-task "{name}"{closest(str(name), SUBTASKS)}')
    return list(dict.fromkeys(wanted))


def _rows(data: Path | None, names: Sequence[str], hub_id: str) -> dict[str, tuple[list[Row], str]]:
    """The rows of each sub-task and where they are: in one file with all of them, or in files of their own, as published."""
    if data is None:
        sources = {name: Source(name="bbh", data=None, hub_id=hub_id, configs=(name,)) for name in names}
        return {name: (source.rows("test"), f"{name} of {hub_id}") for name, source in sources.items()}
    for folder in (data / "bbh", data):
        if file := find_split(folder, "bbh"):
            rows = read_rows(file)
            return {name: ([row for row in rows if row.get("task") == name], f"{name} in {file}") for name in names}
        files = {name: file for name in names if (file := find_split(folder, name))}
        if len(files) == len(names):
            return {name: (read_rows(file), str(file)) for name, file in files.items()}
    raise RestemError(
        f"no problems of bbh in {data}: looked for bbh/bbh.jsonl.gz and bbh/{names[0]}.json; it holds {listing(data)}.\n"
        "Set task.data to a folder that has them: a checkout of github.com/suzgunmirac/BIG-Bench-Hard is one."
    )


def _normal(row: Row, name: str, number: int) -> Row:
    return {
        "question": row.get("input"),
        "answer": row.get("target"),
        "id": f"bbh/{name}/{number}",
        "subtask": name,
        "form": SUBTASKS[name],
    }


def _prompt(names: Sequence[str], reasons: bool, published: Path | None, settings: Mapping[str, Any]) -> Prompt:
    """One prompt, or a variant for each sub-task where they differ."""
    if settings["exemplars"] == "published" and published is None:
        raise RestemError(
            'bbh: exemplars = "published" needs task.data, a folder with bbh/cot_prompts.jsonl.gz or cot-prompts/NAME.txt.\n'
            "A checkout of github.com/suzgunmirac/BIG-Bench-Hard is one."
        )
    prompts = {name: _published(published, name, reasons) if published else _own(SUBTASKS[name], reasons) for name in names}
    first = prompts[names[0]]
    if all(prompt == first for prompt in prompts.values()):
        return first
    return Prompt(question_label="Q:", answer_label="A:", variants=prompts)


def _own(form: str, reasons: bool) -> Prompt:
    exemplars = tuple(
        Exemplar(question=w.question, solution=f"{w.thought} So the answer is {w.answer}." if reasons else w.answer)
        for w in WORKED[form]
    )
    return Prompt(exemplars=exemplars, question_label="Q:", answer_label="A:")


def _published(data: Path, name: str, reasons: bool) -> Prompt:
    r"""The published prompt of a sub-task, without its canary.

    Its answers begin with "Let's think step by step.", which is left to the model to write: three exemplars teach it.
    """
    text = _published_text(data, name)
    about, *blocks = text.rpartition("-----\n")[2].strip().split("\n\nQ: ")
    exemplars = []
    for block in blocks or [about]:
        question, mark, solution = block.partition("\nA: ")
        ending = _ENDING.search(solution)
        if not blocks or not mark or ending is None:
            raise RestemError(
                f'the published prompt of {name} in {data} is not what it should be: "Q: ...", "A: ... So the answer is ...".\n'
                f"It has: {block[:80]!r}. Take the file again from its source, or set exemplars = 'own'."
            )
        exemplars.append(Exemplar(question=question, solution=solution.strip() if reasons else ending[1]))
    return Prompt(instruction=about.strip(), exemplars=tuple(exemplars), question_label="Q:", answer_label="A:")


def _published_text(data: Path, name: str) -> str:
    for folder in (data / "bbh", data):
        if file := find_split(folder, "cot_prompts"):
            for row in read_rows(file):
                if row.get("task") == name:
                    return str(row.get("prompt") or "")
    for folder in (data / "cot-prompts", data.parent / "cot-prompts"):
        if (folder / f"{name}.txt").is_file():
            return (folder / f"{name}.txt").read_text(encoding="utf-8")
    raise RestemError(
        f"no published prompt of {name} in {data}: looked for bbh/cot_prompts.jsonl.gz and cot-prompts/{name}.txt.\n"
        'Set task.data to a folder that has it, or exemplars = "own".'
    )


def _canary(data: Path | None) -> str:
    """The note that stays with whatever holds these problems; the canary itself is the data's own."""
    asks = "these problems must never be trained on"
    for folder in (data / "bbh", data) if data else ():
        if (folder / "CANARY.txt").is_file():
            return f"{asks}: {(folder / 'CANARY.txt').read_text(encoding='utf-8').strip()}"
    return asks
