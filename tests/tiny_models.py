"""Random models of a few ten thousand weights, of many architectures, and tokenizers made in this process.

Random weights of the usual size give nearly flat logits, which hide errors. `tiny` draws them large, so that attention is sharp
and the likeliest token stands out; `scripted` builds a model whose greedy completion is known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from restem import models
from restem.prompts import Exemplar, Prompt, Renderer
from restem.types import Problem

MERGES = (("t", "h"), ("th", "e"), ("Ċ", "Ċ"), ("1", "2"), ("a", "b"), ("ab", "c"))
SPECIAL = ("<s>", "</s>")
END = 1
VOCABULARY = len(SPECIAL) + 256 + len(MERGES)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": None,
}
_ALIKE = ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
_GPT2 = {**{key: _COMMON[key] for key in _ALIKE}, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 512}
_NEOX = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_GRANITE = {"logits_scaling": 3.0, "attention_multiplier": 0.2, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
_WINDOW = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
# With tied embeddings as large as these, Gemma repeats its last token for ever.
_UNTIED = {"tie_word_embeddings": False, "head_dim": 8, "query_pre_attn_scalar": 8}
_CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 20.0}

SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_COMMON, "num_hidden_layers": 3, "head_dim": 8}),
    "llama-tied": ("LlamaConfig", {**_COMMON, "head_dim": 8, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", {**_COMMON, "head_dim": 16}),
    "mistral": ("MistralConfig", {**_COMMON, "sliding_window": None}),
    "olmo2": ("Olmo2Config", _COMMON),
    "phi3": ("Phi3Config", _COMMON),
    "granite": ("GraniteConfig", {**_COMMON, **_GRANITE}),
    "smollm3": ("SmolLM3Config", _COMMON),
    "starcoder2": ("Starcoder2Config", {**_COMMON, "sliding_window": None}),
    "cohere": ("CohereConfig", {**_COMMON, "logit_scale": 0.25}),
    "gpt-neox": ("GPTNeoXConfig", _NEOX),
    "gpt2": ("GPT2Config", _GPT2),
    "mistral-window": ("MistralConfig", {**_COMMON, "sliding_window": 24}),
    "phi3-window": ("Phi3Config", {**_COMMON, "sliding_window": 24}),
    "qwen2-window": ("Qwen2Config", {**_COMMON, **_WINDOW, "use_sliding_window": True}),
    "cohere2": ("Cohere2Config", {**_COMMON, **_WINDOW, "head_dim": 8, "logit_scale": 0.25}),
    "olmo3": ("Olmo3Config", {**_COMMON, **_WINDOW}),
    "gemma2": ("Gemma2Config", {**_COMMON, **_WINDOW, **_UNTIED, **_CAPS}),
    "gemma2-no-caps": (
        "Gemma2Config",
        {**_COMMON, **_WINDOW, **_UNTIED, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("Gemma3TextConfig", {**_COMMON, **_WINDOW, **_UNTIED}),
}
"""Architectures that the tree computes."""

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {**{key: _COMMON[key] for key in _ALIKE}, "hidden_size": 48, "num_hidden_layers": 2}),
    "t5": (
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "initializer_factor": 3.0,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
        },
    ),
    "gptj": ("GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "bloom": ("BloomConfig", {**{key: _COMMON[key] for key in _ALIKE}, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "stablelm": ("StableLmConfig", _COMMON),
    "nemotron": ("NemotronConfig", _COMMON),
}
"""Architectures that the tree would compute wrongly, and therefore refuses."""


def tiny(name: str = "llama", *, seed: int = 0, table: Mapping[str, tuple[str, dict[str, Any]]] = SERVED) -> Any:
    """A random model in float32, in evaluation mode. The global generator is left as it was."""
    kind, settings = table[name]
    config = getattr(transformers, kind)(**settings)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # transformers caps attention scores in its eager attention only.
        capped = getattr(config, "attn_logit_softcapping", None)
        attention = {"attn_implementation": "eager"} if capped else {}
        return auto.from_config(config, dtype=torch.float32, **attention).eval()


def scripted(script: Sequence[str | int], *, after: str = ":") -> Any:
    """A model that, after a prompt ending in `after`, greedily writes these tokens (texts or ids), each of them distinct.

    No layer adds anything: each token stands for one axis of the hidden state, and the output layer maps it to its follower.
    The last token of the script is followed by itself, for ever.
    """
    table = vocabulary()
    ids = [table[item] if isinstance(item, str) else item for item in (after, *script)]
    assert len(set(ids)) == len(ids), "a token has one follower"
    logits = torch.zeros(VOCABULARY, VOCABULARY)  # [follower, token]
    for token, follower in zip(ids, [*ids[1:], ids[-1]], strict=True):
        logits[follower, token] = 20.0
    return bigram(logits)


def bigram(logits_VV: torch.Tensor) -> Any:
    """A model whose logits after a token t are column t of this table, whatever came before."""
    size = len(logits_VV)
    sizes = {"vocab_size": size, "hidden_size": size, "intermediate_size": 4, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 512}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.LlamaConfig(**sizes, **heads, **ends, rms_norm_eps=1e-14)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        # The norm turns a unit axis into one of length sqrt(size).
        model.lm_head.weight.copy_(logits_VV / size**0.5)
    return model


def vocabulary() -> dict[str, int]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, *(left + right for left, right in MERGES)]
    return {token: number for number, token in enumerate(tokens)}


def tokenizer(*, template: str | None = None) -> Any:
    """Every byte a token, and a few longer ones. It has an end token and no padding token."""
    inner = Tokenizer(BPE(vocab=vocabulary(), merges=list(MERGES)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    made.chat_template = template
    return made


def few_shot() -> Renderer:
    """Prompts that share an instruction and an exemplar."""
    exemplar = Exemplar(question="2 + 5?", solution="2 + 5 = 7. The answer is 7.")
    return Renderer(Prompt(instruction="Add the numbers.", exemplars=(exemplar,)), tokenizer())


def bare() -> Renderer:
    """Prompts that are the question and a colon, and share nothing but what their questions share."""
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}:"
    return Renderer(Prompt(style="chat"), tokenizer(template=template))


QUESTIONS = ("3 + 4?", "the abc of 12", "7", "xy zz", "12 + 12 + 12 + 5 is what?", "9 - 1?", "Q", "why the th?", "u", "88*3?")


def problems(count: int = len(QUESTIONS)) -> list[Problem]:
    return [Problem(id=f"p{number}", question=question) for number, question in enumerate(QUESTIONS[:count])]


def fingerprint(model: Any) -> str:
    return models.fingerprint_tensors(sorted(model.state_dict().items()))


def save(model: Any, directory: Path, *, dtype: torch.dtype = torch.float32) -> str:
    """Write a model directory with a tokenizer, as a user's base would be."""
    models.save_model(model, tokenizer(), directory, dtype=dtype)
    return str(directory)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small to share between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
