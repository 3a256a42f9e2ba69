"""Which block of keys and values is whose, in a pool of fixed size: the bookkeeping of `restem.sampling.pool`, without tensors.

A block holds 64 tokens. Questions take blocks from the bottom of the pool, rows from its top, each the nearest free one: what
is in use stands together at both ends, where it is read in place. Holes are closed by moving the farthest blocks into them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from restem.sampling.slots import BLOCK

NOWHERE = 1 << 40  # a position that no text reaches: where free blocks of rows stand

Ints = np.ndarray[Any, np.dtype[np.int64]]
Move = tuple[int, int]


@dataclass
class End:
    """The blocks of one end of the pool, numbered from there on."""

    high: int = 0
    """One more than the highest number in use."""
    owners: dict[int, tuple[list[int], int]] = field(default_factory=dict)
    """By number: the list of a row's or question's blocks, and the place in it."""
    _free: list[int] = field(default_factory=list)

    def take(self, blocks: list[int]) -> int:
        """Add a block to a list."""
        while self._free and (self._free[0] >= self.high or self._free[0] in self.owners):
            heapq.heappop(self._free)
        number = heapq.heappop(self._free) if self._free else self.high
        self.high = max(self.high, number + 1)
        self.owners[number] = blocks, len(blocks)
        blocks.append(number)
        return number

    def give(self, blocks: list[int]) -> None:
        """Take all blocks of a list back."""
        for number in blocks:
            del self.owners[number]
            heapq.heappush(self._free, number)
        while self.high and self.high - 1 not in self.owners:
            self.high -= 1
        blocks.clear()

    def tidy(self) -> list[Move]:
        """Close all holes; what was moved, from and to."""
        holes = [number for number in range(len(self.owners)) if number not in self.owners]
        farthest = sorted(self.owners, reverse=True)[: len(holes)]
        moves = list(zip(farthest, holes, strict=True))
        for source, hole in moves:
            blocks, place = self.owners[hole] = self.owners.pop(source)
            blocks[place] = hole
        self.high, self._free = len(self.owners), []
        return moves


class Blocks:
    """A pool of `count` blocks, with what a step must know of each. `seats`: rows that may share a question's block."""

    def __init__(self, count: int, seats: int) -> None:
        self.count, self.asked, self.own = count, End(), End()
        self.row_NM: Ints = np.full((count, seats), -1)
        """Of a question's block: the rows that attend to it; -1 = an empty seat. Of a row's: the row, in the first column."""
        self.start_N: Ints = np.full(count, NOWHERE)
        """Position in the text of the first token."""
        self.held_N: Ints = np.zeros(count, dtype=np.int64)
        """Tokens of a question's block."""

    @property
    def free(self) -> int:
        return self.count - len(self.asked.owners) - len(self.own.owners)

    def is_scattered(self, wanted: int) -> bool:
        """Whether the ends would meet over so many more blocks, or most of what is read is holes."""
        meet = self.asked.high + self.own.high + wanted > self.count
        return meet or any(end.high > 64 and end.high > 2 * len(end.owners) for end in (self.asked, self.own))

    def at(self, number: int) -> int:
        """Where the block of a row stands in the pool."""
        return self.count - 1 - number

    def take_own(self, blocks: list[int], row: int, start: int) -> int:
        at = self.at(self.own.take(blocks))
        self.row_NM[at, 0], self.start_N[at] = row, start
        return at

    def take_asked(self, blocks: list[int], start: int, tokens: int) -> None:
        """As many blocks as a question of so many tokens fills."""
        for first in range(0, tokens, BLOCK):
            at = self.asked.take(blocks)
            self.start_N[at], self.held_N[at] = start + first, min(BLOCK, tokens - first)

    def give_own(self, blocks: list[int]) -> None:
        self._forget([self.at(number) for number in blocks])
        self.own.give(blocks)

    def give_asked(self, blocks: list[int]) -> None:
        self._forget(blocks)
        self.asked.give(blocks)

    def tidy(self) -> list[Move]:
        """Close the holes; which places of the pool must be copied where."""
        moves = self.asked.tidy() + [(self.at(a), self.at(b)) for a, b in self.own.tidy()]
        for source, target in moves:
            for array in (self.row_NM, self.start_N, self.held_N):
                array[target] = array[source]
            self._forget([source])
        return moves

    def _forget(self, places: Sequence[int]) -> None:
        index = list(places)
        self.row_NM[index], self.start_N[index], self.held_N[index] = -1, NOWHERE, 0
