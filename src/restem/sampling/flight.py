"""The samples in flight of one call: who is drawn now, who is next, and what has finished.

A finished row's place goes to an owed sample at once, across problems and shards. Rows, and the groups in which they share a
question, stand in front without gaps: the last one moves into a gap.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from restem.models import logits_of
from restem.sampling import Decoding, Owed, uniforms
from restem.sampling.decode import Buffers, Decode, Seats
from restem.sampling.decoding import choose
from restem.sampling.finish import Finisher
from restem.sampling.slots import BLOCK, KV, Slots
from restem.types import Sample

if TYPE_CHECKING:
    from restem.sampling.tree import Prefix, TreeSampler

ROW_ALIGN = 16  # below this many rows some float32 matrix products sum in another order
_SEATS = 32  # rows that share one copy of their question
_PREFILL_TOKENS = 1024


@dataclass(slots=True)
class Question:
    """A computed question from which owed samples are forked."""

    kv: KV
    logits: Tensor
    total: int
    """Tokens of the whole prompt."""
    owed: deque[Owed]
    group: Group | None = None
    """Where the next row is to sit."""


@dataclass(slots=True)
class Group:
    """Rows that share a question: one slot of the questions."""

    slot: int
    length: int
    rows: int = 0
    is_open: bool = True
    """More rows may come."""


@dataclass(slots=True)
class Row:
    """One sample in flight, in the slot of its place in the list."""

    owed: Owed
    group: Group
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
        self.computed: deque[Question] = deque()
        self.own: Slots | None = None
        self.questions: Slots | None = None
        self.groups: list[Group] = []
        self.rows: list[Row] = []
        self.finished: list[Row] = []
        self._seats: Seats | None = None
        self._buffers = Buffers()

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
        runs = [[row.owed for row in (*self.rows, *self.finished)], *(q.owed for q in self.computed)]
        for run in (*runs, *(owed for _, owed in self.waiting)):
            for name, index in run:
                left.setdefault(name, []).append(index)
        return left

    # --- coming and going ---------------------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Fill the free rows with owed samples and draw their first tokens. True if any was owed."""
        started = False
        while len(self.rows) < self.pace.rows and (self.computed or self.waiting):
            if not self.computed:
                self._compute_questions()
            question = self.computed[0]
            count = min(len(question.owed), self.pace.rows - len(self.rows))
            limit = min(self.decoding.max_tokens, self.sampler.context - question.total)
            first = len(self.rows)
            for _ in range(count):
                owed = question.owed.popleft()
                group = self._seat(question)
                group.rows += 1
                self.rows.append(Row(owed, group, uniforms(self.stream, owed, limit), limit))
            if not question.owed:
                self.computed.popleft()
                if question.group is not None:
                    question.group.is_open = False
            self._choose(question.logits.expand(count, -1), self.rows[first:])
            self._seats = None
            self._retire()
            started = True
        return started

    def _seat(self, question: Question) -> Group:
        """The group of the question's next row; a new one when the last is full."""
        group = question.group
        if group is None or group.rows >= _SEATS:
            if group is not None:
                group.is_open = False
            group = question.group = Group(len(self.groups), question.kv.length)
            self.groups.append(group)
            if self.questions is None:
                self.questions = Slots(question.kv, 4)
            if len(self.groups) > self.questions.slots:
                self.questions.reserve(2 * self.questions.slots, 0)
            self.questions.put(group.slot, question.kv)
        return group

    def _retire(self) -> None:
        """Move finished rows out, and the last rows into their places; the same for groups that nobody needs any more."""
        if not any(row.finish for row in self.rows):
            return
        gone: list[Row] = []
        moves = _compact(self.rows, lambda row: row.finish is None, gone)
        self.finished += gone
        for row in gone:
            row.group.rows -= 1
        # A row with one token has none of its own computed yet, and may stand beyond the slots that there are.
        begun = [(source, target) for source, target in moves if len(self.rows[target].tokens) > 1]
        if self.own is not None and begun:
            self.own.move(begun, max(len(self.rows[target].tokens) for _, target in begun))
        empty: list[Group] = []
        moves = _compact(self.groups, lambda group: group.rows > 0 or group.is_open, empty)
        if self.questions is not None and moves:
            self.questions.move(moves, max(self.groups[target].length for _, target in moves))
        for slot, group in enumerate(self.groups):
            group.slot = slot
        self._seats = None

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

    # --- computing ----------------------------------------------------------------------------------------------------------

    def _compute_questions(self) -> None:
        """Compute the next waiting questions in one pack: their keys and values, and the logits of the first token."""
        texts: list[tuple[int, ...]] = []
        owed: list[deque[Owed]] = []
        while self.waiting and (not texts or sum(map(len, texts)) + len(self.texts[self.waiting[0][0]]) <= _PREFILL_TOKENS):
            name, wanted = self.waiting.popleft()
            texts.append(self.texts[name])
            owed.append(wanted)
        for (kv, logits), text, wanted in zip(self.sampler.compute(texts, self.prefix), texts, owed, strict=True):
            own = kv if self.prefix.apart or self.prefix.kv is None else self.prefix.kv.followed_by(kv)
            self.computed.append(Question(own, logits, self.prefix.length + len(text), wanted))

    def _step(self) -> None:
        """One token for every row in flight. The products see a multiple of 16 rows; the fillers are nobody's."""
        rows = -(-len(self.rows) // ROW_ALIGN) * ROW_ALIGN
        filler = [0] * (rows - len(self.rows))
        assert self.questions is not None
        place = [len(row.tokens) - 1 for row in self.rows] + filler
        if self.own is None:
            self.own = Slots(self.questions.like, rows, block=BLOCK)
        if rows > self.own.slots:
            self.own.reserve(max(rows, min(2 * self.own.slots, self.pace.most)), 0)
        self.own.reserve(self.own.slots, max(place) + 1)
        question = [row.group.length for row in self.rows] + filler
        device = self.sampler.device
        if self._seats is None or len(self._seats.seat_R) != rows:
            self._seats = Seats.of([row.group.slot for row in self.rows], rows, self.sampler.least_seats, device)
        attends = Decode(
            prefix=self.prefix.transposed,
            questions=self.questions,
            own=self.own,
            seats=self._seats,
            place_R=place,
            question_R=question,
            buffers=self._buffers,
            heads=self.sampler.heads,
        )
        tokens = torch.tensor([row.tokens[-1] for row in self.rows] + filler, device=device)
        position = torch.tensor(place, device=device) + torch.tensor(question, device=device) + self.prefix.apart
        hidden = self.sampler.forward(tokens[:, None], position[:, None], attends)
        logits = logits_of(self.sampler.model, hidden[:, 0])[: len(self.rows)]
        self._choose(logits, self.rows)
        self._retire()

    def _choose(self, logits: Tensor, rows: list[Row]) -> None:
        uniform = torch.tensor([row.uniform[len(row.tokens)] for row in rows], dtype=torch.float64, device=logits.device)
        tokens, logprobs = choose(logits, uniform, self.decoding)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.logprob += logprob
            if token in self.sampler.end_ids:
                row.finish = "stop"
                continue
            row.tokens.append(token)
            if self.finisher.stops(row.tokens):
                row.finish = "stop"
            elif len(row.tokens) >= row.limit:
                row.finish = "length"


def _compact(items: list[Any], stays: Any, gone: list[Any]) -> list[tuple[int, int]]:
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
