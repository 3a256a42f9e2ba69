"""The pool of keys and values off the CPU: blocks of 64 tokens, at places that never move. Whose they are is in `blocks`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from restem.sampling.blocks import Move
from restem.sampling.slots import BLOCK, KV

_COPIED = 1 << 28  # bytes that are moved at once


class Pool:
    """Keys [L, N + 1, K, T, D] and values of `count` blocks; in the last one, rows that are nobody's write. `like`: keys and
    values of any run of tokens; `prefix`: as decoding reads it, [L, K, D, P] and [L, K, P, V]."""

    def __init__(self, count: int, like: KV, prefix: tuple[Tensor, Tensor] | None) -> None:
        layers, self.kv_heads, _, key_size = like.keys.shape
        shape = (layers, count + 1, self.kv_heads, BLOCK)
        self.count, self.prefix = count, prefix
        self.keys = like.keys.new_zeros((*shape, key_size))
        self.values = like.values.new_zeros((*shape, like.values.shape[-1]))
        self.product = _product_on(like.keys.device, like.keys.dtype)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def cell(self, at: int) -> int:
        """Where the first head's first token of a block lies among all heads' tokens."""
        return at * self.kv_heads * BLOCK

    def write(self, kv: KV, tokens: Sequence[int], cells: Sequence[int]) -> None:
        """Put computed tokens into cells."""
        index = torch.tensor([tokens, cells]).to(self.device)
        cell_KT = index[1] + torch.arange(self.kv_heads, device=self.device)[:, None] * BLOCK
        for pool, run in ((self.keys, kv.keys), (self.values, kv.values)):
            flat = pool.view(len(pool), -1, pool.shape[-1])
            flat.index_copy_(1, cell_KT.flatten(), run.index_select(2, index[0]).flatten(1, 2))

    def copy(self, moves: Sequence[Move]) -> None:
        """Copy whole blocks, from and to."""
        index = torch.tensor(moves).T.contiguous().to(self.device)
        size = max(1, _COPIED // (self.keys[:, :1].nbytes + self.values[:, :1].nbytes))
        for source, target in zip(index[0].split(size), index[1].split(size), strict=True):
            for pool in (self.keys, self.values):
                pool.index_copy_(1, target, pool.index_select(1, source))


def _product_on(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """Products [Y, A, B] x [Y, B, C] into float32, in which lower formats are summed anyway."""
    if dtype == torch.float32:
        return lambda a, b, out: torch.bmm(a, b, out=out)
    if device.type == "cuda":
        a = torch.ones(1, 8, 8, dtype=dtype, device=device)
        try:
            torch.bmm(a, a, torch.float32, out=torch.empty(1, 8, 8, device=device))
        except (RuntimeError, TypeError):  # PyTorch before 2.8, or a library without it
            pass
        else:
            return lambda a, b, out: torch.bmm(a, b, torch.float32, out=out)
    return lambda a, b, out: torch.bmm(a.float(), b.float(), out=out)
