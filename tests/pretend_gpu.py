"""A pretend GPU: tensors of a device that is not the CPU, which compute on the CPU and count what a GPU would be asked to do.

As on CUDA, a CPU tensor among its tensors is an error, autocast follows CUDA's rules, and work is launched operation by
operation. What is counted: launches
(one per operation that computes; a library call of several kernels is one), copies to and from the device, and waits, in which
the program stands still until the device has caught up. It knows nothing of speed, memory or a device's own kernels.

    with pretend_gpu() as gpu:
        model = gpu.place(model)  # or anything that is given device=gpu.device
        with gpu.counting() as counts:
            ...
        assert counts.waits == {"from the device": 1}
        with gpu.one_launch(module, "kernel"): ...  # a function of plain operations that stands for one kernel
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from pretend_autocast import as_cuda_does

NAME = "pretend"


def _registered() -> torch.device:
    """At import: the first backward pass of a process fixes which devices there are."""
    backend_registration._setup_privateuseone_for_python_backend(rename=NAME)
    module = getattr(torch, NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.is_available = lambda: True
    return torch.device(NAME, 0)


DEVICE = _registered()

_RULES = as_cuda_does(NAME)  # in force while they are referred to

_MAY_MIX = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
_ALLOCATE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
_UNCOUNTED = {*_ALLOCATE, "_local_scalar_dense", "resize_", "set_", "as_strided_"}
_WAIT = {"nonzero", "masked_select", "_local_scalar_dense", "equal", "unique_dim", "_unique2", "repeat_interleave"}
_KEPT_WHOLE = {"linear"}  # one launch, though CUDA's dispatcher would take it apart first


@dataclass
class Counts:
    """What was asked of the device, by name of the operation."""

    launches: Counter[str] = field(default_factory=Counter)
    to_device: int = 0
    from_device: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    watched: Watched | None = None


@dataclass
class Watched:
    """Which memory was read or written that had been there before watching began."""

    addresses: set[int] = field(default_factory=set)
    _fresh: dict[int, Any] = field(default_factory=dict)

    def touch(self, tensor: Tensor, *, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        if is_new and storage.data_ptr() not in self.addresses:
            self._fresh.setdefault(storage.data_ptr(), storage)  # kept, lest its address be given out again
        elif storage.data_ptr() not in self._fresh:
            self.addresses.add(storage.data_ptr())


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "layout": inner.layout}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=DEVICE, **layout)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.inner})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendGPU(TorchDispatchMode):
    """The device, while it exists: see `pretend_gpu`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.is_counting = True

    @property
    def device(self) -> torch.device:
        return DEVICE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def place(self, model: Any) -> Any:
        """Move a model's weights to the device, in place; tied weights stay one."""
        moved: dict[int, Any] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not isinstance(parameter, PretendTensor):
                    if id(parameter) not in moved:
                        inner = PretendTensor(parameter.detach().clone())
                        moved[id(parameter)] = parameter, torch.nn.Parameter(inner, parameter.requires_grad)
                    module._parameters[name] = moved[id(parameter)][1]
            for name, buffer in module._buffers.items():
                if buffer is not None and not isinstance(buffer, PretendTensor):
                    module._buffers[name] = PretendTensor(buffer.clone())
        return model

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Counts of what happens in a with block."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = before

    @contextmanager
    def watching(self) -> Iterator[set[int]]:
        """Addresses of the memory that is read or written in a with block and was there before it."""
        before, self.counts.watched = self.counts.watched, Watched()
        try:
            yield self.counts.watched.addresses
        finally:
            self.counts.watched = before

    @contextmanager
    def one_launch(self, owner: Any, name: str, stand_in: Callable[..., Any] | None = None) -> Iterator[None]:
        """Count each call of `owner.name`, and each backward pass through it, as one launch, whatever operations it consists
        of: as if it were one kernel. `stand_in`: computes the same in plain operations; None = the function itself."""
        own, is_inherited = getattr(owner, name), name not in vars(owner)

        def called(*args: Any, **kwargs: Any) -> Any:
            return _OneLaunch.apply(self, name, lambda *tensors: (stand_in or own)(*tensors, **kwargs), *args)  # type: ignore[no-untyped-call]

        setattr(owner, name, called)
        try:
            yield
        finally:
            if is_inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

    @contextmanager
    def as_one(self, name: str) -> Iterator[None]:
        """Count what happens in a with block as one launch."""
        outer, self.is_counting = self.is_counting, False
        try:
            yield
        finally:
            self.is_counting = outer
        if outer:
            self.counts.launches[name] += 1


class _OneLaunch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gpu: PretendGPU, name: str, function: Callable[..., Any], *args: Any) -> Any:
        ctx.gpu, ctx.name = gpu, name
        with gpu.as_one(name), torch.enable_grad():
            is_wanted = [torch.is_tensor(x) and x.requires_grad for x in args]
            ctx.args = [x.detach().requires_grad_(r) if torch.is_tensor(x) else x for x, r in zip(args, is_wanted, strict=True)]
            ctx.out = function(*ctx.args)
        return _mapped(lambda x: x.detach() if torch.is_tensor(x) else x, ctx.out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        outs = [ctx.out] if torch.is_tensor(ctx.out) else list(ctx.out)
        pairs = [(out, grad) for out, grad in zip(outs, grads, strict=True) if torch.is_tensor(out) and out.requires_grad]
        inputs = [x for x in ctx.args if torch.is_tensor(x) and x.requires_grad]
        with ctx.gpu.as_one(ctx.name + " backward"):
            found = iter(torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True))
        return None, None, None, *(next(found) if torch.is_tensor(x) and x.requires_grad else None for x in ctx.args)


_current: list[PretendGPU] = []


@contextmanager
def pretend_gpu() -> Iterator[PretendGPU]:
    """The device exists within the with block."""
    gpu = PretendGPU()
    _current.append(gpu)
    try:
        with _Functions(), gpu:
            yield gpu
    finally:
        _current.pop()


class _Functions(TorchFunctionMode):
    """What would not reach the dispatcher as it does on CUDA: tensors made from lists, indexed by lists, turned into lists."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        counts = _current[-1].counts if _current[-1].is_counting else Counts()
        if func is torch.tensor and _is_ours(kwargs.get("device")):
            counts.to_device += 1
            with torch._C.DisableTorchFunction():
                return PretendTensor(func(*args, **{**kwargs, "device": "cpu"}))
        if func is Tensor.tolist and isinstance(args[0], PretendTensor):
            counts.from_device += 1
            counts.waits["from the device"] += 1
            return args[0].inner.tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], PretendTensor):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            counts.to_device += sum(isinstance(part, list) for part in parts)
            index = tuple(PretendTensor(torch.tensor(part)) if isinstance(part, list) else part for part in parts)
            args = (args[0], index if isinstance(args[1], tuple) else index[0], *args[2:])
        return func(*args, **kwargs)


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: checked, counted, and computed on the CPU."""
    flat = [*_leaves(args), *_leaves(kwargs.values())]
    ours = [x for x in flat if isinstance(x, PretendTensor)]
    name = func.overloadpacket.__name__
    device = kwargs.get("device")
    if (ours or _is_ours(device)) and name not in _KEPT_WHOLE and _is_composite(func):
        with _Again():
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
    leaves = bool(ours) and device is not None and not _is_ours(device)
    if not ours and not _is_ours(device):
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs)
    _refuse_mixing(name, flat, bool(ours))
    gpu = _current[-1]
    if gpu.is_counting:
        _count(gpu.counts, func, name, args, leaves=leaves, arrives=not ours)
    with torch._C._DisableTorchDispatch():
        out = func(*_mapped(_inner, args), **_on_cpu(kwargs))
    if name == "copy_":
        out = args[0]
    elif not leaves:
        known = {id(x.inner): x for x in ours}
        out = _mapped(lambda x: (known[id(x)] if id(x) in known else PretendTensor(x)) if torch.is_tensor(x) else x, out)
    if gpu.counts.watched is not None:
        for tensor in (x for x in (*ours, *_leaves((out,))) if isinstance(x, PretendTensor)):
            gpu.counts.watched.touch(tensor.inner, is_new=_is_new(func) and not any(tensor is x for x in ours))
    plain = name == "copy_" or leaves or not ours or _is_new(func)
    return out if plain else return_and_correct_aliasing(func, args, kwargs, out)


def _refuse_mixing(name: str, flat: list[Any], has_ours: bool) -> None:
    strangers = [x for x in flat if torch.is_tensor(x) and not isinstance(x, PretendTensor) and x.dim() > 0]
    if has_ours and strangers and name not in _MAY_MIX:
        shapes = [tuple(x.shape) for x in strangers]
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} met tensors {shapes} on the CPU")


def _count(counts: Counts, func: Any, name: str, args: Any, *, leaves: bool, arrives: bool) -> None:
    if name in _WAIT:
        counts.waits[name] += 1
    if name == "_local_scalar_dense":
        counts.from_device += 1
    if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
        for index in (x for x in args[1] if torch.is_tensor(x)):
            counts.waits["index by a mask"] += index.dtype == torch.bool
            counts.to_device += not isinstance(index, PretendTensor)
    if leaves or (name == "copy_" and not isinstance(args[0], PretendTensor)):
        counts.from_device += 1
        counts.waits["from the device"] += 1
    elif (name == "_to_copy" and arrives) or (name == "copy_" and not isinstance(args[1], PretendTensor)):
        counts.to_device += 1
    elif name not in _UNCOUNTED and not _is_view(func):
        counts.launches[name] += 1
    counts.waits += Counter()  # drops what is 0


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@functools.cache
def _is_view(func: Any) -> bool:
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)


@functools.cache
def _is_new(func: Any) -> bool:
    """Whether what comes back shares no memory with what went in."""
    return all(value.alias_info is None for value in func._schema.returns)


def _leaves(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += _leaves(value) if isinstance(value, list | tuple) else [value]
    return found


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(change, item) for item in value)
    return change(value)


def _inner(x: Any) -> Any:
    if isinstance(x, PretendTensor):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    changed = {name: _mapped(_inner, value) for name, value in kwargs.items()}
    if "device" in changed:
        changed["device"] = torch.device("cpu")
    if changed.get("pin_memory"):
        changed["pin_memory"] = False
    return changed


class _Again(TorchDispatchMode):
    """Decomposed operations come back here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})
