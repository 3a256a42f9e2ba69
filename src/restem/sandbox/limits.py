"""What a program under test may use."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cache

_TURNS, _REFERENCE_S = 300_000, 0.008
"""The machine that default time limits are meant for takes so long for so many turns of a plain loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one test of a program. For HumanEval and MBPP, whose asserts run in a row, of all of them together."""

    time_s: float = 4.0
    """Seconds of processor time. The wall clock may take longer on a busy machine, a sleeping program not."""
    memory_mb: int = 1024
    """Address space of the process."""
    output_kb: int = 1024
    """What it may print, and the size of a value that it may return."""
    processes: int = 16
    """Threads at once, where the rung can count them. A program never starts another process."""
    file_kb: int = 4 << 10
    """Largest file that it may write, where it may write any."""

    def __post_init__(self) -> None:
        if self.time_s <= 0 or self.memory_mb < 64 or self.output_kb < 1 or self.processes < 1 or self.file_kb < 0:
            raise ValueError(f"limits must be positive, and the memory at least 64 MB: {self}")


@cache
def slowness() -> float:
    """How many times as long as the machine that default time limits are meant for this one takes to run Python.

    Processor time of a plain loop, the least of five tries; in quarters, from 1 to 4, so that one machine says the same each
    time. So a slow but right program passes on a slow machine too.
    """
    tries = []
    for _ in range(5):
        began = time.process_time()
        for turn in range(_TURNS):
            if turn % 7 == 0:
                pass
        tries.append(time.process_time() - began)
    return min(4.0, max(1.0, math.ceil(4 * min(tries) / _REFERENCE_S) / 4))
