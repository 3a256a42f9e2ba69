"""The tree that sampling and training share: every node's tokens are computed once, and attend to their ancestors only.

    prefix (few-shot prompt)
    +-- problem 1 --+-- sample 1 .. sample N
    +-- problem 2 --+-- sample 1 .. sample N

Nodes are packed in depth-first order, so the descendants of a node stand right behind it: attention over the tree is, for each
node, one causal block on itself and one full block of all its descendants on it. Blocks are merged exactly by log-sum-exp
(as in Hydragen, arXiv 2402.05099), forward and backward; no mask over the pack is ever built. Positions restart at each branch.

The one thing a newcomer would get wrong: a packed position is not a position in the text. `position_ids` holds the latter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

ATTENTION = "restem_tree"
"""The name under which tree attention is registered with transformers: see `tree_attention`."""


@dataclass(frozen=True, slots=True)
class Node:
    """A run of tokens with one parent. Packed tokens start..end are its own, end..last those of its descendants."""

    start: int
    end: int
    last: int
    depth: int


class Tree:
    """Packed token runs. Build it with `add` in depth-first order: a child after its parent, before the parent's sibling.

    An offset says how many tokens of context precede the roots without being packed (a prefix that is already computed).
    """

    def __init__(self, offset: int = 0) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self._nodes: list[list[int]] = []  # start, end, last, depth
        self._parents: list[int | None] = []
        self._offset = offset

    def add(self, tokens: Sequence[int], parent: int | None = None) -> int:
        """Append a node and return its number. An empty node is allowed: it only groups its children."""
        start, end = len(self.tokens), len(self.tokens) + len(tokens)
        depth, position = 0, self._offset
        if parent is not None:
            _, _, last, depth = self._nodes[parent]
            assert last == start, "nodes must be added depth first"
            depth, position = depth + 1, self.end_position(parent)
        self.tokens.extend(tokens)
        self.positions.extend(range(position, position + len(tokens)))
        self._nodes.append([start, end, end, depth])
        self._parents.append(parent)
        ancestor = parent
        while ancestor is not None:
            self._nodes[ancestor][2] = end
            ancestor = self._parents[ancestor]
        return len(self._nodes) - 1

    def end_position(self, node: int | None) -> int:
        """The text position right behind a node: where its children start."""
        while node is not None:
            start, end, _, _ = self._nodes[node]
            if end > start:
                return self.positions[end - 1] + 1
            node = self._parents[node]
        return self._offset

    def last_token(self, node: int | None) -> int:
        """The packed index of the last token at or above a node; -1 if there is none."""
        while node is not None:
            start, end, _, _ = self._nodes[node]
            if end > start:
                return end - 1
            node = self._parents[node]
        return -1

    @property
    def nodes(self) -> list[Node]:
        return [Node(*values) for values in self._nodes]

    def ancestors(self, node: int) -> list[int]:
        """The nodes above this one, nearest first."""
        chain: list[int] = []
        parent = self._parents[node]
        while parent is not None:
            chain.append(parent)
            parent = self._parents[parent]
        return chain

    def plan(self, device: torch.device | str = "cpu") -> AttentionPlan:
        return AttentionPlan.of(self.nodes, len(self.tokens), torch.device(device))


def shared_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, leaving at least one token to each prompt."""
    if not prompts:
        return 0
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))


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
    length: int

    @staticmethod
    def of(nodes: list[Node], length: int, device: torch.device) -> AttentionPlan:
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
        return AttentionPlan(causal, full, length)


# --- attention -----------------------------------------------------------------------------------------------------------
# Shapes: q is [1, H, T, D], k and v are [1, K, T, D] with K key-value heads; log-sum-exps are [1, H, T] in float32.


class Attends(Protocol):
    """What a forward pass hands to the attention of every layer as the keyword `tree`."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...


@dataclass(frozen=True)
class PackAttention:
    """Attention within one pack: training, and computing a prefix."""

    plan: AttentionPlan

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        # On a CPU the float32 kernels are the faster ones, above all backward, and nothing is lost in them.
        dtype = torch.float32 if q.device.type == "cpu" else v.dtype
        out = _TreeAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype), self.plan, scale)  # type: ignore[no-untyped-call]
        return out.to(v.dtype)  # type: ignore[no-any-return]


@contextmanager
def tree_attention(model: Any) -> Iterator[None]:
    """Switch a transformers model to tree attention, without dropout, for the time of a with block.

    Every forward pass inside must bring the keyword `tree`.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention_interface)
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation(ATTENTION)
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


@torch.no_grad()
def disagreement(model: Any) -> str:
    """Why two branches on one prefix do not have the logits that the model itself gives them; "" if they do, up to rounding.

    No list of architectures could promise that: some scale or cap their logits, some ignore what they are handed.
    """
    from restem.models import logits_of

    size = model.get_input_embeddings().num_embeddings
    # Spread over the vocabulary: its first tokens are special ones, often untrained, and magnify rounding.
    rows = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 8, 9, 10]], device=model.device) * (size // 11) % size
    tree = Tree()
    root = tree.add(rows[0, :4].tolist())
    for row in rows.tolist():
        tree.add(row[4:], root)
    ids, positions = (torch.tensor([values], device=model.device) for values in (tree.tokens, tree.positions))
    training = model.training
    model.eval()
    try:
        expected = model(input_ids=rows, use_cache=False).logits[:, 4:].flatten(0, 1).float()
        with tree_attention(model):
            pack = PackAttention(tree.plan(model.device))
            hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, tree=pack).last_hidden_state
        found = logits_of(model, hidden)[0, 4:].float()
    except TypeError:  # the keyword `tree` did not reach the attention
        return "its attention does not receive what the tree hands to it"
    finally:
        model.train(training)
    if not expected.isfinite().all():
        return "its own logits are not finite: the weights are damaged, or training diverged"
    # Half precision: rounding differs between kernels, and may send a token to another expert.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25
    near = (found - expected).norm() <= tolerance * expected.norm()
    return "" if near else "on a few tokens, the tree's logits differ from the model's own"


def _attention_interface(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Attends,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert softcap is None and sliding_window is None and not dropout, "unsupported models are refused when loaded"
    dtype = value.dtype  # under autocast, rotary embeddings leave queries and keys in float32
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = tree.attend(module.layer_idx, query.to(dtype), key.to(dtype), value, scale)
    return out.transpose(1, 2), None


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
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        out, lse = pack_attention(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale, g = ctx.plan, ctx.scale, grads[0].contiguous()
        # Sums over many blocks: float32, so that bf16 does not lose the small ones.
        dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
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
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def pack_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every packed token over its ancestors and its own node's past. Shapes as in `block`."""
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
