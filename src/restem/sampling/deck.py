"""A decoding step off the CPU: a function of buffers that never move, so that it can be launched as a whole.

Keys and values lie in a pool of blocks of 64 tokens. A row's own tokens fill blocks of their own, as many as it has drawn; a
question's blocks are shared by the rows that sit at them. Each block meets the query of each of its rows in place: a lane. All
lanes of a step are two products, one for questions and one for own blocks, whatever the rows' lengths; the prefix is a third,
with all rows. A row's softmax runs over its lanes and the prefix: scores less the row's largest one, exponentials, and sums
over lanes. Scores, sums and the largest are in float32, whatever the model's format.

What a step must know (tokens, places, who sits where, random numbers) comes in one copy; what it has drawn goes back in one.

Shapes: R rows, K key-value heads, G query heads per key-value head, D and V the sizes of keys and values, N blocks of T tokens,
Q of them of questions with M seats, B of them of rows, X lanes: (question's block, K, seat), then (row's block, K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from restem.attention import Rule
from restem.sampling import Decoding
from restem.sampling.blocks import NOWHERE, Blocks, Ints, Move
from restem.sampling.decoding import draw, draw_from_all
from restem.sampling.graphs import Replays, rounded
from restem.sampling.slots import BLOCK, KV

_COPIED = 1 << 28  # bytes that are moved within the pool at once
_HIDDEN = -1e30  # what nobody sees: finite, so that a lane of nothing else has no NaN


class Size(NamedTuple):
    """What a step is recorded for."""

    rows: int
    asked: int
    """Blocks of questions."""
    own: int


class Rows(NamedTuple):
    """What the host knows of the rows in flight, one entry each."""

    token_R: Ints
    position_R: Ints
    """Of the token in the text."""
    cell_R: Ints
    """Where the first head's key goes: its place among all the pool's."""
    uniform_R: np.ndarray[Any, np.dtype[np.float64]]


class Tokens(NamedTuple):
    """What a step has drawn, one entry a row."""

    tokens: list[int]
    logprobs: list[float]


class Deck:
    """The buffers of one flight. `like`: keys and values of any run of tokens; `prefix`: as decoding reads it, [L, K, D, P] and
    [L, K, P, V]; `compute`: last hidden states of tokens at positions, and `logits_of` of hidden states."""

    def __init__(
        self,
        blocks: Blocks,
        rows: int,
        like: KV,
        prefix: tuple[Tensor, Tensor] | None,
        decoding: Decoding,
        compute: Callable[[Tensor, Tensor, Any], Tensor],
        logits_of: Callable[[Tensor], Tensor],
        replays: Replays,
    ) -> None:
        self.blocks, self.prefix, self.decoding, self.replays = blocks, prefix, decoding, replays
        self._compute, self._logits_of = compute, logits_of
        layers, self.kv_heads, _, key_size = like.keys.shape
        shape = (layers, blocks.count + 1, self.kv_heads, BLOCK)  # in the last one, rows that are nobody's write
        self.keys = like.keys.new_zeros((*shape, key_size))
        self.values = like.values.new_zeros((*shape, like.values.shape[-1]))
        self.product = _product_on(like.keys.device, like.keys.dtype)
        device, seats = like.keys.device, blocks.row_NM.shape[1]
        most = 4 * rounded(rows) + (seats + 4) * rounded(blocks.count)
        self._host = torch.zeros(most, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._sent = torch.zeros(most, dtype=torch.int64, device=device)
        self._out = torch.zeros(3 * rounded(rows), dtype=torch.float64, device=device)
        self._logits: Tensor | None = None  # of the last step, where a nucleus may be larger than the candidates
        self._size = Size(0, 0, 0)

    # --- what stays in the pool ---------------------------------------------------------------------------------------------

    def write(self, kv: KV, tokens: Sequence[int], cells: Sequence[int]) -> None:
        """Put computed tokens into cells of the pool, see `Rows.cell_R`."""
        device, heads = self.keys.device, self.kv_heads
        index = torch.tensor([tokens, cells]).to(device)
        cell_KT = index[1] + torch.arange(heads, device=device)[:, None] * BLOCK
        for pool, run in ((self.keys, kv.keys), (self.values, kv.values)):
            flat = pool.view(len(pool), -1, pool.shape[-1])
            flat.index_copy_(1, cell_KT.flatten(), run.index_select(2, index[0]).flatten(1, 2))

    def copy(self, moves: Sequence[Move]) -> None:
        """Copy whole blocks, from and to."""
        index = torch.tensor(moves).T.contiguous().to(self.keys.device)
        size = max(1, _COPIED // (self.keys[:, :1].nbytes + self.values[:, :1].nbytes))
        for source, target in zip(index[0].split(size), index[1].split(size), strict=True):
            for pool in (self.keys, self.values):
                pool.index_copy_(1, target, pool.index_select(1, source))

    def cell(self, at: int) -> int:
        """The first cell of a block of the pool."""
        return at * self.kv_heads * BLOCK

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
        found = []
        for needed, least, before in zip(
            (rows, self.blocks.asked.high, self.blocks.own.high), (16, 0, 16), self._size, strict=True
        ):
            exact = rounded(needed, least) if needed else least
            found.append(before if exact <= before <= 2 * exact else exact)
        asked = min(found[1], self.blocks.count)
        return Size(found[0], asked, min(found[2], self.blocks.count))

    def _fill(self, rows: Rows, size: Size) -> int:
        """Write down what a step must know; its length."""
        blocks, host, count = self.blocks, self._host.numpy(), len(rows.token_R)
        own = slice(blocks.count - size.own, blocks.count)
        row_B, start_B = blocks.row_NM[own, 0].copy(), blocks.start_N[own].copy()
        row_B[: size.own - blocks.own.high], start_B[: size.own - blocks.own.high] = -1, NOWHERE  # these are not rows' blocks
        row_B = np.where(row_B < 0, np.arange(size.own) % size.rows, row_B)
        nobodys = np.full(size.rows - count, self.cell(blocks.count))
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
        token_R, position_R, cell_R, uniform_R, row_B, start_B, row_QM, start_Q, held_Q = self._sent[: sum(lengths)].split(
            lengths
        )
        attends = Lanes(self, size, position_R, cell_R, row_B, start_B, row_QM.view(asked, seats), start_Q, held_Q)
        hidden = self._compute(token_R[:, None], position_R[:, None], attends)
        logits_RV = self._logits_of(hidden[:, 0])
        token_R, logprob_R, beyond_R = draw(logits_RV, uniform_R.view(torch.float64), self.decoding)
        out_3R = self._out[: 3 * rows].view(3, rows)
        torch.stack(
            [token_R.double(), logprob_R.double(), (token_R < 0 if beyond_R is None else beyond_R).double()], out=out_3R
        )
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
        sent = torch.stack([beyond, uniform.view(torch.int64)]).to(self.keys.device)
        tokens, logprobs = draw_from_all(self._logits.index_select(0, sent[0]), sent[1].view(torch.float64), self.decoding)
        out = torch.stack([tokens.double(), logprobs.double()]).cpu()
        for row, token, logprob in zip(beyond.tolist(), out[0].long().tolist(), out[1].tolist(), strict=True):
            drawn.tokens[row], drawn.logprobs[row] = token, logprob


@dataclass
class Lanes:
    """Attention of one step; what all layers need is worked out once."""

    deck: Deck
    size: Size
    position_R: Tensor
    cell_R: Tensor
    row_B: Tensor
    start_B: Tensor
    row_QM: Tensor
    start_Q: Tensor
    held_Q: Tensor
    of_asked: int = field(init=False)
    """Lanes of questions; those of rows stand behind them."""
    row_X: Tensor = field(init=False)
    """Head and row, as one number, of every lane."""
    cell_RK: Tensor = field(init=False)
    _masks: dict[int | None, tuple[Tensor | None, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        heads, device = self.deck.kv_heads, self.position_R.device
        head_K = torch.arange(heads, device=device)
        self.cell_RK = (self.cell_R[:, None] + head_K * BLOCK).flatten()
        self._seat_QM = self.row_QM.clamp_min(0)
        asked = self._seat_QM[:, None] + head_K[:, None] * self.size.rows
        own = self.row_B[:, None] + head_K * self.size.rows
        self.of_asked = asked.numel()
        self.row_X = torch.cat([asked.flatten(), own.flatten()])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        deck, (rows, heads, _, size), kv_heads = self.deck, q.shape, k.shape[1]
        for pool, new in ((deck.keys, k), (deck.values, v)):
            pool[layer].view(-1, new.shape[-1]).index_copy_(0, self.cell_RK, new.reshape(rows * kv_heads, -1))
        q_KRGD = q.reshape(rows, kv_heads, heads // kv_heads, size).transpose(0, 1).contiguous()
        on_prefix, on_lanes = self._hidden(rule.window)
        scores_XGT = self._score(layer, q_KRGD)
        _add(_capped(scores_XGT, rule), on_lanes, rule)
        shared_KRGP = None if deck.prefix is None else self._score_prefix(q_KRGD, deck.prefix[0][layer], on_prefix, rule)
        return self._mix(layer, scores_XGT, shared_KRGP, q_KRGD.shape)

    def _score(self, layer: int, q_KRGD: Tensor) -> Tensor:
        """Unscaled scores of all lanes [X, G, T], in float32."""
        kv_heads, rows, group, size = q_KRGD.shape
        taken_XGD = q_KRGD.view(kv_heads * rows, group, size).index_select(0, self.row_X)
        scores_XGT = taken_XGD.new_empty((len(self.row_X), group, BLOCK), dtype=torch.float32)
        for x, keys, out in self._products(taken_XGD, self.deck.keys[layer], scores_XGT):
            self.deck.product(x, keys.transpose(1, 2), out)
        return scores_XGT

    def _score_prefix(self, q_KRGD: Tensor, keys_KDP: Tensor, hidden_RP: Tensor | None, rule: Rule) -> Tensor:
        kv_heads, rows, group, size = q_KRGD.shape
        scores = q_KRGD.new_empty((kv_heads, rows, group, keys_KDP.shape[-1]), dtype=torch.float32)
        self.deck.product(q_KRGD.view(kv_heads, rows * group, size), keys_KDP, scores.view(kv_heads, rows * group, -1))
        return _add(_capped(scores, rule), None if hidden_RP is None else hidden_RP[:, None], rule)

    def _mix(self, layer: int, scores_XGT: Tensor, shared_KRGP: Tensor | None, shape: Sequence[int]) -> Tensor:
        """Softmax over each row's lanes and the prefix, and the weighted values [R, H, 1, V]."""
        deck, (kv_heads, rows, group, _) = self.deck, shape
        dtype, size = deck.values.dtype, deck.values.shape[-1]
        if shared_KRGP is None:
            most_YG = scores_XGT.new_full((kv_heads * rows, group), _HIDDEN)
        else:
            most_YG = shared_KRGP.amax(-1).view(kv_heads * rows, group)
        most_YG.scatter_reduce_(0, self.row_X[:, None].expand(-1, group), scores_XGT.amax(-1), "amax")
        scores_XGT.sub_(most_YG.index_select(0, self.row_X)[..., None]).exp_()
        if shared_KRGP is None:  # a row that is nobody's sees nothing
            total_YG, out_YGV = torch.full_like(most_YG, 1e-30), most_YG.new_zeros((*most_YG.shape, size))
        else:
            shared_KRGP.sub_(most_YG.view(kv_heads, rows, group, 1)).exp_()
            total_YG, out_YGV = shared_KRGP.sum(-1).view_as(most_YG), most_YG.new_empty((*most_YG.shape, size))
            weights = shared_KRGP.to(dtype).view(kv_heads, rows * group, -1)
            assert deck.prefix is not None
            deck.product(weights, deck.prefix[1][layer], out_YGV.view(kv_heads, rows * group, size))
        total_YG.index_add_(0, self.row_X, scores_XGT.sum(-1))
        mixed_XGV = scores_XGT.new_empty((len(self.row_X), group, size))
        for x, values, out in self._products(scores_XGT.to(dtype), deck.values[layer], mixed_XGV):
            deck.product(x, values, out)
        out_YGV.index_add_(0, self.row_X, mixed_XGV)
        mixed = scores_XGT.new_empty((rows, kv_heads, group, size), dtype=dtype)
        by_row = (x.view(kv_heads, rows, group, -1).transpose(0, 1) for x in (out_YGV, total_YG))
        return torch.div(*by_row, out=mixed).view(rows, kv_heads * group, 1, size)

    def _products(self, x_XGD: Tensor, pool_NKTD: Tensor, out_XGT: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Lanes with the blocks they meet: of questions, whose lanes of a block stand together, and of rows."""
        blocks, heads, found = self.deck.blocks, self.deck.kv_heads, []
        for lanes, pool in (
            (slice(self.of_asked), pool_NKTD[: self.size.asked]),
            (slice(self.of_asked, None), pool_NKTD[blocks.count - self.size.own : blocks.count]),
        ):
            if len(pool):
                products = len(pool) * heads
                x, out = (y[lanes].view(products, -1, y.shape[-1]) for y in (x_XGD, out_XGT))
                found.append((x, pool.view(products, BLOCK, -1), out))
        return found

    def _hidden(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """What to add to the scores: on the prefix [R, P] (None = nothing), and on the lanes [X, 1, T]."""
        if window not in self._masks:
            heads, device = self.deck.kv_heads, self.position_R.device
            place_T = torch.arange(BLOCK, device=device)
            behind_BT = self.position_R[self.row_B][:, None] - (self.start_B[:, None] + place_T)
            behind_QMT = self.position_R[self._seat_QM][..., None] - (self.start_Q[:, None] + place_T)[:, None]
            seen_BT = behind_BT >= 0
            seen_QMT = (place_T < self.held_Q[:, None])[:, None] & (self.row_QM >= 0)[..., None]
            prefix = None
            if window is not None:
                seen_BT, seen_QMT = seen_BT & (behind_BT < window), seen_QMT & (behind_QMT < window)
                if self.deck.prefix is not None:
                    place_P = torch.arange(self.deck.prefix[0].shape[-1], device=device)
                    prefix = _minus(self.position_R[:, None] - place_P < window)
            lanes = [seen[:, None].expand(-1, heads, *seen.shape[1:]).reshape(-1, BLOCK) for seen in (seen_QMT, seen_BT)]
            self._masks[window] = prefix, _minus(torch.cat(lanes))[:, None]
        return self._masks[window]


def _minus(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=torch.float32, device=seen.device).masked_fill_(~seen, _HIDDEN)


def _capped(scores: Tensor, rule: Rule) -> Tensor:
    """The cap of a rule, in place, which takes the scale with it."""
    return scores if rule.softcap is None else scores.mul_(rule.scale / rule.softcap).tanh_()


def _add(scores: Tensor, hidden: Tensor | None, rule: Rule) -> Tensor:
    """Scores times what is left of their factor, plus what hides some, in place."""
    factor = rule.scale if rule.softcap is None else rule.softcap
    return scores.mul_(factor) if hidden is None else torch.add(hidden, scores, alpha=factor, out=scores)


def _padded(values: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    return np.concatenate([values, np.zeros(length - len(values), dtype=values.dtype)])


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
