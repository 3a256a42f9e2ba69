"""Grading programs: take the program out of a completion, run it against its tests in a sandbox, judge outside.

Three kinds of tests (`CodeTests`): text in and text out, calls with plain arguments, and asserts as HumanEval and MBPP have
them. Expected results never enter the sandbox, in none of them. All tests must pass; the first failure ends the run.

The one thing a newcomer would get wrong: the asserts of a "check" run outside the sandbox, and only the calls that they make
run inside. So a program cannot look at what is expected of it, and cannot answer with an object that equals everything.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace

from restem.sandbox import Limits, slowness
from restem.types import Grade, Problem
from restem.verifiers.code.extraction import complete, extract
from restem.verifiers.code.judge import run_tests
from restem.verifiers.code.tests import CodeTests

__all__ = ["CodeTests", "Limits", "complete", "extract", "run_tests", "verify"]

_verdicts: OrderedDict[str, Grade] = OrderedDict()
_MOST_VERDICTS = 10_000


def verify(problem: Problem, completion: str) -> Grade:
    """Grade a completion against `problem.reference`, a CodeTests or what `CodeTests.as_dict` made of one.

    `problem.meta["code"]` is code that the completion continues (HumanEval's prompt). `problem.meta["limits"]`: Limits as a
    dict; where it names no time limit, the default one is longer on a slow machine (`slowness`).
    """
    try:
        tests = CodeTests.of(problem.reference)
        given = problem.meta.get("limits", {})
        limits = Limits(**given)
        if "time_s" not in given:
            limits = replace(limits, time_s=limits.time_s * slowness())
    except (TypeError, ValueError) as error:
        return Grade(reward=None, reason="verifier_error", note=f"the tests of {problem.id} cannot be read: {error}")
    start = problem.meta.get("code")
    program = extract(completion) if start is None else complete(str(start), completion, tests.entry_point)
    if program is None:
        return Grade(reward=0.0, reason="no_answer", note="no program found")
    return _judged_once(program, tests, limits)


def _judged_once(program: str, tests: CodeTests, limits: Limits) -> Grade:
    """The verdict on a program, kept for the next sample that has the same one."""
    key = hashlib.blake2b(repr((program, tests, limits)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    if key in _verdicts:
        _verdicts.move_to_end(key)
        return _verdicts[key]
    grade = run_tests(program, tests, limits)
    if grade.reward is not None:  # a failure of the machine may not happen again
        _verdicts[key] = grade
        if len(_verdicts) > _MOST_VERDICTS:
            _verdicts.popitem(last=False)
    return grade
