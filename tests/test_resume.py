"""Promise 1: killed at any instant and resumed, a run is complete, holds nothing twice, and is the run that was never killed.

A driver script (its text is below) counts the renames by which files appear, and kills its own process right before the n-th.
Nothing else can be seen from outside: every file of a run appears by a rename. Row 52.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from toy_runs import cli, content, part_rows, run, write_recipe, write_verifiers

SMALL = ("task.train=6", "task.val=4", "task.test=4", "engine.shard_samples=12", "improve.stop=best", "seed=4")
INSTANTS = (
    "run.json",
    "iter-00/val/grades/part-00001",
    "iter-01/samples/part-00001",
    "iter-01/improve/interval-2",
    "iter-01/model",
    "iter-01/eval/arithmetic/scores.json",
    "iter-02/examples",
)
"""Files right before whose appearance a run is killed: in every kind of stage."""


DRIVER = '''
"""driver.py WORK RECIPE FLAGS... --kill[-and-resume] N...: start a run in WORK/killed-N, kill it before rename N.

Each start is the command line's own main in a fork of a process that has imported everything, for speed. N = 0 is never killed.
"""

import os, signal, sys
from pathlib import Path

import pyarrow.parquet, scipy.stats, restem.algorithm, restem.report, restem.show
from restem.cli import main

place = next(i for i, word in enumerate(sys.argv) if word.startswith("--kill"))
work, *recipe = sys.argv[1:place]
how, *kills = sys.argv[place:]
replace = os.replace


def start(arguments, log, before):
    child = os.fork()
    if not child:
        renamed = []

        def counting(source, target):
            renamed.append(str(target))
            if len(renamed) == before:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(source, target)

        os.replace = counting
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.argv = ["restem", *arguments]
            code = 99
            try:
                main()
            except SystemExit as stop:
                code = stop.code
            Path(f"{log}.renamed").write_text("\\n".join(renamed))
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


for n in map(int, kills):
    out = f"{work}/killed-{n}"
    code = start(["run", *recipe, "--out", out, "--json"], f"{out}.log", n)
    assert code == (-signal.SIGKILL if n else 0), (n, code)
    if n and how == "--kill-and-resume":
        held = sorted(str(p.relative_to(out)) for p in Path(out).rglob("*"))
        Path(f"{out}.held").write_text("\\n".join(held))
        code = start(["run", *recipe, "--out", out, "--resume", "--json"], f"{out}.log", 0)
        assert code == 0, (n, code, Path(f"{out}.log").read_text())
'''


class Killed:
    """A folder of runs, one killed before each of some renames and resumed, and the run that never was."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.settings = (*SMALL, f"task.verifier={write_verifiers(work)}:ends")  # starts faster than "math"
        self.recipe = write_recipe(work)
        self.flags = [part for setting in self.settings for part in ("--set", setting)]
        (work / "driver.py").write_text(DRIVER)
        self.drive([0])
        self.renamed = [line.partition("/killed-0/")[2] for line in (work / "killed-0.log.renamed").read_text().split("\n")]

    def before(self, name: str) -> int:
        """The number of the first rename to a path that begins like this."""
        return 1 + next(i for i, path in enumerate(self.renamed) if path.startswith(name))

    def drive(self, kills: Iterable[int], *, work: Path | None = None, resume: bool = True) -> None:
        how = "--kill-and-resume" if resume else "--kill"
        command = [sys.executable, self.work / "driver.py", work or self.work, self.recipe, *self.flags, how, *map(str, kills)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr

    def run(self, n: int) -> Path:
        return self.work / f"killed-{n}"

    def held(self, n: int) -> set[str]:
        """What lay there right after the kill."""
        return set((self.work / f"killed-{n}.held").read_text().split("\n"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return Killed(tmp_path_factory.mktemp("resume"))


def assert_complete_and_nothing_twice(out: Path) -> None:
    stages = {part.parent for part in out.rglob("part-*.parquet")}
    assert len(stages) > 20
    for stage in stages:
        count = Counter((row["problem_id"], row["index"]) for row in part_rows(stage))
        assert set(count.values()) == {1}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["interval"]) for line in lines] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert not list(out.rglob(".tmp-*"))


def test_promise_1_a_run_killed_at_any_rename_and_resumed_is_the_same_run_row_52(killed: Killed) -> None:
    kills = {name: killed.before(name) for name in INSTANTS}
    killed.drive(kills.values())
    whole = content(killed.run(0))
    assert_complete_and_nothing_twice(killed.run(0))
    for name, n in kills.items():
        assert content(killed.run(n)) == whole, f"killed before {name}"
        assert_complete_and_nothing_twice(killed.run(n))
    generating, improving = (killed.held(kills[name]) for name in INSTANTS[2:4])
    assert "iter-01/samples/part-00000.parquet" in generating and "iter-01/examples.parquet" not in generating
    assert "iter-01/improve/interval-1" in improving and "iter-01/iteration.json" not in improving


@pytest.mark.slow
def test_promise_1_for_every_single_rename_row_52(killed: Killed) -> None:
    kills = range(1, len(killed.renamed) + 1)
    killed.drive(n for n in kills if not killed.run(n).exists())
    whole = content(killed.run(0))
    for n in kills:
        assert content(killed.run(n)) == whole, f"killed before rename {n}"
        assert_complete_and_nothing_twice(killed.run(n))


def test_the_plain_command_resumes_a_killed_run_row_52(killed: Killed, tmp_path: Path) -> None:
    n = killed.before("iter-02/grades")
    killed.drive([n], work=tmp_path, resume=False)
    out = tmp_path / f"killed-{n}"
    assert not (out / "result.json").exists()
    done = cli("run", killed.recipe, *killed.flags, "--out", out, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((out / "result.json").read_text())
    assert content(out) == content(killed.run(0))


def test_resuming_a_finished_run_changes_no_file_but_the_log_and_draws_nothing(killed: Killed) -> None:
    out = killed.run(0)

    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    before = files()
    done = cli("run", killed.recipe, *killed.flags, "--out", out, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    after = files()
    changed = {Path(name).name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert changed <= {"lock", "log.txt", "report.html"}
    assert "samples in" not in done.stderr  # no stage had anything to draw


def test_a_finished_run_can_be_given_more_iterations(killed: Killed, tmp_path: Path) -> None:
    out = run(tmp_path / "run", *killed.settings, "iterations=1")
    run(out, *killed.settings, "iterations=2", resume=True)
    whole, extended = content(killed.run(0)), content(out)
    added = {name for name in extended if name not in whole}
    assert {name.split("/")[1] for name in added} == {"train"}  # the train accuracy of the model that was the last one
    assert all(extended[name] == whole[name] for name in whole if name.startswith(("iter-", "metrics")))
    assert extended["result.json"]["accepted"] == whole["result.json"]["accepted"]
