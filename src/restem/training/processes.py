"""Training in several processes: the job that they share, and a model whose weights are spread over them.

Every process knows the whole plan, so only gradients travel: summed over processes ("replicate"), or with each process holding
a part of the weights ("shard", FSDP2). A spread model is whole nowhere: each process reads its own rows of the files, and
tensors are gathered one at a time.

    torchrun --nproc-per-node 2 -m restem.cli run RECIPE.toml
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restem import models
from restem.processes import Job, Processes


@dataclass(frozen=True, slots=True)
class TrainingJob(Job):
    """A training that all processes take part in: the arguments of `TreeTrainer`, and those of its method `follow`."""

    trainer: dict[str, Any]
    follow: dict[str, Any]

    def work(self, processes: Processes, held: dict[str, Any]) -> None:
        from restem.training.tree import TreeTrainer

        held.clear()  # a sampler's memory
        for _ in TreeTrainer(**self.trainer, processes=processes).follow(**self.follow):
            pass


def layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a transformers model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


# --- a model that is spread ---------------------------------------------------------------------------------------------------


def empty_model(start: str, *, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """A directory's model as `load_model` would give it, but for its weights, which are nowhere (device "meta")."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    path = models.adapted(start)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):  # buffers follow from the config, and most are in no file
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def with_stand_ins(model: Any, attach: Callable[[Any], Any]) -> Any:
    """`attach(model)` for an empty model: new weights are made real, as beside real ones.

    peft puts what it adds where a layer's weights are, which for a moment is in one number on the CPU.
    """
    made = _exchange(model, lambda weight: torch.zeros((), dtype=weight.dtype).expand(weight.shape))
    stand_ins = {id(parameter) for parameter in made}
    attached = attach(model)
    _exchange(model, lambda weight: weight.detach().to("meta") if id(weight) in stand_ins else weight)
    return attached


def shard(loss: nn.Module, model: Any, device: str, count: int) -> None:
    """Spread a model's weights over all processes: each layer on its own, and the rest together (FSDP2, `fully_shard`).

    Gradients are summed, not averaged: a step's loss is already normalised over all its examples.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (count,))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(loss, mesh=mesh)
    register_fsdp_forward_method(loss, "through")
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def whole_pass(loss: Any, compute: Callable[[Any], Any]) -> Any:
    """`compute(model)`, a pass that is no loss, with the weights that it needs gathered. Every process calls it."""
    from torch.distributed.fsdp import FSDPModule

    result = loss.through(compute)
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward pass behind it, the outermost module would stay whole
    return result


def fill(model: Any, start: str, device: str, *, trust_remote_code: bool, processes: Processes) -> None:
    """Read the weights of a spread empty model: each process its own rows, where the files name tensors as the model does.

    Elsewhere (mixtures of experts, adapters) the first process loads the model into main memory and hands out the parts.
    """
    empty = {_plain(name): weight for name, weight in model.named_parameters() if weight.is_meta}
    files = {} if models.is_adapter(start) else _tensor_files(start)
    filled: dict[int, Tensor] = {}
    if all(name in files and _shape(files[name], name) == list(weight.shape) for name, weight in empty.items()):
        for name, weight in empty.items():
            filled[id(weight)] = read_part(files[name], name, weight, device).to(weight.dtype)
        for name, buffer in model.named_buffers():
            if _plain(name) in files:
                buffer.copy_(files[_plain(name)].get_tensor(_plain(name)))
    else:
        dtype = next(iter(empty.values())).dtype
        whole = models.load_model(start, dtype=dtype, trust_remote_code=trust_remote_code) if processes.is_main else None
        for name, weight in empty.items():
            filled[id(weight)] = _handed_out(None if whole is None else whole.get_parameter(name), weight, device)
        for name, buffer in model.named_buffers():
            if whole is not None:
                buffer.copy_(whole.get_buffer(_plain(name)))
            torch.distributed.broadcast(buffer, src=0)
    _exchange(model, lambda weight: filled.get(id(weight), weight))


def read_part(file: Any, name: str, like: Any, device: str | torch.device) -> Tensor:
    """This process's part of a stored tensor, spread over processes as `like` is."""
    if not hasattr(like, "full_tensor"):
        return file.get_tensor(name).to(device)  # type: ignore[no-any-return]
    from torch.distributed.tensor import DTensor, Shard

    assert list(like.placements) == [Shard(0)], "rows are spread"
    mesh, rows = like.device_mesh, like.shape[0]
    step = -(-rows // mesh.size())
    first = min(rows, mesh.get_local_rank() * step)
    last = min(rows, first + step)
    part = file.get_slice(name)[first:last] if first < last else file.get_slice(name)[:1][:0]  # an empty slice is an error
    return DTensor.from_local(part.to(device), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def whole(tensor: Any) -> Tensor:
    """A tensor that may be spread over processes, gathered. Every process must call it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def gathered(tensors: Iterable[tuple[str, Any]], *, is_main: bool) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors on the CPU, for the main process; the others get none. Every process must run through it.

    One is whole at a time, unless the main process keeps it.
    """
    for name, tensor in tensors:
        full = whole(tensor.detach())
        if is_main:
            yield name, full.cpu()
        del full


def _handed_out(source: Tensor | None, like: Any, device: str) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    full = torch.empty(like.shape, dtype=like.dtype, device=device) if source is None else source.detach().to(device)
    return distribute_tensor(full, like.device_mesh, like.placements)  # the first process's values


def _exchange(model: nn.Module, new: Callable[[nn.Parameter], Tensor]) -> list[nn.Parameter]:
    """Put other tensors in the place of parameters; one that stands in several places stays one. Returns those that are new."""
    made: dict[int, nn.Parameter] = {}
    kept = []  # alive, so that no id is used twice
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(old) not in made:
                value = new(old)
                made[id(old)] = old if value is old else nn.Parameter(value, requires_grad=old.requires_grad)
                kept.append(old)
            setattr(module, name, made[id(old)])
    return [parameter for old, parameter in zip(kept, made.values(), strict=True) if parameter is not old]


def _plain(name: str) -> str:
    """A parameter's name without what adapters around its layer add."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _tensor_files(path: str) -> dict[str, Any]:
    """Open safetensors files by the names of the tensors in them."""
    from safetensors import safe_open

    found = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        handle = safe_open(file, framework="pt")
        found.update(dict.fromkeys(handle.keys(), handle))  # type: ignore[no-untyped-call]
    return found


def _shape(file: Any, name: str) -> list[int]:
    return list(file.get_slice(name).get_shape())
