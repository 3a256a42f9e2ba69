"""The tree sampler: draws N completions per problem from a Hugging Face decoder, each prompt computed once.

The shared prefix is computed once per model and attended to in place; a problem's own tokens are computed once and forked into
a slot per sample; finished rows are replaced at once by owed ones, across problems. Everything a row's result depends on is its
own: on one device and number format a sample is the same whatever else is in flight, as far as the machine's matrix products
give a row the same result in every batch (docs/sampling.md says where they do).

Not here: sliding-window and soft-cap attention. Such a model is refused by name when it is loaded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restem.errors import RestemError
from restem.models import end_ids, logits_of, refuse_unsupported
from restem.prompts import Renderer
from restem.sampling import Decoding, Owed, uniforms
from restem.sampling.decoding import choose
from restem.sampling.finish import Finisher
from restem.tree import (
    AttentionPlan,
    PackAttention,
    Tree,
    block,
    merge,
    pack_attention,
    shared_length,
    tree_attention,
)
from restem.types import Problem, Sample

_ALIGN = 64  # columns of a slot in use are rounded up to this: few shapes, and the same summation order in each
_ROW_ALIGN = 16  # below this many rows some float32 matrix products sum in another order
_PREFILL_TOKENS = 1024


class TreeSampler:
    """Draws samples of one model. See `restem.sampling.Sampler` for the contract of `sample`.

    `model`: a `transformers` causal language model, already on its device; its weights are never changed. `renderer` turns
    problems into token ids. `rows`: samples in flight; None = from the memory at hand.
    """

    def __init__(self, model: Any, renderer: Renderer, *, rows: int | None = None) -> None:
        refuse_unsupported(model)
        self.model, self.renderer = model, renderer
        self.config = model.config.get_text_config()
        self.device, self.dtype = model.device, model.dtype
        self.context = int(getattr(self.config, "max_position_embeddings", 1 << 30))
        self.end_ids = end_ids(model, renderer)
        self._rows = rows
        self._prefix: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def sample(self, problems: Sequence[Problem], owed: Iterable[Owed], decoding: Decoding, *, stream: str) -> Iterator[Sample]:
        """Yield every owed sample once, in the order in which they finish. `problems` is the whole stage."""
        prompts = {problem.id: self.renderer.encode(problem) for problem in problems}
        for name, prompt in prompts.items():
            if len(prompt) >= self.context:
                raise RestemError(
                    f"the prompt of problem {name} has {len(prompt)} tokens, and the model's context holds {self.context}. "
                    "Use fewer exemplars (prompt.shots), or leave the problem out."
                )
        queue = _by_problem(owed)
        if not queue:
            return
        shared = shared_length(list(prompts.values()))
        prefix_ids = next(iter(prompts.values()))[:shared]
        with tree_attention(self.model):
            batch = _Batch(self, prefix_ids, self._compute_prefix(prefix_ids), prompts, queue, decoding, stream)
            while batch.admit() or batch.active:
                yield from batch.take_finished()
                if batch.active:
                    batch.step()
                    yield from batch.take_finished()

    def forward(self, tokens: Tensor, positions: Tensor, attends: Any) -> Tensor:
        """Last hidden states [B, T, hidden]."""
        out = self.model.base_model(input_ids=tokens, position_ids=positions, use_cache=False, tree=attends)
        return out.last_hidden_state  # type: ignore[no-any-return]

    def _compute_prefix(self, ids: tuple[int, ...]) -> Tensor:
        """Keys and values [L, 2, K, P, D] of the shared prefix; computed once per sampler."""
        if ids not in self._prefix:
            tree = Tree()
            tree.add(ids)
            capture = _Capture(PackAttention(tree.plan(self.device)))
            if ids:
                self.forward(self._tensor([ids]), self._tensor([tree.positions]), capture)
            self._prefix = {ids: capture.stacked() if ids else self._empty_kv(0)}
        return self._prefix[ids]

    def rows_for(self, width: int, owed: int) -> int:
        """Samples in flight: what memory allows for slots of `width` tokens, a multiple of 16."""
        per_row = self._empty_kv(1).numel() * width * self.dtype.itemsize
        limit = 512 if self.device.type == "cpu" else 1024
        wanted = self._rows or min(limit, max(1, _free_bytes(self.device) // 3 // per_row))
        return max(_ROW_ALIGN, -(-min(wanted, owed) // _ROW_ALIGN) * _ROW_ALIGN)

    def _empty_kv(self, length: int) -> Tensor:
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        shape = (self.config.num_hidden_layers, 2, heads, length, size)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _tensor(self, rows: Any) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.device)


@dataclass(slots=True)
class _Row:
    """One sample in flight, in slot number = its place in the list."""

    owed: Owed
    finisher: Finisher
    uniform: np.ndarray[Any, np.dtype[np.float64]]
    length: int
    """Tokens in the slot: the problem's own and those sampled."""
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None


@dataclass(slots=True)
class _Fork:
    """A computed problem from which owed samples are forked."""

    kv: Tensor
    logits: Tensor
    length: int
    total: int
    """Tokens of the whole prompt."""
    owed: deque[Owed]


class _Batch:
    """The samples in flight of one call: slots, the queue behind them, and what has finished."""

    def __init__(
        self,
        sampler: TreeSampler,
        prefix_ids: tuple[int, ...],
        prefix: Tensor,
        prompts: dict[str, tuple[int, ...]],
        queue: dict[str, list[int]],
        decoding: Decoding,
        stream: str,
    ) -> None:
        self.sampler, self.prefix, self.decoding, self.stream = sampler, prefix, decoding, stream
        self.offset = len(prefix_ids)
        self.own = {name: prompts[name][self.offset :] for name in queue}
        self.waiting = deque((name, deque(Owed(name, index) for index in indices)) for name, indices in queue.items())
        self.forks: deque[_Fork] = deque()
        longest = max(len(prompts[name]) for name in prompts) - self.offset
        self.width = _round_up(min(longest + decoding.max_tokens, sampler.context - self.offset), _ALIGN)
        self.capacity = sampler.rows_for(self.width, sum(len(indices) for indices in queue.values()))
        one = sampler._empty_kv(self.width)
        self.kv = one.new_zeros((*one.shape[:2], self.capacity, *one.shape[2:]))  # [L, 2, R, K, T, D]
        self.rows: list[_Row] = []
        self.finished: list[_Row] = []

    @property
    def active(self) -> int:
        return len(self.rows)

    def admit(self) -> bool:
        """Fill free slots with owed samples and draw their first tokens. True if any was owed."""
        started = False
        while self.active < self.capacity and (self.forks or self.waiting):
            if not self.forks:
                self._prefill()
            fork = self.forks[0]
            owed = [fork.owed.popleft() for _ in range(min(len(fork.owed), self.capacity - self.active))]
            if not fork.owed:
                self.forks.popleft()
            first = self.active
            self.kv[:, :, first : first + len(owed), :, : fork.length] = fork.kv[:, :, None]
            limit = min(self.decoding.max_tokens, self.sampler.context - fork.total)
            for item in owed:
                uniform = uniforms(self.stream, item, limit)
                finisher = Finisher(self.sampler.renderer, self.decoding.stop)
                self.rows.append(_Row(item, finisher, uniform, fork.length, limit))
            self._choose(fork.logits.expand(len(owed), -1), self.rows[first:])
            self._retire()
            started = True
        return started

    def step(self) -> None:
        """One token for every row in flight."""
        padded = min(self.capacity, _round_up(self.active, _ROW_ALIGN))
        filler = padded - self.active
        tokens = [row.tokens[-1] for row in self.rows] + [0] * filler
        lengths = [row.length for row in self.rows] + [0] * filler
        place = self.sampler._tensor(lengths)
        attends = _Decode(self.kv[:, :, :padded], self.prefix, place, min(self.width, _round_up(max(lengths) + 1, _ALIGN)))
        hidden = self.sampler.forward(self.sampler._tensor(tokens)[:, None], (place + self.offset)[:, None], attends)
        logits = logits_of(self.sampler.model, hidden[:, 0])[: self.active]
        for row in self.rows:
            row.length += 1
        self._choose(logits, self.rows)
        self._retire()

    def take_finished(self) -> Iterator[Sample]:
        for row in self.finished:
            token_ids, text = row.finisher.close(row.tokens)
            yield Sample(
                problem_id=row.owed.problem_id,
                index=row.owed.index,
                token_ids=tuple(token_ids),
                text=text,
                finish="stop" if row.finish == "stop" else "length",
                logprob=float(sum(row.logprobs)),
            )
        self.finished = []

    def _prefill(self) -> None:
        """Compute the next waiting problems in one pack: their keys and values, and the logits of the first token."""
        tree = Tree(self.offset)
        batch: list[tuple[int, deque[Owed]]] = []
        while self.waiting and (not batch or len(tree.tokens) + len(self.own[self.waiting[0][0]]) <= _PREFILL_TOKENS):
            name, owed = self.waiting.popleft()
            batch.append((tree.add(self.own[name]), owed))
        tree.add([0] * (-len(tree.tokens) % _ROW_ALIGN))  # nobody's child: it only fills the rows
        capture = _Capture(_Prefill(tree.plan(self.sampler.device), self.prefix))
        ids, positions = self.sampler._tensor([tree.tokens]), self.sampler._tensor([tree.positions])
        hidden = self.sampler.forward(ids, positions, capture)[0]
        kv = capture.stacked()
        nodes = tree.nodes
        ends = [nodes[number].end - 1 for number, _ in batch]
        logits = logits_of(self.sampler.model, hidden[ends + [0] * (-len(ends) % _ROW_ALIGN)])
        for (number, owed), row in zip(batch, logits[: len(batch)], strict=True):
            node = nodes[number]
            size = node.end - node.start
            self.forks.append(_Fork(kv[..., node.start : node.end, :], row, size, self.offset + size, owed))

    def _choose(self, logits: Tensor, rows: list[_Row]) -> None:
        uniform = torch.tensor([row.uniform[len(row.tokens)] for row in rows], dtype=torch.float64, device=logits.device)
        tokens, logprobs = choose(logits, uniform, self.decoding)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.logprobs.append(logprob)
            if token in self.sampler.end_ids:
                row.finish = "stop"
                continue
            row.tokens.append(token)
            if row.finisher.stops(row.tokens):
                row.finish = "stop"
            elif len(row.tokens) >= row.limit:
                row.finish = "length"

    def _retire(self) -> None:
        """Move finished rows out; the last row in flight takes the slot, so that slots in use stay in front."""
        slot = 0
        while slot < self.active:
            row = self.rows[slot]
            if row.finish is None:
                slot += 1
                continue
            self.finished.append(row)
            last = self.active - 1
            if slot != last:
                used = self.rows[last].length
                self.kv[:, :, slot, :, :used] = self.kv[:, :, last, :, :used]
                self.rows[slot] = self.rows[last]
            self.rows.pop()


# --- attention of the three kinds of forward pass (shapes as in restem.tree) -----------------------------------------------


class _Capture:
    """Keeps every layer's keys and values of a pass, around another attention."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.layers: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.layers[layer] = torch.stack([k[0], v[0]])
        return self.inner.attend(layer, q, k, v, scale)  # type: ignore[no-any-return]

    def stacked(self) -> Tensor:
        """[L, 2, K, T, D]"""
        return torch.stack([self.layers[layer] for layer in sorted(self.layers)])


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Problems in one pack, each on itself and all on the prefix."""

    plan: AttentionPlan
    prefix: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        own = pack_attention(q, k, v, self.plan, scale)
        if not self.prefix.shape[3]:
            return own[0]
        keys, values = self.prefix[layer]
        return merge([own, block(q, keys[None], values[None], scale, causal=False)])[0]


class _Decode:
    """One new token per row: on the shared prefix in place, and on the row's own slot."""

    def __init__(self, kv: Tensor, prefix: Tensor, place_R: Tensor, width: int) -> None:
        self.kv, self.prefix, self.place_R, self.width = kv, prefix, place_R, width
        self.rows_R = torch.arange(len(place_R), device=place_R.device)
        unseen_RT = torch.arange(width, device=place_R.device)[None] > place_R[:, None]
        self.mask_R11T = torch.zeros_like(unseen_RT, dtype=kv.dtype).masked_fill_(unseen_RT, float("-inf"))[:, None, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rows, heads, _, size = q.shape
        groups = k.shape[1]
        keys, values = self.kv[layer]
        keys[self.rows_R, :, self.place_R] = k[:, :, 0]
        values[self.rows_R, :, self.place_R] = v[:, :, 0]
        grouped = (q * scale).reshape(rows, groups, heads // groups, size)
        own = (grouped @ keys[:, :, : self.width].transpose(-1, -2)).add_(self.mask_R11T)
        if not self.prefix.shape[3]:
            weights = torch.softmax(own, -1)  # sums in float32, whatever the format
            return torch.as_tensor((weights @ values[:, :, : self.width]).reshape(q.shape))
        # One product for all rows: the queries of a key-value head, of every row and group, are one long sequence. The prefix
        # comes second, so that a wider slot moves it by whole vectors and no sum changes its order.
        shared_keys, shared_values = self.prefix[layer]
        folded = grouped.transpose(0, 1).reshape(groups, -1, size)
        shared = (folded @ shared_keys.transpose(-1, -2)).view(groups, rows, heads // groups, -1).transpose(0, 1)
        weights = torch.softmax(torch.cat([own, shared], -1), -1)
        out = weights[..., : self.width] @ values[:, :, : self.width]
        folded_weights = weights[..., self.width :].transpose(0, 1).reshape(groups, rows * (heads // groups), -1)
        out = out + (folded_weights @ shared_values).view(groups, rows, -1, size).transpose(0, 1)
        return torch.as_tensor(out.reshape(q.shape))


def _by_problem(owed: Iterable[Owed]) -> dict[str, list[int]]:
    """Owed samples of a problem together, so that its prompt is computed once; order of first appearance."""
    grouped: dict[str, list[int]] = {}
    for problem_id, index in owed:
        grouped.setdefault(problem_id, []).append(index)
    return grouped


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import os

    try:
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return 4 << 30
