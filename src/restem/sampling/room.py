"""How many samples fit in flight off the CPU: planned at the lengths seen so far, not at the longest possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from restem.sampling.flight import SEATS
from restem.sampling.graphs import rounded_down

_GUESS = 0.5  # of the longest possible: the length expected before any has been seen
_ENOUGH = 32  # finished samples from which their lengths are believed
_AHEAD = 128  # questions that are computed and wait for rows
_MARGIN = 1.25  # those that finish first are the short ones


class Lengths:
    """Of the samples that one sampler has finished, in tokens."""

    def __init__(self) -> None:
        self.count = self.total = 0

    def add(self, tokens: int) -> None:
        self.count += 1
        self.total += tokens

    def expected(self, longest: int) -> int:
        """Tokens of the next samples, of which none has more than `longest`."""
        if self.count < _ENOUGH:
            return max(1, int(_GUESS * longest))
        return max(1, min(longest, int(_MARGIN * self.total / self.count)))


class Plan(NamedTuple):
    rows: int
    """At most in flight."""
    blocks: int
    """Of the pool."""
    seats: int
    """Rows that share one copy of their question."""
    share: float
    """Blocks of questions for each row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a stage needs."""

    block: int
    """Bytes of a block of keys and values in all layers."""
    row: int
    """Bytes of a row besides: its logits."""
    longest: int
    """Blocks of the longest possible sample."""
    expected: int
    """Blocks of one as long as those seen so far."""
    asked: Sequence[int]
    """Blocks of each question."""
    samples: int
    """All that are owed."""

    def plan(self, free: int, wanted: int, *, least_seats: int) -> Plan:
        """For so many free bytes, and so many rows at most: half of the memory for keys and values, a quarter for logits."""
        asked = sum(self.asked) / len(self.asked)
        sharing = min(SEATS, -(-self.samples // len(self.asked)))
        seats, share = 1 << (max(least_seats, sharing) - 1).bit_length(), asked / sharing
        affordable = free // 2 // self.block
        rows = min(wanted, int(affordable / (self.expected + share)), free // 4 // self.row)
        rows = max(1, rows if rows == wanted else rounded_down(rows))  # what is recorded for a size had better be full
        # Questions are computed some ahead of the rows that will sit at them.
        questions = math.ceil((rows / sharing + min(len(self.asked), _AHEAD)) * asked) + max(self.asked)
        # All at once are rarely twice as long as expected; if they are, some begin again.
        own = max(self.longest, rows * min(self.longest, 2 * self.expected))
        return Plan(rows, min(affordable, own + questions), seats, share)
