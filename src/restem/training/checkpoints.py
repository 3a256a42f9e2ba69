"""What training goes on from after a kill: weights, optimiser, and the history of the steps so far.

A checkpoint is the folder state-N, N optimiser steps done. It is complete or absent, and a new one replaces the old. Tensors
that are spread over processes are gathered for it, so that any number of processes can go on from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restem.errors import RestemError
from restem.files import finish_directory, remove_directory

History = list[dict[str, Any]]
"""The metrics of every step, from the first."""


def newest(directory: Path) -> int:
    """Steps done at the newest checkpoint; 0 = there is none."""
    found = [folder.name.removeprefix("state-") for folder in directory.glob("state-*")]
    return max((int(name) for name in found if name.isdigit()), default=0)


def write(directory: Path, step: int, model: Any, optimiser: Any, history: History, *, is_main: bool = True) -> None:
    """Write state-`step` and delete the older ones. Every process calls it; the main one writes."""
    from safetensors.torch import save_file

    state = {f"weights/{name}": whole(tensor) for name, tensor in trained(model)}
    for index, values in optimiser.state_dict()["state"].items():
        state.update({f"optimiser/{index}/{key}": whole(value) for key, value in values.items()})
    if not is_main:
        return
    with finish_directory(directory / f"state-{step}") as folder:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / "state.safetensors")
        (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")
    for folder in directory.glob("state-*"):
        if folder.name != f"state-{step}":
            remove_directory(folder)


def restore(directory: Path, step: int, model: Any, optimiser: Any) -> History:
    """Bring model and optimiser to where state-`step` was written; return the history until then."""
    from safetensors.torch import load_file

    folder = directory / f"state-{step}"
    state = load_file(folder / "state.safetensors")
    with torch.no_grad():
        for name, tensor in trained(model):
            tensor.copy_(_spread(state[f"weights/{name}"], tensor))
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("optimiser/"):
            _, index, key = name.split("/")
            like = parameters[int(index)]
            values.setdefault(int(index), {})[key] = _spread(tensor, like) if tensor.shape == like.shape else tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": values})
    history: History = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    return history


def trained(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What training changes, by name: parameters with a gradient; tied ones once."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def whole(tensor: Any) -> Tensor:
    """A tensor that may be spread over processes, gathered. Every process must call it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def _spread(full: Tensor, like: Any) -> Tensor:
    if not hasattr(like, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)


def check_disk(directory: Path, model: Any, intervals: int, storage: torch.dtype) -> None:
    """Refuse to start what would fill the disk: the models of all intervals, and two states while one replaces the other."""
    models = intervals * sum(parameter.numel() for parameter in model.parameters()) * storage.itemsize
    states = 2 * sum(3 * parameter.numel() * parameter.element_size() for _, parameter in trained(model))
    free = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
    if models + states > free:
        raise RestemError(
            f"training needs up to {(models + states) / 1e9:.2f} GB in {directory} ({intervals} models of the intervals: "
            f"{models / 1e9:.2f}, checkpoints: {states / 1e9:.2f}), and {free / 1e9:.2f} GB are free. Free some, give another "
            "--out, or lower improve.epochs."
        )
