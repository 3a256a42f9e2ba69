"""A model with its reward on D_val: what the M-step compares, keeps and hands on.

In files, models inside a run are named relative to it, so that a run can be moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model with its reward on D_val."""

    model: str
    """Its directory."""
    fingerprint: str
    """Hash of its weights."""
    reward: float
    """Mean over D_val problems of the mean reward of their samples."""
    low: float
    high: float
    n: int
    """D_val problems behind the reward."""
    iteration: int = 0
    interval: int = 0
    """Evaluation interval of the M-step; 0 = candidate 0, not trained in this iteration."""


def as_dict(home: Path, candidate: Candidate) -> dict[str, Any]:
    """The content of candidate.json and iteration.json, in the run directory `home`."""
    names = ("fingerprint", "reward", "low", "high", "n", "iteration", "interval")
    return {"model": relative(home, candidate.model), **{name: getattr(candidate, name) for name in names}}


def from_dict(home: Path, value: dict[str, Any]) -> Candidate:
    """Read back what `as_dict` gave."""
    model = Path(value["model"])
    return Candidate(**{**value, "model": str(model if model.is_absolute() else home / model)})


def relative(home: Path, model: str) -> str:
    """The name of a model directory as files of the run keep it."""
    path = Path(model)
    return str(path.relative_to(home)) if path.is_relative_to(home) else model
