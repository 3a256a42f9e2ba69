"""Seconds spent in the parts of a training step.

On CUDA, work is timed where it is done, by events in its stream: the processor hands it over and goes on, and waiting for it
after each part would leave the device idle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Times named parts, each as often as one likes: `with clock("forward"): ...`, then `seconds()`, once."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.began = device, time.perf_counter()
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = self._now()
        yield
        self._spans.append((part, began, self._now()))

    def seconds(self) -> dict[str, float]:
        """By part; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for part, began, ended in self._spans:
            spent = ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000
            found[part] = found.get(part, 0.0) + spent
        return found

    def total(self) -> float:
        return time.perf_counter() - self.began

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
