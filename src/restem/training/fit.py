"""Whether a recipe's training fits the device: said before anything is drawn, and refused with what would fit if it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from restem.config import ImproveConfig, Recipe
from restem.errors import RestemError
from restem.memory import free_bytes, total_bytes
from restem.processes import of_this_run
from restem.training.batches import pack_budget
from restem.training.estimate import ROWS, TOKENS, Memory, Shape, Work, estimate, read_shape

if TYPE_CHECKING:
    import torch


def before_training(recipe: Recipe, base: str, work: Work, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Say what the recipe's training will take, refuse it if it cannot fit; for run.json, the bytes by part.

    Nothing is said of a model that cannot be counted: one that is no decoder with attention is refused elsewhere.
    """
    shape = read_shape(base, trust_remote_code=recipe.model.trust_remote_code)
    if shape is None:
        return {}
    settings, total = recipe.improve, total_bytes(device)
    memory = estimate(shape, settings, work)
    refuse_what_cannot_fit(memory, shape, settings, work, total)
    say(words(memory, work, total))
    if (others := _used_by_others(device, total)) > 1e9:
        say(f"  {_gb(others)} GB of {device} are in use by other programs, and will be missing if they stay")
    if memory.peak > total:
        say(f"warning: training may run out of memory. By the same estimate {_advice(shape, settings, work, total)}")
    return {"training_memory": {**memory.as_dict(), "of": total}}


def _used_by_others(device: torch.device, total: int) -> int:
    """Memory of a GPU that neither is free nor holds tensors of this process."""
    if device.type != "cuda":
        return 0
    import torch

    return total - free_bytes(device) - torch.cuda.memory_allocated(device)


def work_of(recipe: Recipe, *, device: str, arithmetic: str, sampler: str, shared: int) -> Work:
    """What a recipe asks of a device; where it leaves a choice to the run, what the run begins with."""
    tokens = recipe.generate.max_tokens or TOKENS
    return Work(
        arithmetic=arithmetic,
        sampler=sampler,
        device=device,
        pack=max(pack_budget((), recipe.improve, device=device), recipe.generate.max_tokens or 0),
        shared=shared,
        rows=recipe.engine.rows or ROWS,
        tokens=tokens,
        processes=of_this_run().count,
    )


def words(memory: Memory, work: Work, total: int) -> str:
    """The estimate in two lines."""
    beside = f"a sampler beside them {_gb(memory.sampler)}" if memory.sampler else "a sampler that shares the weights"
    return (
        f"memory for improve on {work.device} ({_gb(total)} GB): weights {_gb(memory.weights)}, gradients "
        f"{_gb(memory.gradients)}, moments {_gb(memory.moments)}, activations {_gb(memory.activations)}, output layer "
        f"{_gb(memory.output_layer)}: about {_gb(memory.training)} GB\n"
        f"  while D_val is drawn: weights and moments {_gb(memory.weights + memory.moments)}, {beside}, keys and values of "
        f"{work.rows} samples {_gb(memory.keys)}: about {_gb(memory.validation)} GB"
    )


def refuse_what_cannot_fit(memory: Memory, shape: Shape, settings: ImproveConfig, work: Work, total: int) -> None:
    """Raise RestemError if weights, gradients and moments alone exceed a device: the rest is estimated, and may be less."""
    if memory.certain <= total:
        return
    raise RestemError(
        f"training cannot fit on {work.device}: weights {_gb(memory.weights)} GB, gradients {_gb(memory.gradients)} GB and "
        f"moments {_gb(memory.moments)} GB make {_gb(memory.certain)} GB, and it has {_gb(total)} GB. By estimate "
        f"{_advice(shape, settings, work, total)}"
    )


def _advice(shape: Shape, settings: ImproveConfig, work: Work, total: int) -> str:
    found = list(ways_to_fit(shape, settings, work, total))
    return "this fits:" + "".join(f"\n  {way}" for way in found) if found else "nothing but a smaller model fits."


def ways_to_fit(shape: Shape, settings: ImproveConfig, work: Work, total: int) -> Iterator[str]:
    """Settings with which the estimate stays within a device, and what it is then: the least change of each kind."""
    recompute: dict[str, Any] = {"gradient_checkpointing": True}
    light, adapter = {"weights": "bfloat16", "optimiser": "adamw-bfloat16"}, {"lora_rank": 16}
    spread = [{"parallel": "shard"}, {"parallel": "shard"} | recompute, {"parallel": "shard"} | recompute | light]
    # On a CPU processes share one memory.
    more = [count for count in (2, 4, 8, 16, 32, 64) if count > work.processes and work.device != "cpu"]
    kinds: list[list[tuple[dict[str, Any], int]]] = [
        [(changes, work.processes) for changes in (recompute, light, recompute | light)],
        [(changes, work.processes) for changes in (adapter, recompute | adapter)],
        [(changes, count) for count in more for changes in spread],
    ]
    for kind in kinds:
        for changes, count in kind:
            found = estimate(shape, settings.model_copy(update=changes), replace(work, processes=count))
            if found.peak <= total:
                keys = [f"improve.{key} = {json.dumps(value)}" for key, value in changes.items()]
                yield ", ".join(keys) + (f", {count} processes" if count != work.processes else "") + f": {_gb(found.peak)} GB"
                break


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"
