"""What a model sees of one problem: the rendered prompt token by token, and what ends a completion (`restem show-prompt`).

The prompt comes from the `Renderer` that sampling and training use; nothing is rendered here. What a newcomer would get wrong:
few-shot prompts end without a blank, and a chat template adds turns and special tokens that the task's text does not show.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from restem.config import load_recipe
from restem.errors import RestemError
from restem.prompts import Renderer
from restem.show_mask import Mark, fold, print_lines, visible
from restem.tasks import Task
from restem.tasks.splits import closest
from restem.tree import shared_length
from restem.types import Problem

SHARED = Mark("|", "dim", "shared by all prompts of the split: computed once")
OWN = Mark(">", "bold", "this problem's own")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptView:
    """One rendered prompt. Its texts may hold anything: print them through `restem.show_mask.visible`."""

    task: str
    model: str
    split: str
    index: int
    """0-based, in the split."""
    problems: int
    """How many the split has."""
    problem: Problem
    style: str
    token_ids: tuple[int, ...]
    shared: int
    """How many tokens from the start all prompts of the split have in common."""
    stop: tuple[str, ...]
    """Texts that end a completion, besides the end token."""
    end_id: int
    decode: Callable[[Sequence[int]], str]
    """Token ids as text, special tokens spelled out."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, ready for JSON."""
        return {
            "task": self.task,
            "model": self.model,
            "split": self.split,
            "index": self.index,
            "problems": self.problems,
            "id": self.problem.id,
            "style": self.style,
            "text": self.decode(self.token_ids),
            "token_ids": list(self.token_ids),
            "tokens": {
                "total": len(self.token_ids),
                "shared": self.shared,
                "question": len(self.token_ids) - self.shared,
            },
            "stop": list(self.stop),
            "end_token": {"id": self.end_id, "text": self.decode([self.end_id])},
        }


def open_prompt(
    source: str | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    split: str = "test",
    index: int = 0,
    id: str | None = None,
    say: Callable[[str], None],
) -> PromptView:
    """Render a problem of a recipe as its model would see it; only the tokenizer is loaded. `id` wins over `index`."""
    from restem.mask import open_tokenizer
    from restem.tasks.of_recipe import task_of

    recipe = load_recipe(source, overrides)
    task = task_of(recipe)
    problems = _split(task, split)
    at = _find(problems, index, id, f"{task.name}, {split}")
    tokenizer = open_tokenizer(recipe, say)
    renderer = Renderer(task.prompt, tokenizer)
    prompts = [renderer.encode(problem) for problem in problems]
    return PromptView(
        task=task.name,
        model=recipe.model.base,
        split=split,
        index=at,
        problems=len(problems),
        problem=problems[at],
        style=renderer.prompt.of(problems[at]).style,
        token_ids=prompts[at],
        shared=shared_length(prompts),
        stop=renderer.stop if recipe.generate.stop is None else recipe.generate.stop,
        end_id=renderer.end_id,
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)),
    )


def print_prompt(view: PromptView, console: Console) -> None:
    """Print the prompt with a sign of ours before each line, so that no text can pass for another; then the counts."""
    title = f"{view.task}, {view.split} problem {view.index} of {view.problems} (id {view.problem.id})"
    about = f"tokens of {view.model}, style {view.style}"
    lines = [
        Text(visible(f"{title}; {about}").replace("\n", ""), "bold"),
        *(Text.assemble("  ", (f"{mark.sign} ", "bold"), (mark.meaning, mark.style)) for mark in (SHARED, OWN)),
        Text("  \u23ce is a line end of the text; other characters that cannot be seen are spelled out"),
        Text(),
    ]
    for mark, text in _pieces(view):
        for line in fold(visible(text), max(20, console.width - 2)):
            lines.append(Text.assemble((f"{mark.sign} ", "bold"), (line, mark.style)))
    total = len(view.token_ids)
    ends = [json.dumps(stop) for stop in view.stop]
    end = f"the end token {visible(view.decode([view.end_id]))} ({view.end_id})"
    lines += [
        Text(),
        Text(f"tokens  {total}: {view.shared} shared by all {view.problems} prompts, {total - view.shared} of this problem"),
        Text("stop    " + ", ".join([*ends, end])),
    ]
    print_lines(lines, console)


def _pieces(view: PromptView) -> Iterator[tuple[Mark, str]]:
    whole, head = view.decode(view.token_ids), view.decode(view.token_ids[: view.shared])
    if not whole.startswith(head):  # the cut falls into a character of several tokens
        head = ""
    if head:
        yield SHARED, head
    yield OWN, whole[len(head) :]


def _split(task: Task, split: str) -> tuple[Problem, ...]:
    splits = {"train": task.train, "val": task.val, "test": task.test}
    if split not in splits:
        raise RestemError(f'there is no split "{split}"{closest(split, splits)}')
    if not splits[split]:
        others = ", ".join(name for name, problems in splits.items() if problems)
        raise RestemError(f"{task.name} has no {split} problems. It has: {others}.")
    return splits[split]


def _find(problems: Sequence[Problem], index: int, id: str | None, where: str) -> int:
    if id is None:
        if not 0 <= index < len(problems):
            raise RestemError(f"{where} has {len(problems)} problems: --index goes from 0 to {len(problems) - 1}, not {index}.")
        return index
    found = next((number for number, problem in enumerate(problems) if problem.id == id), None)
    if found is None:
        near = difflib.get_close_matches(id, [problem.id for problem in problems], n=1)
        hint = f'Did you mean "{near[0]}"?' if near else f'The first is "{problems[0].id}".'
        raise RestemError(f'{where} has no problem with the id "{id}". {hint}')
    return found
