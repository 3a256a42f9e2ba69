"""Where keys and values lie while sampling: one slot per token run.

Keys stand with the tokens last, and where runs grow they are cut into blocks of 64 tokens of every slot: so a product of a few
queries with a slot's keys reads memory in order. Memory grows with the longest run so far, by whole blocks. Slots in use stand
in front; who moves one moves what refers to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64


class KV(NamedTuple):
    """Keys [L, K, T, D] and values [L, K, T, V] of one token run, in all layers."""

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def part(self, start: int, end: int) -> KV:
        return KV(self.keys[:, :, start:end], self.values[:, :, start:end])

    def followed_by(self, other: KV) -> KV:
        return KV(torch.cat([self.keys, other.keys], 2), torch.cat([self.values, other.values], 2))

    @property
    def length(self) -> int:
        return self.keys.shape[2]


class Slots:
    """Keys by block, each [L, S, K, D, B], and values [L, S, K, T, V], for S slots of T tokens.

    `block`: columns of a key block; None = one block that is as long as the longest run, for runs that do not grow. Nothing is
    ever unset: what has not been written is zero, so that a weight of zero makes it vanish.
    """

    def __init__(self, like: KV, slots: int, *, block: int | None = None) -> None:
        self.like, self.slots, self.block = like, slots, block
        self.keys: list[Tensor] = []
        self.values = self._values(slots, 0)

    @property
    def length(self) -> int:
        """Tokens that a slot has room for."""
        return self.values.shape[3]

    def reserve(self, slots: int, length: int) -> None:
        """Make room for so many slots of so many tokens; what is there stays."""
        slots, length = max(slots, self.slots), max(whole_blocks(length), self.length)
        if (slots, length) == (self.slots, self.length):
            return
        self.values = _enlarged(self.values, self._values(slots, length))
        width = self.block or length
        if slots > self.slots or self.block is None:
            self.keys = [_enlarged(keys, self._keys(slots, width)) for keys in self.keys]
        while len(self.keys) * width < length:
            self.keys.append(self._keys(slots, width))
        self.slots = slots

    def put(self, slot: int, run: KV) -> None:
        """Write a run from its first token on."""
        self.reserve(self.slots, run.length)
        self.values[:, slot, :, : run.length] = run.values
        width = self.block or self.length
        for keys, start in zip(self.keys, range(0, run.length, width), strict=False):
            part = run.keys[:, :, start : start + width].transpose(-1, -2)
            keys[:, slot, :, :, : part.shape[-1]] = part

    def move(self, moves: Sequence[tuple[int, int]], length: int) -> None:
        """Copy whole slots, of at most `length` tokens: from, to."""
        source, target = torch.tensor(moves, device=self.values.device).T
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
        for keys in self.keys[: -(-length // (self.block or self.length))]:
            keys[:, target] = keys[:, source]

    def _keys(self, slots: int, width: int) -> Tensor:
        layers, heads, _, size = self.like.keys.shape
        return self.like.keys.new_zeros((layers, slots, heads, size, width))

    def _values(self, slots: int, length: int) -> Tensor:
        layers, heads, _, size = self.like.values.shape
        return self.like.values.new_zeros((layers, slots, heads, length, size))


def whole_blocks(tokens: int) -> int:
    """Tokens, rounded up to whole blocks."""
    return -(-tokens // BLOCK) * BLOCK


def _enlarged(old: Tensor, new: Tensor) -> Tensor:
    new[tuple(slice(size) for size in old.shape)] = old
    return new
