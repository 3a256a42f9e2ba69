"""FlexAttention in plain operations, written from its documentation: what a pretend GPU computes in the kernel's place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from pretend_gpu import PretendGPU
from restem import attention_flex


def attention(q: Tensor, k: Tensor, v: Tensor, *, score_mod: Any, block_mask: Any, scale: float, enable_gqa: bool) -> Tensor:
    """Every score of every pair; the mask's function decides, not its blocks."""
    assert block_mask.shape[-2:] == (q.shape[2], k.shape[2]), "as the kernel demands"
    assert enable_gqa or q.shape[1] == k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, q.shape[1] // x.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
    query, key = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    if score_mod is not None:
        head = torch.arange(q.shape[1], device=q.device)[:, None, None]
        scores = score_mod(scores, 0, head, query[:, None], key)
    seen = block_mask.mask_mod(0, 0, query[:, None], key)
    return (torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ v.float()).to(v.dtype)


@contextmanager
def flex_as_one_launch(gpu: PretendGPU) -> Iterator[None]:
    """Attention as on a GPU with Triton: one kernel a layer, forward and backward."""
    with pytest.MonkeyPatch.context() as patch, gpu.one_launch(sys.modules[__name__], "attention"):
        patch.setattr(attention_flex, "serves", lambda device: device.type == gpu.device.type)
        patch.setattr(attention_flex, "_kernel", lambda: attention)
        yield
