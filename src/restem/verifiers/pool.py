"""Run a verifier over model text where it can do no harm to the run: in warm processes with a time and a memory limit.

Whatever happens to a grading (hang, crash, memory, exception, nonsense returned), its future gets a Grade with reward
None and the reason `verifier_error`, and the next one gets a fresh process. Not for programs under test: those need
the sandbox.
"""

from __future__ import annotations

import math
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import TracebackType
from typing import Any

from restem.errors import RestemError
from restem.types import REASONS, Grade, Problem
from restem.verifiers.worker import Worker, WorkerLost

_Job = tuple[Problem, str, "Future[Grade]"]


class VerifierPool:
    """Grades in `workers` processes; a context manager.

    verifier: a name or "module:function" as for `restem.verifiers.load`, or a function that can be found by its name
    in a file. seconds: time limit of one grading, wall clock. memory_mb: address space of a worker; None = no limit.
    queue_size: gradings that may wait before `submit` blocks.

    The verifier is loaded before the constructor returns; RestemError if it cannot be. After `close` no process,
    thread or descriptor is left. Workers ignore Ctrl-C and end when their parent does, a busy one at its time limit.
    """

    def __init__(
        self,
        verifier: str | Callable[..., Any],
        *,
        workers: int = 1,
        seconds: float = 10.0,
        memory_mb: int | None = 2048,
        queue_size: int = 1024,
    ) -> None:
        if workers < 1 or seconds <= 0 or queue_size < 1:
            raise RestemError(
                f"a verifier pool needs workers, seconds and queue_size above 0: {workers}, {seconds}, {queue_size}"
            )
        self._seconds = seconds
        self._jobs: queue.Queue[_Job | None] = queue.Queue(queue_size)
        self._closing = threading.Lock()
        self._closed = False
        self._cancelled = False
        spec = verifier if isinstance(verifier, str) else _spec(verifier)
        self._workers = _start(workers, spec, memory_mb)
        self._threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in self._workers]
        for thread in self._threads:
            thread.start()

    def submit(self, problem: Problem, completion: str) -> Future[Grade]:
        """Queue one grading; blocks while the queue is full. The future never holds a verifier's exception."""
        future: Future[Grade] = Future()
        while True:
            if self._closed:
                raise RuntimeError("the verifier pool is closed")
            try:
                self._jobs.put((problem, completion, future), timeout=1.0)
                return future
            except queue.Full:
                continue

    def close(self, *, cancel: bool = False) -> None:
        """Finish what was submitted, or with `cancel` drop it and kill what runs; then end processes and threads."""
        with self._closing:
            self._cancelled = self._cancelled or cancel
            if not self._closed:
                self._closed = True
                if cancel:
                    self._drop()
                for _ in self._threads:
                    self._jobs.put(None)
            for thread in self._threads:
                thread.join()
            self._drop()  # what a racing `submit` put behind the end

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(cancel=kind is not None)

    def _drop(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job[2].cancel()

    def _serve(self, worker: Worker) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                problem, completion, future = job
                if not future.set_running_or_notify_cancel():
                    continue
                grade = self._grade(worker, problem, completion)
                if self._cancelled:
                    future.set_exception(CancelledError())
                else:
                    future.set_result(grade)
        finally:
            worker.close()

    def _grade(self, worker: Worker, problem: Problem, completion: str) -> Grade:
        try:
            if not worker.is_alive():
                worker.restart()
            outcome = worker.call((problem, completion), seconds=self._seconds)
        except (WorkerLost, RestemError, OSError) as error:
            return _error(str(error))
        if not outcome.ok:
            return _error(outcome.value)
        return as_grade(outcome.value)


def as_grade(value: Any) -> Grade:
    """Turn what a verifier returned into a valid Grade: True is 1, False is 0, a number is a reward, the rest is an
    error."""
    if isinstance(value, Grade):
        if value.reason not in REASONS or not isinstance(value.answer, str | None) or not isinstance(value.note, str):
            return _error(f"the verifier returned an invalid Grade: {value!r:.200}")
        if value.reward is None:
            return value
        problem = _reward_problem(value.reward)
        return value if problem is None else _error(problem)
    problem = _reward_problem(value)
    if problem is not None:
        return _error(problem)
    return Grade(reward=float(value), reason="correct" if value > 0 else "incorrect")


def _reward_problem(value: Any) -> str | None:
    if not isinstance(value, bool | int | float):
        return f"the verifier returned {type(value).__name__}, not a Grade, a bool or a number: {value!r:.100}"
    if not math.isfinite(value) or value < 0:
        return f"the verifier returned the reward {value}; a reward is a finite number, 0 or more"
    return None


def _error(note: str) -> Grade:
    return Grade(reward=None, reason="verifier_error", note=note)


def _start(count: int, spec: str, memory_mb: int | None) -> list[Worker]:
    """Start all at once; if one fails, end the others and raise its error."""
    made: list[Worker | BaseException] = []

    def start() -> None:
        try:
            made.append(Worker("restem.verifiers.pool:_make", spec, memory_mb=memory_mb))
        except BaseException as error:
            made.append(error)

    threads = [threading.Thread(target=start) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    workers = [worker for worker in made if isinstance(worker, Worker)]
    failures = [failure for failure in made if isinstance(failure, BaseException)]
    if failures:
        for worker in workers:
            worker.close()
        raise failures[0]
    return workers


def _make(spec: str) -> Callable[[Problem, str], Any]:
    """In the worker: load the verifier."""
    from restem.verifiers import load

    verifier = load(spec)

    def grade(problem: Problem, completion: str) -> Any:
        value = verifier(problem, completion)
        return value if isinstance(value, Grade | bool | int | float) else as_grade(value)

    return grade


def _spec(verifier: Callable[..., Any]) -> str:
    """Where a worker finds a function: its module, or its file when that is the main script."""
    module = getattr(verifier, "__module__", None)
    name = getattr(verifier, "__qualname__", "")
    if module == "__main__":
        file = getattr(sys.modules["__main__"], "__file__", None)
        if file is not None and name.isidentifier():
            return f"{Path(file).resolve()}:{name}"
    elif module and name.isidentifier() and getattr(sys.modules.get(module), name, None) is verifier:
        return f"{module}:{name}"
    raise RestemError(
        f"the verifier {name or verifier!r} cannot be found by a worker process: lambdas, inner functions and "
        "functions typed into an interactive session have no file. Put it at the top level of a file and pass "
        '"path/to/file.py:function".'
    )
