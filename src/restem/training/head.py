"""The loss of the output layer: cross-entropy of chosen tokens, without the logits of a whole pack in memory.

With a vocabulary of 152,000 tokens the logits of 4,096 targets take 1.2 GB in bfloat16, and as much again in every step from
there to their gradient. So they exist for a part of the targets at a time, and their gradients are computed at once with them.

The number formats are chosen here, with autocast off: which operations autocast widens differs from device to device. Products
are in the format of the arithmetic; what lies between logits and loss, and sums over parts, are in float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from restem.models import logits_of, shape_logits, shapes_logits
from restem.sampling.decoding import log_normaliser

_TARGETS = 512
"""Targets of a part on a CPU; elsewhere a part is as large as `_BYTES` of logits, since a small product leaves a GPU idle."""
_BYTES = 1 << 29


class _Head(NamedTuple):
    """An output layer of one product, and the function from its result to the logits, where that is not the identity."""

    model: Any
    weight_VH: Tensor
    bias_V: Tensor | None

    def product(self, hidden_NH: Tensor, out: Tensor) -> Tensor:
        raw_NV = torch.mm(hidden_NH, self.weight_VH.T, out=out)
        return raw_NV if self.bias_V is None else raw_NV.add_(self.bias_V)


def head_loss(model: Any, hidden_NH: Tensor, targets_N: Tensor, weights_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum of weights times cross-entropy, with its gradient, and every target's own cross-entropy, without.

    `dtype`: the number format of the products. All parameters of the output layer get their gradients.
    """
    head = model.get_output_embeddings()
    with torch.autocast(hidden_NH.device.type, enabled=False):
        if type(head) is nn.Linear:
            parameters = (head.weight, head.bias)
            return _LinearLoss.apply(model, dtype, hidden_NH, targets_N, weights_N, *parameters)  # type: ignore[no-any-return,no-untyped-call]
        parameters = tuple(p for p in head.parameters() if p.requires_grad)
        return _ModuleLoss.apply(model, dtype, hidden_NH, targets_N, weights_N, *parameters)  # type: ignore[no-any-return,no-untyped-call]


class _LinearLoss(torch.autograd.Function):
    """For an output layer that is one product with a matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        model: Any,
        dtype: torch.dtype,
        hidden_NH: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(model, weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype))
        _, _, for_hidden, _, _, for_weight, for_bias = ctx.needs_input_grad
        sum_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if for_weight else None
        sum_V = torch.zeros_like(weight_VH[:, 0], dtype=torch.float32) if for_bias else None
        slopes_NH, losses = torch.empty_like(hidden_NH) if for_hidden else None, []
        size = _part(len(weight_VH), dtype, hidden_NH.device)
        buffer = hidden_NH.new_empty(min(size, len(hidden_NH)), len(weight_VH), dtype=dtype)
        for start in range(0, len(hidden_NH), size):
            part = slice(start, start + size)
            hidden, targets, weights = hidden_NH[part].to(dtype), targets_N[part], weights_N[part]
            raw_NV = head.product(hidden, buffer[: len(hidden)])
            if not (for_hidden or for_weight or for_bias):
                losses.append(_nll(shape_logits(model, raw_NV), targets))
                continue
            nll, slope_NV = _slope(model, raw_NV, targets, weights)
            losses.append(nll)
            if slopes_NH is not None:
                slopes_NH[part] = slope_NV @ head.weight_VH
            if sum_VH is not None:
                _add_product(sum_VH, slope_NV, hidden)
            if sum_V is not None:
                sum_V += slope_NV.sum(0, dtype=torch.float32)
        nll_N = torch.cat(losses)
        ctx.gradients = slopes_NH, sum_VH, sum_V
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = (None if x is None else x.mul_(grads[0]) for x in ctx.gradients)
        ctx.gradients = ()
        return None, None, hidden, None, None, weight, bias


class _ModuleLoss(torch.autograd.Function):
    """For an output layer of any kind, such as one with an adapter: by calling it, its number formats left to autocast."""

    @staticmethod
    def forward(
        ctx: Any,
        model: Any,
        dtype: torch.dtype,
        hidden_NH: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        size = _part(model.config.get_text_config().vocab_size, dtype, hidden_NH.device)
        losses, gradients = [], []
        sums = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in parameters] if wanted else []
        for hidden, targets, weights in zip(*(x.split(size) for x in (hidden_NH, targets_N, weights_N)), strict=True):
            with torch.set_grad_enabled(wanted):
                hidden = hidden.detach().requires_grad_(wanted)
                with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                    logits = logits_of(model, hidden)
                nll = _nll(logits, targets)
                if wanted:
                    first, *rest = torch.autograd.grad((nll * weights).sum(), [hidden, *parameters])
                    gradients.append(first)
                    for total, gradient in zip(sums, rest, strict=True):
                        total += gradient
            losses.append(nll.detach())
        ctx.gradients = (torch.cat(gradients), *sums) if wanted else ()
        nll_N = torch.cat(losses)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = (gradient.mul_(grads[0]) for gradient in ctx.gradients)
        ctx.gradients = ()
        return None, None, hidden, None, None, *parameters


def _part(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many targets' logits are in memory at once."""
    return _TARGETS if device.type == "cpu" else max(_TARGETS, _BYTES // (vocabulary * dtype.itemsize))


def _nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def _slope(model: Any, raw_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their weighted sum by the products, in the products' number format. May overwrite these."""
    if shapes_logits(model):
        with torch.enable_grad():
            leaf_NV = raw_NV.float().requires_grad_()
            nll_N = _nll(shape_logits(model, leaf_NV), targets_N)
            (slope_NV,) = torch.autograd.grad((nll_N * weights_N).sum(), leaf_NV)
        return nll_N.detach(), slope_NV.to(raw_NV.dtype)
    # Softmax minus one-hot, without a second copy of the logits.
    normaliser_N = log_normaliser(raw_NV)
    nll_N = normaliser_N - raw_NV.gather(1, targets_N[:, None])[:, 0].float()
    if raw_NV.dtype == torch.float32:
        slope_NV = raw_NV.sub_((normaliser_N - weights_N.log())[:, None]).exp_()
    else:  # a difference of two bfloat16 numbers is good for no exponential
        slope_NV = torch.softmax(raw_NV, -1).mul_(weights_N[:, None].to(raw_NV.dtype))
    # p - 1 of the target, from its loss: in bfloat16 the difference would vanish where the model is sure, as it is of what
    # it has sampled itself.
    of_targets_N = (weights_N * torch.expm1(-nll_N)).to(slope_NV.dtype)
    return nll_N, slope_NV.scatter_(1, targets_N[:, None], of_targets_N[:, None])


def _add_product(sum_VH: Tensor, slope_NV: Tensor, hidden_NH: Tensor) -> None:
    """Add slope^T hidden to a sum in float32; where the device can, without a matrix of its size in between."""
    if slope_NV.dtype == sum_VH.dtype:
        sum_VH.addmm_(slope_NV.T, hidden_NH)
    elif _adds_wider(slope_NV.device, slope_NV.dtype):
        torch.addmm(sum_VH, slope_NV.T, hidden_NH, out_dtype=torch.float32, out=sum_VH)
    else:
        sum_VH += slope_NV.T @ hidden_NH


@cache
def _adds_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device adds a product of narrow numbers to a float32 matrix in place. Found by trying."""
    left, right = (torch.arange(256, device=device).view(16, 16).remainder(n).to(dtype) for n in (5, 7))
    found = torch.ones(16, 16, dtype=torch.float32, device=device)
    expected = left.float().T @ right.float() + 1
    try:
        torch.addmm(found, left.T, right, out_dtype=torch.float32, out=found)
    except (RuntimeError, TypeError):  # not on this device, or not in this torch
        return False
    return torch.equal(found, expected)
