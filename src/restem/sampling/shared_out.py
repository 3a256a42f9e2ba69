"""A stage's samples, drawn by all processes of a run: each draws those of some problems, on its own device.

The first process draws its share and yields it together with what the others hand over, so that grading and files stay with it.
A sample depends on its key alone, so who draws it changes nothing. The one thing a newcomer would get wrong: every process is
told the whole stage's problems, for what they share is computed from all of them.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from restem.errors import RestemError
from restem.processes import Job, Processes
from restem.sampling import Decoding, Owed, Sampler, by_problem
from restem.types import Problem, Sample

_SECONDS = 0.2  # between two messages of a process, and between two looks for some
_TOKENS = 100_000  # of a message at most, or one sample
_numbers = count(1)


class SharedSampler:
    """Draws samples of one model in all processes. See `restem.sampling.Sampler` for the contract of `sample`.

    `own` opens this process's sampler, `elsewhere` that of another process, from what it holds; it is pickled.
    """

    def __init__(
        self, own: Callable[[], Sampler], elsewhere: Callable[[dict[str, Any]], Sampler], processes: Processes
    ) -> None:
        self.own, self.elsewhere, self.processes = own, elsewhere, processes

    def sample(self, problems: Sequence[Problem], owed: Iterable[Owed], decoding: Decoding, *, stream: str) -> Iterator[Sample]:
        mine, *others = share_out(owed, self.processes.count)
        told = [replace(problem, reference=None) for problem in problems]
        job = DrawingJob(f"samples {next(_numbers)}", self.elsewhere, told, others, decoding, stream)
        handed_over = _HandedOver(self.processes, job)
        self.processes.send(job)
        try:
            for sample in self.own().sample(problems, mine, decoding, stream=stream):
                yield sample
                yield from handed_over.now()
            yield from handed_over.rest()
        finally:
            handed_over.end()


def share_out(owed: Iterable[Owed], processes: int) -> list[list[Owed]]:
    """Owed samples for each process: whole problems, each to the one with the fewest samples so far."""
    shares: list[list[Owed]] = [[] for _ in range(processes)]
    for problem, indices in by_problem(owed).items():
        min(shares, key=len).extend(Owed(problem, index) for index in indices)
    return shares


@dataclass(frozen=True, slots=True)
class DrawingJob(Job):
    """Samples to draw; `shares`: those of the second process, the third, and so on."""

    key: str
    open: Callable[[dict[str, Any]], Sampler]
    problems: list[Problem]
    shares: list[list[Owed]]
    decoding: Decoding
    stream: str

    def work(self, processes: Processes, held: dict[str, Any]) -> None:
        share, outbox = self.shares[processes.rank - 1], _Outbox(processes, self.key)
        if not share:
            return
        try:
            for sample in self.open(held).sample(self.problems, share, self.decoding, stream=self.stream):
                if not outbox.add(sample):
                    return
        except RestemError as error:
            outbox.close(RestemError(str(error)))
        except Exception as error:
            traceback.print_exc()
            outbox.close(RuntimeError(f"{type(error).__name__}: {error}; its stack is above"))
        else:
            outbox.close(None)


class _Outbox:
    """What another process hands to the first: messages of (samples, whether it was the last, what went wrong)."""

    def __init__(self, processes: Processes, key: str) -> None:
        self.processes, self.key, self.number = processes, f"{key} of {processes.rank}", 0
        self.ended = f"{key} ended"
        self.samples: list[Sample] = []
        self.sent = time.monotonic()

    def add(self, sample: Sample) -> bool:
        """False if nobody wants more."""
        self.samples.append(sample)
        is_large = sum(len(sample.token_ids) for sample in self.samples) > _TOKENS
        if is_large or time.monotonic() - self.sent > _SECONDS:
            if self.processes.has(self.ended):
                return False
            self._send(False, None)
        return True

    def close(self, error: Exception | None) -> None:
        self._send(True, error)

    def _send(self, is_last: bool, error: Exception | None) -> None:
        self.number += 1
        self.processes.put(f"{self.key} {self.number}", (self.samples, is_last, error))
        self.samples, self.sent = [], time.monotonic()


class _HandedOver:
    """The other processes' samples, as the first one gets them."""

    def __init__(self, processes: Processes, job: DrawingJob) -> None:
        self.processes, self.key = processes, job.key
        self.next = {rank: 1 for rank, share in enumerate(job.shares, start=1) if share}
        self.looked = time.monotonic()

    def now(self, pause: float = _SECONDS) -> Iterator[Sample]:
        """What has come since the last look; looks no more often than every `pause` seconds."""
        if time.monotonic() - self.looked > pause:
            self.looked = time.monotonic()
            for rank in list(self.next):
                while rank in self.next and self.processes.has(f"{self.key} of {rank} {self.next[rank]}"):
                    yield from self._take(rank)

    def rest(self) -> Iterator[Sample]:
        """All that is still to come."""
        while self.next:
            yield from self.now(pause=0.0)
            time.sleep(_SECONDS / 10)

    def end(self) -> None:
        """Nothing more is wanted; whoever still draws stops at its next finished sample."""
        if self.next:
            self.processes.put(f"{self.key} ended", None)

    def _take(self, rank: int) -> list[Sample]:
        samples, is_last, error = self.processes.take(f"{self.key} of {rank} {self.next[rank]}")
        self.next[rank] += 1
        if is_last:
            del self.next[rank]
        if error is not None:
            raise type(error)(f"process {rank}, which drew a share of the samples, failed: {error}")
        return list(samples)
