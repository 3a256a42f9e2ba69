"""Training in several processes, started by `torchrun` or `accelerate launch`.

The first process runs the whole of `restem run`. The others wait here for a training job, do their share of every step, and
wait for the next. Every process knows the whole plan, so only gradients travel: summed over processes ("replicate"), or with
each process holding a part of the weights ("shard", FSDP2).

    torchrun --nproc-per-node 2 -m restem.cli run RECIPE.toml
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn


class Processes:
    """The processes of one run. With one process every method does nothing, at no cost."""

    def __init__(self) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.is_main = self.rank == 0

    def start(self) -> None:
        """Join the others, by accelerate. They may wait for hours while the first one samples."""
        if self.count > 1 and not torch.distributed.is_initialized():
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))

    def finish(self) -> None:
        """The first process: there will be no more jobs. Lets the others end."""
        if self.count > 1 and torch.distributed.is_initialized():
            self.tell(None)
            self.leave()

    def leave(self) -> None:
        """Part from the others, as every process must: one that ends still connected may be aborted while it ends."""
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def device(self, device: str) -> str:
        """This process's own device of a kind."""
        if self.count > 1 and device == "cuda":
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return device

    def tell(self, message: Any) -> Any:
        """What the first process says, in every process."""
        if self.count == 1:
            return message
        box = [message]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def share(self, items: list[Any]) -> list[Any]:
        """This process's share; as many items for everyone, with None for what is missing."""
        most = -(-len(items) // self.count)
        own = items[self.rank :: self.count]
        return own + [None] * (most - len(own))

    def sum(self, values: Tensor) -> Tensor:
        if self.count > 1:
            if torch.distributed.get_backend() == "nccl":  # which sends what lies on a GPU only
                values = values.cuda()
            torch.distributed.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum whole gradients over processes, many small ones in one message; those that lie in parts are summed already."""
        if self.count == 1:
            return
        batch: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if hasattr(parameter.grad, "full_tensor"):
                continue
            batch.append(parameter.grad)
            if sum(gradient.numel() for gradient in batch) > 1 << 24:
                _sum_together(batch)
                batch = []
        if batch:
            _sum_together(batch)


def _sum_together(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def shard(loss: nn.Module, model: Any) -> None:
    """Spread a model's weights over all processes: each layer on its own, and the rest together (FSDP2, `fully_shard`).

    Gradients are summed, not averaged: a step's loss is already normalised over all its examples.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for layer in layers(model):
        fully_shard(layer)
    fully_shard(loss)
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a transformers model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def serve(processes: Processes) -> None:
    """What every process but the first does: its share of each training job, until the first process says that it is over."""
    from restem.training.tree import TreeTrainer

    while (job := processes.tell(None)) is not None:
        trainer = TreeTrainer(**job.pop("trainer"), processes=processes)
        for _ in trainer.follow(**job):
            pass
    processes.leave()
