"""The records that flow through the loop: Problem -> Sample -> Grade -> Example.

All are frozen, slotted and keyword-only; they are enriched by copy (`dataclasses.replace`), never in place. The one thing a
newcomer would get wrong: a reward of `None` means "not graded, or could not be graded" and is never the same as 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Finish = Literal["stop", "length"]
Reason = Literal[
    "correct",
    "incorrect",
    "no_answer",
    "truncated",
    "timeout",
    "memory",
    "crash",
    "forbidden",
    "verifier_error",
]
REASONS: tuple[Reason, ...] = (
    "correct",
    "incorrect",
    "no_answer",
    "truncated",
    "timeout",
    "memory",
    "crash",
    "forbidden",
    "verifier_error",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One x of the paper: a question with what is needed to check an answer."""

    id: str
    """Stable identity; derived from the content where the data has none."""
    question: str
    reference: Any = None
    """What the verifier needs: an answer text, tests, a choice. None = the problem cannot be graded."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping: level, subject, number of steps. Never shown to the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """What a verifier says of one completion."""

    reward: float | None
    """Non-negative; None = could not be graded (never the same as 0)."""
    answer: str | None = None
    """The answer that was read from the completion; None = none found."""
    reason: Reason
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion of one problem; (problem_id, index) is its identity within a stage."""

    problem_id: str
    index: int
    """0-based, below the number of samples per problem (N in the paper)."""
    token_ids: tuple[int, ...]
    """The tokens that were sampled, without the end token, cut before a stop string."""
    text: str
    finish: Finish
    """"stop" = ended by an end token or stop string; "length" = cut off at max_tokens."""
    logprob: float | None = None
    """Sum of the log-probabilities (natural log) of `token_ids` and the end token, under the untruncated model at T 1."""
    reward: float | None = None
    """None = not graded, or could not be graded."""
    answer: str | None = None
    reason: Reason | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One term of J = E[r log p]: what a trainer is given. Loss falls on `completion_ids` only."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """The sampled tokens plus the end token; never re-tokenised text."""
    weight: float = 1.0
    """r(x, y): non-negative."""
    problem_id: str = ""
    index: int = 0
    """Which sample of the problem this was."""


@runtime_checkable
class Verifier(Protocol):
    """Grades a completion. Pure and deterministic; nonsense earns reward 0, never an exception."""

    def __call__(self, problem: Problem, completion: str) -> Grade: ...
