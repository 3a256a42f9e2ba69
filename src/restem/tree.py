"""The tree that sampling and training share: every node's tokens are computed once, and attend to their ancestors only.

    prefix (few-shot prompt)
    +-- problem 1 --+-- sample 1 .. sample N
    +-- problem 2 --+-- sample 1 .. sample N

Nodes are packed in depth-first order, so the descendants of a node stand right behind it. Positions restart at each branch.
How tokens attend to each other is in `restem.attention`.

The one thing a newcomer would get wrong: a packed position is not a position in the text. `position_ids` holds the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Node:
    """A run of tokens with one parent. Packed tokens start..end are its own, end..last those of its descendants."""

    start: int
    end: int
    last: int
    depth: int


class Tree:
    """Packed token runs. Build it with `add` in depth-first order: a child after its parent, before the parent's sibling.

    An offset says how many tokens of context precede the roots without being packed (a prefix that is already computed).
    """

    def __init__(self, offset: int = 0) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self._nodes: list[list[int]] = []  # start, end, last, depth
        self._parents: list[int | None] = []
        self._offset = offset

    def add(self, tokens: Sequence[int], parent: int | None = None) -> int:
        """Append a node and return its number. An empty node is allowed: it only groups its children."""
        start, end = len(self.tokens), len(self.tokens) + len(tokens)
        depth, position = 0, self._offset
        if parent is not None:
            _, _, last, depth = self._nodes[parent]
            assert last == start, "nodes must be added depth first"
            depth, position = depth + 1, self.end_position(parent)
        self.tokens.extend(tokens)
        self.positions.extend(range(position, position + len(tokens)))
        self._nodes.append([start, end, end, depth])
        self._parents.append(parent)
        ancestor = parent
        while ancestor is not None:
            self._nodes[ancestor][2] = end
            ancestor = self._parents[ancestor]
        return len(self._nodes) - 1

    def fill(self, multiple: int) -> None:
        """Fill up to a multiple of so many tokens, with nobody's children: they change nothing but the sizes of products."""
        if missing := -len(self.tokens) % multiple:
            self.add([0] * missing)

    def end_position(self, node: int | None) -> int:
        """The text position right behind a node: where its children start."""
        while node is not None:
            start, end, _, _ = self._nodes[node]
            if end > start:
                return self.positions[end - 1] + 1
            node = self._parents[node]
        return self._offset

    def last_token(self, node: int | None) -> int:
        """The packed index of the last token at or above a node; -1 if there is none."""
        while node is not None:
            start, end, _, _ = self._nodes[node]
            if end > start:
                return end - 1
            node = self._parents[node]
        return -1

    @property
    def nodes(self) -> list[Node]:
        return [Node(*values) for values in self._nodes]

    def ancestors(self, node: int) -> list[int]:
        """The nodes above this one, nearest first."""
        chain: list[int] = []
        parent = self._parents[node]
        while parent is not None:
            chain.append(parent)
            parent = self._parents[parent]
        return chain


def shared_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, leaving at least one token to each prompt."""
    if not prompts:
        return 0
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))
