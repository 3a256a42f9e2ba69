"""The pool turns every kind of failing verifier into a grade of None, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from restem.errors import RestemError
from restem.types import Grade, Problem
from restem.verifiers.pool import VerifierPool, as_grade

HOSTILE = """
import ctypes, os, time
from restem.types import Grade

def judge(problem, completion):
    if completion == "hang":
        time.sleep(60)
    if completion == "hang in C":
        return (10 ** 8) ** (10 ** 8) > 0
    if completion == "crash":
        ctypes.string_at(0)
    if completion == "exit":
        os._exit(3)
    if completion == "sys.exit":
        raise SystemExit(0)
    if completion == "memory":
        return len(bytearray(1 << 40)) > 0
    if completion == "raise":
        raise ValueError("bad\\n  luck")
    if completion == "print":
        print("noise")
        return True
    if completion == "pid":
        return Grade(reward=1.0, reason="correct", answer=str(os.getpid()))
    if completion == "child":
        import subprocess
        child = subprocess.Popen(["sleep", "60"])
        with open(problem.reference, "w") as file:
            file.write(str(child.pid))
        time.sleep(60)
    return {"bool": True, "float": 0.25, "zero": 0, "nan": float("nan"), "negative": -1.0, "none": None, "text": "yes",
            "lambda": lambda: 0, "bad grade": Grade(reward=-1.0, reason="correct")}[completion]

NOT_CALLABLE = 3
"""
PROBLEM = Problem(id="p", question="q", reference="5")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("verifiers") / "hostile.py"
    path.write_text(HOSTILE)
    return f"{path}:judge"


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while _is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not _is_running(pid)


def test_a_hang_is_killed_at_the_limit_and_the_next_grading_works(hostile: str) -> None:
    with VerifierPool(hostile, seconds=0.3) as pool:
        for kind in ("hang", "hang in C"):
            start = time.monotonic()
            grade = pool.submit(PROBLEM, kind).result()
            assert 0.3 <= time.monotonic() - start < 3.0
            assert (grade.reward, grade.reason) == (None, "verifier_error")
            assert "time limit of 0.3 s" in grade.note
        assert pool.submit(PROBLEM, "bool").result().reward == 1.0


@pytest.mark.parametrize(
    ("completion", "note"),
    [
        ("crash", "signal 11"),
        ("exit", "exit code 3"),
        ("memory", "died|MemoryError"),
        ("sys.exit", "SystemExit"),
        ("raise", "ValueError: bad luck"),
        ("nan", "nan"),
        ("negative", "-1"),
        ("bad grade", "-1"),
        ("none", "NoneType"),
        ("text", "str"),
        ("lambda", "function"),
    ],
)
def test_no_failure_of_a_verifier_is_a_wrong_answer(shared: VerifierPool, completion: str, note: str) -> None:
    grade = shared.submit(PROBLEM, completion).result()
    assert (grade.reward, grade.reason) == (None, "verifier_error")
    assert re.search(note, grade.note), grade.note
    assert shared.submit(PROBLEM, "bool").result() == Grade(reward=1.0, reason="correct")


@pytest.fixture(scope="module")
def shared(hostile: str) -> Any:
    with VerifierPool(hostile, seconds=5.0, memory_mb=1024) as pool:
        yield pool


def test_plain_values_become_grades(shared: VerifierPool) -> None:
    assert shared.submit(PROBLEM, "float").result() == Grade(reward=0.25, reason="correct")
    assert shared.submit(PROBLEM, "zero").result() == Grade(reward=0.0, reason="incorrect")
    assert as_grade(False) == Grade(reward=0.0, reason="incorrect")
    assert as_grade(float("inf")).reason == "verifier_error"


def test_a_worker_stays_warm(shared: VerifierPool) -> None:
    first, second = (shared.submit(PROBLEM, "pid").result().answer for _ in range(2))
    assert first == second != str(os.getpid())


def test_what_cannot_be_sent_is_an_error_of_that_grading_only(shared: VerifierPool) -> None:
    grade = shared.submit(Problem(id="p", question="q", meta={"lock": threading.Lock()}), "bool").result()
    assert grade.reward is None and "could not be sent" in grade.note
    assert shared.submit(PROBLEM, "bool").result().reward == 1.0


def test_a_printing_verifier_does_not_write_to_our_results(shared: VerifierPool, capfd: pytest.CaptureFixture[str]) -> None:
    assert shared.submit(PROBLEM, "print").result().reward == 1.0
    assert capfd.readouterr().out == ""


def test_after_close_no_process_thread_or_descriptor_is_left(hostile: str) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with VerifierPool(hostile, workers=3, seconds=0.3) as pool:
        futures = [pool.submit(PROBLEM, "pid") for _ in range(20)] + [
            pool.submit(PROBLEM, kind) for kind in ("hang", "crash", "exit")
        ]
        pids = {int(future.result().answer or 0) for future in futures[:20]}
    assert all(future.done() for future in futures)
    assert not any(_is_running(pid) for pid in pids)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(PROBLEM, "bool")
    pool.close()


def test_what_a_verifier_started_dies_with_it(hostile: str, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with VerifierPool(hostile, seconds=1.0) as pool:
        pool.submit(Problem(id="p", question="q", reference=str(note)), "child").result()
    assert _gone_within(int(note.read_text()), 2.0)


def test_an_error_in_the_block_drops_what_waits(hostile: str) -> None:
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), VerifierPool(hostile, seconds=0.5) as pool:
        futures = [pool.submit(PROBLEM, "hang") for _ in range(20)]
        raise KeyboardInterrupt
    assert all(future.done() for future in futures)
    assert time.monotonic() - start < 5.0


def test_submit_waits_while_the_queue_is_full(hostile: str) -> None:
    with VerifierPool(hostile, seconds=0.4, queue_size=1) as pool:
        start = time.monotonic()
        futures = [pool.submit(PROBLEM, "hang"), *(pool.submit(PROBLEM, "bool") for _ in range(2))]
        assert time.monotonic() - start > 0.2
        assert [future.result().reward for future in futures] == [None, 1.0, 1.0]


def test_a_verifier_that_cannot_be_loaded_is_the_users_error_at_once(tmp_path: Path, hostile: str) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_thing\n")
    for spec, says in [
        ("maths", "Did you mean"),
        (f"{broken}:f", "no_such_thing"),
        (hostile.replace(":judge", ":NOT_CALLABLE"), "not a function"),
    ]:
        with pytest.raises(RestemError, match=says):
            VerifierPool(spec, workers=2)
    with pytest.raises(RestemError, match="file"):
        VerifierPool(lambda problem, completion: True)


SCRIPT = """
import sys, time
from restem.types import Problem
from restem.verifiers.pool import VerifierPool
pool = VerifierPool("math", workers=2)
futures = [pool.submit(Problem(id=str(i), question="q", reference=str(i)), f"The answer is {i % 3}.") for i in range(6)]
print([future.result().reward for future in futures], *[worker.pid for worker in pool._workers], flush=True)
if sys.argv[1:] == ["wait"]:
    time.sleep(60)
pool.close()
"""


def _run_script(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    return subprocess.Popen([sys.executable, str(path), *arguments], stdout=subprocess.PIPE, text=True, env=env)


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    with _run_script(tmp_path) as script:
        assert script.communicate(timeout=30)[0].startswith("[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]")
    assert script.returncode == 0


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    with _run_script(tmp_path, "wait") as script:
        assert script.stdout is not None
        pids = [int(word) for word in script.stdout.readline().rpartition("]")[2].split()]
        assert len(pids) == 2 and all(map(_is_running, pids))
        script.send_signal(signal.SIGKILL)
    assert all(_gone_within(pid, 3.0) for pid in pids)


def test_workers_ignore_the_interrupt_that_is_meant_for_us(shared: VerifierPool) -> None:
    pid = int(shared.submit(PROBLEM, "pid").result().answer or 0)
    os.kill(pid, signal.SIGINT)
    assert shared.submit(PROBLEM, "pid").result().answer == str(pid)


def test_mathematics_is_graded_the_same_in_the_pool() -> None:
    with VerifierPool("math", workers=2) as pool:
        futures = [pool.submit(PROBLEM, text) for text in ("The answer is 5.", r"\boxed{10/2}", r"\boxed{6}", "5")]
        symbolic = pool.submit(Problem(id="p", question="q", reference="3x > 6"), r"\boxed{x > 2}")
        assert [future.result().reason for future in futures] == ["correct", "correct", "incorrect", "no_answer"]
        assert symbolic.result().reason == "correct"
