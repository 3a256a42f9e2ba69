"""Attention over a tree: exact, forward and backward, for training and for computing prompts.

On a CPU it is computed in blocks, without a mask (`restem.attention_blocks`); on a GPU by FlexAttention
(`restem.attention_flex`). What neither serves is computed with a dense mask, and so are prompts on a GPU: right, and quadratic
in the pack.

Shapes: q is [1, H, T, D], k and v are [1, K, T, D] with K key-value heads; log-sum-exps are [1, H, T] in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from restem import attention_blocks, attention_flex
from restem.attention_plan import AttentionPlan, Rule
from restem.tree import Tree

_DENSE_TOKENS = 8192
"""Without gradients, a mask of so many tokens squared costs less than compiling a kernel for them."""

__all__ = ["AttentionPlan", "Before", "Capture", "PackAttention", "Rule", "dense", "planned"]


def planned(tree: Tree, device: torch.device) -> AttentionPlan:
    """The plan of a tree. It is filled up first to the sizes that the device computes in, so that no layer need copy for it."""
    if attention_flex.serves(device):
        tree.fill(attention_flex.BLOCK)
    return AttentionPlan.of(tree, device)


Before = tuple[Tensor, Tensor]
"""Keys and values [1, K, P, D] of P tokens that stand before the roots of a pack."""


@dataclass(frozen=True)
class PackAttention:
    """Attention within one pack: training, and computing prompts. `before`: by layer; empty = nothing precedes the roots."""

    plan: AttentionPlan
    before: Mapping[int, Before] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        before = self.before.get(layer)
        rule = rule.within(self.plan.reach)
        # Number formats are chosen here: what autocast does to scores differs from device to device.
        with torch.autocast(q.device.type, enabled=False):
            if attention_flex.serves(q.device) and (torch.is_grad_enabled() or q.shape[2] > _DENSE_TOKENS):
                return attention_flex.attend(self.plan, q, k, v, before, rule)
            if q.device.type != "cpu":
                return self._dense(q, k, v, before, rule)
            # On a CPU the float32 kernels are the faster ones, above all backward, and nothing is lost in them.
            parts = [x.float() for x in (q, k, v, *(before or ()))]
            if rule.is_plain:
                return attention_blocks.attend(self.plan, rule.scale, *parts).to(v.dtype)
            return self._dense(parts[0], parts[1], parts[2], before, rule).to(v.dtype)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, before: Before | None, rule: Rule) -> Tensor:
        count = 0
        if before is not None:
            count = before[0].shape[2]
            k, v = torch.cat([before[0].to(k), k], 2), torch.cat([before[1].to(v), v], 2)
        return dense(q, k, v, self.plan.visible(rule.window, count), rule)


class Capture:
    """Keeps every layer's keys and values [1, K, T, D] of a pass, around another attention."""

    def __init__(self, inner: PackAttention) -> None:
        self.inner = inner
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        self.layers[layer] = k, v
        return self.inner.attend(layer, q, k, v, rule)


def dense(q: Tensor, k: Tensor, v: Tensor, visible_TS: Tensor, rule: Rule) -> Tensor:
    """Attention of T queries over S keys with a mask, scores in float32."""
    k, v = (attention_blocks.per_head(x, q.shape[1]) for x in (k, v))
    if rule.softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible_TS, scale=rule.scale)
    scores = (q.float() @ k.float().transpose(-1, -2) * (rule.scale / rule.softcap)).tanh() * rule.softcap
    weights = torch.softmax(scores.masked_fill(~visible_TS, float("-inf")), -1)
    return weights.to(v.dtype) @ v
