"""Gradings per second of the graders, and a soak: do ten thousand gradings, a fifth of them hostile, leave anything behind?

    python -m benchmarks.grading [--shape math,code] [--rounds 3] [--data DIR]
    python -m benchmarks.grading --shape soak [--count 10000] [--workers 2]

`math`: a stream as a run makes it: every problem's 32 samples, some right in several spellings, the wrong ones repeating as
a model's do. The peer is Math-Verify on such texts, parsing gold and answer each time, as its own examples do; it gets a part.
`code`: a short program on two inputs, in every rung that holds here, one after the other, by the clock: hardly more than one
core is busy at any time. The peer `bare` is a fresh Python on each input, without any wall.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.sampling import machine
from restem import load_task
from restem.sandbox import RUNGS, Limits, Rung, examine
from restem.types import Problem
from restem.verifiers import math
from restem.verifiers.code import CodeTests, run_tests
from restem.verifiers.math import structure, verify
from restem.verifiers.pool import VerifierPool

PROGRAM = "numbers = list(map(int, input().split()))\nprint(sum(n * n for n in numbers))"
TESTS = CodeTests(kind="stdin", inputs=["1 2 3\n", "4 5\n"], outputs=["14\n", "41\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="math,code", help="math, code, soak")
    parser.add_argument("--peers", default="math-verify,bare")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--data", default=os.environ.get("RESTEM_DATA"), help="folder with one folder per set; default: the hub"
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    shapes = {"math": math_shape, "code": code_shape, "soak": soak_shape}
    for name in options.shape.split(","):
        line = shapes[name](options)
        line = {"benchmark": "grading", "shape": name, **line, "machine": machine(torch.device("cpu"))}
        print(json.dumps(line), flush=True)


def medians(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    speeds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for who, run in runs.items():
            speeds.setdefault(who, []).append(run())
            print(f"{who}: {speeds[who][-1]:.1f}", file=sys.stderr, flush=True)
    return {who: round(statistics.median(values), 1) for who, values in speeds.items()}


def compared(runs: dict[str, Callable[[], float]], rounds: int, unit: str, notes: str) -> dict[str, Any]:
    found = medians(runs, rounds)
    ours = found.pop("ours")
    ratios = {who: round(ours / value, 2) for who, value in found.items()}
    return {"unit": unit, "ours": ours, "peers": found, "ratios": ratios, "rounds": rounds, "notes": notes}


# --- mathematics -------------------------------------------------------------------------------------------------------------


def stream(data: str | None, problems: int, seed: int) -> list[tuple[Problem, str]]:
    """Completions of MATH test problems, 32 each: a third right, in three spellings; the others of a few wrong answers."""
    chance = random.Random(seed)
    stage = list(load_task("math", data=data, test=problems + 200).test)
    golds = [str(problem.reference) for problem in stage]
    pairs = []
    for problem in stage[:problems]:
        gold = str(problem.reference)
        right = [gold, gold.replace("\\frac", "\\dfrac"), f" {gold} "]
        wrong = [chance.choice(golds) for _ in range(6)]
        for _ in range(32):
            answer = chance.choice(right) if chance.random() < 1 / 3 else chance.choices(wrong, weights=[32, 16, 8, 4, 2, 1])[0]
            pairs.append((problem, f"We compute step by step.\nSo the answer is $\\boxed{{{answer}}}$."))
    return pairs


def math_shape(options: argparse.Namespace) -> dict[str, Any]:
    seeds = iter(range(1000))

    def ours() -> float:
        pairs = stream(options.data, 200, next(seeds))
        math._equivalent.cache_clear()
        structure.read.cache_clear()
        began = time.perf_counter()
        for problem, completion in pairs:
            verify(problem, completion)
        return len(pairs) / (time.perf_counter() - began)

    def math_verify() -> float:
        from math_verify import parse
        from math_verify import verify as compare

        pairs = stream(options.data, 20, next(seeds))
        began = time.perf_counter()
        for problem, completion in pairs:
            compare(parse(f"\\boxed{{{problem.reference}}}"), parse(completion))
        return len(pairs) / (time.perf_counter() - began)

    runs = {"ours": ours} | ({"math-verify": math_verify} if "math-verify" in options.peers else {})
    return compared(runs, options.rounds, "gradings per second, one process", "200 problems x 32 samples; Math-Verify 20 x 32")


# --- programs ----------------------------------------------------------------------------------------------------------------


def code_shape(options: argparse.Namespace) -> dict[str, Any]:
    def in_rung(rung: Rung) -> float:
        began = time.perf_counter()
        for _ in range(50):
            assert run_tests(PROGRAM, TESTS, rung=rung).reward == 1
        return 50 / (time.perf_counter() - began)

    def bare() -> float:
        began = time.perf_counter()
        for _ in range(25):
            for given, expected in zip(TESTS.inputs, TESTS.outputs, strict=True):
                done = subprocess.run([sys.executable, "-I", "-c", PROGRAM], input=given, capture_output=True, text=True)
                assert done.stdout == expected
        return 25 / (time.perf_counter() - began)

    rungs = [rung for rung in RUNGS if not examine().failures[rung]]
    runs: dict[str, Callable[[], float]] = {"ours": lambda: in_rung(rungs[0])}
    runs |= {rung: lambda rung=rung: in_rung(rung) for rung in rungs[1:]}  # type: ignore[misc]
    if "bare" in options.peers:
        runs["bare"] = bare
    return compared(runs, options.rounds, "programs per second, one at a time", f"ours: the rung {rungs[0]}; two inputs each")


# --- soak --------------------------------------------------------------------------------------------------------------------

HOSTILE = (
    "while True: pass",
    "import time\ntime.sleep(1000)",
    "import os\nwhile True: os.fork()",
    "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "while True: print('x' * 10000)",
    "import os\nos.kill(-1, 9)",
    "import threading\nfor n in range(10000): threading.Thread(target=input).start()",
    "import os\nos.closerange(0, 1000)\nos._exit(0)",
)


def soak_verify(problem: Problem, completion: str) -> Any:
    """What the pool's workers run: every completion is a program."""
    return run_tests(completion, TESTS, Limits(time_s=0.3, memory_mb=256, output_kb=64))


def soak_shape(options: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(0)
    problem = Problem(id="soak", question="")
    reasons: dict[str, int] = {}
    began = time.perf_counter()
    with VerifierPool(f"{Path(__file__).resolve()}:soak_verify", workers=options.workers, seconds=60, queue_size=64) as pool:
        for number in range(options.count):
            program = chance.choice(HOSTILE) if number % 5 == 0 else f"{PROGRAM}\n# {number}"
            future = pool.submit(problem, program)
            future.add_done_callback(lambda done: reasons.update({(r := done.result().reason): reasons.get(r, 0) + 1}))
            if number == options.count // 10:
                before = footprint()
            if number % 500 == 0:
                print(f"{number} gradings, {time.perf_counter() - began:.0f} s, {footprint()}", file=sys.stderr, flush=True)
        after = footprint()
    seconds = time.perf_counter() - began
    return {
        "unit": "gradings per second",
        "ours": round(options.count / seconds, 1),
        "peers": {},
        "ratios": {},
        "reasons": reasons,
        "after a tenth": before,
        "at the end": after,
        "left when the pool is closed": footprint(),
        "notes": f"{options.count} gradings in {seconds:.0f} s with {options.workers} workers, a fifth of them hostile",
    }


def footprint() -> dict[str, float]:
    """What this process and its children hold. A grading that runs now is counted too."""
    me = psutil.Process()
    children = me.children(recursive=True)
    memory = 0
    for process in (me, *children):
        try:
            memory += process.memory_info().rss
        except psutil.Error:
            continue
    return {
        "processes": len(children),
        "descriptors": me.num_fds(),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
        "memory_mb": round(memory / 1e6),
    }


if __name__ == "__main__":
    main()
