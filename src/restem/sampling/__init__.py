"""Samplers: draw completions of problems from a model. One protocol; `tree` and `toy` implement it here.

The one thing a newcomer would get wrong: `problems` is the whole stage, `owed` what is still to be drawn of it. What the
problems share is computed from all of them, so that a resumed stage computes exactly what an uninterrupted one does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from restem.errors import RestemError
from restem.types import Problem, Sample

if TYPE_CHECKING:
    from restem.sampling.tree import TreeSampler as TreeSampler

__all__ = ["Decoding", "Owed", "Sampler", "TreeSampler", "names", "uniforms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How tokens are chosen. Order of application: temperature, top-k, top-p, min-p (each on what the former left)."""

    temperature: float = 1.0
    """0 = greedy: the likeliest token, whatever the other options say."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "max_tokens": self.max_tokens,
            "stop": list(self.stop),
        }


class Owed(NamedTuple):
    """One sample to draw."""

    problem_id: str
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here


class Sampler(Protocol):
    """Draws samples of one frozen model."""

    def sample(self, problems: Sequence[Problem], owed: Iterable[Owed], decoding: Decoding, *, stream: str) -> Iterator[Sample]:
        """Yield every owed sample once, in any order, as soon as it is finished.

        `stream` names the source of randomness (run seed, iteration and stage): a sample depends on it, its problem and its
        index, never on what else is drawn.
        """
        ...


def uniforms(stream: str, owed: Owed, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`count` numbers in [0, 1) that belong to one sample: a counter-based generator keyed by (stream, problem, index)."""
    key = hashlib.blake2b(f"{stream}\0{owed.problem_id}\0{owed.index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count)


def by_problem(owed: Iterable[Owed]) -> dict[str, list[int]]:
    """Owed samples of a problem together, so that its prompt is computed once; order of first appearance."""
    grouped: dict[str, list[int]] = {}
    for problem_id, index in owed:
        grouped.setdefault(problem_id, []).append(index)
    return grouped


def check_lengths(prompts: dict[str, tuple[int, ...]], context: int) -> None:
    """Refuse a prompt that leaves no room for a completion, by the name of its problem."""
    for name, prompt in prompts.items():
        if len(prompt) >= context:
            raise RestemError(
                f"the prompt of problem {name} has {len(prompt)} tokens, and the model's context holds {context}. "
                "Use fewer exemplars (prompt.shots), or leave the problem out."
            )


def names() -> list[str]:
    """The samplers that a recipe may name."""
    return ["tree", "generate", "toy", *sorted(point.name for point in entry_points(group="restem.samplers"))]


def plugin(name: str) -> Any:
    """The factory that an installed package registered under `restem.samplers`."""
    for point in entry_points(group="restem.samplers"):
        if point.name == name:
            return point.load()
    raise RestemError(f'engine.sampler = "{name}": there is no such sampler. There are: auto, {", ".join(names())}.')


def __getattr__(name: str) -> Any:
    if name == "TreeSampler":
        from restem.sampling.tree import TreeSampler

        return TreeSampler
    raise AttributeError(f"module 'restem.sampling' has no attribute {name!r}")
