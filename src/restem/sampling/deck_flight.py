"""The samples in flight off the CPU: rows and questions in a pool of fixed size (`restem.sampling.deck`).

A row's first step feeds the last token of its prompt: so questions need no logits, and a row's first token comes as all others
do. When the pool is full, the youngest rows begin again later, and come out the same: a sample depends on its key alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from restem.models import logits_of
from restem.sampling import Owed, uniforms
from restem.sampling.blocks import Blocks, Ints
from restem.sampling.deck import Deck, Rows
from restem.sampling.flight import Flight, Row, compact
from restem.sampling.graphs import Replays
from restem.sampling.pool import Pool
from restem.sampling.slots import BLOCK

_PREFILL_TOKENS = 2048  # of questions in a pack, whose attention has a dense mask


@dataclass(slots=True, eq=False)
class Question:
    """A computed question from which owed samples are forked."""

    name: str
    text: tuple[int, ...]
    stored: int
    """Tokens in its blocks: all of the prompt but the prefix that stands apart, and the last token."""
    owed: deque[Owed]
    group: Group
    """Where the next row is to sit."""


@dataclass(slots=True, eq=False)
class Group:
    """Rows that share one copy of a question."""

    seats: list[int]
    """The empty ones."""
    question: Question | None = None
    """From which more rows may come; None = from none."""
    blocks: list[int] = field(default_factory=list)
    rows: int = 0


@dataclass(slots=True, kw_only=True)
class DeckRow(Row):
    group: Group
    seat: int
    blocks: list[int] = field(default_factory=list)


class Numbers:
    """What a step needs of each row, one entry a row, in the order of the rows."""

    def __init__(self, rows: int) -> None:
        self.token_R, self.place_R, self.position_R, self.cell_R, self.held_R = (np.zeros(rows, np.int64) for _ in range(5))
        self.uniform_RT = np.zeros((rows, BLOCK))  # those of the block that the row is in

    def of(self, rows: int) -> Rows:
        uniform_R = self.uniform_RT[np.arange(rows), self.place_R[:rows] % BLOCK]
        return Rows(self.token_R[:rows], self.position_R[:rows], self.cell_R[:rows], uniform_R)

    def advance(self, tokens: Sequence[int]) -> None:
        self.token_R[: len(tokens)] = tokens
        for array in (self.place_R, self.position_R, self.cell_R):
            array[: len(tokens)] += 1

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        source, target = (list(numbers) for numbers in zip(*moves, strict=True))
        for array in (self.token_R, self.place_R, self.position_R, self.cell_R, self.held_R, self.uniform_RT):
            array[target] = array[source]


class DeckFlight(Flight):
    """See `Flight`. `blocks`: those of the pool; `share`: a row's share of a question's; `replays`: how steps are launched."""

    rows: list[DeckRow]

    def __init__(self, *args: Any, blocks: Blocks, share: float, replays: Replays) -> None:
        super().__init__(*args)
        self.share = share
        self.blocks, self.computed, self.numbers = blocks, deque[Question](), Numbers(self.pace.most)
        self._allowed = self.pace.most  # rows, after the pool was full
        sampler = self.sampler
        self.pool = Pool(blocks.count, sampler.like(), self.prefix.transposed)
        self.deck = Deck(
            self.pool,
            blocks,
            self.pace.most,
            self.decoding,
            sampler.forward,
            lambda hidden: logits_of(sampler.model, hidden),
            replays,
        )

    def _held_back(self) -> Sequence[deque[Owed]]:
        return [question.owed for question in self.computed]

    # --- coming and going ---------------------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        started = False
        most = min(self.pace.rows, self._allowed, self._fitting())
        while len(self.rows) < most and (self.computed or self.waiting):
            if not self.computed and not self._compute_questions():
                break
            if not self._begin(self.computed[0]):
                break
            if not self.computed[0].owed:
                self._close(self.computed.popleft())
            started = True
        if not self.rows and (self.computed or self.waiting):
            raise torch.OutOfMemoryError("out of memory: not one sample fits")
        return started

    def _fitting(self) -> int:
        """Rows that the pool holds when they are as long as those seen so far."""
        own = -(-self.sampler.lengths.expected(self.decoding.max_tokens) // BLOCK)
        return max(1, int(self.blocks.count / (own + self.share)))

    def _begin(self, question: Question) -> bool:
        """Start a row of a question; False if it must wait for room."""
        if not question.group.seats and not self._copy(question):
            return False
        if not self._has_room(1):
            return False
        owed, group, place = question.owed.popleft(), question.group, len(self.rows)
        total = self.prefix.length + len(question.text)
        limit = min(self.decoding.max_tokens, self.sampler.context - total)
        row = DeckRow(owed, uniforms(self.stream, owed, limit), limit, group=group, seat=group.seats.pop())
        group.rows += 1
        self.rows.append(row)
        self.blocks.row_NM[group.blocks, row.seat] = place
        numbers = self.numbers
        numbers.token_R[place], numbers.position_R[place] = question.text[-1], total - 1
        numbers.place_R[place] = numbers.held_R[place] = 0
        self._extend(place)
        return True

    def _extend(self, place: int) -> None:
        """One more block for a row."""
        row, numbers = self.rows[place], self.numbers
        at = self.blocks.take_own(row.blocks, place, int(numbers.position_R[place]))
        numbers.cell_R[place] = self.pool.cell(at)
        first = numbers.held_R[place] * BLOCK
        numbers.held_R[place] += 1
        part = row.uniform[first : first + BLOCK]
        numbers.uniform_RT[place, : len(part)] = part

    def _copy(self, question: Question) -> bool:
        """A new group for a question whose last one is full."""
        if not self._has_room(len(question.group.blocks) + 1):
            return False
        full, question.group = question.group, self._group(question.stored)
        if full.blocks:
            self.pool.copy(list(zip(full.blocks, question.group.blocks, strict=True)))
        full.question, question.group.question = None, question
        self._free(full)
        return True

    def _group(self, stored: int) -> Group:
        group = Group(list(range(self.blocks.row_NM.shape[1]))[::-1])
        self.blocks.take_asked(group.blocks, self.prefix.apart, stored)
        return group

    def _close(self, question: Question) -> None:
        question.group.question = None
        self._free(question.group)

    def _free(self, group: Group) -> None:
        """Give back the blocks of a group that nobody needs any more."""
        if group.rows == 0 and group.question is None:
            self.blocks.give_asked(group.blocks)

    def _leave(self, row: DeckRow) -> None:
        self.blocks.give_own(row.blocks)
        self.blocks.row_NM[row.group.blocks, row.seat] = -1
        row.group.seats.append(row.seat)
        row.group.rows -= 1
        self._free(row.group)

    def _retire(self, leaving: Sequence[DeckRow]) -> None:
        """Take rows out; the last ones move into their places."""
        if not leaving:
            return
        names = {id(row) for row in leaving}
        moves = compact(self.rows, lambda row: id(row) not in names, [])
        for row in leaving:
            self._leave(row)
        if moves:
            self.numbers.move(moves)
        for _, target in moves:
            row = self.rows[target]
            self.blocks.row_NM[[self.blocks.at(number) for number in row.blocks], 0] = target
            self.blocks.row_NM[row.group.blocks, row.seat] = target

    # --- room ---------------------------------------------------------------------------------------------------------------

    def _has_room(self, wanted: int) -> bool:
        """Whether so many blocks can be taken now; holes are closed for it."""
        if self.blocks.is_scattered(wanted) and (moves := self.blocks.tidy()):
            self.pool.copy(moves)
            for place, row in enumerate(self.rows):
                within = self.numbers.place_R[place] - (self.numbers.held_R[place] - 1) * BLOCK
                self.numbers.cell_R[place] = self.pool.cell(self.blocks.at(row.blocks[-1])) + within
        return wanted <= self.blocks.free

    def _give_back(self) -> None:
        """Make room: by a question that no row has been forked from, else by the youngest row."""
        if self.computed and self.computed[-1].group.rows == 0:
            question = self.computed.pop()
            self._close(question)
            self.waiting.appendleft((question.name, question.owed))
            return
        if len(self.rows) == 1:
            raise torch.OutOfMemoryError("out of memory: not one sample fits")
        row = self.rows[int(self.numbers.place_R[: len(self.rows)].argmin())]
        if row.group.question is not None:
            row.group.question.owed.appendleft(row.owed)
        elif self.waiting and self.waiting[0][0] == row.owed.problem_id:
            self.waiting[0][1].appendleft(row.owed)
        else:
            self.waiting.appendleft((row.owed.problem_id, deque([row.owed])))
        self._retire([row])
        self._allowed = len(self.rows)

    # --- computing ----------------------------------------------------------------------------------------------------------

    def _compute_questions(self) -> bool:
        """Compute the next waiting questions in one pack; False if there is room for none."""
        prefix, batch, tokens = self.prefix, list[Question](), 0
        rest = prefix.length - prefix.apart
        while self.waiting:
            name, owed = self.waiting[0]
            text = self.texts[name]
            stored, tokens = rest + len(text) - 1, tokens + len(text)
            # Rows in flight grow: some room is left to them.
            wanted = -(-stored // BLOCK) + 1 + len(self.rows) // 8
            if (batch and tokens > _PREFILL_TOKENS) or not self._has_room(wanted):
                break
            self.waiting.popleft()
            question = Question(name, text, stored, owed, self._group(stored))
            question.group.question = question
            batch.append(question)
        if not batch:
            return False
        kv, starts = self.sampler.compute_questions([question.text[:-1] for question in batch], prefix)
        sources, cells = list[int](), list[int]()
        for question, start in zip(batch, starts, strict=True):
            sources += [*range(rest), *range(rest + start, start + question.stored)]
            first = [self.pool.cell(block) for block in question.group.blocks]
            cells += [first[place // BLOCK] + place % BLOCK for place in range(question.stored)]
        if kv is not None:
            self.pool.write(kv, sources, cells)
        self.computed.extend(batch)
        return True

    def _step(self) -> None:
        numbers = self.numbers
        while not self._has_room(len(border := self._at_border())):
            self._give_back()
        for place in border.tolist():
            self._extend(place)
        drawn = self.deck.step(numbers.of(len(self.rows)))
        self._note(self.rows, drawn.tokens, drawn.logprobs)
        numbers.advance(drawn.tokens)
        finished = [row for row in self.rows if row.finish]
        self._retire(finished)
        self.finished += finished
        for row in finished:
            self.sampler.lengths.add(len(row.tokens))
        if self.blocks.free > self.blocks.count // 4:
            self._allowed = min(self._allowed + len(finished), self.pace.most)

    def _at_border(self) -> Ints:
        """Rows whose next token needs a new block."""
        count = len(self.rows)
        return np.nonzero(self.numbers.place_R[:count] >= self.numbers.held_R[:count] * BLOCK)[0]
