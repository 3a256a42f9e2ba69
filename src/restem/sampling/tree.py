"""The tree sampler: draws N completions per problem from a Hugging Face decoder, each prompt computed once.

The shared prefix is computed once per model and attended to in place, and so is a problem's question; finished rows are
replaced at once by owed ones, across problems. Everything a row's result depends on is its own: on one device and number format
a sample is the same whatever else is in flight, as far as the machine's matrix products give a row the same result in every
batch (docs/sampling.md says where they do).

The one thing a newcomer would get wrong: the model is never rewritten. Its forward pass is its own; only the function behind
its attention interface is ours (`restem.compatibility`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restem.attention import AttentionPlan, Capture, PackAttention
from restem.compatibility import refuse_unsupported, tree_attention
from restem.errors import RestemError
from restem.memory import free_bytes, keep_freed_memory
from restem.models import end_ids, logits_of
from restem.prompts import Renderer
from restem.sampling import Decoding, Owed, by_problem, check_lengths
from restem.sampling.flight import ROW_ALIGN, Flight, Pace
from restem.sampling.packed import PackedLinears
from restem.sampling.slots import BLOCK, KV, whole_blocks
from restem.tree import Tree, shared_length
from restem.types import Problem, Sample


@dataclass(frozen=True, slots=True)
class Prefix:
    """What all prompts of a stage begin with, computed."""

    length: int
    kv: KV | None
    transposed: tuple[Tensor, Tensor] | None
    """Keys [L, K, D, P] and values, as decoding reads them; None if nothing stands apart."""

    @property
    def apart(self) -> int:
        """Tokens that are attended to in place by all rows. A prefix of less than a block costs less as the beginning of every
        question, to which its keys and values are copied."""
        return self.length if self.length >= BLOCK else 0

    def by_layer(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {} if self.kv is None else {n: (k[None], v[None]) for n, (k, v) in enumerate(zip(*self.kv, strict=True))}


class TreeSampler:
    """Draws samples of one model. See `restem.sampling.Sampler` for the contract of `sample`.

    `model`: a `transformers` causal language model, already on its device; its weights are never changed. `renderer` turns
    problems into token ids. `rows`: samples in flight at most; None = as many as make the machine faster, within the memory
    at hand. `say` is told what is about to be used.
    """

    def __init__(
        self, model: Any, renderer: Renderer, *, rows: int | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        refuse_unsupported(model)
        keep_freed_memory()
        self.model, self.renderer, self.say = model, renderer, say
        self.device, self.dtype = model.device, model.dtype
        config = model.config.get_text_config()
        self.heads = int(config.num_attention_heads)
        self.context = int(getattr(config, "max_position_embeddings", 1 << 30))
        self.end_ids = end_ids(model, renderer)
        self._rows = rows
        self._prefix: tuple[tuple[int, ...], Prefix] | None = None
        self._first = rows or (128 if self.device.type == "cpu" else 256)  # rows to begin with; later what the pace found
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
                flight = None
                try:
                    prefix = self._compute_prefix(prompts)
                    pace = self._pace(prompts, queue, prefix, decoding)
                    flight = Flight(self, prefix, prompts, queue, decoding, stream, pace)
                    yield from flight.run()
                    if not self._found:
                        self._first, self._found = max(self._first, pace.rows), pace.found
                    return
                except RuntimeError as error:  # torch.OutOfMemoryError is one
                    self._rows = self._fewer_rows(error, 0 if flight is None else len(flight.rows))
                    queue = queue if flight is None else flight.owed()  # those in flight begin again, and come out the same

    def forward(self, tokens: Tensor, positions: Tensor, attends: Any) -> Tensor:
        """Last hidden states [B, T, hidden]."""
        out = self.model.base_model(input_ids=tokens, position_ids=positions, use_cache=False, tree=attends)
        return out.last_hidden_state  # type: ignore[no-any-return]

    def compute(self, texts: Sequence[tuple[int, ...]], prefix: Prefix) -> list[tuple[KV, Tensor]]:
        """Texts behind the prefix, in one pack: keys and values of each, and the logits of what follows it."""
        tree = Tree(prefix.length)
        numbers = [tree.add(text) for text in texts]
        tree.add([0] * (-len(tree.tokens) % ROW_ALIGN))  # nobody's child: it only fills the rows
        capture = Capture(PackAttention(AttentionPlan.of(tree, self.device), prefix.by_layer()))
        ids, positions = (torch.tensor([values], device=self.device) for values in (tree.tokens, tree.positions))
        hidden = self.forward(ids, positions, capture)[0]
        nodes = [tree.nodes[number] for number in numbers]
        ends = [node.end - 1 for node in nodes]
        logits = logits_of(self.model, hidden[ends + [0] * (-len(ends) % ROW_ALIGN)])
        kv = _stacked(capture)
        return [(kv.part(node.start, node.end), row) for node, row in zip(nodes, logits, strict=False)]

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
                apart = (kv.keys.transpose(-1, -2).contiguous(), kv.values) if len(ids) >= BLOCK else None
                prefix = Prefix(len(ids), kv, apart)
            else:
                prefix = Prefix(0, None, None)
            self._prefix = (ids, prefix)
        return self._prefix[1]

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

    def _bytes_per_token(self) -> int:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or self.heads
        size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        return int(config.num_hidden_layers * 2 * heads * size * self.dtype.itemsize)

    def _fewer_rows(self, error: RuntimeError, rows: int) -> int:
        """Half the rows that were in flight when memory ran out; any other error goes on its way."""
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
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
