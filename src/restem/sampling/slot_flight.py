"""The samples in flight on a CPU: rows and questions in slots (`restem.sampling.slots`), as memory is read best.

Rows, and the groups in which they share a question, stand in front without gaps: the last one moves into a gap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restem.models import logits_of
from restem.sampling import Owed, uniforms
from restem.sampling.decode import Buffers, Decode, Seats
from restem.sampling.decoding import choose
from restem.sampling.flight import ROW_ALIGN, SEATS, Flight, Row, compact
from restem.sampling.slots import BLOCK, KV, Slots

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


@dataclass(slots=True, kw_only=True)
class SlotRow(Row):
    """A row in the slot of its place in the list."""

    group: Group


class SlotFlight(Flight):
    """See `Flight`."""

    rows: list[SlotRow]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.computed: deque[Question] = deque()
        self.own: Slots | None = None
        self.questions: Slots | None = None
        self.groups: list[Group] = []
        self._seats: Seats | None = None
        self._buffers = Buffers()

    def _held_back(self) -> Sequence[deque[Owed]]:
        return [question.owed for question in self.computed]

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
                self.rows.append(SlotRow(owed, uniforms(self.stream, owed, limit), limit, group=group))
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
        if group is None or group.rows >= SEATS:
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
        gone: list[SlotRow] = []
        moves = compact(self.rows, lambda row: row.finish is None, gone)
        self.finished += gone
        for row in gone:
            row.group.rows -= 1
        # A row with one token has none of its own computed yet, and may stand beyond the slots that there are.
        begun = [(source, target) for source, target in moves if len(self.rows[target].tokens) > 1]
        if self.own is not None and begun:
            self.own.move(begun, max(len(self.rows[target].tokens) for _, target in begun))
        empty: list[Group] = []
        moves = compact(self.groups, lambda group: group.rows > 0 or group.is_open, empty)
        if self.questions is not None and moves:
            self.questions.move(moves, max(self.groups[target].length for _, target in moves))
        for slot, group in enumerate(self.groups):
            group.slot = slot
        self._seats = None

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

    def _choose(self, logits: Tensor, rows: list[SlotRow]) -> None:
        uniform = torch.tensor([row.uniform[len(row.tokens)] for row in rows], dtype=torch.float64, device=logits.device)
        tokens, logprobs = choose(logits, uniform, self.decoding)
        self._note(rows, tokens.tolist(), logprobs.tolist())
