"""The loss of a packed tree: the weighted negative log-likelihood of its targets, and how likely a model finds examples.

Logits exist for a few hundred targets at a time, never for the pack: with a vocabulary of 49,000 tokens those of 4,096 targets
would take 800 MB. Their gradients are computed in the forward pass, so that nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from restem.attention import AttentionPlan, PackAttention
from restem.compatibility import tree_attention
from restem.models import is_plain_head, logits_of
from restem.sampling.decoding import log_normaliser
from restem.training.batches import Pack, make_packs
from restem.types import Example

_CHUNK = 512  # targets whose logits are in memory at once


class Losses(NamedTuple):
    """Of one pack."""

    weighted: Tensor
    """The loss, with its gradient."""
    nll_N: Tensor
    """Negative log-likelihood of every target, in the pack's order; detached."""


class PackLoss(nn.Module):
    """A model as a function from a pack to its loss. Call it inside `tree_attention(model)`.

    A module of its own, so that what wraps a module's forward pass (sharding) wraps all of it, the output layer included.
    `dtype`: number format of the arithmetic; a lower one than the weights' is reached by autocast.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, pack: Pack) -> Losses:
        device = self.model.device
        lower = self.dtype == torch.bfloat16 and self.model.dtype == torch.float32
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=lower):
            hidden = self.model.base_model(
                input_ids=torch.tensor([pack.tree.tokens], device=device),
                position_ids=torch.tensor([pack.tree.positions], device=device),
                use_cache=False,
                tree=PackAttention(AttentionPlan.of(pack.tree, device)),
            ).last_hidden_state[0, torch.tensor(pack.sources, device=device)]
            targets = torch.tensor(pack.targets, device=device)
            weights = torch.tensor(pack.weights, dtype=torch.float32, device=device)
            head = [p for p in self.model.get_output_embeddings().parameters() if p.requires_grad]
            return Losses(*_ChunkedLoss.apply(self.model, hidden, targets, weights, *head))  # type: ignore[no-untyped-call]


class _ChunkedLoss(torch.autograd.Function):
    """Sum of weights times cross-entropy, chunk by chunk, with the gradients of the hidden states and the output layer."""

    @staticmethod
    def forward(
        ctx: Any, model: Any, hidden_NH: Tensor, targets_N: Tensor, weights_N: Tensor, *head: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[4:])
        if wanted and len(head) == 1 and is_plain_head(model) and torch.is_autocast_enabled(hidden_NH.device.type):
            ctx.gradients, nll_N = _in_bfloat16(head[0], hidden_NH, targets_N, weights_N)
            ctx.mark_non_differentiable(nll_N)
            return (nll_N * weights_N).sum(), nll_N
        losses, gradients = [], []
        sums = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in head] if wanted else []
        for hidden, targets, weights in zip(*(x.split(_CHUNK) for x in (hidden_NH, targets_N, weights_N)), strict=True):
            with torch.set_grad_enabled(wanted):
                hidden = hidden.detach().requires_grad_(wanted)
                nll = nn.functional.cross_entropy(logits_of(model, hidden).float(), targets, reduction="none")
                if wanted:
                    first, *rest = torch.autograd.grad((nll * weights).sum(), [hidden, *head])
                    gradients.append(first)
                    for total, part in zip(sums, rest, strict=True):
                        total += part
            losses.append(nll.detach())
        ctx.gradients = (torch.cat(gradients), *sums) if wanted else ()
        nll_N = torch.cat(losses)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *head = (gradient * grads[0] for gradient in ctx.gradients)
        ctx.gradients = ()
        return None, hidden, None, None, *head


def _in_bfloat16(
    head_VH: Tensor, hidden_NH: Tensor, targets_N: Tensor, weights_N: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Gradients and losses of a plain output layer: softmax minus one-hot, without a float32 copy of the logits.

    The loss is computed in float32; products and the softmax are bfloat16, as autocast has them. Summed over chunks in float32.
    """
    weight_VH, hidden_NH = head_VH.to(torch.bfloat16), hidden_NH.to(torch.bfloat16)
    total_VH, gradients, losses = torch.zeros_like(head_VH, dtype=torch.float32), [], []
    for hidden, targets, weights in zip(*(x.split(_CHUNK) for x in (hidden_NH, targets_N, weights_N)), strict=True):
        logits = hidden @ weight_VH.T
        losses.append(log_normaliser(logits) - logits.gather(1, targets[:, None])[:, 0].float())
        slope = torch.softmax(logits, -1).mul_(weights[:, None].to(logits.dtype))
        # p - 1 of the target, from its loss: in bfloat16 the difference would vanish where the model is sure, as it is of what
        # it has sampled itself.
        of_targets = (weights * torch.expm1(-losses[-1])).to(slope.dtype)
        slope[torch.arange(len(targets), device=slope.device), targets] = of_targets
        gradients.append(slope @ weight_VH)
        total_VH += slope.T @ hidden
    return (torch.cat(gradients), total_VH), torch.cat(losses)


@torch.no_grad()
def log_likelihoods(model: Any, examples: Sequence[Example], *, budget: int = 4096) -> list[float]:
    """Log-probability of every example's completion under a model, at temperature 1 and without truncation.

    Computed in the model's own number format, `budget` tokens at once.
    """
    loss, found = PackLoss(model, model.dtype), [0.0] * len(examples)
    with tree_attention(model):
        for pack in make_packs(examples, "sum", budget):
            parts = loss(pack).nll_N.split([len(examples[place].completion_ids) for place in pack.order])
            for place, nll in zip(pack.order, parts, strict=True):
                found[place] = -float(nll.double().sum())
    return found
