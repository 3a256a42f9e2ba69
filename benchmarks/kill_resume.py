"""Kill a run at many instants, resume it after each, and compare what it ends with against a run that was left alone.

    python -m benchmarks.kill_resume [--recipe toy] [--kills 20] [--seed 0] [--per-run 4] [--set a.b=c ...] [--model-run]

One run is left alone and timed. Others start the same recipe as a process of its own; each is killed with SIGKILL `--per-run`
times, at instants that all kills together spread evenly over the measured duration, with a jitter from `--seed`, and resumed
after each kill. `identical`: D_i, samples, grades and scores equal those of the run left alone, and nothing is there twice.
`seconds lost`: what the kills cost, the run's time over all its starts less that of the run left alone, shared by its kills;
starting Python and loading the model again are part of it. `--model-run`: for a real model; instants are then measured from the
base's first file, so that no kill falls into fetching and loading, and only D_i, rewards and scores are compared (weights that
differ in the last bit differ in their fingerprint).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from restem.files import read_json, read_rows


@dataclass
class Kill:
    """One kill: when it was due in the run's own time, what the run was doing, and what became of the run."""

    instant: float
    stage: str = "not reached: the run had ended"
    identical: bool = False
    lost: float = 0.0


@dataclass
class Work:
    """How to start a run, and where."""

    arguments: list[str]
    home: Path
    model_run: bool
    outputs: list[str] = field(default_factory=list)

    def start(self, name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "restem.cli", "run", *self.arguments, "--out", str(self.home / name), "--resume"]
        log = (self.home / f"{name}.stderr").open("ab")
        with log:
            return subprocess.Popen([*command, "--json"], stdout=subprocess.DEVNULL, stderr=log)

    def finish(self, name: str, process: subprocess.Popen[bytes]) -> None:
        if process.wait():
            raise SystemExit(f"a run failed with exit code {process.returncode}:\n{(self.home / f'{name}.stderr').read_text()}")

    def wait_for_begin(self, name: str, process: subprocess.Popen[bytes]) -> float:
        """The moment from which instants count: the start, or with a real model its first drawn samples."""
        mark = self.home / name / "iter-00"
        while self.model_run and not mark.exists() and process.poll() is None:
            time.sleep(0.01)
        return time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="toy")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--model-run", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="restem-kill-") as folder:
        settings = [part for setting in options.set for part in ("--set", setting)]
        work = Work(arguments=[options.recipe, *settings], home=Path(folder), model_run=options.model_run)
        began = time.monotonic()
        alone = work.start("alone")
        from_begin = work.wait_for_begin("alone", alone)
        work.finish("alone", alone)
        seconds, whole = time.monotonic() - from_begin, time.monotonic() - began
        print(f"left alone: {whole:.1f} s, of which {seconds:.1f} s can be killed", flush=True)
        kills = instants(options.kills, seconds, options.seed)
        reference = contents(work.home / "alone", weights=not work.model_run)
        runs = max(1, -(-options.kills // options.per_run))
        for number in range(runs):  # every run gets early, middle and late instants
            kill_and_resume(work, f"killed-{number}", kills[number::runs], whole, reference)
    report(options, kills, seconds)


def instants(count: int, seconds: float, seed: int) -> list[Kill]:
    """One at a random place in each of `count` equal parts of the duration."""
    draw = random.Random(seed)
    return [Kill(instant=(i + draw.random()) * seconds / count) for i in range(count)]


def kill_and_resume(work: Work, name: str, kills: list[Kill], whole: float, reference: dict[str, Any]) -> None:
    """Kill one run at each instant of its own running time, and let it end after the last.

    A run's time goes on where the work of its last start ended: what a kill costs does not move the later instants.
    """
    spent, reached = 0.0, 0.0
    for kill in kills:
        began = time.monotonic()
        process = work.start(name)
        due = work.wait_for_begin(name, process) + kill.instant - reached
        while process.poll() is None and time.monotonic() < due:
            time.sleep(min(0.005, max(0.0, due - time.monotonic())))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kill.stage, reached = running_stage(work.home / name / "log.txt"), kill.instant
        else:
            work.finish(name, process)
        spent += time.monotonic() - began
    began = time.monotonic()
    work.finish(name, work.start(name))
    spent += time.monotonic() - began
    identical = contents(work.home / name, weights=not work.model_run) == reference and not repeats(work.home / name)
    for kill in kills:
        kill.identical, kill.lost = identical, (spent - whole) / len(kills)


def running_stage(log: Path) -> str:
    """What the log says was ended last; the stage after it was running."""
    lines = [line[21:].strip() for line in log.read_text().splitlines()] if log.is_file() else []
    ended = [line for line in lines if line.startswith("iteration ")]
    return f"after {ended[-1].partition(' samples in')[0][:44]!r}" if ended else "starting"


def contents(run: Path, *, weights: bool) -> dict[str, Any]:
    """What must be equal: D_i, samples, grades and scores; of a real model without what its fingerprint is in."""
    found: dict[str, Any] = {}
    for path in sorted(run.glob("iter-*/**/*.parquet")):
        found[str(path.relative_to(run))] = read_rows(path)
    for path in [*sorted(run.glob("iter-*/**/*.json")), run / "result.json"]:
        if path.name in ("scores.json", "selection.json", "candidate.json", "iteration.json", "result.json"):
            found[str(path.relative_to(run))] = comparable(read_json(path), weights=weights)
    return found


def comparable(value: Any, *, weights: bool) -> Any:
    if isinstance(value, dict):
        left_out = {"run"} if weights else {"run", "fingerprint"}
        return {key: comparable(item, weights=weights) for key, item in value.items() if key not in left_out}
    return [comparable(item, weights=weights) for item in value] if isinstance(value, list) else value


def repeats(run: Path) -> list[str]:
    """Samples and training intervals that are there more than once."""
    found = []
    for stage in {path.parent for path in run.glob("iter-*/**/part-*.parquet")}:
        rows = [row for part in stage.glob("part-*.parquet") for row in read_rows(part)]
        found += [f"{stage}: {key}" for key, n in Counter((r["problem_id"], r["index"]) for r in rows).items() if n > 1]
    if (run / "metrics.jsonl").is_file():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found += [str(key) for key, n in Counter((line["iteration"], line["interval"]) for line in lines).items() if n > 1]
    return found


def report(options: argparse.Namespace, kills: list[Kill], seconds: float) -> None:
    print(f"{'instant':>9}  {'seconds lost':>12}  identical  was running")
    for kill in kills:
        print(f"{kill.instant:7.2f} s  {kill.lost:10.2f} s  {'yes' if kill.identical else 'NO':<9}  {kill.stage}")
    lost = sorted(kill.lost for kill in kills)
    line = {
        "benchmark": "kill_resume",
        "shape": options.recipe,
        "unit": "kills after which the resumed run is identical",
        "ours": sum(kill.identical for kill in kills),
        "kills": len(kills),
        "kills_that_hit": sum(not kill.stage.startswith("not reached") for kill in kills),
        "seconds_alone": round(seconds, 2),
        "median_seconds_lost": round(lost[len(lost) // 2], 2),
        "peers": {},
        "ratios": {},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "notes": "seconds lost include starting Python again",
    }
    print(json.dumps(line))
    if not all(kill.identical for kill in kills):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
