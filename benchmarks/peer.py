"""A peer of `benchmarks.evaluation` in a process of its own, with the Python of its own environment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any


class Peer:
    """Runs `lm_eval_peer.py`, which gets ready and then answers "measure" with seconds and with what came out.

    A context manager: its processes end with the block. What it says on stderr is kept, and shown if it fails.
    """

    def __init__(self, python: str, settings: dict[str, Any], folder: Path) -> None:
        script = str(Path(__file__).with_name("lm_eval_peer.py").absolute())
        self.folder, self.log = folder, folder / "peer.log"
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [str(Path(python).absolute()), script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                cwd=folder,
                env=os.environ | offline,
                text=True,
            )
        try:
            self._tell(json.dumps({**settings, "folder": str(folder)}))
            self._answer("ready")
        except BaseException:
            self.close()
            raise

    def measure(self) -> tuple[float, Any]:
        """Seconds, and what came out."""
        self._tell("measure")
        seconds, file = self._answer("done")
        return float(seconds), json.loads((self.folder / file).read_text(encoding="utf-8"))

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a process that has ended says more in its log
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def _answer(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(f"{word} "):
                return line.split()[1:]
        said = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"the peer ended with exit code {self.process.wait()}:\n{said}")


def package_of(python: str) -> Path:
    """The folder of the lm_eval that another Python has."""
    find = "import importlib.util as u; print(u.find_spec('lm_eval').submodule_search_locations[0])"
    done = subprocess.run([python, "-c", find], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} has no lm-eval: {done.stderr.strip().splitlines()[-1]}")
    return Path(done.stdout.strip())
