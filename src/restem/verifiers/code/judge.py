"""Running a program against its tests and judging what comes out, outside the sandbox.

Time is processor time, so that a busy machine changes no verdict: a test that ran out of clock without having had its share of
the processor is tried once more, alone and with five times the clock. One that slept through it is not.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from restem.sandbox import Box, BoxLost, Limits, Rung, choose
from restem.sandbox.inside import plain
from restem.types import Grade, Reason
from restem.verifiers.code import checks
from restem.verifiers.code.comparison import Comparison, same_text, same_value
from restem.verifiers.code.tests import CodeTests

DEFAULT = Limits()
_RETRY = 5  # times the clock, for a test that was starved
_SHOWN = 200  # characters of a value in a note


def run_tests(
    program: str, tests: CodeTests, limits: Limits = DEFAULT, *, comparison: Comparison = "exact", rung: Rung | None = None
) -> Grade:
    """Run a program against all its tests in a sandbox: reward 1 if it passes every one, else 0 with the reason of the first
    failure; None with `verifier_error` if the tests or the machine are to blame.

    `comparison`: see `restem.verifiers.code.comparison`; it does not apply to checks. `rung`: of the sandbox; None = the best
    that holds. Raises RestemError if there is no sandbox.
    """
    rung = rung or choose()
    if not tests.count:
        return _grade("verifier_error", program, "there are no tests", rung)
    if not program.strip():
        return _grade("no_answer", None, "the program is empty", rung)
    try:
        if tests.kind == "check":
            return _checked(program, tests, limits, rung)
        with Box(rung) as box:
            return _tested(box, program, tests, limits, comparison)
    except BoxLost as lost:
        return _grade("crash", program, str(lost), rung)


def _tested(box: Box, program: str, tests: CodeTests, limits: Limits, comparison: Comparison) -> Grade:
    load(box, program, limits, preamble=True)
    for number, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), start=1):
        which = f"test {number} of {len(tests.inputs)}"
        if tests.kind == "stdin":
            text = given if isinstance(given, str) else "\n".join(map(str, given))
            report = timed(box, {"op": "run", "stdin": text}, program, limits)
        else:
            try:
                arguments = plain.encode(list(given))
            except (plain.Unplain, TypeError) as error:
                return _grade("verifier_error", program, f"{which}: the arguments cannot be sent: {error}", box.rung)
            report = timed(box, {"op": "call", "entry": tests.entry_point, "arguments": arguments}, program, limits)
        if report["status"] != "ok":
            reason, note = reason_of(report)
            return _grade(reason, program, f"{which}: {note}", box.rung)
        if tests.kind == "stdin":
            found, is_same = report["stdout"], same_text(report["stdout"], expected, comparison)
        else:
            try:
                found = plain.decode(report["value"])
            except plain.Unplain:
                return _grade("crash", program, f"{which}: it returned nothing that can be read", box.rung)
            is_same = same_value(found, expected, "apps" if tests.wrapped and len(expected) == 1 else comparison)
        if not is_same:
            note = f"{which}: expected {_short(expected)}, found {_short(found)}"
            return _grade("incorrect", program, note, box.rung)
    return _grade("correct", program, f"{len(tests.inputs)} tests passed", box.rung)


def load(box: Box, program: str, limits: Limits, *, preamble: bool, clock: float = 1.0) -> None:
    """Hand a program to a box. `clock`: factor on the time by the clock."""
    settings = {
        "time_s": limits.time_s,
        "wall_s": clock * limits.time_s,
        "memory_mb": limits.memory_mb,
        "output_kb": limits.output_kb,
        "processes": limits.processes,
        "file_kb": limits.file_kb,
    }
    box.ask({"op": "load", "source": program, "limits": settings, "preamble": preamble}, seconds=0)


def timed(box: Box, order: dict[str, Any], program: str, limits: Limits) -> dict[str, Any]:
    """The report on an order, tried again alone if the machine was too busy."""
    report = box.ask(order, seconds=limits.time_s)
    if is_starved(report, limits):
        with alone():
            load(box, program, limits, preamble=True, clock=_RETRY)
            report = box.ask(order, seconds=_RETRY * limits.time_s)
        load(box, program, limits, preamble=True)
    if report["status"] == "ok" and report["cpu"] > limits.time_s:
        report["status"] = "timeout"
    return report


def is_starved(report: dict[str, Any], limits: Limits) -> bool:
    """Out of clock, with some of its processor time used, and not nearly all."""
    share: float = report.get("cpu", 0.0) / limits.time_s
    return report["status"] == "timeout" and 0.1 < share < 0.9


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While no other process of this user's restem tries a test again."""
    import fcntl

    name = Path(tempfile.gettempdir()) / f"restem-alone-{os.getuid()}.lock"
    with name.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def reason_of(report: dict[str, Any]) -> tuple[Reason, str]:
    """A report that is not "ok", as a reason and words."""
    status, note = report["status"], report.get("note") or ""
    if status == "timeout":
        return "timeout", f"time limit, after {report.get('cpu', 0.0):.1f} s of processor time"
    if status == "output":
        return "incorrect", "it printed too much"
    reason: Reason = cast(Reason, status) if status in ("memory", "forbidden") else "crash"
    return reason, note or status


# --- asserts ------------------------------------------------------------------------------------------------------------------

_local = threading.local()


def _checked(program: str, tests: CodeTests, limits: Limits, rung: Rung) -> Grade:
    """Asserts run in a warm process of their own: they are code as well, and might hang."""
    from restem.verifiers.worker import Worker, WorkerLost

    if getattr(_local, "owner", None) != os.getpid():
        _local.worker, _local.owner = Worker("restem.verifiers.code.checks:make", memory_mb=4096), os.getpid()
    worker: Worker = _local.worker
    for clock in (1, _RETRY):
        if not worker.is_alive():
            worker.restart()
        with alone() if clock > 1 else contextlib.nullcontext():
            try:
                outcome = worker.call((program, tests, limits, rung, clock), seconds=clock * limits.time_s + 30)
            except WorkerLost as lost:
                return _grade("timeout" if lost.timed_out else "crash", program, f"the asserts did not end: {lost}", rung)
        if not outcome.ok:
            return _grade("verifier_error", program, str(outcome.value), rung)
        result: checks.Result = outcome.value
        if not result.starved:
            break
    return _grade(result.reason, program, result.note, rung)


def _grade(reason: Reason, program: str | None, note: str, rung: Rung) -> Grade:
    reward = None if reason == "verifier_error" else float(reason == "correct")
    return Grade(reward=reward, answer=program, reason=reason, note=f"{note} [{rung}]")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
