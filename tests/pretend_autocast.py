"""CUDA's rules of autocast for another device: the part of them that a decoder meets.

Products are computed in the lower format, exponentials and sums in float32. A CPU's rules are others: there a softmax stays in
bfloat16, and what depends on it shows on a GPU only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import library

_LOWERED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")
_WIDENED = ("exp", "expm1", "log", "log1p", "rsqrt", "reciprocal", "pow.Tensor_Scalar", "logsumexp", "nll_loss", "layer_norm")
_SUMMED_WIDE = ("softmax.int", "log_softmax.int", "cumsum", "sum", "sum.dim_IntList")


def as_cuda_does(device: str) -> list[library.Library]:
    """Give these rules to a device of PyTorch's private kind. They hold while what is returned does."""
    nothing, rules = library.Library("_", "IMPL"), library.Library("aten", "IMPL")
    nothing.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")

    def under(name: str) -> Any:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def kernel(*args: Any, **kwargs: Any) -> Any:
            wanted = torch.get_autocast_dtype(device) if name in _LOWERED else torch.float32
            low = any(torch.is_tensor(x) and x.dtype in (torch.bfloat16, torch.float16) for x in args)
            if name not in _SUMMED_WIDE:
                args = tuple(x.to(wanted) if torch.is_tensor(x) and x.is_floating_point() else x for x in args)
            elif low and not kwargs.get("dtype") and torch.float32 not in args:
                kwargs = {**kwargs, "dtype": wanted}
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
                return op(*args, **kwargs)

        return kernel

    for name in (*_LOWERED, *_WIDENED, *_SUMMED_WIDE):
        rules.impl(name, under(name), "AutocastPrivateUse1")
    return [nothing, rules]
