"""Which examples make up which optimiser step, and how steps become packed trees. No tensors here.

A step takes whole problems, in a seeded order, until it holds `batch_size` examples: a problem's solutions share its tokens,
and the order depends on nothing but the seed and the epoch, so that a resumed run continues it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from restem.config import ImproveConfig
from restem.tree import Tree, shared_length
from restem.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The examples of one optimiser step."""

    examples: tuple[Example, ...]
    interval: int | None
    """The number of the evaluation interval that ends with this step; None = none does."""


def plan_steps(examples: Sequence[Example], settings: ImproveConfig, *, stream: str) -> list[Step]:
    """All steps of a training run, in order. The last one always ends an interval."""
    wanted = _whole(settings.epochs * len(examples))
    groups = [step for epoch in range(math.ceil(settings.epochs)) for step in _epoch(examples, settings, stream, epoch)]
    steps: list[Step] = []
    seen, interval = 0, 0
    for group in groups:
        if seen >= wanted:
            break
        seen += len(group)
        if settings.interval_steps is None:
            ended = seen >= _whole((interval + 1) * settings.interval * len(examples))
        else:
            ended = len(steps) + 1 == (interval + 1) * settings.interval_steps
        ended = ended or seen >= wanted
        interval += ended
        steps.append(Step(examples=tuple(group), interval=interval if ended else None))
    return steps


def _whole(examples: float) -> int:
    """So many examples, rounded up; 3 * 0.1 * 10 is a little more than 3, but 3 are meant."""
    return math.ceil(examples - 1e-6)


def _epoch(examples: Sequence[Example], settings: ImproveConfig, stream: str, epoch: int) -> Iterator[list[Example]]:
    problems: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        problems.setdefault(example.prompt_ids, []).append(example)
    order = sorted(problems)
    random.Random(f"{stream}\0epoch {epoch}").shuffle(order)
    step: list[Example] = []
    for prompt in order:
        step += problems[prompt]
        if len(step) >= settings.batch_size:
            yield step
            step = []
    if step:
        yield step


def token_weights(examples: Sequence[Example], objective: str) -> list[float]:
    """The factor of every target token of each example in the loss of one optimiser step.

    With T_e target tokens and reward r_e > 0 (an example with r_e = 0 counts nowhere):
    "sum": r_e / examples (Eq. 1 of the paper); "token-mean": r_e / sum of T_e; "problem": r_e / (sum of r over the example's
    problem) / problems, the exact M-step, in which every solved problem weighs 1.
    """
    counted = [example for example in examples if example.weight > 0]
    if objective == "sum":
        total = float(len(counted))
    elif objective == "token-mean":
        total = float(sum(len(example.completion_ids) for example in counted))
    else:
        rewards: dict[tuple[int, ...], float] = {}
        for example in counted:
            rewards[example.prompt_ids] = rewards.get(example.prompt_ids, 0.0) + example.weight
        return [e.weight / rewards[e.prompt_ids] / len(rewards) if e.weight > 0 else 0.0 for e in examples]
    return [example.weight / total if total else 0.0 for example in examples]


@dataclass(frozen=True, slots=True)
class Pack:
    """A packed tree with its targets: token `targets[i]` is predicted at packed index `sources[i]`, with `weights[i]`."""

    tree: Tree
    sources: list[int]
    targets: list[int]
    weights: list[float]
    order: list[int]
    """The examples, by their place among those that were packed, in the order of their targets."""


def pack_budget(examples: Sequence[Example], settings: ImproveConfig, *, is_apart: bool = True, device: str = "cpu") -> int:
    """Tokens of a pack behind what all prompts share, to begin with: the recipe's, or enough for products to be as fast as they
    get, which on a CPU are few. Where each pack holds the shared part as well, as many as make computing it again worth it."""
    if settings.pack_tokens is not None:
        return settings.pack_tokens
    enough = 768 if device == "cpu" else 4096
    return enough if is_apart else min(4096, max(enough, 6 * len(shared_prompt(examples))))


def shared_prompt(examples: Sequence[Example]) -> tuple[int, ...]:
    """What the prompts of all examples begin with."""
    prompts = [example.prompt_ids for example in examples]
    return prompts[0][: shared_length(prompts)] if prompts else ()


def make_packs(examples: Sequence[Example], objective: str, budget: int, *, is_apart: bool = False) -> list[Pack]:
    """Pack the examples of one step into trees of at most about `budget` tokens behind what all prompts share, as few trees as
    there can be and of like size: the largest one decides how much memory a step takes. Loss and gradient do not depend on the
    budget. `is_apart`: the shared part stands in no pack, and is computed by itself."""
    weights = token_weights(examples, objective)
    shared = shared_prompt(examples)
    own = sum(len(prompt) - len(shared) for prompt in {e.prompt_ids for e in examples})
    own += sum(len(e.completion_ids) for e in examples)
    even = own / math.ceil(own / max(1, budget)) if own else 0
    packs: list[Pack] = []
    pack: Pack | None = None
    size, prompt = 0, None
    problem, root = -1, None
    for place, example in sorted(enumerate(examples), key=lambda pair: pair[1].prompt_ids):
        if pack is None or size >= even or size + len(example.completion_ids) > budget:
            pack, size, prompt = Pack(Tree(len(shared) if is_apart else 0), [], [], [], []), 0, None
            root = None if is_apart else pack.tree.add(shared)
            packs.append(pack)
        before = len(pack.tree.tokens)
        if example.prompt_ids != prompt:
            prompt = example.prompt_ids
            problem = pack.tree.add(prompt[len(shared) :], root)
        # The last target is predicted, never read: it needs no place in the tree.
        branch = pack.tree.add(example.completion_ids[:-1], problem)
        size += len(pack.tree.tokens) - before
        start = pack.tree.nodes[branch].start
        pack.sources.extend([pack.tree.last_token(problem), *range(start, start + len(example.completion_ids) - 1)])
        pack.targets.extend(example.completion_ids)
        pack.weights.extend([weights[place]] * len(example.completion_ids))
        pack.order.append(place)
    return packs
