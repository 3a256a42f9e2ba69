"""How much memory a recipe's training takes, by part, before anything is loaded.

Sizes come from a model directory's config and from the headers of its weights. Weights, gradients and moments follow from the
recipe and are certain; activations are counted for decoder layers like Llama's, and a run adjusts what it samples at once to
the memory that is left. GB are 1e9 bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from restem.config import ImproveConfig
from restem.models import adapted, storage_dtype

_TARGETS, _LOGITS = 512, 1 << 29  # targets, and off the CPU bytes, of logits in memory at once
ROWS, TOKENS = 256, 512  # of samples in flight, where the recipe leaves them open
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of a model decides about memory. Counts are numbers, not bytes."""

    weights: int
    linear: dict[str, tuple[int, ...]]
    """The matrices of the layers, by name; neither embeddings nor the output layer."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together."""
    vocabulary: int
    is_tied: bool
    storage: str
    """Number format of the files."""

    def adapter(self, settings: ImproveConfig) -> int:
        """Weights of the recipe's adapter: for a matrix of m x n, rank times m + n."""
        wanted = settings.lora_targets
        ends = None if wanted == "all-linear" else (wanted,) if isinstance(wanted, str) else tuple(wanted)
        return settings.lora_rank * sum(
            sum(size) for name, size in self.linear.items() if ends is None or name.removesuffix(".weight").endswith(ends)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Where and on how much a model is trained and sampled."""

    arithmetic: str
    """Number format of training: "float32" or "bfloat16"."""
    sampler: str
    """Number format of the sampler."""
    device: str = "cpu"
    pack: int = 768
    """Tokens of a pack."""
    shared: int = 0
    """Tokens with which all prompts begin."""
    rows: int = ROWS
    tokens: int = TOKENS
    """Longest completion."""
    processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on each device, by part."""

    weights: int
    gradients: int
    moments: int
    activations: int
    output_layer: int
    """A part of the logits, and the gradient of the output layer in float32."""
    sampler: int
    """Weights of the sampler that are not those of training: while D_val is drawn it stands beside the trained model."""
    sampler_alone: int
    keys: int
    """Keys and values of samples in flight."""

    @property
    def certain(self) -> int:
        return self.weights + self.gradients + self.moments

    @property
    def training(self) -> int:
        return self.certain + self.activations + self.output_layer

    @property
    def validation(self) -> int:
        """While D_val is drawn: no gradient and no activation is left."""
        return self.weights + self.moments + self.sampler + self.keys

    @property
    def generation(self) -> int:
        return self.sampler_alone + self.keys

    @property
    def peak(self) -> int:
        return max(self.training, self.validation, self.generation)

    def as_dict(self) -> dict[str, int]:
        phases = {name: getattr(self, name) for name in ("training", "validation", "generation", "peak")}
        return {**asdict(self), **phases}


def estimate(shape: Shape, settings: ImproveConfig, work: Work) -> Memory:
    """The memory of one process's device."""
    weight, is_lora = _BYTES[settings.weights], settings.lora_rank > 0
    share = work.processes if settings.parallel == "shard" else 1
    matrices = sum(prod(size) for size in shape.linear.values())
    head = shape.vocabulary * shape.hidden
    trained = shape.adapter(settings) if is_lora else shape.weights
    lower = work.arithmetic == "bfloat16" and settings.weights == "float32"
    light = matrices + (0 if shape.is_tied else head) if is_lora and lower and share == 1 and _is_light(shape) else 0
    weights = weight * (shape.weights + (trained if is_lora else 0)) - 2 * light
    moment = 2 if settings.optimiser == "adamw-bfloat16" else weight
    is_same = not is_lora and share == 1 and settings.weights == shape.storage == work.sampler
    sampler = _BYTES[work.sampler] * shape.weights
    return Memory(
        weights=weights // share,
        gradients=weight * trained // share,
        moments=2 * moment * trained // share,
        activations=_activations(shape, settings, work, casts=0 if light or not lower else 2 * matrices),
        output_layer=_output_layer(shape, settings, work, head),
        sampler=0 if is_same else sampler,
        sampler_alone=sampler,
        keys=2 * _BYTES[work.sampler] * shape.layers * shape.keys * (work.shared + work.rows * work.tokens),
    )


def _activations(shape: Shape, settings: ImproveConfig, work: Work, *, casts: int) -> int:
    """What the backward pass needs of a pack and of the shared part of its prompts, whose pass stays open until the step ends.

    Of each token and layer: what both norms and the linear layers behind them are given, queries, keys, values and output of
    attention, and four numbers for each of the inner width. `casts`: weights in the number format of the arithmetic.
    """
    stream = _BYTES[settings.weights]  # between layers
    number = min(stream, _BYTES[work.arithmetic])
    norms = 8 + (0 if settings.lora_rank else 2 * stream)  # computed in float32, then multiplied by their weights
    inputs = number * (2 if number == stream else 5)  # in another format each of five layers has a copy of its own
    inside = 4 if work.device == "cpu" else number  # attention on a CPU is computed in float32
    attention = inside * (2 * shape.queries + 2 * shape.keys) + number * shape.queries + 4 * shape.heads
    layer = (norms + inputs) * shape.hidden + attention + 4 * number * shape.intermediate
    tokens, around = work.pack + work.shared, 5 * 4 * shape.hidden * work.pack
    outside = 16 * shape.keys * shape.layers * work.shared  # keys and values of the shared part, and their gradients
    if settings.gradient_checkpointing:
        kept = stream * shape.hidden * shape.layers * tokens
        return kept + layer * max(work.pack, work.shared) + around + outside + casts
    return layer * shape.layers * tokens + around + outside + casts * (2 if work.shared else 1)


def _output_layer(shape: Shape, settings: ImproveConfig, work: Work, head: int) -> int:
    """A part of the logits and, where it is no overwriting, their gradient; the layer's weights in the number format of the
    products; its own gradient as a float32 sum, and what one part adds to it."""
    number = min(_BYTES[settings.weights], _BYTES[work.arithmetic])
    targets = _TARGETS if work.device == "cpu" else max(_TARGETS, _LOGITS // (shape.vocabulary * number))
    logits = 4 * min(targets, work.pack) * shape.vocabulary
    is_light = settings.lora_rank > 0 and _is_light(shape) and not shape.is_tied
    copy = 0 if is_light or number == _BYTES[settings.weights] else number
    own = 0 if settings.lora_rank else 4 if number == 4 else 6
    return logits + head * (copy + own)


def _is_light(shape: Shape) -> bool:
    """Whether frozen matrices are kept in bfloat16 where that is the arithmetic, as in `lora.lighten`."""
    return shape.storage == "bfloat16"


def read_shape(path: str, *, trust_remote_code: bool = False) -> Shape | None:
    """The shape of the model in a directory, no weight being read; None for what is no decoder with attention."""
    from transformers import AutoConfig

    folder = adapted(path)
    sizes = {name: tuple(entry["shape"]) for name, entry in _headers(Path(folder))}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
        heads, hidden, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    width = getattr(config, "head_dim", None) or hidden // heads
    experts = (getattr(config, "num_experts_per_tok", None) or 0) * (getattr(config, "moe_intermediate_size", None) or 0)
    outside = [name for name, size in sizes.items() if size == (config.vocab_size, hidden)]
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    if is_tied and len(outside) > 1:  # written twice, held once
        del sizes[outside[-1]]
    return Shape(
        weights=sum(map(prod, sizes.values())),
        linear={name: size for name, size in sizes.items() if len(size) == 2 and re.search(r"\.\d+\.", name)},
        layers=layers,
        hidden=hidden,
        intermediate=max(experts, getattr(config, "intermediate_size", None) or 4 * hidden),
        heads=heads,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        vocabulary=config.vocab_size,
        is_tied=is_tied,
        storage=str(storage_dtype(folder)).removeprefix("torch."),
    )


def _headers(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name, and number format and shape, of every tensor of a model directory. A file begins with the length of its header."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        yield from ((name, entry) for name, entry in header.items() if name != "__metadata__")
