"""A decoding step off the CPU: a function of buffers that never move, so that it can be launched as a whole.

What a step must know (tokens, places, who sits where, random numbers) comes in one copy; what it has drawn goes back in one.
`restem.sampling.lanes` is its attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from restem.sampling import Decoding
from restem.sampling.blocks import NOWHERE, Blocks, Ints
from restem.sampling.decoding import draw, draw_from_all
from restem.sampling.graphs import Replays, rounded
from restem.sampling.lanes import Lanes, Seating, Size
from restem.sampling.pool import Pool


class Rows(NamedTuple):
    """What the host knows of the rows in flight, one entry each."""

    token_R: Ints
    position_R: Ints
    """Of the token in the text."""
    cell_R: Ints
    """Where its key goes, see `Pool.cell`."""
    uniform_R: np.ndarray[Any, np.dtype[np.float64]]


class Tokens(NamedTuple):
    """What a step has drawn, one entry a row."""

    tokens: list[int]
    logprobs: list[float]


class Deck:
    """The buffers of one flight, for `rows` at most. `blocks`: whose the pool's are; `compute`: last hidden states of tokens
    at positions; `logits_of`: logits of these."""

    def __init__(
        self,
        pool: Pool,
        blocks: Blocks,
        rows: int,
        decoding: Decoding,
        compute: Callable[[Tensor, Tensor, Any], Tensor],
        logits_of: Callable[[Tensor], Tensor],
        replays: Replays,
    ) -> None:
        self.pool, self.blocks, self.decoding, self.replays = pool, blocks, decoding, replays
        self._compute, self._logits_of = compute, logits_of
        device, seats = pool.device, blocks.row_NM.shape[1]
        most = 4 * rounded(rows) + (seats + 4) * rounded(blocks.count)
        self._host = torch.zeros(most, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._sent = torch.zeros(most, dtype=torch.int64, device=device)
        self._out = torch.zeros(3 * rounded(rows), dtype=torch.float64, device=device)
        self._logits: Tensor | None = None  # of the last step, where a nucleus may be larger than the candidates
        self._size = Size(0, 0, 0)

    # --- a step -------------------------------------------------------------------------------------------------------------

    def step(self, rows: Rows) -> Tokens:
        """The next token of every row, and its log-probability: one copy there, one launch if it is recorded, one copy back."""
        count = len(rows.token_R)
        size = self._size = self._fitting(count)
        length = self._fill(rows, size)
        self._sent[:length].copy_(self._host[:length], non_blocking=True)
        self.replays.run(size, lambda: self._step(size), self._out[: 3 * size.rows].view(3, size.rows))
        out_3R = self._out[: 3 * size.rows].view(3, size.rows).cpu()[:, :count]
        drawn = Tokens(out_3R[0].long().tolist(), out_3R[1].tolist())
        if self._logits is not None and (beyond := out_3R[2].nonzero()[:, 0]).numel():
            self._draw_again(beyond, rows, drawn)
        return drawn

    def _fitting(self, rows: int) -> Size:
        """The size of a step. What is twice too large stays: sizes that come and go are recorded in vain."""
        blocks, before = self.blocks, self._size
        asked = _kept(before.asked, rounded(blocks.asked.high, 0) if blocks.asked.high else 0)
        own = _kept(before.own, rounded(blocks.own.high))
        return Size(_kept(before.rows, rounded(rows)), min(asked, blocks.count), min(own, blocks.count))

    def _fill(self, rows: Rows, size: Size) -> int:
        """Write down what a step must know; its length."""
        blocks, host, count = self.blocks, self._host.numpy(), len(rows.token_R)
        own = slice(blocks.count - size.own, blocks.count)
        row_B, start_B = blocks.row_NM[own, 0].copy(), blocks.start_N[own].copy()
        row_B[: size.own - blocks.own.high], start_B[: size.own - blocks.own.high] = -1, NOWHERE  # these are not rows' blocks
        row_B = np.where(row_B < 0, np.arange(size.own) % size.rows, row_B)
        nobodys = np.full(size.rows - count, self.pool.cell(blocks.count))
        parts = [
            _padded(rows.token_R, size.rows),
            _padded(rows.position_R, size.rows),
            np.concatenate([rows.cell_R, nobodys]),
            _padded(rows.uniform_R, size.rows).view(np.int64),
            row_B,
            start_B,
            blocks.row_NM[: size.asked].ravel(),
            blocks.start_N[: size.asked],
            blocks.held_N[: size.asked],
        ]
        np.concatenate(parts, out=host[: sum(map(len, parts))])
        return sum(map(len, parts))

    def _step(self, size: Size) -> None:
        """The step itself: reads `_sent`, writes the pool and `_out`, and knows nothing else."""
        rows, asked, own = size
        seats = self.blocks.row_NM.shape[1]
        lengths = [rows, rows, rows, rows, own, own, asked * seats, asked, asked]
        sent = self._sent[: sum(lengths)].split(lengths)
        token_R, position_R, cell_R, uniform_R, row_B, start_B, row_QM, start_Q, held_Q = sent
        seating = Seating(position_R, cell_R, row_B, start_B, row_QM.view(asked, seats), start_Q, held_Q)
        hidden = self._compute(token_R[:, None], position_R[:, None], Lanes(self.pool, size, seating))
        logits_RV = self._logits_of(hidden[:, 0])
        token_R, logprob_R, beyond_R = draw(logits_RV, uniform_R.view(torch.float64), self.decoding)
        out_3R = self._out[: 3 * rows].view(3, rows)
        again_R = token_R < 0 if beyond_R is None else beyond_R
        torch.stack([token_R.double(), logprob_R.double(), again_R.double()], out=out_3R)
        if beyond_R is not None:
            self._keep_logits(logits_RV)

    def _keep_logits(self, logits_RV: Tensor) -> None:
        if self._logits is None:
            self._logits = logits_RV.new_empty(len(self._out) // 3, logits_RV.shape[-1])
        self._logits[: len(logits_RV)].copy_(logits_RV)

    def _draw_again(self, beyond: Tensor, rows: Rows, drawn: Tokens) -> None:
        """The few rows whose nucleus is larger than the candidates. It takes one more copy there and back."""
        assert self._logits is not None
        uniform = torch.from_numpy(rows.uniform_R)[beyond]
        sent = torch.stack([beyond, uniform.view(torch.int64)]).to(self.pool.device)
        tokens, logprobs = draw_from_all(self._logits.index_select(0, sent[0]), sent[1].view(torch.float64), self.decoding)
        out = torch.stack([tokens.double(), logprobs.double()]).cpu()
        for row, token, logprob in zip(beyond.tolist(), out[0].long().tolist(), out[1].tolist(), strict=True):
            drawn.tokens[row], drawn.logprobs[row] = token, logprob


def _kept(before: int, exact: int) -> int:
    return before if exact <= before <= 2 * exact else exact


def _padded(values: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    return np.concatenate([values, np.zeros(length - len(values), dtype=values.dtype)])
