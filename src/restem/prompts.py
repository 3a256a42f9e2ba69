"""The only place where text becomes a prompt.

Sampling, tuning and evaluation all take a problem's token ids from one `Renderer`, which renders each problem once:
what is trained on is what was sampled from. A prompt is made of the question alone; the reference and the meta never
reach it. All that the meta may decide is which sub-task's exemplars are shown (`Prompt.variants`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from restem.errors import RestemError
from restem.types import Problem

Tokenizer = Any
"""A Hugging Face tokenizer. Not typed further: its library is only imported by those who load one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exemplar:
    """A worked problem shown before the question."""

    question: str
    solution: str
    """The worked solution; ends in the answer sentence that completions should end in."""


class Frame(NamedTuple):
    """What stands around a question, to the letter."""

    before: str
    after: str
    gap: str
    """Between that and an exemplar's solution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """How a question is put to a model."""

    style: Literal["few-shot", "chat", "plain"] = "few-shot"
    """ "few-shot" continues plain text, as the paper does; "chat" uses the tokenizer's chat template; "plain" is the question
    alone, character by character, for questions that are the beginning of the answer (HumanEval)."""
    instruction: str = ""
    """Said once, before all else. In a chat it opens the first user turn: some templates refuse a system turn."""
    exemplars: tuple[Exemplar, ...] = ()
    """Worked problems, in order; in a chat they are earlier turns."""
    question_label: str = "Question:"
    answer_label: str = "Answer:"
    frame: Frame | None = None
    """In place of the two labels, for a few-shot prompt that is published to the letter: then questions and solutions keep
    their blanks, and `ends` alone end a completion. None = the labels."""
    ends: tuple[str, ...] = ()
    """More strings that end a completion of plain text or few-shot."""
    variants: Mapping[str, Prompt] = field(default_factory=dict, hash=False)
    """Prompts of sub-tasks, by the name that a problem's meta holds under "subtask": a benchmark of many tasks shows each its
    own exemplars. A sub-task without one gets this prompt."""

    def of(self, problem: Problem) -> Prompt:
        """The prompt that this problem is put with."""
        return self.variants.get(str(problem.meta.get("subtask")), self) if self.variants else self

    @property
    def shown(self) -> tuple[Exemplar, ...]:
        """All exemplars, those of the variants included, each once."""
        return tuple(dict.fromkeys(shot for prompt in (self, *self.variants.values()) for shot in prompt.exemplars))

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a completion; the completion is cut before them.

        A blank line ends it only if the exemplars teach that: there are some, and none holds one. A chat ends by its
        end token, a framed prompt as it was published.
        """
        if self.style == "chat":
            return ()
        if self.style == "plain" or self.frame is not None:
            return self.ends
        taught = self.shown and not any("\n\n" in exemplar.solution for exemplar in self.shown)
        return (("\n\n",) if taught else ()) + (f"\n{self.question_label}", *self.ends)

    def text(self, problem: Problem, tokenizer: Tokenizer = None) -> str:
        """Render the prompt of a problem. A chat needs the tokenizer, for its template."""
        prompt = self.of(problem)
        if prompt.style == "plain":
            return problem.question
        return prompt._few_shot(problem) if prompt.style == "few-shot" else prompt._chat(problem, tokenizer)

    def encode(self, problem: Problem, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Tokenize the prompt; a BOS comes from the tokenizer (few-shot) or from the template (chat), never both."""
        ids = tuple(tokenizer(self.text(problem, tokenizer), add_special_tokens=False)["input_ids"])
        if self.style != "chat" and _adds_bos(tokenizer) and ids[:1] != (tokenizer.bos_token_id,):
            return (tokenizer.bos_token_id, *ids)
        return ids

    def _few_shot(self, problem: Problem) -> str:
        blocks = [self.instruction.strip()] if self.instruction.strip() else []
        for exemplar in self.exemplars:
            solution = f" {exemplar.solution.strip()}" if self.frame is None else self.frame.gap + exemplar.solution
            blocks.append(self._asked(exemplar.question) + solution)
        return "\n\n".join([*blocks, self._asked(problem.question)])

    def _asked(self, question: str) -> str:
        if self.frame is not None:
            return self.frame.before + question + self.frame.after
        # No blank after the label: with most tokenizers the blank belongs to the completion's first token.
        return f"{self.question_label} {question.strip()}\n{self.answer_label}"

    def _chat(self, problem: Problem, tokenizer: Tokenizer) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise RestemError(
                f'{_name(tokenizer)} has no chat template, which prompt.style = "chat" needs.\n'
                'Set prompt.style = "few-shot", or use a model that was tuned for chat.'
            )
        messages = []
        for exemplar in self.exemplars:
            messages.append({"role": "user", "content": exemplar.question.strip()})
            messages.append({"role": "assistant", "content": exemplar.solution.strip()})
        messages.append({"role": "user", "content": problem.question.strip()})
        if self.instruction.strip():
            messages[0]["content"] = f"{self.instruction.strip()}\n\n{messages[0]['content']}"
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class Renderer:
    """A prompt bound to a tokenizer. Each problem is rendered once; later calls return the same object."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_token_id is None:
            raise RestemError(
                f"{_name(tokenizer)} has no end token (eos_token), so no completion could ever end.\n"
                "Set eos_token in the model's tokenizer_config.json."
            )
        self.prompt = prompt
        self.tokenizer = tokenizer
        self.end_id = int(tokenizer.eos_token_id)
        self.stop = prompt.stop
        # The question is part of the key, so that two sets that number their problems alike cannot meet here.
        self._ids: dict[tuple[str, str], tuple[int, ...]] = {}

    def encode(self, problem: Problem) -> tuple[int, ...]:
        key = (problem.id, problem.question)
        if key not in self._ids:
            self._ids[key] = self.prompt.encode(problem, self.tokenizer)
        return self._ids[key]

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """Tokenize a completion that was not sampled, without special tokens."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: tuple[int, ...] | list[int]) -> str:
        """Turn sampled ids into text, without special tokens and without tidying blanks."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load_exemplars(path: str | Path) -> tuple[Exemplar, ...]:
    """Read exemplars from .jsonl, .json (a list) or .toml (`[[exemplars]]`); each has a question and a solution."""
    from restem.tasks.files import read_rows  # restem.tasks imports this module

    path = Path(path)
    exemplars = tuple(_exemplar(row, f"{path}, exemplar {number}") for number, row in enumerate(read_rows(path), start=1))
    if not exemplars:
        raise RestemError(f"{path} holds no exemplars.\nGive each one a question and a solution.")
    return exemplars


def _exemplar(row: Mapping[str, Any], where: str) -> Exemplar:
    for key in ("question", "solution"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise RestemError(
                f'{where} has no text under "{key}"; it has: {", ".join(row) or "nothing"}.\n'
                'An exemplar is {"question": "...", "solution": "worked solution. The answer is 4."}.'
            )
    return Exemplar(question=row["question"], solution=row["solution"])


def _adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer itself opens a text with its BOS. Tried out, since its setting add_bos_token may lie."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


def _name(tokenizer: Tokenizer) -> str:
    return f"the tokenizer of {getattr(tokenizer, 'name_or_path', '') or 'this model'}"
