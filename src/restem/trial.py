"""Is the tree right on a device? A second of it beside the model's own pass: sampling, and a training step's gradient.

The one thing a newcomer would get wrong: in half precision the tree is not compared with the model's own pass. Both are
measured against float32, and the tree may not be much further from it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from restem.attention import AttentionPlan, PackAttention
from restem.compatibility import Unsupported, refuse_unsupported, tree_attention
from restem.memory import is_out_of_memory
from restem.models import logits_of
from restem.prompts import Renderer
from restem.sampling import Decoding, Owed, TreeSampler
from restem.training.batches import make_packs, shared_prompt, token_weights
from restem.training.loss import PackLoss, SharedPrompt
from restem.tree import Tree
from restem.types import Example, Problem

What = Literal["logits", "decoding", "gradient"]


class Formats(NamedTuple):
    """The number formats that restem would use on a device."""

    sampling: torch.dtype
    training: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """How one use of the tree compares with the model's own pass."""

    what: What
    """The logits of a packed tree; the probabilities of tokens that the sampler drew; the gradient of a training step."""
    dtype: str
    verdict: Literal["ok", "wrong", "crash", "refused"]
    """"refused": an architecture that the tree does not serve on any device."""
    error: float | None = None
    """Of the tree, against float32: relative, of `decoding` in nats per token."""
    own: float | None = None
    """Of the model's own pass in the same number format."""
    reason: str = ""

    def words(self) -> str:
        if self.error is None:
            return f"{self.what} {self.verdict}: {self.reason}"
        size = f"{self.error:.2g} nats a token" if self.what == "decoding" else f"{100 * self.error:.2g}%"
        own = f" (the model's own pass: {self.own:.2g})" if self.verdict == "wrong" and self.own is not None else ""
        return f"{self.what} {size}{own}"


def trial(model: Any, formats: Formats) -> list[Finding]:
    """Compare every use of the tree with the model's own pass. `model`: in float32, on the device to be tried."""
    name = str(formats.sampling).removeprefix("torch.")
    try:
        refuse_unsupported(model)
    except Unsupported as error:
        return [_refusal(model, name, error)]
    except Exception as error:
        return [Finding(what="logits", dtype=name, verdict="crash", reason=first_line(error))]
    return [
        _found("logits", formats.sampling, partial(_logits, model, formats.sampling)),
        _found("decoding", formats.sampling, partial(_decoding, model, formats.sampling)),
        _found("gradient", formats.training, partial(_gradient, model, formats.training)),
    ]


class Errors(NamedTuple):
    """Distances from float32."""

    tree: float
    own: float


def _found(what: What, dtype: torch.dtype, compare: Callable[[], Errors]) -> Finding:
    name = str(dtype).removeprefix("torch.")
    try:
        errors = compare()
    except Exception as error:  # whatever a device's kernels raise is what we want to know
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise  # which says nothing about the tree
        return Finding(what=what, dtype=name, verdict="crash", reason=first_line(error))
    # Three times what rounding does to the model itself, but not where it does much: experts may be exchanged by it.
    allowed = 1e-3 if dtype == torch.float32 else 0.01 + min(3 * errors.own, errors.own + 0.2)
    is_near = errors.tree <= allowed  # not so if it is not a number
    return Finding(what=what, dtype=name, verdict="ok" if is_near else "wrong", error=errors.tree, own=errors.own)


def _refusal(model: Any, dtype: str, error: Unsupported) -> Finding:
    """What the tree refuses on the CPU, too, is the architecture's affair; else the device computes something else."""
    if model.device.type != "cpu":
        try:
            refuse_unsupported(copy.deepcopy(model).to("cpu"))
        except Unsupported:
            pass
        else:
            return Finding(what="logits", dtype=dtype, verdict="wrong", reason=f"{error} On the CPU the same model passes.")
    return Finding(what="logits", dtype=dtype, verdict="refused", reason=str(error))


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _examples(model: Any) -> list[Example]:
    """Three problems behind a prompt that is long enough to stand apart, two solutions each, one of them long."""
    chance, size = torch.Generator().manual_seed(0), model.get_input_embeddings().num_embeddings

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, size, (count,), generator=chance).tolist())

    shared, examples = ids(70), []
    for number, question in enumerate((3, 17, 9)):
        prompt = (*shared, *ids(question))
        examples += [
            Example(problem_id=str(number), index=n, prompt_ids=prompt, completion_ids=ids(12 + 23 * n)) for n in (0, 1)
        ]
    return examples


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def _logits(model: Any, dtype: torch.dtype) -> Errors:
    examples, lower = _examples(model), copy.deepcopy(model).to(dtype)
    exact, own = (torch.cat([_row_logits(m, [*e.prompt_ids, *e.completion_ids]) for e in examples]) for m in (model, lower))
    tree = Tree()
    root = tree.add(shared_prompt(examples))
    places: list[int] = []
    for prompt in dict.fromkeys(example.prompt_ids for example in examples):
        question = tree.add(prompt[tree.nodes[root].end :], root)
        for example in (e for e in examples if e.prompt_ids == prompt):
            leaf = tree.add(example.completion_ids, question)
            for node in (root, question, leaf):
                places += range(tree.nodes[node].start, tree.nodes[node].end)
    with tree_attention(lower):
        pack = PackAttention(AttentionPlan.of(tree, lower.device))
        hidden = PackLoss(lower, dtype).hidden(tree, pack)
    found = logits_of(lower, hidden)[places].float()
    return Errors(_distance(found, exact), _distance(own, exact))


def _row_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """A model's own logits [T, vocabulary] of one text, in float32."""
    return cast(Tensor, model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float())


class _Ids:
    """A renderer of token ids that are given."""

    stop: tuple[str, ...] = ()
    end_id = -1  # nothing ends a completion

    def __init__(self, prompts: dict[str, tuple[int, ...]]) -> None:
        self.prompts = prompts

    def encode(self, problem: Problem) -> tuple[int, ...]:
        return self.prompts[problem.id]

    def decode(self, ids: Sequence[int]) -> str:
        return ""


@torch.no_grad()
def _decoding(model: Any, dtype: torch.dtype) -> Errors:
    """Root mean squares over samples of the error of their log-probability, in nats per token."""
    lower = copy.deepcopy(model).to(dtype)
    lower.generation_config.eos_token_id = None
    prompts = {example.problem_id: example.prompt_ids for example in _examples(model)}
    stage = [Problem(id=name, question=name) for name in prompts]
    sampler = TreeSampler(lower, cast(Renderer, _Ids(prompts)), rows=16)
    owed = [Owed(name, index) for name in prompts for index in range(6)]
    drawn = list(sampler.sample(stage, owed, Decoding(temperature=0.7, top_k=40, max_tokens=16), stream="trial"))
    assert len(drawn) == len(owed), "a sampler yields every owed sample"
    tree, own = [], []
    for sample in drawn:
        exact, there = (_row_logprob(m, prompts[sample.problem_id], sample.token_ids) for m in (model, lower))
        assert sample.logprob is not None
        tree.append((sample.logprob - exact) / len(sample.token_ids))
        own.append((there - exact) / len(sample.token_ids))
    return Errors(*(math.sqrt(sum(x * x for x in errors) / len(errors)) for errors in (tree, own)))


def _row_logprob(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    logits = _row_logits(model, [*prompt, *completion])[len(prompt) - 1 : -1]
    targets = torch.tensor(completion, device=logits.device)
    return -nn.functional.cross_entropy(logits, targets, reduction="sum").item()


def _gradient(model: Any, dtype: torch.dtype) -> Errors:
    exact = _row_gradient(model, torch.float32)
    own = _row_gradient(model, dtype)
    model.zero_grad(set_to_none=True)
    loss, examples = PackLoss(model, dtype), _examples(model)
    with tree_attention(model):
        shared = SharedPrompt(loss, shared_prompt(examples))
        for pack in make_packs(examples, "token-mean", 64, is_apart=True):
            loss(pack, shared.before).weighted.backward()
        shared.backward()
    return Errors(_distance(_flat(model), exact), _distance(own, exact))


def _row_gradient(model: Any, dtype: torch.dtype) -> Tensor:
    """The gradient of one sequence per row, through the model's own pass."""
    model.zero_grad(set_to_none=True)
    examples = _examples(model)
    lower = dtype != torch.float32
    for example, weight in zip(examples, token_weights(examples, "token-mean"), strict=True):
        with torch.autocast(model.device.type, dtype=dtype if lower else torch.bfloat16, enabled=lower):
            logits = _row_logits(model, [*example.prompt_ids, *example.completion_ids])[len(example.prompt_ids) - 1 : -1]
        targets = torch.tensor(example.completion_ids, device=logits.device)
        (weight * nn.functional.cross_entropy(logits, targets, reduction="sum")).backward()
    return _flat(model)


def _flat(model: Any) -> Tensor:
    """All gradients as one vector, and none left in the model."""
    flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return flat
