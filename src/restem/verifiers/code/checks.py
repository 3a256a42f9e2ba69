"""Asserts about a program, as HumanEval and MBPP have them, run on this side of the wall.

The names of the program stand here as proxies: calling one sends plain arguments in and takes plain data out. What is no data
(an instance of the program's own class) stays inside and comes back as a proxy as well. So the asserts see builtin values
only, and the program never sees the asserts.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from restem.sandbox import Box, BoxLost, Limits, Rung
from restem.sandbox.inside import plain
from restem.types import Reason
from restem.verifiers.code.tests import CodeTests


@dataclass(frozen=True, slots=True)
class Result:
    reason: Reason
    note: str
    starved: bool = False
    """It ran out of clock, and the machine was busy."""


def make() -> Callable[..., Result]:
    """What a worker process serves."""
    sys.setrecursionlimit(10_000)
    return run_check


def run_check(program: str, tests: CodeTests, limits: Limits, rung: Rung, clock: float) -> Result:
    """Run the asserts. `clock`: factor on the time by the clock."""
    from restem.verifiers.code.judge import load

    try:
        code = compile(tests.check, "tests.py", "exec", dont_inherit=True)
        tree = ast.parse(tests.check)
    except (SyntaxError, ValueError) as error:
        return Result("verifier_error", f"the tests do not parse: {error}")
    with Box(rung) as box:
        try:
            source = f"{program}\n\n{tests.setup}" if tests.setup.strip() else program
            load(box, source, limits, preamble=False, clock=clock)
            remote = Remote(box, clock * limits.time_s)
            remote.start()
            has_check = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body)
            return _judge(code, _free_names(tree), has_check, tests.entry_point, remote)
        except ProgramOver as over:
            return _over(over.report, limits)
        except BoxLost as lost:
            return Result("crash", str(lost))


def _judge(code: Any, wanted: set[str], has_check: bool, entry_point: str | None, remote: Remote) -> Result:
    names = remote.ask("names", sorted(wanted | {entry_point} if entry_point else wanted))
    if entry_point and entry_point not in names:
        return Result("crash", f"there is no function {entry_point!r}")
    # What the tests define or import themselves goes before the program's names, and so do modules: it judges them.
    namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins, **names, **_modules(wanted)}
    try:
        exec(code, namespace)
        if entry_point and has_check:
            namespace["check"](names[entry_point])
    except AssertionError as error:
        if is_from_program(error):
            return Result("crash", "the program raised AssertionError")
        return Result("incorrect", f"an assert failed{_where(error)}")
    except plain.Unplain as error:
        return Result("verifier_error", f"the tests hand over something that is no data: {error}")
    except Exception as error:
        if is_from_program(error):
            return Result(
                "forbidden" if isinstance(error, PermissionError) else "crash", f"{type(error).__name__}: {error}"[:300]
            )
        return Result("incorrect", f"{type(error).__name__}{_where(error)}: {error}"[:300])
    return Result("correct", "all asserts hold")


def _over(report: dict[str, Any], limits: Limits) -> Result:
    from restem.verifiers.code.judge import is_starved, reason_of

    reason, note = reason_of(report)
    return Result(reason, note, starved=is_starved(report, limits))


class ProgramOver(BaseException):
    """The program ended or was ended; no `except Exception` in the tests may stand in the way."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__(report.get("note"))
        self.report = report


class Remote:
    """The names of a program inside a box."""

    def __init__(self, box: Box, seconds: float) -> None:
        self._box, self._seconds = box, seconds

    def start(self) -> None:
        """Run the program, up to its end."""
        self._checked(self._box.ask({"op": "serve"}, seconds=self._seconds))

    def ask(self, what: str, *values: Any) -> Any:
        """The answer to a request; raises what the program raised."""
        request = plain.encode((what, *values), _reference)
        report = self._checked(self._box.ask({"op": "ask", "request": request}, seconds=self._seconds))
        try:
            kind, *rest = plain.decode(report["value"].strip(), lambda number, kind: Proxy(self, number, kind))
        except (plain.Unplain, ValueError, TypeError):
            raise ProgramOver({"status": "crash", "note": "it answered with nothing that can be read"}) from None
        if kind == "value" and len(rest) == 1:
            return rest[0]
        if kind == "error" and len(rest) == 3:
            raise _as_exception(*rest)
        raise ProgramOver({"status": "crash", "note": "it answered with nothing that can be read"})

    def _checked(self, report: dict[str, Any]) -> dict[str, Any]:
        if report["status"] != "ok":
            raise ProgramOver(report)
        return report


class Proxy:
    """A function, class or object of the program."""

    def __init__(self, remote: Remote, number: int, kind: str) -> None:
        self._remote, self._number, self._kind = remote, number, kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._remote.ask("call", self, args, kwargs)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ProgramOver({"status": "crash", "note": "it answered with nothing that can be read"})
        value, after = answer
        if isinstance(after, tuple):
            for given, changed in zip(args, after, strict=False):
                _write_back(given, changed)
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._remote.ask("attribute", self, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._remote.ask("list", self))

    def __next__(self) -> Any:
        raise TypeError("an iterator of the program can only be read whole")

    def __len__(self) -> int:
        return int(self._remote.ask("length", self))

    def __getitem__(self, key: Any) -> Any:
        return self._remote.ask("item", self, key)

    def __str__(self) -> str:
        return str(self._remote.ask("text", self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Proxy) and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)


def _reference(value: Any) -> plain.Reference:
    if isinstance(value, Proxy):
        return plain.Reference(value._number, value._kind)
    raise plain.Unplain(f"a {type(value).__name__}")


def _write_back(given: Any, changed: Any) -> None:
    """What a function did to its arguments, done to the originals."""
    if type(given) is not type(changed) or given == changed:
        return
    if isinstance(given, list | bytearray):
        given[:] = changed
    elif isinstance(given, dict | set):
        given.clear()
        given.update(changed)


def _as_exception(bases: Any, name: Any, text: Any) -> BaseException:
    """The program's exception, as the nearest builtin one."""
    for base in bases if isinstance(bases, list) else []:
        kind = getattr(builtins, str(base), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                error = kind(f"{text}")
            except Exception:  # some want more arguments
                error = RuntimeError(f"{name}: {text}")
            error.__dict__["from_program"] = True
            return error
    return ProgramOver({"status": "crash", "note": f"{name}: {text}"})


def is_from_program(error: BaseException) -> bool:
    return bool(getattr(error, "from_program", False))


def _where(error: BaseException) -> str:
    """The line of the tests."""
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests.py":
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f" in line {line} of the tests"


def _free_names(tree: ast.AST) -> set[str]:
    """Names that the tests read, and that may be the program's."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    # A program may not replace `len` or `sorted` under its tests. If they name nothing else, what they test is called so.
    return {name for name in names if not hasattr(builtins, name)} or names


def _modules(wanted: set[str]) -> dict[str, Any]:
    """Modules that the tests name, and that the program may have imported for them."""
    known = (
        "math",
        "re",
        "itertools",
        "collections",
        "functools",
        "random",
        "string",
        "heapq",
        "datetime",
        "copy",
        "sys",
        "cmath",
    )
    return {name: importlib.import_module(name) for name in known if name in wanted}
