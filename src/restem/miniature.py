"""A small model to the pattern of a given one: its widths, heads and kinds of attention, and random weights.

It has few layers, experts and tokens, and windows so short that a hundred tokens show them. For trying a device in a second, in
place of a model that takes gigabytes (`restem.trial`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from restem.errors import RestemError

MOST_PARAMETERS = 1_000_000_000
"""A larger miniature (of a model of about 50 billion or more) is not made: it would take many seconds and gigabytes."""

_VOCABULARY = 512
_WINDOW = 24
_EXPERTS = 8


def miniature_config(config: Any) -> Any:
    """The text model of a config with few layers (one of each kind of attention, at least two), experts and tokens."""
    small = copy.deepcopy(config.get_text_config())
    layers = int(small.num_hidden_layers)
    kinds = list(dict.fromkeys(getattr(small, "layer_types", None) or []))
    fewer = min(layers, max(2, len(kinds)))
    for name, value in vars(small).copy().items():
        if isinstance(value, list) and len(value) == layers:
            setattr(small, name, value[:fewer])
    if kinds:
        small.layer_types = (kinds * fewer)[:fewer]
    changes = {
        "num_hidden_layers": fewer,
        "vocab_size": _VOCABULARY,
        "initializer_range": min(0.3, 2 * small.hidden_size**-0.5),
    }
    for name, value in changes.items():  # weights drawn large: sharp attention and logits that are not flat show errors
        setattr(small, name, value)
    for name, most in {"sliding_window": _WINDOW, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": _VOCABULARY}.items():
        if getattr(small, name, None):
            setattr(small, name, min(most, getattr(small, name)))
    experts = {"num_experts": _EXPERTS, "num_local_experts": _EXPERTS, "n_routed_experts": _EXPERTS}
    for name, most in {**experts, "num_experts_per_tok": _EXPERTS // 2, "n_group": 1, "topk_group": 1}.items():
        if getattr(small, name, None):
            setattr(small, name, min(most, getattr(small, name)))
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    return small


def miniature(config: Any, device: str) -> Any:
    """A float32 model of a miniature's config, its weights drawn from a fixed seed that no other generator notices."""
    from transformers import AutoModelForCausalLM

    # transformers caps attention scores in its eager attention only.
    attention = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise RestemError(f"two layers of it have {count / 1e9:.1f} billion parameters")
    there = torch.device(device)
    with torch.random.fork_rng(devices=[there] if there.type == "cuda" else []), there:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
    return model.to(there).eval()
