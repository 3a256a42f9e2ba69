"""One process that can be killed: it serves a function over a socket until it is told to stop or its parent is gone.

Started as a fresh interpreter rather than through `multiprocessing`, so the user's main module is not imported again
and a script without a main guard works, as does an interactive session. It is not a sandbox: what runs here has the
user's rights.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from restem.errors import RestemError

START_SECONDS = 120.0
"""How long an interpreter may take to import what it serves, on a busy machine."""
_GRACE = 5
"""Seconds after the limit at which the kernel ends a worker whose parent did not."""


class WorkerLost(Exception):
    """The worker hit its time limit or died; it has been killed and reaped."""

    def __init__(self, note: str, *, timed_out: bool) -> None:
        super().__init__(note)
        self.timed_out = timed_out


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call gave: `ok` and its value, or the exception's type and text."""

    ok: bool
    value: Any


class Worker:
    """A process serving the function that `factory` ("package.module:function", called with `argument`) returns.

    Belongs to one thread at a time. `call` raises WorkerLost after a kill or a crash; `restart` replaces the process.
    """

    def __init__(self, factory: str, argument: Any = None, *, memory_mb: int | None = None) -> None:
        self._setup = (list(sys.path), factory, argument, memory_mb)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self.restart()

    def restart(self) -> None:
        """Start a process, after ending the one that may be there. Raises RestemError if it cannot serve."""
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._connection = Connection(ours.detach())
            command = (
                f"import sys; sys.path[:0] = {self._setup[0]!r}; "
                f"from restem.verifiers.worker import _main; _main({theirs.fileno()})"
            )
            self._process = subprocess.Popen(
                [sys.executable, "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a verifier prints must not mix with our results
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "RESTEM_WORKER": "1"},
                start_new_session=True,
            )
        try:
            self._connection.send(self._setup)
            ready = self._receive(START_SECONDS)
        except WorkerLost as lost:
            raise RestemError(f"a verifier process could not be started: {lost}") from None
        if not ready.ok:
            self.close()
            raise RestemError(f"a verifier process could not load its verifier: {ready.value}")

    def call(self, arguments: tuple[Any, ...], *, seconds: float) -> Outcome:
        """Run the function on `arguments` for at most `seconds`."""
        assert self._connection is not None, "the worker is closed"
        try:
            self._connection.send((arguments, seconds))
        except OSError:
            raise self._lost() from None
        except Exception as error:  # arguments that cannot be pickled; nothing has been sent
            return Outcome(False, f"the problem could not be sent to the verifier: {describe(error)}")
        return self._receive(seconds)

    def _receive(self, seconds: float) -> Outcome:
        assert self._connection is not None
        try:
            if self._connection.poll(seconds):
                outcome = self._connection.recv()
                assert isinstance(outcome, Outcome)
                return outcome
        except (EOFError, OSError):
            raise self._lost() from None
        self.kill()
        raise WorkerLost(f"time limit of {seconds:g} s", timed_out=True)

    def _lost(self) -> WorkerLost:
        process = self._process
        self.kill()
        code = process.returncode if process else None
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return WorkerLost(f"the verifier's process died ({how})", timed_out=False)

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def kill(self) -> None:
        """End the process and everything that it started, now, and reap it."""
        if self._process is not None:
            if self._process.poll() is None:
                # Our own call to poll() proves that the id is still ours to kill.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    close = kill


def describe(error: BaseException) -> str:
    """An exception in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def _main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    connection: Connection[Any, Any] = Connection(descriptor)
    try:
        path, factory, argument, memory_mb = connection.recv()
        sys.path[:] = path
        try:
            function = _load(factory, argument, memory_mb)
        except BaseException as error:
            connection.send(Outcome(False, str(error) if isinstance(error, RestemError) else describe(error)))
            return
        connection.send(Outcome(True, None))
        while True:
            arguments, seconds = connection.recv()
            # The kernel ends a worker whose parent is gone, even inside C code that never returns.
            signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)
            outcome = _run(function, arguments)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(outcome)
    except (EOFError, OSError):
        return


def _load(factory: str, argument: Any, memory_mb: int | None) -> Callable[..., Any]:
    import importlib

    module, _, name = factory.partition(":")
    make = getattr(importlib.import_module(module), name)
    function: Callable[..., Any] = make() if argument is None else make(argument)
    if memory_mb is not None:
        with contextlib.suppress(ImportError, ValueError):
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return function


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Outcome:
    try:
        outcome = Outcome(True, function(*arguments))
        pickle.dumps(outcome)
        return outcome
    except MemoryError:
        os._exit(77)  # what is left of the process cannot be trusted
    except (Exception, SystemExit) as error:
        return Outcome(False, describe(error))
