"""How layers score, and who sees whom in a pack of token runs.

Nodes stand in depth-first order, so a token is seen by itself and by what follows it, up to the end of its node's subtree:
one integer per token is the whole mask of any tree. T are the tokens of the pack, S the keys, with those before the roots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from restem.tree import Node, Tree

Integers = np.ndarray[Any, np.dtype[np.int32]]


class Rule(NamedTuple):
    """How one layer scores: softmax over softcap * tanh(scale * q.k / softcap), of keys nearer than the window."""

    scale: float
    window: int | None = None
    """Tokens that a token sees, itself included; None = all before it."""
    softcap: float | None = None

    @property
    def is_plain(self) -> bool:
        return self.window is None and self.softcap is None

    def within(self, reach: int) -> Rule:
        """The rule for texts of `reach` tokens: a window that holds them all is none."""
        return self._replace(window=None) if self.window is not None and reach <= self.window else self


Sees = Callable[[Any, Any, Tensor, Tensor], Tensor]
"""Whether query q sees key k, by (batch, head, q, k); the first two are not looked at."""


class Keys(NamedTuple):
    """Who sees the keys that a pack attends to. Query q stands at key own_at + q."""

    last_S: Integers
    """The place behind the last query that sees the key."""
    position_S: Integers
    """The key's place in its text."""
    own_at: int
    """Where the pack's own keys begin, behind those that precede its roots."""

    def sees(self, window: int | None, device: torch.device) -> Sees:
        """The mask as a function of indices. Only tensors differ between packs, so that it compiles once."""
        last_S, position_S = torch.from_numpy(np.stack([self.last_S, self.position_S])).to(device)
        place_T = torch.arange(self.own_at, len(self.last_S), dtype=torch.int32, device=device)
        if window is None:
            return lambda b, h, q, k: (k <= place_T[q]) & (place_T[q] < last_S[k])
        oldest_T = position_S[self.own_at :] - window
        return lambda b, h, q, k: (k <= place_T[q]) & (place_T[q] < last_S[k]) & (oldest_T[q] < position_S[k])


@dataclass(frozen=True)
class AttentionPlan:
    """Who sees whom in one pack."""

    nodes: list[Node]
    last: Integers
    """For every packed token, the index behind the last token that sees it."""
    positions: Integers
    """Its place in its text."""
    device: torch.device
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(tree: Tree, device: torch.device | str = "cpu") -> AttentionPlan:
        nodes = tree.nodes
        last = np.zeros(len(tree.tokens), dtype=np.int32)
        for node in nodes:
            last[node.start : node.end] = node.last
        return AttentionPlan(nodes, last, np.array(tree.positions, dtype=np.int32), torch.device(device))

    @property
    def reach(self) -> int:
        """Tokens of the longest text, with what precedes the roots."""
        return int(self.positions.max(initial=-1)) + 1

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once: layers of one kind share it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def visible(self, window: int | None = None, before: int = 0) -> Tensor:
        """[T, S], queries by keys: which packed token sees which, behind `before` keys that precede the roots."""
        return self.once(("visible", window, before), lambda: self._visible(window, before))  # type: ignore[no-any-return]

    def _visible(self, window: int | None, before: int) -> Tensor:
        size = len(self.last)
        sees = self.keys(before, before, size).sees(window, self.device)
        return sees(0, 0, torch.arange(size, device=self.device)[:, None], torch.arange(before + size, device=self.device))

    def keys(self, before: int, own_at: int, size: int) -> Keys:
        """`before` keys in front, and from `own_at` on the pack's, filled up to `size`. What fills is seen by itself alone."""
        total, length = own_at + size, len(self.last)
        last_S, position_S = np.arange(1, total + 1, dtype=np.int32), np.zeros(total, dtype=np.int32)
        last_S[:before], last_S[before:own_at] = total, 0
        last_S[own_at : own_at + length] = own_at + self.last
        position_S[:before] = np.arange(before)
        position_S[own_at : own_at + length] = self.positions
        return Keys(last_S, position_S, own_at)
