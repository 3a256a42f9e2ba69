"""The loss of a packed tree: the weighted negative log-likelihood of its targets, and how likely a model finds examples.

Logits exist for a few hundred targets at a time, never for the pack: with a vocabulary of 49,000 tokens those of 4,096 targets
would take 800 MB. Their gradients are computed in the forward pass, so that nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from restem.attention import AttentionPlan, Before, Capture, PackAttention
from restem.compatibility import tree_attention
from restem.models import is_plain_head, logits_of
from restem.sampling.decoding import log_normaliser
from restem.training.batches import Pack, make_packs, shared_prompt
from restem.tree import Tree
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

    def forward(self, pack: Pack, before: Mapping[int, Before] = MappingProxyType({})) -> Losses:
        """`before`: what precedes a pack whose prompts' common beginning stands apart (`SharedPrompt`)."""
        device = self.model.device
        with self.arithmetic():
            attends = PackAttention(AttentionPlan.of(pack.tree, device), before)
            hidden = self.hidden(pack.tree, attends)[torch.tensor(pack.sources, device=device)]
            targets = torch.tensor(pack.targets, device=device)
            weights = torch.tensor(pack.weights, dtype=torch.float32, device=device)
            head = [p for p in self.model.get_output_embeddings().parameters() if p.requires_grad]
            return Losses(*_ChunkedLoss.apply(self.model, hidden, targets, weights, *head))  # type: ignore[no-untyped-call]

    def arithmetic(self) -> torch.autocast:
        """A context in which the model computes in `dtype`."""
        lower = self.dtype == torch.bfloat16 and self.model.dtype == torch.float32
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=lower)

    def hidden(self, tree: Tree, attends: PackAttention | Capture) -> Tensor:
        """Last hidden states [T, hidden] of a tree's tokens."""
        ids, positions = (torch.tensor([values], device=self.model.device) for values in (tree.tokens, tree.positions))
        out = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False, tree=attends)
        return out.last_hidden_state[0]  # type: ignore[no-any-return]


class SharedPrompt:
    """What all prompts of a step begin with, computed once for all its packs.

    Packs attend to `before`, its keys and values by layer, and leave their gradients there. When all packs are through,
    `backward` takes the sum on into the weights: the gradient is that of a pack that holds everything.
    """

    def __init__(self, loss: PackLoss, tokens: Sequence[int]) -> None:
        self._computed: list[Tensor] = []
        self.before: dict[int, Before] = {}
        if not tokens:
            return
        tree = Tree()
        tree.add(tokens)
        capture = Capture(PackAttention(AttentionPlan.of(tree, loss.model.device)))
        with loss.arithmetic():
            loss.hidden(tree, capture)
        for layer, pair in capture.layers.items():
            keys, values = (x.float() for x in pair)  # the gradients of many packs are summed there
            self._computed += [keys, values]
            self.before[layer] = _leaf(keys), _leaf(values)

    def backward(self) -> None:
        leaves = [leaf for pair in self.before.values() for leaf in pair]
        pairs = [(x, leaf.grad) for x, leaf in zip(self._computed, leaves, strict=True) if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])


def _leaf(computed: Tensor) -> Tensor:
    return computed.detach().requires_grad_(computed.requires_grad)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of weights times cross-entropy, chunk by chunk, with the gradients of the hidden states and the output layer."""

    @staticmethod
    def forward(
        ctx: Any, model: Any, hidden_NH: Tensor, targets_N: Tensor, weights_N: Tensor, *head: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[4:])
        if wanted and len(head) == 1 and is_plain_head(model):
            lower = torch.is_autocast_enabled(hidden_NH.device.type)
            dtype = torch.bfloat16 if lower else head[0].dtype
            ctx.gradients, nll_N = _of_plain_head(head[0], hidden_NH.to(dtype), targets_N, weights_N)
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
        hidden, *head = (gradient.mul_(grads[0]) for gradient in ctx.gradients)
        ctx.gradients = ()
        return None, hidden, None, None, *head


def _of_plain_head(
    head_VH: Tensor, hidden_NH: Tensor, targets_N: Tensor, weights_N: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Gradients and losses of an output layer that is one product: softmax minus one-hot, without a second copy of the logits.

    Products are in the number format of the hidden states. The loss is computed in float32, and sums over chunks are, too.
    """
    weight_VH, total_VH = head_VH.to(hidden_NH.dtype), torch.zeros_like(head_VH, dtype=torch.float32)
    buffer = hidden_NH.new_empty(min(_CHUNK, len(hidden_NH)), len(head_VH))
    gradients, losses = [], []
    for hidden, targets, weights in zip(*(x.split(_CHUNK) for x in (hidden_NH, targets_N, weights_N)), strict=True):
        logits = torch.mm(hidden, weight_VH.T, out=buffer[: len(hidden)])
        normaliser = log_normaliser(logits)
        losses.append(normaliser - logits.gather(1, targets[:, None])[:, 0].float())
        if logits.dtype == torch.float32:
            slope = logits.sub_((normaliser - weights.log())[:, None]).exp_()
        else:  # a difference of two bfloat16 numbers is good for no exponential
            slope = torch.softmax(logits, -1).mul_(weights[:, None].to(logits.dtype))
        # p - 1 of the target, from its loss: in bfloat16 the difference would vanish where the model is sure, as it is of what
        # it has sampled itself.
        of_targets = (weights * torch.expm1(-losses[-1])).to(slope.dtype)
        slope[torch.arange(len(targets), device=slope.device), targets] = of_targets
        gradients.append(slope @ weight_VH)
        if slope.dtype == torch.float32:
            total_VH.addmm_(slope.T, hidden)
        else:
            total_VH += slope.T @ hidden
    return (torch.cat(gradients), total_VH), torch.cat(losses)


@torch.no_grad()
def log_likelihoods(model: Any, examples: Sequence[Example], *, budget: int = 4096) -> list[float]:
    """Log-probability of every example's completion under a model, at temperature 1 and without truncation.

    Computed in the model's own number format, `budget` tokens at once.
    """
    loss, found = PackLoss(model, model.dtype), [0.0] * len(examples)
    with tree_attention(model):
        shared = SharedPrompt(loss, shared_prompt(examples))
        for pack in make_packs(examples, "sum", budget, is_apart=True):
            parts = loss(pack, shared.before).nll_N.split([len(examples[place].completion_ids) for place in pack.order])
            for place, nll in zip(pack.order, parts, strict=True):
                found[place] = -float(nll.double().sum())
    return found
