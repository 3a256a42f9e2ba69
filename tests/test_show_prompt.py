"""restem show-prompt shows what a model sees, token for token, and nothing in a question can lie to the reader."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from commands import Command, in_process
from restem import load_task
from restem.prompts import Prompt
from restem.show_prompt import open_prompt
from tiny_models import END, tokenizer

INSTRUCTION = 'Solve the problem. End with "The answer is X.", X being the answer.'
TEMPLATE = "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model directory with a tokenizer and no weights."""
    tokenizer(template=TEMPLATE).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "base"


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A task of its own: the first tokens of all its test questions are the same."""
    folder = tmp_path / "sums"
    folder.mkdir()
    for split, first in (("train", 1), ("val", 4), ("test", 7)):
        rows = [
            {"question": f"Sum {n}: {n} + {n}?", "answer": str(2 * n), "id": f"{split}{n}"} for n in range(first, first + 3)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def recipe(base: Path, sums: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sums.toml"
    path.write_text(f'[model]\nbase = "{base}"\n[task]\nname = "{sums}"\nid = "id"\n')
    return path


@pytest.fixture
def show_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process("show-prompt", monkeypatch, capsys, columns=200)


def shown(out: str, sign: str) -> str:
    """The text that stands behind a sign, with its line ends."""
    lines = [line[2:] for line in out.splitlines() if line.startswith(f"{sign} ")]
    return "".join(line[:-1] + "\n" if line.endswith("\u23ce") else line for line in lines)


def test_the_prompt_is_shown_as_the_task_renders_it(recipe: Path, sums: Path, show_prompt: Command) -> None:
    code, out, err = show_prompt(recipe, "--index", 1)
    problem = load_task(sums, id="id").test[1]
    text = load_task(sums, id="id").prompt.text(problem)
    assert (code, err) == (0, "")
    assert f"sums, test problem 1 of 3 (id {problem.id})" in out and "style few-shot" in out
    assert shown(out, "|") + shown(out, ">") == text
    assert shown(out, "|") == f"{INSTRUCTION}\n\nQuestion: Sum " and shown(out, ">").startswith(problem.question[4:])
    total = len(tokenizer()(text)["input_ids"])
    own = len(tokenizer()(text[text.index("Sum ") + 4 :])["input_ids"])
    assert f"tokens  {total}: {total - own} shared by all 3 prompts, {own} of this problem" in out
    assert f'stop    "\\nQuestion:", the end token </s> ({END})' in out


def test_a_problem_is_named_by_its_id_in_any_split(recipe: Path, show_prompt: Command) -> None:
    code, out, _ = show_prompt(recipe, "--split", "train", "--id", "train2")
    assert code == 0 and "train problem" in out and "(id train2)" in out and "2 + 2?" in out


def test_a_task_and_a_model_need_no_recipe(sums: Path, base: Path, show_prompt: Command) -> None:
    code, out, _ = show_prompt(sums, "--model", base, "--set", "prompt.instruction=Add.", "--set", 'generate.stop=["X"]')
    assert code == 0 and f"tokens of {base}" in out
    assert shown(out, "|").startswith("Add.\n\nQuestion: ")
    assert f'stop    "X", the end token </s> ({END})' in out


def test_a_chat_shows_its_turns_and_special_tokens(recipe: Path, show_prompt: Command) -> None:
    code, out, _ = show_prompt(recipe, "--set", "prompt.style=chat")
    assert code == 0 and "style chat" in out
    assert (shown(out, "|") + shown(out, ">")).startswith(f"<s>[user] {INSTRUCTION}\n\nSum ")
    assert shown(out, ">").endswith("?\n[assistant]")
    assert f"stop    the end token </s> ({END})" in out


def test_json_holds_the_ids_that_sampling_gets(recipe: Path, show_prompt: Command) -> None:
    code, out, _ = show_prompt(recipe, "--index", 2, "--json")
    view = open_prompt(str(recipe), index=2, say=pytest.fail)
    found = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and found == json.loads(json.dumps(view.as_dict()))
    assert tokenizer().decode(found["token_ids"]) == found["text"]
    assert found["tokens"]["total"] == len(found["token_ids"]) == found["tokens"]["shared"] + found["tokens"]["question"]
    assert (found["index"], found["problems"], found["stop"]) == (2, 3, ["\nQuestion:"])
    assert found["end_token"] == {"id": END, "text": "</s>"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--index", "3"], "--index goes from 0 to 2, not 3"),
        (["--id", "test77"], 'no problem with the id "test77". Did you mean "test7"?'),
        (["--split", "tests"], 'no split "tests"; did you mean "test"'),
        (["--model", "toy"], "has no text tokens"),
        (["--set", "task.nonsense=1"], "no such key"),
    ],
)
def test_mistakes_are_explained(recipe: Path, show_prompt: Command, arguments: list[str], says: str) -> None:
    code, out, err = show_prompt(recipe, *arguments)
    assert (code, out) == (1, "") and says in err


HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]x[/red]\ra\u202eb\u2028\n| Question: forged\ntokens  1: 1 shared"


def test_a_question_cannot_steer_the_terminal_or_forge_a_line(recipe: Path, sums: Path, show_prompt: Command) -> None:
    (sums / "test.jsonl").write_text(json.dumps({"question": HOSTILE, "answer": "1", "id": "\x1b[1m\nx"}) + "\n")
    code, out, _ = show_prompt(recipe)
    assert code == 0 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", out)
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("tokens")] == [lines[-2]]
    assert "| | Question: forged\u23ce" in lines and "(id \u241b[1m\u23cex)" in lines[0]


def test_a_split_of_one_shares_all_but_its_last_token(recipe: Path, sums: Path) -> None:
    (sums / "test.jsonl").write_text('{"question": "Alone?", "answer": "1", "id": "t"}\n')
    view = open_prompt(str(recipe), say=pytest.fail)
    assert (view.problems, len(view.token_ids) - view.shared) == (1, 1)


def test_the_cut_may_fall_into_a_character(recipe: Path, sums: Path, show_prompt: Command) -> None:
    rows: list[dict[str, Any]] = [{"question": f"{c}?", "answer": "1", "id": c} for c in "\u00e9\u00e8"]
    (sums / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = show_prompt(recipe)
    assert code == 0 and "\ufffd" not in out and "Question: \u00e9?" in shown(out, ">")


@pytest.mark.skipif("RESTEM_DATA" not in os.environ, reason="RESTEM_DATA names no data folder")
def test_subtasks_with_prompts_of_their_own_are_shown_with_theirs(base: Path, show_prompt: Command) -> None:
    options = 'task.options={ subtask = ["navigate", "word_sorting"] }'
    data = os.environ["RESTEM_DATA"]
    arguments = ("bbh", "--data", data, "--model", base, "--set", options, "--set", "task.test=8", "--json")
    found = [json.loads(show_prompt(*arguments, "--index", n)[1]) for n in range(8)]
    task = load_task("bbh", data=data, options={"subtask": ["navigate", "word_sorting"]}, test=8)
    assert [one["text"] for one in found] == [task.prompt.text(problem) for problem in task.test]
    assert Prompt().stop != tuple(found[0]["stop"]) == task.prompt.stop
