"""vLLM in a process and an environment of its own (`vllm_server.py`), as a peer of `benchmarks.sampling`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any


class VLLM:
    """vLLM in a process of its own, which answers "measure" with a speed."""

    def __init__(self, settings: dict[str, Any], python: str) -> None:
        script = str(Path(__file__).with_name("vllm_server.py"))
        cores = f"0-{(os.cpu_count() or 1) - 1}"
        environment = os.environ | {
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "6",
        }
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [python, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
            text=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        self._answer("ready")
        self.seconds = time.perf_counter() - began

    def measure(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("measure\n")
        self.process.stdin.flush()
        return float(self._answer("speed"))

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its workers outlive it otherwise
        self.process.wait()

    def _answer(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(f"{word} "):
                return line.split()[1]
        raise RuntimeError(f"vLLM ended with exit code {self.process.wait()}")
