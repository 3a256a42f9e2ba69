"""Attention over a tree: exact, without a mask over the pack, forward and backward.

For each node there is one causal block on itself and one full block of all its descendants on it; what precedes the roots, if
its keys and values are at hand, is one more full block of the whole pack. Blocks are merged by log-sum-exp (as in Hydragen,
arXiv 2402.05099). Layers with a sliding window shorter than the text, or with capped scores, are computed with a dense mask
instead: right, and quadratic in the pack.

Shapes: q is [1, H, T, D], k and v are [1, K, T, D] with K key-value heads; log-sum-exps are [1, H, T] in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from restem.tree import Node, Tree


class Rule(NamedTuple):
    """How one layer scores: softmax over softcap * tanh(scale * q.k / softcap), of keys nearer than the window."""

    scale: float
    window: int | None = None
    """Tokens that a token sees, itself included; None = all before it."""
    softcap: float | None = None

    def is_plain(self, reach: int) -> bool:
        """Whether texts of `reach` tokens are scored as if there were neither window nor cap."""
        return self.softcap is None and (self.window is None or reach <= self.window)

    def capped(self, scores: Tensor) -> Tensor:
        return scores if self.softcap is None else (scores / self.softcap).tanh() * self.softcap


class SelfBlocks(NamedTuple):
    """Nodes of like length, padded to a rectangle, for one causal call. Padding is on the right, so nothing sees it."""

    index_ML: Tensor
    """Packed indices; padding repeats the node's last token."""
    own_ML: Tensor
    """True where the entry is a token of the node."""


class CrossBlock(NamedTuple):
    """The tokens start..end as keys for the queries end..last."""

    start: int
    end: int
    last: int


@dataclass(frozen=True)
class AttentionPlan:
    """Which blocks to compute for one pack."""

    causal: list[SelfBlocks]
    full: list[CrossBlock]
    position_T: Tensor
    """Place of every packed token in its text."""
    reach: int
    """Tokens of the longest text, with what precedes the roots."""
    _visible: dict[int | None, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(tree: Tree, device: torch.device | str = "cpu") -> AttentionPlan:
        nodes = tree.nodes
        buckets: dict[int, list[Node]] = {}
        for node in nodes:
            if length := node.end - node.start:
                # Rounding up by at most a third, or to 16, keeps the shapes few. Not to the longest node of a group: a node's
                # sums must not depend on what else is in the pack.
                step = max(16, (1 << (length - 1).bit_length()) // 4)
                buckets.setdefault(-(-length // step) * step, []).append(node)
        causal = []
        for width, group in sorted(buckets.items()):
            start = torch.tensor([node.start for node in group])[:, None]
            count = torch.tensor([node.end - node.start for node in group])[:, None]
            column = torch.arange(width)[None]
            index = start + torch.minimum(column, count - 1)
            causal.append(SelfBlocks(index.to(device), (column < count).to(device)))
        full = [CrossBlock(n.start, n.end, n.last) for n in nodes if n.end > n.start and n.last > n.end]
        positions = torch.tensor(tree.positions, dtype=torch.long, device=device)
        return AttentionPlan(causal, full, positions, max(tree.positions, default=-1) + 1)

    def visible(self, window: int | None) -> Tensor:
        """[T, T], queries by keys: which packed token sees which. Made once per window."""
        if window not in self._visible:
            length = len(self.position_T)
            seen_TT = torch.zeros(length, length, dtype=torch.bool, device=self.position_T.device)
            for index, own in self.causal:
                for first, count in zip(index[:, 0].tolist(), own.sum(1).tolist(), strict=True):
                    node = slice(first, first + count)
                    seen_TT[node, node] = torch.ones(count, count, dtype=torch.bool, device=seen_TT.device).tril()
            for start, end, last in self.full:
                seen_TT[end:last, start:end] = True
            self._visible[window] = seen_TT & near(self.position_T, self.position_T, window)
        return self._visible[window]


Before = tuple[Tensor, Tensor]
"""Keys and values [1, K, P, D] of P tokens that stand before the roots of a pack."""


@dataclass(frozen=True)
class PackAttention:
    """Attention within one pack: training, and computing prompts. `before`: by layer; empty = nothing precedes the roots."""

    plan: AttentionPlan
    before: Mapping[int, Before] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        before = self.before.get(layer)
        if not rule.is_plain(self.plan.reach):
            return self._dense(q, k, v, before, rule)
        # On a CPU the float32 kernels are the faster ones, above all backward, and nothing is lost in them.
        dtype = torch.float32 if q.device.type == "cpu" else v.dtype
        parts = [x.to(dtype) for x in (q, k, v, *(before or ()))]
        return _TreeAttention.apply(self.plan, rule.scale, *parts).to(v.dtype)  # type: ignore[no-untyped-call,no-any-return]

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, before: Before | None, rule: Rule) -> Tensor:
        seen = self.plan.visible(rule.window)
        if before is not None:
            length = before[0].shape[2]
            earlier = near(self.plan.position_T, torch.arange(length, device=q.device), rule.window)
            k, v, seen = torch.cat([before[0].to(k), k], 2), torch.cat([before[1].to(v), v], 2), torch.cat([earlier, seen], 1)
        return dense(q, k, v, seen, rule)


class Capture:
    """Keeps every layer's keys and values [1, K, T, D] of a pass, around another attention."""

    def __init__(self, inner: PackAttention) -> None:
        self.inner = inner
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        self.layers[layer] = k, v
        return self.inner.attend(layer, q, k, v, rule)


def block(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Plain attention of one block: output [B, H, T, D] in q's dtype, log-sum-exp [B, H, T] in float32.

    Fewer key-value heads than query heads are shared by groups. A causal block has as many queries as keys.
    """
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    scores = _scores(q, k, scale, causal)
    lse = torch.logsumexp(scores, -1)
    weights = (scores - lse[..., None]).exp().to(v.dtype)
    return weights @ _per_head(v, q.shape[1]), lse


def near(queries_T: Tensor, keys_S: Tensor, window: int | None) -> Tensor:
    """[T, S]: which keys lie within the window, by positions in the text."""
    if window is None:
        return torch.ones(len(queries_T), len(keys_S), dtype=torch.bool, device=queries_T.device)
    return queries_T[:, None] - keys_S[None] < window


def dense(q: Tensor, k: Tensor, v: Tensor, visible_TS: Tensor, rule: Rule) -> Tensor:
    """Attention of T queries over S keys with a mask; for the layers that `block` cannot compute."""
    scores = rule.capped(_scores(q, k, rule.scale, causal=False))
    weights = torch.softmax(scores.masked_fill(~visible_TS, float("-inf")), -1)
    return weights.to(v.dtype) @ _per_head(v, q.shape[1])


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys: softmax over their union, exactly. Shapes as in `block`."""
    (out, lse), *rest = parts
    if not rest:
        return out, lse
    total = torch.logsumexp(torch.stack([part for _, part in parts]), 0)
    merged = sum(part.float() * (logs - total).exp()[..., None] for part, logs in parts)
    return merged.to(out.dtype), total  # type: ignore[union-attr]


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    scores = (q @ _per_head(k, q.shape[1]).transpose(-1, -2)).float() * scale
    if causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~below, float("-inf"))
    return scores


def _block_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given the *merged* output and log-sum-exp: exact, since a softmax weight is exp(score - lse)
    and the backward of softmax needs only the inner product of gradient and output (FlashAttention-2, arXiv 2307.08691)."""
    heads, groups = q.shape[1], k.shape[1]
    if q.device.type == "cpu":
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, _per_head(k, heads), _per_head(v, heads), out, lse, 0.0, causal, scale=scale
        )
    else:
        weights = (_scores(q, k, scale, causal) - lse[..., None]).exp()
        dv = weights.transpose(-1, -2) @ g.float()
        inner = (g.float() * out.float()).sum(-1, keepdim=True)
        ds = weights * (g.float() @ _per_head(v, heads).float().transpose(-1, -2) - inner) * scale
        dq = (ds @ _per_head(k, heads).float()).to(q.dtype)
        dk = (ds.transpose(-1, -2) @ q.float()).to(k.dtype)
        dv = dv.to(v.dtype)
    if groups != heads:
        dk, dv = (x.unflatten(1, (groups, heads // groups)).sum(2) for x in (dk, dv))
    return dq, dk, dv


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: AttentionPlan, scale: float, q: Tensor, k: Tensor, v: Tensor, *before: Tensor) -> Tensor:
        out, lse = pack_attention(q, k, v, plan, scale)
        if before:
            out, lse = merge([(out, lse), block(q, before[0], before[1], scale, causal=False)])
        ctx.save_for_backward(q, k, v, out, lse, *before)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *before = ctx.saved_tensors
        plan, scale, g = ctx.plan, ctx.scale, grads[0].contiguous()
        # Sums over many blocks: float32, so that bf16 does not lose the small ones.
        dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
        earlier: list[Tensor] = []
        if before:
            part, *earlier = _block_backward(g, q, before[0], before[1], out, lse, scale, causal=False)
            dq += part
        for start, end, last in plan.full:
            parts = _block_backward(
                g[:, :, end:last],
                q[:, :, end:last],
                k[:, :, start:end],
                v[:, :, start:end],
                out[:, :, end:last],
                lse[:, :, end:last].contiguous(),
                scale,
                causal=False,
            )
            dq[:, :, end:last] += parts[0]
            dk[:, :, start:end] += parts[1]
            dv[:, :, start:end] += parts[2]
        for index, own in plan.causal:
            parts = _block_backward(
                _rows(g, index) * own[:, None, :, None],  # padding carries no gradient
                _rows(q, index),
                _rows(k, index),
                _rows(v, index),
                _rows(out, index),
                lse[0][:, index].transpose(0, 1).contiguous(),
                scale,
                causal=True,
            )
            flat = index[own]
            for total, part in zip((dq, dk, dv), parts, strict=True):
                total[0, :, flat] += part.transpose(1, 2)[own].transpose(0, 1)
        return None, None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *earlier


def pack_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every packed token over its ancestors in the pack and its own node's past. Shapes as in `block`."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:-1], float("-inf"), dtype=torch.float32, device=q.device)
    for index, own in plan.causal:
        part, logs = block(_rows(q, index), _rows(k, index), _rows(v, index), scale, causal=True)
        flat = index[own]
        out[0, :, flat] = part.transpose(1, 2)[own].transpose(0, 1)
        lse[0, :, flat] = logs.transpose(1, 2)[own].transpose(0, 1)
    for start, end, last in plan.full:
        above = block(q[:, :, end:last], k[:, :, start:end], v[:, :, start:end], scale, causal=False)
        out[:, :, end:last], lse[:, :, end:last] = merge([(out[:, :, end:last], lse[:, :, end:last]), above])
    return out, lse


def _rows(x_1HTD: Tensor, index_ML: Tensor) -> Tensor:
    """[1, H, T, D] -> [M, H, L, D]: the tokens of each node."""
    return x_1HTD[0][:, index_ML].transpose(0, 1).contiguous()
