"""How many tokens are computed at once in training: the recipe's number, or what the memory at hand is found to hold.

Loss and gradient do not depend on it, beyond rounding. On a GPU larger packs are faster: the first step is taken with few
tokens, and what it took of the memory says how many the next ones may have. When memory runs out all the same, they are halved,
and the step begins again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from restem.config import ImproveConfig
from restem.errors import RestemError
from restem.memory import free_bytes
from restem.training.batches import pack_budget
from restem.types import Example

_MOST = 16384
_LEAST = 64
_SHARE = 0.8  # of the free memory that larger packs may take: what they need is not quite linear


class PackBudget:
    """Tokens of a pack, behind what all prompts share."""

    def __init__(self, settings: ImproveConfig, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.tokens: int | None = None
        """What was found; None = nothing yet."""
        self._measures = settings.pack_tokens is None and device.type == "cuda"

    def of(self, examples: Sequence[Example], *, is_apart: bool = True) -> int:
        """`is_apart`: what all prompts share stands in no pack."""
        return self.tokens or pack_budget(examples, self.settings, is_apart=is_apart, device=self.device.type)

    def go_on_with(self, tokens: int | None) -> None:
        """Take over what a former part of this training had chosen."""
        if tokens is not None:
            self.tokens, self._measures = tokens, False

    def begin(self) -> None:
        """Before the passes of a step."""
        if self._measures:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)

    def passed(self, largest: int, gradients: int) -> None:
        """After the passes of a step: the largest pack had so many tokens, and gradients take so many bytes."""
        if self._measures:
            peak = torch.cuda.max_memory_allocated(self.device)
            self._measured = largest, max(1, peak - self._before - gradients)

    def stepped(self) -> None:
        """After the first optimiser step, when everything that stays in memory is there: choose."""
        if self._measures:
            self.tokens = fitting(*self._measured, free_bytes(self.device))
            self._measures = False

    def halve(self, used: int) -> None:
        """Memory ran out with packs of so many tokens."""
        if used // 2 < _LEAST:
            raise RestemError(
                f"memory is not enough to train on packs of {used} tokens. Set improve.gradient_checkpointing = true, train an "
                "adapter (improve.lora_rank = 16), or leave out the longest examples (generate.max_tokens)."
            )
        self.tokens, self._measures = used // 2, False


def fitting(largest: int, bytes_of_pack: int, free: int) -> int:
    """Tokens of packs, if one of `largest` tokens took so many bytes and so many are free; at least as many."""
    room = int(_SHARE * free / bytes_of_pack * largest)
    return max(largest, min(_MOST, room // 1024 * 1024))
