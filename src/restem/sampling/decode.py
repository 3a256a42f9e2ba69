"""Attention of one decoding step: a new token per row, on the prefix, on its problem's question, and on its own tokens.

All rows attend to the prefix in place, as one product. The rows of a problem attend to its question in place, as one product
per group of rows (`Seats` says who sits where). Only the tokens a row has drawn itself are its own. The scores of the three
stand side by side in one buffer, so that there is one softmax over all of them: exact, and nothing to merge.

Shapes: R rows, K key-value heads, G query heads per key-value head, D and V the sizes of keys and values, C groups of M seats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from restem.attention import Rule
from restem.sampling.slots import BLOCK, Slots, whole_blocks


@dataclass(frozen=True, slots=True)
class Seats:
    """Which rows sit in which group. A group is one slot of the questions; an empty seat holds row 0, whom nobody asks."""

    row_CM: Tensor
    seat_R: Tensor
    """Index into the flat C x M seats."""
    groups: int
    size: int

    @staticmethod
    def of(group_of_row: Sequence[int], rows: int, least: int, device: torch.device) -> Seats:
        """`rows` may be more than there are: fillers. `least`: fewest seats of a group."""
        taken: dict[int, int] = {}
        seats = []
        for group in group_of_row:
            seats.append((group, taken.get(group, 0)))
            taken[group] = taken.get(group, 0) + 1
        # Powers of two: few shapes, since each new one costs the library a plan of its own.
        size = 1 << (max(least, *taken.values()) - 1).bit_length()
        groups = max(taken) + 1
        row = [0] * (groups * size)
        for number, (group, seat) in enumerate(seats):
            row[group * size + seat] = number
        seat_of_row = [group * size + seat for group, seat in seats] + [0] * (rows - len(seats))
        return Seats(torch.tensor(row, device=device), torch.tensor(seat_of_row, device=device), groups, size)


@dataclass(slots=True)
class Buffers:
    """Scores and weights [K, R, G, W] of a step, made again only when they do not fit."""

    flat: tuple[Tensor, Tensor] | None = None

    def fit(self, shape: tuple[int, ...], prefix: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of this shape; the scores right behind `prefix` columns, where no key is, are -inf up to the next block."""
        size = math.prod(shape)
        if self.flat is None or self.flat[0].numel() < size:
            self.flat = like.new_empty(size), like.new_empty(size)
        scores, weights = (buffer[:size].view(shape) for buffer in self.flat)
        scores[..., prefix : whole_blocks(prefix)] = float("-inf")
        return scores, weights


@dataclass
class Decode:
    """One step; what it needs to know of the rows in flight is worked out once, for all layers.

    `place_R`: where each row's new token goes among its own. `question_R`: length of each row's question. Fillers at the end
    have a place of 0. `prefix`: keys transposed, [L, K, D, P] and [L, K, P, V].
    """

    prefix: tuple[Tensor, Tensor] | None
    questions: Slots
    own: Slots
    seats: Seats
    place_R: list[int]
    question_R: list[int]
    buffers: Buffers
    heads: int
    length: int = field(init=False)
    """Tokens of the prefix."""
    question_at: int = field(init=False)
    """Column where the scores on the questions start; whole blocks, so that a wider neighbour changes no sum's order."""
    own_at: int = field(init=False)
    width: int = field(init=False)
    scores: Tensor = field(init=False)
    weights: Tensor = field(init=False)
    _writes: list[tuple[Tensor, Tensor, Tensor]] = field(init=False, default_factory=list)
    _masks: dict[int | None, tuple[Tensor | None, Tensor, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        like = self.own.like.keys
        self.length = 0 if self.prefix is None else self.prefix[0].shape[-1]
        self.question_at = whole_blocks(self.length)
        self.own_at = self.question_at + self.questions.length
        self.width = self.own_at + whole_blocks(max(self.place_R) + 1)
        kv_heads = like.shape[1]
        self.scores, self.weights = self.buffers.fit(
            (kv_heads, len(self.place_R), self.heads // kv_heads, self.width), self.length, like
        )
        for number, keys in enumerate(self.own.keys):
            rows = [n for n, place in enumerate(self.place_R) if place // BLOCK == number]
            if rows:
                columns = [self.place_R[n] % BLOCK for n in rows]
                self._writes.append((torch.tensor(rows, device=like.device), torch.tensor(columns, device=like.device), keys))
        self._rows = torch.arange(len(self.place_R), device=like.device)
        self._place_R = torch.tensor(self.place_R, device=like.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        self.own.values[layer][self._rows, :, self._place_R] = v[:, :, 0]
        for written, column, keys in self._writes:
            keys[layer][written, :, :, column] = k[written, :, 0]
        rows, heads, _, size = q.shape
        kv_heads = k.shape[1]
        self._score(layer, (q * rule.scale).view(rows, kv_heads, heads // kv_heads, size), rule)
        torch.softmax(self.scores, -1, out=self.weights)  # sums in float32, whatever the format
        return self._mix(layer).transpose(0, 1).reshape(rows, heads, 1, -1)

    def _score(self, layer: int, q_RKGD: Tensor, rule: Rule) -> None:
        on_prefix, on_question, on_own = self._hidden(rule.window)
        rows, kv_heads, group, size = q_RKGD.shape
        q_KRGD = q_RKGD.transpose(0, 1).contiguous()
        if self.prefix is not None:
            part = self.scores[..., : self.length]
            folded = q_KRGD.view(kv_heads, rows * group, size)
            torch.bmm(folded, self.prefix[0][layer], out=part.view(kv_heads, rows * group, -1))
            _cap(part, rule)
            if on_prefix is not None:
                part += on_prefix[:, None]
        found = _cap(self._seated(q_KRGD) @ self.questions.keys[0][layer, : self.seats.groups], rule)
        torch.add(self._unseated(found), on_question[:, None], out=self.scores[..., self.question_at : self.own_at])
        for keys, start in zip(self.own.keys, range(self.own_at, self.width, BLOCK), strict=False):
            found = _cap(q_RKGD @ keys[layer, :rows], rule).transpose(0, 1)
            hidden = on_own[:, None, start - self.own_at : start - self.own_at + BLOCK]
            torch.add(found, hidden, out=self.scores[..., start : start + BLOCK])

    def _mix(self, layer: int) -> Tensor:
        """Weighted values [K, R, G, V]."""
        kv_heads, rows, group, _ = self.weights.shape
        own = self.weights[..., self.own_at :].transpose(0, 1)
        out: Tensor = (own @ self.own.values[layer, :rows, :, : self.width - self.own_at]).transpose(0, 1)
        seated = self._seated(self.weights[..., self.question_at : self.own_at])
        out = self._unseated(seated @ self.questions.values[layer, : self.seats.groups]) + out
        if self.prefix is not None:
            folded = self.weights.view(kv_heads, rows * group, -1)[..., : self.length]
            out += torch.bmm(folded, self.prefix[1][layer]).view(out.shape)
        return out

    def _seated(self, x_KRGD: Tensor) -> Tensor:
        """[C, K, M * G, D]: each row's entries at its seat."""
        kv_heads, _, group, size = x_KRGD.shape
        taken = x_KRGD.index_select(1, self.seats.row_CM)
        return taken.view(kv_heads, self.seats.groups, self.seats.size * group, size).transpose(0, 1)

    def _unseated(self, x_CKMD: Tensor) -> Tensor:
        """[K, R, G, D]: back to the rows."""
        groups, kv_heads, together, size = x_CKMD.shape
        flat = x_CKMD.transpose(0, 1).reshape(kv_heads, groups * self.seats.size, together // self.seats.size, size)
        return flat.index_select(1, self.seats.seat_R)

    def _hidden(self, window: int | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """What to add to the scores, 0 or -inf: on prefix (None = nothing), question and own [R, columns]."""
        if window not in self._masks:
            like = self.own.like.keys
            place_R1 = self._place_R[:, None]
            question_R1 = torch.tensor(self.question_R, device=like.device)[:, None]
            own_T = torch.arange(self.width - self.own_at, device=like.device)
            question_T = torch.arange(self.questions.length, device=like.device)
            hidden_own, hidden_question = own_T > place_R1, question_T >= question_R1
            prefix = None
            if window is not None:  # distances in the text: the new token stands behind prefix, question and its own place
                hidden_own |= place_R1 - own_T >= window
                hidden_question |= question_R1 + place_R1 - question_T >= window
                prefix_T = torch.arange(self.length, device=like.device)
                prefix = _minus_inf(self.length + question_R1 + place_R1 - prefix_T >= window, like)
            self._masks[window] = (prefix, _minus_inf(hidden_question, like), _minus_inf(hidden_own, like))
        return self._masks[window]


def _minus_inf(hidden: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def _cap(scores: Tensor, rule: Rule) -> Tensor:
    """The cap of a rule, in place."""
    return scores if rule.softcap is None else scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
