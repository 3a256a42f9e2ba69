"""The parts of decoder layers that are not attention (norms, feed-forward), compiled where a trial on the device says so.

Element by element operations leave a GPU waiting for its memory; compiled, several are one pass. Compiling takes a minute or so
and does not always pay. So it is tried on one layer when there is long enough to train, and kept only if it is faster and as
near to exact arithmetic as what it replaces.

The one thing a newcomer would get wrong: a compiled module is the same module, with the same weights and the same hooks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from restem.training.processes import layers

WORTH_SECONDS = 600.0
"""Training that takes no longer is not worth a minute of compiling."""
_TOKENS = 2048
_PAYS = 1.05
_ROUNDS = 5


class Trial(NamedTuple):
    """What one layer's parts took, forward and backward, and how far from float32 they came (relative)."""

    plain_seconds: float
    compiled_seconds: float
    plain_error: float
    compiled_error: float

    @property
    def is_equal(self) -> bool:
        """As near to float32 as what it replaces, up to the luck of rounding."""
        return self.compiled_error <= 1.25 * self.plain_error + 1e-5

    @property
    def gain(self) -> float:
        return self.plain_seconds / self.compiled_seconds


def fuse(model: Any, arithmetic: Callable[[], AbstractContextManager[Any]], *, backend: str = "inductor") -> str:
    """Compile what pays; return a line that says what was found. `arithmetic`: a context in which training computes."""
    parts = [_parts(layer) for layer in layers(model)]
    if not parts or not parts[0]:
        return "the layers of this model have no part that could be compiled apart from attention"
    try:
        trial = _trial(parts[0], arithmetic, backend)
    except Exception as error:  # a compiler has many ways to fail, and training can do without
        _undo(parts[0])
        return f"norms and feed-forward layers stay as they are: compiling fails ({type(error).__name__})"
    if not trial.is_equal or trial.gain < _PAYS:
        _undo(parts[0])
        why = (
            f"{trial.gain:.2f} times as fast"
            if trial.is_equal
            else f"{trial.compiled_error:.1e} from exact, not {trial.plain_error:.1e}"
        )
        return f"norms and feed-forward layers stay as they are: compiled, one layer is {why}"
    for modules in parts[1:]:
        for module in modules:
            module.compile(dynamic=True, backend=backend)
    return f"norms and feed-forward layers are compiled from here on: {trial.gain:.2f} times as fast on one layer, and equal"


def _parts(layer: nn.Module) -> list[nn.Module]:
    """The children of a layer that compute on hidden states alone. Attention knows its layer's number."""
    return [child for child in layer.children() if not hasattr(child, "layer_idx") and any(True for _ in child.parameters())]


def _undo(modules: list[nn.Module]) -> None:
    for module in modules:
        module._compiled_call_impl = None


def _trial(modules: list[nn.Module], arithmetic: Callable[[], AbstractContextManager[Any]], backend: str) -> Trial:
    weight = next(modules[0].parameters())
    width, chance = _width(modules), torch.Generator(device=weight.device).manual_seed(0)
    inputs, slopes = (
        torch.randn(1, _TOKENS, width, device=weight.device, dtype=weight.dtype, generator=chance) for _ in range(2)
    )
    with _gradients_set_aside(modules):
        exact = _run(modules, inputs, slopes, nullcontext)
        plain, plain_seconds = _timed(modules, inputs, slopes, arithmetic)
        for module in modules:
            module.compile(dynamic=True, backend=backend)
        compiled, compiled_seconds = _timed(modules, inputs, slopes, arithmetic)
    return Trial(plain_seconds, compiled_seconds, _apart(plain, exact), _apart(compiled, exact))


def _width(modules: list[nn.Module]) -> int:
    """The size of hidden states: a norm's only weight, or what the first product of a feed-forward part takes."""
    return min(parameter.shape[-1] for module in modules for parameter in module.parameters() if parameter.dim() == 1)


def _run(
    modules: list[nn.Module], inputs: Tensor, slopes: Tensor, arithmetic: Callable[[], AbstractContextManager[Any]]
) -> list[Tensor]:
    """What the modules make of the inputs, one by one, and the gradients of the inputs."""
    found: list[Tensor] = []
    for module in modules:
        leaf = inputs.detach().requires_grad_()
        with arithmetic():
            out = module(leaf)
        out.backward(slopes.to(out.dtype))
        assert leaf.grad is not None
        found += [out.detach().float(), leaf.grad.float()]
    return found


def _timed(
    modules: list[nn.Module], inputs: Tensor, slopes: Tensor, arithmetic: Callable[[], AbstractContextManager[Any]]
) -> tuple[list[Tensor], float]:
    """The same, and the shortest of a few rounds; the first, which compiles, is not timed."""
    found, best = _run(modules, inputs, slopes, arithmetic), float("inf")
    for _ in range(_ROUNDS):
        _wait(inputs.device)
        began = time.perf_counter()
        _run(modules, inputs, slopes, arithmetic)
        _wait(inputs.device)
        best = min(best, time.perf_counter() - began)
    return found, best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _apart(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True))


@contextmanager
def _gradients_set_aside(modules: list[nn.Module]) -> Iterator[None]:
    """The trial leaves no gradient behind."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
