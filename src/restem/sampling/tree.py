"""The tree sampler: draws N completions per problem from a Hugging Face decoder, each prompt computed once.

The shared prefix is computed once per model and attended to in place, and so is a problem's question; finished rows are
replaced at once by owed ones, across problems. Everything a row's result depends on is its own: on one device and number format
a sample is the same whatever else is in flight, as far as the machine's matrix products give a row the same result in every
batch (docs/sampling.md says where they do).

The one thing a newcomer would get wrong: the model is never rewritten. Its forward pass is its own; only the function behind
its attention interface is ours (`restem.compatibility`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from restem.attention import AttentionPlan, Capture, PackAttention
from restem.compatibility import refuse_unsupported, tree_attention
from restem.errors import RestemError
from restem.memory import free_bytes, hand_back, is_out_of_memory, keep_freed_memory
from restem.models import end_ids, logits_of
from restem.prompts import Renderer
from restem.sampling import Decoding, Owed, by_problem, check_lengths
from restem.sampling.blocks import Blocks
from restem.sampling.deck_flight import DeckFlight
from restem.sampling.flight import ROW_ALIGN, Flight, Pace
from restem.sampling.graphs import Replays, recorder, rounded
from restem.sampling.packed import PackedLinears
from restem.sampling.room import Lengths, Needs, Plan
from restem.sampling.slot_flight import SlotFlight
from restem.sampling.slots import BLOCK, KV, whole_blocks
from restem.tree import Node, Tree, shared_length
from restem.types import Problem, Sample


@dataclass(frozen=True)
class Prefix:
    """What all prompts of a stage begin with, computed."""

    length: int
    kv: KV | None
    apart: int = 0
    """Tokens that are attended to in place by all rows. The others are copied to the beginning of every question: all of a
    prefix of less than a block, for which that costs less, and what exceeds a multiple of 8 on a GPU, which is slower then."""

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor] | None:
        """Keys [L, K, D, P] and values of the tokens that stand apart, as decoding reads them; None if there are none."""
        if self.kv is None or not self.apart:
            return None
        keys, values = self.kv.part(0, self.apart)
        return keys.transpose(-1, -2).contiguous(), values.contiguous()

    def by_layer(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {} if self.kv is None else {n: (k[None], v[None]) for n, (k, v) in enumerate(zip(*self.kv, strict=True))}


class TreeSampler:
    """Draws samples of one model. See `restem.sampling.Sampler` for the contract of `sample`.

    `model`: a `transformers` causal language model, already on its device; its weights are never changed. `renderer` turns
    problems into token ids. `rows`: samples in flight at most; None = as many as make the machine faster, within the memory
    at hand. `say` is told what is about to be used. `on_deck`: compute as on a GPU; None = on what is not a CPU.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        *,
        rows: int | None = None,
        say: Callable[[str], None] = lambda text: None,
        on_deck: bool | None = None,
    ) -> None:
        refuse_unsupported(model)
        keep_freed_memory()
        self.model, self.renderer, self.say = model, renderer, say
        self.device, self.dtype = model.device, model.dtype
        config = model.config.get_text_config()
        self.heads = int(config.num_attention_heads)
        self.context = int(getattr(config, "max_position_embeddings", 1 << 30))
        self.end_ids = end_ids(model, renderer)
        self._on_deck = self.device.type != "cpu" if on_deck is None else on_deck
        self.lengths = Lengths()
        self.record = recorder(self.device)
        self._like: KV | None = None
        self._rows = rows
        self._prefix: tuple[tuple[int, ...], Prefix] | None = None
        self._first = rows or (2048 if self._on_deck else 128)  # rows to begin with; later what the pace found
        self._found = False  # more are no faster
        self._stated = 0.0  # bytes that the user knows of
        self._packed = PackedLinears(model)
        # Fewer query rows than 16 in a product: float32 kernels may sum in another order.
        shared = self.heads // int(getattr(config, "num_key_value_heads", None) or self.heads)
        self.least_seats = -(-ROW_ALIGN // shared) if self.dtype == torch.float32 else 1

    @torch.inference_mode()
    def sample(self, problems: Sequence[Problem], owed: Iterable[Owed], decoding: Decoding, *, stream: str) -> Iterator[Sample]:
        """Yield every owed sample once, in the order in which they finish. `problems` is the whole stage."""
        prompts = {problem.id: self.renderer.encode(problem) for problem in problems}
        check_lengths(prompts, self.context)
        queue = by_problem(owed)
        if not queue:
            return
        with tree_attention(self.model), self._packed:
            while queue:
                flight: Flight | None = None
                try:
                    prefix = self._compute_prefix(prompts)
                    flight = self._flight(prefix, prompts, queue, decoding, stream)
                    yield from flight.run()
                    if not self._found:
                        self._first, self._found = max(self._first, flight.pace.rows), flight.pace.found
                    return
                except RuntimeError as error:  # torch.OutOfMemoryError is one
                    if not is_out_of_memory(error):
                        raise
                    rows = 0 if flight is None else len(flight.rows)
                    queue = queue if flight is None else flight.owed()  # those in flight begin again, and come out the same
                    traceback.clear_frames(error.__traceback__)  # they hold the tensors of the rows
                    problem = error
                finally:
                    flight = None
                    hand_back(self.device)
                self._rows = self._fewer_rows(problem, rows)

    def forward(self, tokens: Tensor, positions: Tensor, attends: Any) -> Tensor:
        """Last hidden states [B, T, hidden]."""
        out = self.model.base_model(input_ids=tokens, position_ids=positions, use_cache=False, tree=attends)
        return out.last_hidden_state  # type: ignore[no-any-return]

    def compute(self, texts: Sequence[tuple[int, ...]], prefix: Prefix) -> list[tuple[KV, Tensor]]:
        """Texts behind the prefix, in one pack: keys and values of each, and the logits of what follows it."""
        kv, hidden, nodes = self._pack(texts, prefix, lambda tokens: -(-tokens // ROW_ALIGN) * ROW_ALIGN)
        ends = [node.end - 1 for node in nodes]
        logits = logits_of(self.model, hidden[ends + [0] * (-len(ends) % ROW_ALIGN)])
        return [(kv.part(node.start, node.end), row) for node, row in zip(nodes, logits, strict=False)]

    def compute_questions(self, texts: Sequence[tuple[int, ...]], prefix: Prefix) -> tuple[KV | None, list[int]]:
        """The same for a deck: keys and values of what of the prefix does not stand apart, and of all texts behind it, in one
        run, and where in the pack each text starts. None if that is nothing."""
        rest = prefix.kv.part(prefix.apart, prefix.length) if prefix.kv and prefix.apart < prefix.length else None
        if not any(texts):
            return rest, [0] * len(texts)
        kv, _, nodes = self._pack(texts, prefix, lambda tokens: rounded(tokens, 256))
        return kv if rest is None else rest.followed_by(kv), [node.start for node in nodes]

    def like(self) -> KV:
        """Keys and values of a token, for their sizes."""
        if self._like is None:
            self._like = self._pack([(0,)], Prefix(0, None), lambda tokens: ROW_ALIGN)[0].part(0, 1)
        return self._like

    def _pack(
        self, texts: Sequence[tuple[int, ...]], prefix: Prefix, padded: Callable[[int], int]
    ) -> tuple[KV, Tensor, list[Node]]:
        """Keys and values, last hidden states, and the texts' nodes. `padded`: tokens to compute for so many."""
        tree = Tree(prefix.length)
        numbers = [tree.add(text) for text in texts]
        # Nobody's children: they only fill the rows. Many are to reach no further in the context than the texts do.
        fill = padded(len(tree.tokens)) - len(tree.tokens)
        longest = max(map(len, texts)) if fill >= ROW_ALIGN else ROW_ALIGN
        for start in range(0, fill, longest):
            tree.add([0] * min(longest, fill - start))
        capture = Capture(PackAttention(AttentionPlan.of(tree, self.device), prefix.by_layer()))
        ids, positions = (torch.tensor([values], device=self.device) for values in (tree.tokens, tree.positions))
        hidden = self.forward(ids, positions, capture)[0]
        nodes = tree.nodes
        return _stacked(capture), hidden, [nodes[number] for number in numbers]

    def _compute_prefix(self, prompts: dict[str, tuple[int, ...]]) -> Prefix:
        """What all prompts begin with; kept for the next stage."""
        ids = next(iter(prompts.values()))[: shared_length(list(prompts.values()))]
        if self._prefix is None or self._prefix[0] != ids:
            self._prefix = None
            if ids:
                tree = Tree()
                tree.add(ids)
                capture = Capture(PackAttention(AttentionPlan.of(tree, self.device)))
                tokens, positions = (torch.tensor([values], device=self.device) for values in (tree.tokens, tree.positions))
                self.forward(tokens, positions, capture)
                kv = _stacked(capture)
                apart = len(ids) - len(ids) % (8 if self._on_deck else 1)
                prefix = Prefix(len(ids), kv, apart if apart >= BLOCK else 0)
            else:
                prefix = Prefix(0, None)
            self._prefix = (ids, prefix)
        return self._prefix[1]

    def _flight(
        self,
        prefix: Prefix,
        prompts: dict[str, tuple[int, ...]],
        queue: dict[str, list[int]],
        decoding: Decoding,
        stream: str,
    ) -> Flight:
        if not self._on_deck:
            pace = self._pace(prompts, queue, prefix, decoding)
            return SlotFlight(self, prefix, prompts, queue, decoding, stream, pace)
        plan = self._plan(prompts, queue, prefix, decoding)
        pace = Pace(self._rows or self._first, plan.rows, found=self._found)
        replays = Replays(self.record, self._record_no_more)
        args = (self, prefix, prompts, queue, decoding, stream, pace)
        return DeckFlight(*args, blocks=Blocks(plan.blocks, plan.seats), share=plan.share, replays=replays)

    def _record_no_more(self, reason: str) -> None:
        """In this stage and all later ones."""
        self.record = None
        self.say(reason)

    # --- memory -------------------------------------------------------------------------------------------------------------

    def _pace(
        self,
        prompts: dict[str, tuple[int, ...]],
        queue: dict[str, list[int]],
        prefix: Prefix,
        decoding: Decoding,
    ) -> Pace:
        """Rows in flight that a third of the free memory holds at their longest; says what that comes to."""
        per_token = self._bytes_per_token()
        question = whole_blocks(max(len(prompts[name]) for name in queue) - prefix.apart)
        sharing = min(32, max(len(indices) for indices in queue.values()))
        own = whole_blocks(min(decoding.max_tokens, self.context))
        per_row = per_token * (own + question / sharing)
        free = free_bytes(self.device)
        most = min(int(free / 3 / per_row), 1024 if self.device.type == "cpu" else 4096)
        if most < ROW_ALIGN:
            self.say(f"memory is short: {free / 1e9:.2f} GB free, and {ROW_ALIGN} samples need {ROW_ALIGN * per_row / 1e9:.2f}")
        most = max(ROW_ALIGN, min(self._rows or most, sum(map(len, queue.values()))))
        text = (
            f"at most {most} samples in flight: {most * per_row / 1e9:.2f} GB of keys and values "
            f"({per_row / 1e6:.1f} MB each), and {prefix.length * per_token / 1e6:.0f} MB for {prefix.length} shared tokens"
        )
        if most * per_row > self._stated:
            self._stated = most * per_row
            self.say(text)
        return Pace(self._rows or self._first, most, found=self._found)

    def _plan(
        self, prompts: dict[str, tuple[int, ...]], queue: dict[str, list[int]], prefix: Prefix, decoding: Decoding
    ) -> Plan:
        """A pool of half the free memory at most, and the rows that it holds at the lengths seen so far."""
        asked = [-(-(len(prompts[name]) - 1 - prefix.apart) // BLOCK) for name in queue]
        needs = Needs(
            block=BLOCK * self.like().nbytes,
            row=self.model.get_input_embeddings().num_embeddings * self.dtype.itemsize * (2 if decoding.top_k == 0 else 1),
            longest=-(-min(decoding.max_tokens, self.context) // BLOCK),
            expected=-(-self.lengths.expected(min(decoding.max_tokens, self.context)) // BLOCK),
            asked=asked,
            samples=sum(map(len, queue.values())),
        )
        free = free_bytes(self.device)
        plan = needs.plan(free, min(self._rows or 4096, needs.samples), least_seats=self.least_seats)
        if plan.blocks < max(asked) + needs.longest:
            raise torch.OutOfMemoryError(
                f"out of memory: {free / 1e9:.2f} GB free, and one sample does not fit into half of it"
            )
        size = plan.blocks * needs.block
        if size > self._stated:
            self._stated = size
            self.say(
                f"at most {plan.rows} samples in flight: {size / 1e9:.2f} GB of keys and values, enough for answers of "
                f"{int((plan.blocks / plan.rows - plan.share) * BLOCK)} tokens, and "
                f"{prefix.length * self.like().nbytes / 1e6:.0f} MB for {prefix.length} shared tokens"
            )
        return plan

    def _bytes_per_token(self) -> int:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or self.heads
        size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        return int(config.num_hidden_layers * 2 * heads * size * self.dtype.itemsize)

    def _fewer_rows(self, error: RuntimeError, rows: int) -> int:
        """Half the rows that were in flight when memory ran out."""
        if rows // 2 < ROW_ALIGN:
            raise RestemError(
                f"memory is not enough for {max(rows, ROW_ALIGN)} samples in flight. Lower generate.max_tokens, use fewer "
                "exemplars (prompt.shots), or free memory on this device."
            ) from error
        self.say(f"out of memory with {rows} samples in flight; going on with {rows // 2}")
        return rows // 2


def _stacked(capture: Capture) -> KV:
    keys, values = zip(*(capture.layers[layer] for layer in sorted(capture.layers)), strict=True)
    return KV(torch.cat(keys), torch.cat(values))
