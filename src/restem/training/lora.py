"""LoRA: train a low-rank change of the linear layers instead of all weights, through `peft`.

What is handed over is an ordinary model: the change is added to the weights, and the merged model is accepted only if it says
what the trained one says. The adapter itself lies beside it.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restem.compatibility import own_logits
from restem.config import ImproveConfig
from restem.errors import MissingExtra, RestemError

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # relative; what rounding the weights may cost


def attach(model: Any, settings: ImproveConfig, *, stream: str) -> Any:
    """The model with a fresh adapter; only the adapter has gradients. Layers of the model are changed in place.

    `stream` names the source of the adapter's random start.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtra("peft", "lora", "Training a LoRA adapter (improve.lora_rank)") from None
    targets: Any = settings.lora_targets
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha,  # type: ignore[arg-type]
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    seed = int.from_bytes(hashlib.blake2b(f"{stream}\0lora".encode(), digest_size=7).digest(), "little")
    try:
        with torch.random.fork_rng(devices=[]):  # the adapter begins on the CPU; a GPU that is not used stays untouched
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise RestemError(
            f"improve.lora_targets = {settings.lora_targets!r} does not fit this {model.config.model_type} model: "
            f"{str(error).splitlines()[0][:300]}"
        ) from None
    return adapted.eval()


def lighten(model: Any, dtype: torch.dtype) -> None:
    """Keep frozen linear weights in the number format in which they are multiplied, where it holds their values exactly.

    Nothing else changes: autocast takes them to that format at every call, and without autocast they are taken back. Embeddings
    and norms, which are computed in float32, stay as they are, and so does an output layer that shares its weights with them.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.requires_grad or id(module.weight) in embeddings:
            continue
        lighter = module.weight.detach().to(dtype)
        if dtype.itemsize < module.weight.itemsize and torch.equal(lighter.to(module.weight.dtype), module.weight):
            module.weight = nn.Parameter(lighter, requires_grad=False)
            module.forward = partial(_of_light_weights, module)  # type: ignore[method-assign]  # its class stays


def _of_light_weights(layer: nn.Linear, inputs: Tensor) -> Tensor:
    lower = torch.is_autocast_enabled(inputs.device.type)
    return nn.functional.linear(inputs, layer.weight if lower else layer.weight.to(inputs.dtype), layer.bias)


def merged(base: Any, adapter: Path, says: Any, storage: torch.dtype) -> tuple[Any, float]:
    """The base with a saved adapter added to its weights, layer by layer, and how far its logits are from what the trained
    model `says` (`own_logits`; the distance is relative). `base` is changed.

    `storage`: the number format in which it will be stored; the comparison includes the rounding to it. Raises RestemError if
    the two disagree by more than rounding can explain.
    """
    from peft import PeftModel

    # Left to itself, peft reads the adapter to the first GPU.
    plain = PeftModel.from_pretrained(base, adapter, torch_device=str(base.device)).merge_and_unload()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(parameter.to(storage))
    found, expected = own_logits(plain), says.to(plain.device)
    apart = float((found - expected).norm() / expected.norm())
    if not apart <= _TOLERANCE.get(storage, 0.1):
        raise RestemError(
            f"the adapter merged into the weights is not the trained model: its logits differ by {apart:.1%}, stored "
            f"as {storage}. Store the base in float32, or train all weights (improve.lora_rank = 0)."
        )
    return plain, apart


def save(adapted: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
    """The adapter alone, as peft writes it. `state`: its weights, where the model holds parts of them."""
    adapted.save_pretrained(folder, state_dict=state)
