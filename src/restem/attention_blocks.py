"""Attention over a tree on a CPU, in blocks: exact, without a mask over the pack, forward and backward.

For each node there is one causal block on itself and one full block of all its descendants on it; what precedes the roots, if
its keys and values are at hand, is one more full block of the whole pack. Blocks are merged by log-sum-exp (as in Hydragen,
arXiv 2402.05099), and computed by PyTorch's flash kernels for CPUs.

Shapes: q is [1, H, T, D], k and v are [1, K, T, D] with K key-value heads; log-sum-exps are [1, H, T]. All in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from restem.attention_plan import AttentionPlan
from restem.tree import Node


def attend(plan: AttentionPlan, scale: float, q: Tensor, k: Tensor, v: Tensor, *before: Tensor) -> Tensor:
    """Attention of every packed token over its ancestors and its own node's past; `before`: keys and values of what precedes
    the roots, or nothing."""
    blocks = plan.once("blocks", lambda: Blocks.of(plan.nodes))
    return _BlockAttention.apply(blocks, scale, q, k, v, *before)  # type: ignore[no-untyped-call,no-any-return]


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


class Blocks(NamedTuple):
    """The blocks of one pack."""

    causal: list[SelfBlocks]
    full: list[CrossBlock]

    @staticmethod
    def of(nodes: Sequence[Node]) -> Blocks:
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
            causal.append(SelfBlocks(index, (column < count)))
        full = [CrossBlock(n.start, n.end, n.last) for n in nodes if n.end > n.start and n.last > n.end]
        return Blocks(causal, full)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys: softmax over their union, exactly. Shapes as in `block`."""
    (out, lse), *rest = parts
    if not rest:
        return out, lse
    total = torch.logsumexp(torch.stack([part for _, part in parts]), 0)
    merged = sum(part.float() * (logs - total).exp()[..., None] for part, logs in parts)
    return merged.to(out.dtype), total  # type: ignore[union-attr]


def block(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Plain attention of one block: output [B, H, T, D] in q's dtype, log-sum-exp [B, H, T] in float32.

    Fewer key-value heads than query heads are shared by groups. A causal block has as many queries as keys.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _block_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given the *merged* output and log-sum-exp: exact, since a softmax weight is exp(score - lse)
    and the backward of softmax needs only the inner product of gradient and output (FlashAttention-2, arXiv 2307.08691)."""
    heads, groups = q.shape[1], k.shape[1]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, per_head(k, heads), per_head(v, heads), out, lse, 0.0, causal, scale=scale
    )
    if groups != heads:
        dk, dv = (x.unflatten(1, (groups, heads // groups)).sum(2) for x in (dk, dv))
    return dq, dk, dv


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Blocks, scale: float, q: Tensor, k: Tensor, v: Tensor, *before: Tensor) -> Tensor:
        out, lse = _within(q, k, v, blocks, scale)
        if before:
            out, lse = merge([(out, lse), block(q, before[0], before[1], scale, causal=False)])
        ctx.save_for_backward(q, k, v, out, lse, *before)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *before = ctx.saved_tensors
        blocks, scale, g = ctx.blocks, ctx.scale, grads[0].contiguous()
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        earlier: list[Tensor] = []
        if before:
            part, *earlier = _block_backward(g, q, before[0], before[1], out, lse, scale, causal=False)
            dq += part
        for start, end, last in blocks.full:
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
        for index, own in blocks.causal:
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
        return None, None, dq, dk, dv, *earlier


def _within(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every packed token over its ancestors in the pack and its own node's past. Shapes as in `block`."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:-1], float("-inf"), dtype=torch.float32, device=q.device)
    for index, own in blocks.causal:
        part, logs = block(_rows(q, index), _rows(k, index), _rows(v, index), scale, causal=True)
        flat = index[own]
        out[0, :, flat] = part.transpose(1, 2)[own].transpose(0, 1)
        lse[0, :, flat] = logs.transpose(1, 2)[own].transpose(0, 1)
    for start, end, last in blocks.full:
        above = block(q[:, :, end:last], k[:, :, start:end], v[:, :, start:end], scale, causal=False)
        out[:, :, end:last], lse[:, :, end:last] = merge([(out[:, :, end:last], lse[:, :, end:last]), above])
    return out, lse


def per_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, K, T, D], those of a group repeated for each of its query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _rows(x_1HTD: Tensor, index_ML: Tensor) -> Tensor:
    """[1, H, T, D] -> [M, H, L, D]: the tokens of each node."""
    return x_1HTD[0][:, index_ML].transpose(0, 1).contiguous()
