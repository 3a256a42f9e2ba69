"""The samples in flight of one call: who is drawn now, who is next, and what has finished.

A finished row's place goes to an owed sample at once, across problems and shards. Where keys and values lie, and how a step is
computed, is left to `SlotFlight` on a CPU and to `DeckFlight` elsewhere.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from restem.sampling import Decoding, Owed
from restem.sampling.finish import Finisher
from restem.types import Sample

if TYPE_CHECKING:
    from restem.sampling.tree import Prefix, TreeSampler

ROW_ALIGN = 16  # below this many rows some float32 matrix products sum in another order
SEATS = 32  # rows that share one copy of their question


@dataclass(slots=True)
class Row:
    """One sample in flight."""

    owed: Owed
    uniform: np.ndarray[Any, np.dtype[np.float64]]
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finish: str | None = None


class Pace:
    """How many rows to keep in flight: doubled while that makes the machine faster by more than a trifle, up to `most`.

    `found`: more rows than the first were tried before, and were no faster; so memory does not grow from stage to stage.
    """

    _STEPS = 6

    def __init__(self, first: int, most: int, *, found: bool = False) -> None:
        self.rows, self.most, self.found = min(first, most), most, found
        self._best = (0.0, self.rows)
        self._settled = found or self.rows == most
        self._seconds: list[float] = []

    def step(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        if self._settled or rows < self.rows:
            return
        self._seconds.append(seconds)
        if len(self._seconds) < self._STEPS:
            return
        speed, self._seconds = rows / float(np.median(self._seconds)), []
        if speed > 1.04 * self._best[0]:
            self._best = speed, self.rows
            self._settled = self.rows == self.most
            self.rows = min(2 * self.rows, self.most)
        else:
            self._settled = self.found = True
            self.rows = self._best[1]


class Flight:
    """Draws what a queue owes. `queue`: sample numbers by problem; `prompts`: token ids of the whole stage."""

    def __init__(
        self,
        sampler: TreeSampler,
        prefix: Prefix,
        prompts: dict[str, tuple[int, ...]],
        queue: dict[str, list[int]],
        decoding: Decoding,
        stream: str,
        pace: Pace,
    ) -> None:
        self.sampler, self.prefix, self.decoding, self.stream, self.pace = sampler, prefix, decoding, stream, pace
        self.finisher = Finisher(sampler.renderer, decoding.stop)
        self.texts = {name: prompts[name][prefix.length :] for name in queue}
        self.waiting = deque((name, deque(Owed(name, index) for index in indices)) for name, indices in queue.items())
        self.rows: list[Any] = []
        self.finished: list[Row] = []

    def run(self) -> Iterator[Sample]:
        """Every owed sample once, in the order in which they finish."""
        while self._admit() or self.rows:
            yield from self._take_finished()
            if self.rows:
                began = time.perf_counter()
                rows = len(self.rows)
                self._step()
                self.pace.step(rows, time.perf_counter() - began)
                yield from self._take_finished()

    def owed(self) -> dict[str, list[int]]:
        """What has not been handed over, by problem: in flight, computed, or waiting."""
        left: dict[str, list[int]] = {}
        runs = [[row.owed for row in (*self.rows, *self.finished)], *self._held_back()]
        for run in (*runs, *(owed for _, owed in self.waiting)):
            for name, index in run:
                left.setdefault(name, []).append(index)
        return left

    def _admit(self) -> bool:
        """Fill the free rows with owed samples. True if any was owed."""
        raise NotImplementedError

    def _step(self) -> None:
        """One token for every row in flight; those that are finished move from `rows` to `finished`."""
        raise NotImplementedError

    def _held_back(self) -> Sequence[deque[Owed]]:
        """What is owed of questions that are computed."""
        raise NotImplementedError

    def _take_finished(self) -> Iterator[Sample]:
        for row in self.finished:
            token_ids, text = self.finisher.close(row.tokens)
            yield Sample(
                problem_id=row.owed.problem_id,
                index=row.owed.index,
                token_ids=tuple(token_ids),
                text=text,
                finish="stop" if row.finish == "stop" else "length",
                logprob=row.logprob,
            )
        self.finished = []

    def _note(self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """What was drawn for each row."""
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.logprob += logprob
            if token in self.sampler.end_ids:
                row.finish = "stop"
                continue
            row.tokens.append(token)
            if self.finisher.stops(row.tokens):
                row.finish = "stop"
            elif len(row.tokens) >= row.limit:
                row.finish = "length"


def compact(items: list[Any], stays: Callable[[Any], bool], gone: list[Any]) -> list[tuple[int, int]]:
    """Drop items from a list in place, filling each gap with the last that stays; return the moves (source, target)."""
    moves = []
    where = list(range(len(items)))
    slot = 0
    while slot < len(items):
        if stays(items[slot]):
            slot += 1
            continue
        gone.append(items[slot])
        items[slot], where[slot] = items[-1], where[-1]
        items.pop()
        where.pop()
    for target, source in enumerate(where):
        if source != target:
            moves.append((source, target))
    return moves
