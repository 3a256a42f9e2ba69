"""restem: ReST^EM self-training (Singh et al., TMLR 2024). Importing it loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from restem.errors import RestemError
from restem.types import Example, Grade, Problem, Sample

__version__ = "0.1.0"

if TYPE_CHECKING:
    from restem.algorithm import rest_em as rest_em
    from restem.config import Recipe as Recipe
    from restem.config import load_recipe as load_recipe
    from restem.run import Run as Run
    from restem.tasks import Task as Task
    from restem.tasks import load_task as load_task

_LAZY = {
    "rest_em": "restem.algorithm",
    "Recipe": "restem.config",
    "load_recipe": "restem.config",
    "Run": "restem.run",
    "Task": "restem.tasks",
    "load_task": "restem.tasks",
}
_MODULES = {"sampling", "statistics", "tasks", "training", "verifiers"}

__all__ = ["Example", "Grade", "Problem", "RestemError", "Sample", *_LAZY]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"restem.{name}")
    raise AttributeError(f"module 'restem' has no attribute {name!r}")
