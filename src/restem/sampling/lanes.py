"""Attention of one decoding step off the CPU: each block of the pool meets the query of each of its rows in place, as a lane.

All lanes of a step are two products, one for questions and one for rows' own blocks, whatever their lengths; the prefix is a
third, with all rows. A row's softmax runs over its lanes and the prefix: scores less the row's largest one, exponentials, and
sums over lanes. Scores, sums and the largest are in float32, whatever the model's format. Nothing waits for the device, and
nothing depends on what the host knows but the sizes.

Shapes: R rows, K key-value heads, G query heads per key-value head, D and V the sizes of keys and values, N blocks of T tokens,
Q of them of questions with M seats, B of them of rows, X lanes: (question's block, K, seat), then (row's block, K).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from restem.attention import Rule
from restem.sampling.pool import Pool
from restem.sampling.slots import BLOCK

_HIDDEN = -1e30  # what nobody sees: finite, so that a lane of nothing else has no NaN


class Size(NamedTuple):
    """What a step is recorded for."""

    rows: int
    asked: int
    """Blocks of questions."""
    own: int


class Seating(NamedTuple):
    """Who stands where."""

    position_R: Tensor
    cell_R: Tensor
    """Where a row's new key goes, see `Pool.cell`."""
    row_B: Tensor
    start_B: Tensor
    """Position in the text of a block's first token."""
    row_QM: Tensor
    """-1 = an empty seat."""
    start_Q: Tensor
    held_Q: Tensor
    """Tokens of a question's block."""


@dataclass
class Lanes:
    """Attention of one step; what all layers need is worked out once."""

    pool: Pool
    size: Size
    seating: Seating
    of_asked: int = field(init=False)
    """Lanes of questions; those of rows stand behind them."""
    row_X: Tensor = field(init=False)
    """Head and row, as one number, of every lane."""
    cell_RK: Tensor = field(init=False)
    _masks: dict[int | None, tuple[Tensor | None, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        head_K = torch.arange(self.pool.kv_heads, device=self.pool.device)
        self.cell_RK = (self.seating.cell_R[:, None] + head_K * BLOCK).flatten()
        self._seat_QM = self.seating.row_QM.clamp_min(0)
        asked = self._seat_QM[:, None] + head_K[:, None] * self.size.rows
        own = self.seating.row_B[:, None] + head_K * self.size.rows
        self.of_asked = asked.numel()
        self.row_X = torch.cat([asked.flatten(), own.flatten()])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        pool, (rows, heads, _, size), kv_heads = self.pool, q.shape, k.shape[1]
        for kept, new in ((pool.keys, k), (pool.values, v)):
            kept[layer].view(-1, new.shape[-1]).index_copy_(0, self.cell_RK, new.reshape(rows * kv_heads, -1))
        q_KRGD = q.reshape(rows, kv_heads, heads // kv_heads, size).transpose(0, 1).contiguous()
        on_prefix, on_lanes = self._hidden(rule.window)
        scores_XGT = self._score(layer, q_KRGD)
        _add(_capped(scores_XGT, rule), on_lanes, rule)
        shared_KRGP = None if pool.prefix is None else self._score_prefix(q_KRGD, pool.prefix[0][layer], on_prefix, rule)
        return self._mix(layer, scores_XGT, shared_KRGP, q_KRGD.shape)

    def _score(self, layer: int, q_KRGD: Tensor) -> Tensor:
        """Unscaled scores of all lanes [X, G, T], in float32."""
        kv_heads, rows, group, size = q_KRGD.shape
        taken_XGD = q_KRGD.view(kv_heads * rows, group, size).index_select(0, self.row_X)
        scores_XGT = taken_XGD.new_empty((len(self.row_X), group, BLOCK), dtype=torch.float32)
        for x, keys, out in self._products(taken_XGD, self.pool.keys[layer], scores_XGT):
            self.pool.product(x, keys.transpose(1, 2), out)
        return scores_XGT

    def _score_prefix(self, q_KRGD: Tensor, keys_KDP: Tensor, hidden_RP: Tensor | None, rule: Rule) -> Tensor:
        kv_heads, rows, group, size = q_KRGD.shape
        scores = q_KRGD.new_empty((kv_heads, rows, group, keys_KDP.shape[-1]), dtype=torch.float32)
        self.pool.product(q_KRGD.view(kv_heads, rows * group, size), keys_KDP, scores.view(kv_heads, rows * group, -1))
        return _add(_capped(scores, rule), None if hidden_RP is None else hidden_RP[:, None], rule)

    def _mix(self, layer: int, scores_XGT: Tensor, shared_KRGP: Tensor | None, shape: Sequence[int]) -> Tensor:
        """Softmax over each row's lanes and the prefix, and the weighted values [R, H, 1, V]."""
        pool, (kv_heads, rows, group, _) = self.pool, shape
        dtype, size = pool.values.dtype, pool.values.shape[-1]
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
            assert pool.prefix is not None
            pool.product(weights, pool.prefix[1][layer], out_YGV.view(kv_heads, rows * group, size))
        total_YG.index_add_(0, self.row_X, scores_XGT.sum(-1))
        mixed_XGV = scores_XGT.new_empty((len(self.row_X), group, size))
        for x, values, out in self._products(scores_XGT.to(dtype), pool.values[layer], mixed_XGV):
            pool.product(x, values, out)
        out_YGV.index_add_(0, self.row_X, mixed_XGV)
        mixed = scores_XGT.new_empty((rows, kv_heads, group, size), dtype=dtype)
        by_row = (x.view(kv_heads, rows, group, -1).transpose(0, 1) for x in (out_YGV, total_YG))
        return torch.div(*by_row, out=mixed).view(rows, kv_heads * group, 1, size)

    def _products(self, x_XGD: Tensor, pool_NKTD: Tensor, out_XGT: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Lanes with the blocks they meet: of questions, whose lanes of a block stand together, and of rows."""
        count, heads, found = self.pool.count, self.pool.kv_heads, []
        for lanes, pool in (
            (slice(self.of_asked), pool_NKTD[: self.size.asked]),
            (slice(self.of_asked, None), pool_NKTD[count - self.size.own : count]),
        ):
            if len(pool):
                products = len(pool) * heads
                x, out = (y[lanes].view(products, -1, y.shape[-1]) for y in (x_XGD, out_XGT))
                found.append((x, pool.view(products, BLOCK, -1), out))
        return found

    def _hidden(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """What to add to the scores: on the prefix [R, P] (None = nothing), and on the lanes [X, 1, T]."""
        if window not in self._masks:
            position_R, _, row_B, start_B, row_QM, start_Q, held_Q = self.seating
            heads, device = self.pool.kv_heads, self.pool.device
            place_T = torch.arange(BLOCK, device=device)
            behind_BT = position_R[row_B][:, None] - (start_B[:, None] + place_T)
            behind_QMT = position_R[self._seat_QM][..., None] - (start_Q[:, None] + place_T)[:, None]
            seen_BT = behind_BT >= 0
            seen_QMT = (place_T < held_Q[:, None])[:, None] & (row_QM >= 0)[..., None]
            prefix = None
            if window is not None:
                seen_BT, seen_QMT = seen_BT & (behind_BT < window), seen_QMT & (behind_QMT < window)
                if self.pool.prefix is not None:
                    place_P = torch.arange(self.pool.prefix[0].shape[-1], device=device)
                    prefix = _minus(position_R[:, None] - place_P < window)
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
