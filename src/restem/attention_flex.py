"""Attention over a tree on a GPU: one FlexAttention call, forward and backward.

PyTorch compiles it to one kernel that skips what nobody sees, with scores in float32 and memory linear in the pack. Windows,
caps and keys that precede the roots are part of the same call. Which blocks of 128 queries by 128 keys hold anything is worked
out from the tree, once per pack and window, never from a mask of all pairs.

Few shapes compile: packs and what precedes them are filled up to whole blocks, sizes are dynamic, and a mask or a cap differs
from another in its tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restem.attention_plan import AttentionPlan, Keys, Rule

BLOCK = 128
_LEAST_BLOCKS = 2  # a size of 1 would be compiled apart from all others
_LEAST_HEAD = 16  # smaller heads are filled up with zeros, which changes no score

_refused: dict[torch.device, str] = {}


def serves(device: torch.device) -> bool:
    """Whether attention on this device is computed here: a GPU with Triton, on which FlexAttention was not found to fail."""
    return device.type == "cuda" and find_spec("triton") is not None and device not in _refused


def refuse(device: torch.device, reason: str) -> None:
    """Compute attention on this device with a dense mask from here on: FlexAttention fails there, for this reason."""
    _refused[device] = reason


def attend(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor] | None, rule: Rule) -> Tensor:
    """Attention [1, H, T, V] of every packed token over what it sees. `before`: keys and values of what precedes the roots."""
    length, size = q.shape[2], max(_LEAST_BLOCKS * BLOCK, whole_blocks(q.shape[2]))
    count = 0 if before is None else before[0].shape[2]
    mask = plan.once(("flex", count, size, rule.window), lambda: _block_mask(plan, count, size, rule.window))
    q, k, own_v = (_filled(x, size) for x in (q, k, v))
    if before is not None:
        k, own_v = (
            torch.cat([_filled(x.to(own.dtype), whole_blocks(count)), own], 2)
            for x, own in zip(before, (k, own_v), strict=True)
        )
    out = _kernel()(
        q,
        k,
        own_v,
        score_mod=None if rule.softcap is None else _capped(rule.softcap, q.shape[1], q.device),
        block_mask=mask,
        scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[:, :, :length, : v.shape[3]]  # type: ignore[no-any-return]


def whole_blocks(tokens: int) -> int:
    """Tokens, rounded up to whole blocks."""
    return -(-tokens // BLOCK) * BLOCK


def _filled(x: Tensor, size: int) -> Tensor:
    """[1, K, T, D] with zeros up to `size` tokens, and up to a head that the kernels take."""
    fill = (max(0, _LEAST_HEAD - x.shape[3]), size - x.shape[2])
    return torch.nn.functional.pad(x, (0, fill[0], 0, fill[1])) if any(fill) else x


@cache
def _kernel() -> Callable[..., Any]:
    return compiled("inductor")


def compiled(backend: Any) -> Callable[..., Any]:
    """FlexAttention, compiled by a backend of torch.compile."""
    from torch.nn.attention.flex_attention import flex_attention

    settings = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):  # one, or the other, by the version of torch
        if hasattr(settings, name):  # kinds of layers x number formats x gradients or none: beyond it, nothing is compiled
            setattr(settings, name, max(64, getattr(settings, name)))
            break
    return torch.compile(flex_attention, dynamic=True, backend=backend)


@cache
def _capped(softcap: float, heads: int, device: torch.device) -> Callable[..., Tensor]:
    """The scores of a layer with a cap. The cap is a tensor: as a number, FlexAttention could not compile it (torch 2.11)."""
    with torch.inference_mode(False):  # it is kept, and may be needed with gradients
        cap_H = torch.full((heads,), softcap, device=device)
    return lambda score, b, h, q, k: cap_H[h] * torch.tanh(score / cap_H[h])


def _block_mask(plan: AttentionPlan, before: int, size: int, window: int | None) -> Any:
    """The mask of a pack, and which of its blocks are to be computed: with the mask, or, where all is seen, without."""
    from torch.nn.attention.flex_attention import BlockMask

    keys = plan.keys(before, whole_blocks(before), size)
    some_QK, whole_QK = blocks_of(keys, window)
    mask = BlockMask.from_kv_blocks(
        *_in_order(some_QK & ~whole_QK), *_in_order(whole_QK), BLOCK_SIZE=BLOCK, mask_mod=keys.sees(window, plan.device)
    )
    return mask.to(plan.device)


def blocks_of(keys: Keys, window: int | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(some, whole) [blocks of queries, blocks of keys]: where some key may be seen, and where all are seen by all queries.

    A key is seen by the queries from its own place up to its last, without a gap. So a block of keys is seen by its own
    block of queries, and by the later ones up to the furthest of its lasts; all see all of it before the nearest.
    """
    last_KB, position_KB = (x.reshape(-1, BLOCK) for x in (keys.last_S, keys.position_S))
    own = keys.own_at // BLOCK
    column_K = np.arange(len(last_KB))[None]
    row_Q1 = np.arange(own, len(last_KB))[:, None]  # in blocks of keys: where the queries stand
    some = (column_K == row_Q1) | ((column_K < row_Q1) & (last_KB.max(1)[None] > row_Q1 * BLOCK))
    whole = (column_K < row_Q1) & (last_KB.min(1)[None] >= (row_Q1 + 1) * BLOCK)
    if window is not None:
        query_QB = position_KB[own:]
        some &= query_QB.min(1)[:, None] - position_KB.max(1)[None] < window
        whole &= query_QB.max(1)[:, None] - position_KB.min(1)[None] < window
    return some, whole


def _in_order(wanted_QK: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each row wants, and their numbers, in front of the others: as BlockMask takes them."""
    counts = wanted_QK.sum(1).astype(np.int32)
    numbers = np.argsort(~wanted_QK, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(counts)[None, None], torch.from_numpy(numbers)[None, None]
