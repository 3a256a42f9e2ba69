"""Linear layers whose weights are put in the processor's own order once, instead of at every call.

On a CPU, a product first reorders the weights; with a few hundred rows that is some per cent of its time, and for a wide output
layer as much as the product itself. The model is not changed: its linear layers compute with the reordered copies for the time
of a with block. Elsewhere this does nothing.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from restem.memory import free_bytes

_ROWS = 256  # the number of rows that the order is made for; it serves any


class PackedLinears:
    """A context manager, to be entered as often as one likes; the copies are made at the first entry."""

    def __init__(self, model: Any) -> None:
        self.layers = [module for module in model.modules() if type(module) is torch.nn.Linear] if _pays(model) else []
        self._packed: list[Tensor] | None = None

    def __enter__(self) -> PackedLinears:
        if self._packed is None:
            self._packed = [torch.ops.mkldnn._reorder_linear_weight(layer.weight, _ROWS) for layer in self.layers]
        for layer, weight in zip(self.layers, self._packed, strict=True):
            layer.forward = _Forward(weight, layer.bias)  # type: ignore[assignment,method-assign]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for layer in self.layers:
            del layer.forward  # the class's own shows again


class _Forward:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def _pays(model: Any) -> bool:
    """On a CPU, in a number format that it multiplies in, with room for a second copy of the weights."""
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not (model.dtype == torch.float32 or (model.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())):
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    copies = sum(module.weight.nbytes for module in model.modules() if type(module) is torch.nn.Linear)
    return copies < free_bytes(model.device) // 4
