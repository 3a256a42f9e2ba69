"""CUDA's autocast rules on a CPU: which operations give float32 there, whatever they are given.

A CPU's autocast leaves most of them in bfloat16, so that arithmetic whose types follow from it passes every test here and
crashes on a GPU. The list is that of PyTorch's documentation ("CUDA Ops that can autocast to float32").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_NAMES = """
__pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cosh cosine_embedding_loss cdist
cosine_similarity cross_entropy cumprod cumsum dist erfinv exp expm1 group_norm hinge_embedding_loss kl_div l1_loss
layer_norm log log10 log_softmax log1p log2 margin_ranking_loss mse_loss multilabel_margin_loss multi_margin_loss
nll_loss norm normalize pdist poisson_nll_loss pow prod reciprocal rsqrt sinh smooth_l1_loss soft_margin_loss softmax
softmin softplus sum renorm tan triplet_margin_loss logsumexp
"""
FLOAT32 = frozenset(_NAMES.split())


class CudaRules(TorchFunctionMode):
    """Inside, autocast on the CPU widens what autocast on CUDA does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        is_widened = getattr(func, "__name__", "") in FLOAT32 and torch.is_autocast_enabled("cpu")
        if is_widened and isinstance(first, torch.Tensor) and first.dtype == torch.bfloat16:
            args = (first.float(), *args[1:])
        return func(*args, **(kwargs or {}))
