"""Trainers: fine-tune a model on examples, and hand over a model after every evaluation interval.

Hand-over is by files: every interval's model is an ordinary model directory, so what is measured on D_val is what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from restem.errors import RestemError
from restem.types import Example

if TYPE_CHECKING:
    from restem.training.tree import TreeTrainer as TreeTrainer

__all__ = ["Interval", "Trainer", "TreeTrainer", "names"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A model that training has reached."""

    number: int
    """1, 2, ...; 0 is the untrained start, which a trainer never yields."""
    model: str
    """Its directory."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What was measured on the way: epochs, steps, loss, gradient norm, tokens per second."""


class Trainer(Protocol):
    """Fine-tunes from a model directory on examples."""

    def train(self, start: str, examples: Sequence[Example], directory: Path, *, stream: str) -> Iterator[Interval]:
        """Yield a model after every interval, first those that `directory` already holds complete (a resumed run).

        Interval k lies in directory/interval-k, with the model in its subfolder "model". The optimiser is fresh. `stream`
        names the source of randomness for the order of the examples.
        """
        ...


def names() -> list[str]:
    """The trainers that a recipe may name."""
    return ["tree", "toy", *sorted(point.name for point in entry_points(group="restem.trainers"))]


def plugin(name: str) -> Any:
    """The factory that an installed package registered under `restem.trainers`."""
    for point in entry_points(group="restem.trainers"):
        if point.name == name:
            return point.load()
    raise RestemError(f'engine.trainer = "{name}": there is no such trainer. There are: auto, {", ".join(names())}.')


def check_examples(examples: Sequence[Example]) -> None:
    """Refuse what would be trained on silently: negative weights, and examples without a target token."""
    for example in examples:
        where = f"example {example.index} of problem {example.problem_id}"
        if not example.weight >= 0:
            raise RestemError(f"{where} has the weight {example.weight}; rewards must be non-negative numbers.")
        if not example.completion_ids:
            raise RestemError(f"{where} has no target token, so there is nothing to train on.")
        if not example.prompt_ids:
            raise RestemError(f"{where} has an empty prompt; the first target token has nothing to follow.")


def __getattr__(name: str) -> Any:
    if name == "TreeTrainer":
        from restem.training.tree import TreeTrainer

        return TreeTrainer
    raise AttributeError(f"module 'restem.training' has no attribute {name!r}")
