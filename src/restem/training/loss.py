"""The loss of a packed tree: the weighted negative log-likelihood of its targets, and how likely a model finds examples.

What the output layer makes of the hidden states is in `restem.training.head`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from restem.attention import Before, Capture, PackAttention, planned
from restem.compatibility import tree_attention
from restem.training.batches import Pack, make_packs, shared_prompt
from restem.training.head import head_loss
from restem.tree import Tree
from restem.types import Example

T = TypeVar("T")


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
            attends = PackAttention(planned(pack.tree, device), before)
            hidden = self.hidden(pack.tree, attends)[torch.tensor(pack.sources, device=device)]
        targets = torch.tensor(pack.targets, device=device)
        weights = torch.tensor(pack.weights, dtype=torch.float32, device=device)
        return Losses(*head_loss(self.model, hidden, targets, weights, self.products))

    @property
    def products(self) -> torch.dtype:
        """The number format of matrix products: `dtype`, where the weights are not in a lower one."""
        lower = self.dtype == torch.bfloat16 and self.model.dtype == torch.float32
        return torch.bfloat16 if lower else self.model.dtype

    def through(self, compute: Callable[[Any], T]) -> T:
        """`compute(model)`, for a pass of the whole model that is no loss. Where weights are spread, every process calls it."""
        return compute(self.model)

    def arithmetic(self) -> torch.autocast:
        """A context in which the model computes in `dtype`."""
        lower = self.products != self.model.dtype
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
        capture = Capture(PackAttention(planned(tree, loss.model.device)))
        with loss.arithmetic():
            loss.hidden(tree, capture)
        for layer, pair in capture.layers.items():
            keys, values = (x[:, :, : len(tokens)].float() for x in pair)  # the gradients of many packs are summed there
            self._computed += [keys, values]
            self.before[layer] = _leaf(keys), _leaf(values)

    def backward(self) -> None:
        leaves = [leaf for pair in self.before.values() for leaf in pair]
        pairs = [(x, leaf.grad) for x, leaf in zip(self._computed, leaves, strict=True) if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])


def _leaf(computed: Tensor) -> Tensor:
    return computed.detach().requires_grad_(computed.requires_grad)


@torch.no_grad()
def log_likelihoods(model: Any, examples: Sequence[Example], *, budget: int = 4096) -> list[float]:
    """Log-probability of every example's completion under a model, at temperature 1 and without truncation.

    Computed in the model's own number format, `budget` tokens at once.
    """
    loss, found = PackLoss(model, model.dtype), [0.0] * len(examples)
    with tree_attention(model):
        shared = SharedPrompt(loss, shared_prompt(examples))
        for pack in make_packs(examples, "sum", budget, is_apart=True):
            lengths = [len(examples[place].completion_ids) for place in pack.order]
            parts = loss(pack, shared.before).nll_N.cpu().double().split(lengths)
            for place, nll in zip(pack.order, parts, strict=True):
                found[place] = -float(nll.sum())
    return found
