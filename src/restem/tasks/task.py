"""What a task is: problems, the prompt that asks them, the verifier that grades the answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from restem.prompts import Prompt
from restem.types import Problem, Verifier


@dataclass(frozen=True, kw_only=True)
class Task:
    """Problems, how they are asked, and how answers are graded."""

    name: str
    train: tuple[Problem, ...]
    val: tuple[Problem, ...]
    """D_val: what training stops on. Held out of training where the data has none."""
    test: tuple[Problem, ...]
    prompt: Prompt
    verifier_spec: str
    """What `restem.verifiers.load` takes: "math", "choice", "module:function", "file.py:function"."""
    samples: int = 32
    """N in the paper: completions per problem and iteration; 32 for mathematics, 64 for code."""
    max_tokens: int = 512
    """Longest completion, in tokens. The paper does not state it."""
    answer_style: str = "auto"
    """How the final answer is written: auto, boxed, minerva, gsm8k or answer-is."""
    evaluation_only: bool = False
    """Whether its problems are to test on only: a run that would train on them, or on a part of them, is refused."""
    notes: tuple[str, ...] = ()
    """What was left out or held out when loading, with counts, and what else the data asks for."""

    @cached_property
    def verifier(self) -> Verifier:
        """The verifier that `verifier_spec` names, loaded when first asked for."""
        from restem.verifiers import load  # graders are heavy, and not all who load a task grade

        return load(self.verifier_spec)
