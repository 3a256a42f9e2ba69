"""What training goes on from after a kill: weights, optimiser, and the history of the steps so far.

A checkpoint is the folder state-N, N optimiser steps done. It is complete or absent, and a new one replaces the old. Tensors
that are spread over processes are gathered for it, one at a time, so that any number of processes can go on from it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restem.errors import RestemError
from restem.files import finish_directory, remove_directory
from restem.training.processes import gathered, read_part

History = list[dict[str, Any]]
"""The metrics of every step, from the first."""


def newest(directory: Path) -> int:
    """Steps done at the newest checkpoint; 0 = there is none."""
    found = [folder.name.removeprefix("state-") for folder in directory.glob("state-*")]
    return max((int(name) for name in found if name.isdigit()), default=0)


def write(directory: Path, step: int, model: Any, optimiser: Any, history: History, *, is_main: bool = True) -> None:
    """Write state-`step` and delete the older ones. Every process calls it; the main one writes."""
    state = {f"weights/{name}": tensor for name, tensor in trained(model)}
    for index, values in optimiser.state_dict()["state"].items():
        state.update({f"optimiser/{index}/{key}": value for key, value in values.items()})
    if not is_main:
        for _ in gathered(state.items(), is_main=False):
            pass
        return
    with finish_directory(directory / f"state-{step}") as folder:
        _write_tensors(folder / "state.safetensors", state)
        (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")
    for folder in directory.glob("state-*"):
        if folder.name != f"state-{step}":
            remove_directory(folder)


def restore(directory: Path, step: int, model: Any, optimiser: Any) -> History:
    """Bring model and optimiser to where state-`step` was written; return the history until then."""
    from safetensors import safe_open

    folder = directory / f"state-{step}"
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    values: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad(), safe_open(folder / "state.safetensors", framework="pt") as file:
        for name, tensor in trained(model):
            tensor.copy_(read_part(file, f"weights/{name}", tensor, tensor.device))
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            if name.startswith("optimiser/"):
                _, index, key = name.split("/")
                like = parameters[int(index)]
                is_alike = list(like.shape) == file.get_slice(name).get_shape()
                value = read_part(file, name, like, like.device) if is_alike else file.get_tensor(name)
                values.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": values})
    history: History = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    return history


def trained(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What training changes, by name: parameters with a gradient; tied ones once."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


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


_FORMATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """A safetensors file, written tensor by tensor: its own writer wants all of them in memory at once."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _FORMATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, full in gathered(tensors.items(), is_main=True):
            file.write(full.contiguous().flatten().view(torch.uint8).numpy().data)
