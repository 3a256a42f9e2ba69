"""What a program under test may use."""

from __future__ import annotations

from dataclasses import dataclass


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
