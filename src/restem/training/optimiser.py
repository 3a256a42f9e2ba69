"""The optimisers of training: PyTorch's AdamW, and one that keeps moments, and weights in bfloat16, by stochastic rounding.

bfloat16 has 8 significant bits: rounded to the nearest, a weight does not move under steps below 1/512 of its size, and a mean
of squares with a decay of 0.999 never falls. Rounded up or down by chance, with the odds that make it right on average, neither
is lost; what is paid is noise in every step. Nothing is compiled, and the state is plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from restem.config import ImproveConfig

_CHUNK = 1 << 24  # numbers updated at once: float32 copies of a whole output layer would take gigabytes


def make(parameters: Iterable[nn.Parameter], settings: ImproveConfig) -> torch.optim.Optimizer:
    """The optimiser that a recipe asks for, over the parameters that have gradients."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    common: dict[str, Any] = {
        "lr": settings.peak_learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(trained, **common, fused=True)
    return StochasticAdamW(trained, **common)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) computed in float32, with moments kept in bfloat16 by stochastic rounding.

    Weights in bfloat16 are rounded in that way too; float32 weights are exact. The chance depends on the number of the step and
    the place of the parameter alone: a resumed training makes the same steps, and so do processes that hold the same weights.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the gradients are there already"
        places = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        generators: dict[torch.device, torch.Generator] = {}
        for place, (group, parameter) in enumerate(places):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["step"] += 1
            count = int(state["step"])
            device = parameter.device
            generator = generators.setdefault(device, torch.Generator(device))
            generator.manual_seed(count * len(places) + place)
            tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            for weight, gradient, mean, square in zip(*(_chunks(_own_part(tensor)) for tensor in tensors), strict=True):
                _update(weight, gradient, mean, square, group, count, generator)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's, which takes the moments to the weights' number format: back to their own, with nothing lost."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({name: state[name].to(torch.bfloat16) for name in ("exp_avg", "exp_avg_sq") if name in state})


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 as one of its two neighbours in bfloat16, each as likely as it is near, so that the mean is the value itself.

    The 16 bits that bfloat16 lacks are a fraction of the distance between the neighbours: a random fraction is added, and they
    are cut off.
    """
    bits = values.contiguous().view(torch.int32)
    chance = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return chance.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _update(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    group: dict[str, Any],
    step: int,
    generator: torch.Generator,
) -> None:
    first, second = group["betas"]
    gradient = gradient.float()
    new_mean = mean.float().lerp_(gradient, 1 - first)
    new_square = square.float().mul_(second).addcmul_(gradient, gradient, value=1 - second)
    size = (new_square / (1 - second**step)).sqrt_().add_(group["eps"])
    new = weight.float()  # the weight itself if it is float32
    new.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(new_mean, size, value=-group["lr"] / (1 - first**step))
    if new is not weight:
        weight.copy_(round_stochastically(new, generator))
    mean.copy_(round_stochastically(new_mean, generator))
    square.copy_(round_stochastically(new_square, generator))


def _own_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor that may be spread over processes."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most about _CHUNK numbers, along the first axis."""
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    row = max(1, tensor[:1].numel())
    yield from tensor.split(max(1, _CHUNK // row))
