"""What `benchmarks.gpu` measures with: models of random weights, prompts and examples of random tokens, and a clock.

Nothing is fetched, and no tokenizer is needed. With random weights only speed and agreement are measured, never quality.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from restem.types import Example, Problem


@dataclass(frozen=True)
class Options:
    """What is common to all pieces."""

    device: str
    tiny: bool
    model: str | None
    folder: str
    """Where models of random weights are kept between pieces."""


class Line(NamedTuple):
    """One result: for people, and for machines."""

    text: str
    facts: dict[str, Any] = {}  # noqa: RUF012  # never changed


_WINDOW: dict[str, Any] = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA: dict[str, Any] = {**_WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": False}
_PLAIN: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_PLAIN, "head_dim": 16}),
    "llama, heads of 64": ("LlamaConfig", {**_PLAIN, "num_attention_heads": 4, "head_dim": 64}),
    "llama, heads of 8": ("LlamaConfig", {**_PLAIN, "head_dim": 8}),
    "qwen2, biased keys": ("Qwen2Config", _PLAIN),
    "mistral, window": ("MistralConfig", {**_PLAIN, "sliding_window": 24}),
    "gemma2, windows and caps": ("Gemma2Config", {**_PLAIN, **_GEMMA, "attn_logit_softcapping": 3.0}),
    "gemma3, windows": ("Gemma3TextConfig", {**_PLAIN, **_GEMMA}),
    "cohere2, windows": ("Cohere2Config", {**_PLAIN, **_WINDOW, "head_dim": 16, "logit_scale": 0.25}),
    "gpt2, learned positions": ("GPT2Config", {"vocab_size": 512, "n_embd": 96, "n_layer": 2, "n_head": 6}),
}
"""Every kind of attention that the tree serves: full, windows, capped scores, few and many key heads, small and usual heads."""

_ALIKE: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None, "max_position_embeddings": 32768}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**_PLAIN, **_ALIKE},
    "0.1b": {
        **_ALIKE,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        **_ALIKE,
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {
        **_ALIKE,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
"""Qwen2's shapes: "0.1b" has the sizes of SmolLM2-135M, the others are those of Qwen2.5."""


def random_model(size: str, device: str, dtype: torch.dtype) -> Any:
    """Made on its device, so that 7B take a second."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES[size]), dtype=dtype)
    model.generation_config.eos_token_id = None  # nothing ends a completion but its length
    return model.to(device).eval()


def stored_model(size: str, options: Options) -> str:
    """The same as a model directory in bfloat16, with a tokenizer that nobody asks anything; written once."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = Path(options.folder) / size
    if not (folder / "tokenizer_config.json").is_file():
        random_model(size, options.device, torch.bfloat16).save_pretrained(folder)
        inner = Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
        PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    free_memory(options.device)
    return str(folder)


@dataclass
class Ids:
    """A renderer of token ids that are given; texts do not matter."""

    prompts: dict[str, tuple[int, ...]]
    stop: tuple[str, ...] = ()
    end_id: int = -1
    stage: list[Problem] = field(init=False)

    def __post_init__(self) -> None:
        self.stage = [Problem(id=name, question=name) for name in self.prompts]

    def encode(self, problem: Problem) -> tuple[int, ...]:
        return self.prompts[problem.id]

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def random_prompts(vocabulary: int, problems: int, *, shared: int, question: int) -> dict[str, tuple[int, ...]]:
    """Prompts that begin with the same `shared` tokens, and have `question` to a quarter more of their own."""
    chance = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocabulary, (count,), generator=chance).tolist())

    head = ids(shared)
    return {f"p{n}": (*head, *ids(question + n * max(1, question // 4) // problems)) for n in range(problems)}


def random_examples(vocabulary: int, prompts: dict[str, tuple[int, ...]], solutions: int, tokens: int) -> list[Example]:
    """So many solutions of each, of half to one and a half times `tokens`."""
    chance = torch.Generator().manual_seed(1)
    examples = []
    for name, prompt in prompts.items():
        for index in range(solutions):
            length = tokens // 2 + int(torch.randint(0, tokens, (1,), generator=chance))
            completion = tuple(torch.randint(2, vocabulary, (length,), generator=chance).tolist())
            examples.append(Example(problem_id=name, index=index, prompt_ids=prompt, completion_ids=completion))
    return examples


def use(device: str) -> None:
    """Make a device the current one, where compiled kernels go."""
    if torch.device(device).index is not None and is_cuda(device):
        torch.cuda.set_device(device)


def is_cuda(device: str) -> bool:
    return device.startswith("cuda")


def wait(device: str) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


def seconds(device: str, run: Callable[[], object], repeat: int = 1) -> float:
    """Of one call, with all that it left the device to do."""
    wait(device)
    began = time.perf_counter()
    for _ in range(repeat):
        run()
    wait(device)
    return (time.perf_counter() - began) / repeat


def free_memory(device: str) -> None:
    """Give back what nothing uses, and begin to count the peak anew."""
    if is_cuda(device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: str) -> float:
    """The most memory that tensors took since `free_memory`; 0 on a CPU, where nobody counts."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if is_cuda(device) else 0.0
