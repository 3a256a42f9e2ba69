"""The tests of a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTests:
    """What a program must do.

    "stdin": `inputs` are texts, `outputs` what it must print. "call": `inputs` are lists of arguments of `entry_point` (a
    function, or a method of a class Solution), `outputs` what it must return. "check": `check` is code with asserts that call
    the program's functions; if it defines a function `check`, that is called with `entry_point`.
    """

    kind: Literal["stdin", "call", "check"]
    inputs: Sequence[Any] = ()
    outputs: Sequence[Any] = ()
    entry_point: str | None = None
    check: str = ""
    setup: str = ""
    """For a check: code that makes its arguments. It runs behind the program, inside the sandbox, so it must not hold what is
    expected."""
    wrapped: bool = False
    """For calls: an expected list of one value stands for that value as well, as in APPS' files."""

    def __post_init__(self) -> None:
        if self.kind not in ("stdin", "call", "check"):
            raise ValueError(f'kind = "{self.kind}": the kinds of tests are stdin, call and check')
        if len(self.inputs) != len(self.outputs):
            raise ValueError(f"{len(self.inputs)} inputs and {len(self.outputs)} outputs")
        if self.kind == "call" and not self.entry_point:
            raise ValueError("tests that call need an entry_point")

    @property
    def count(self) -> int:
        """How many tests there are; a check counts as one."""
        return len(self.inputs) if self.kind != "check" else int(bool(self.check.strip()))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(value: Any) -> CodeTests:
        """A CodeTests, or one made of a mapping. Raises TypeError or ValueError for anything else."""
        if isinstance(value, CodeTests):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"tests are a CodeTests or a mapping, not {type(value).__name__}")
        return CodeTests(**value)
