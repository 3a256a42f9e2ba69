"""Which models the tree serves, and how their attention is exchanged for it.

Stock transformers models are used as they are: only the function behind their attention interface changes, for the time of a
with block. What the tree cannot compute as the model itself does is found here, by name or by trying.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from restem.attention import AttentionPlan, PackAttention, Rule
from restem.errors import RestemError
from restem.models import logits_of
from restem.tree import Tree

ATTENTION = "restem_tree"
"""The name under which tree attention is registered with transformers."""


class Attends(Protocol):
    """What a forward pass hands to the attention of every layer as the keyword `tree`."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """Shapes as in `restem.attention`; the answer is [B, H, T, D]."""
        ...


@contextmanager
def tree_attention(model: Any) -> Iterator[None]:
    """Switch a transformers model to tree attention, without dropout, for the time of a with block.

    Every forward pass inside must bring the keyword `tree`.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention_interface)
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation(ATTENTION)
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


class Unsupported(RestemError):
    """A model that the tree does not compute as the model does itself."""


def refuse_unsupported(model: Any) -> None:
    """Raise Unsupported, with the reason, for a model that the tree would compute wrongly."""
    reasons = _known_reasons(model.config)
    if not reasons and not getattr(model, "_supports_attention_backend", False):
        reasons = ["its code does not let transformers exchange its attention"]
    if not reasons and (reason := disagreement(model)):
        reasons = [reason]
    if reasons:
        raise Unsupported(f"the tree cannot serve this {model.config.model_type} model: {'; '.join(reasons)}.")


def _known_reasons(config: Any) -> list[str]:
    text = config.get_text_config()
    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("it is an encoder-decoder")
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        reasons.append(f"its layers are of the kinds {', '.join(sorted(kinds))}")
    return reasons


@torch.no_grad()
def own_logits(model: Any) -> Tensor:
    """A model's own logits behind two short texts of a common beginning, [6, vocabulary] in float32."""
    training = model.training
    model.eval()
    logits: Tensor = model(input_ids=_texts(model), use_cache=False).logits[:, 4:].flatten(0, 1).float()
    model.train(training)
    return logits


def _texts(model: Any) -> Tensor:
    size = model.get_input_embeddings().num_embeddings
    # Spread over the vocabulary: its first tokens are special ones, often untrained, and magnify rounding.
    rows = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 8, 9, 10]], device=model.device)
    return rows * (size // 11) % size  # type: ignore[no-any-return]


@torch.no_grad()
def disagreement(model: Any) -> str:
    """Why two branches on one prefix do not have the logits that the model itself gives them; "" if they do, up to rounding.

    No list of architectures could promise that: some scale or cap their logits, some ignore what they are handed.
    """
    rows = _texts(model)
    tree = Tree()
    root = tree.add(rows[0, :4].tolist())
    for row in rows.tolist():
        tree.add(row[4:], root)
    ids, positions = (torch.tensor([values], device=model.device) for values in (tree.tokens, tree.positions))
    try:
        expected = own_logits(model)
        with tree_attention(model):
            pack = PackAttention(AttentionPlan.of(tree, model.device))
            hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, tree=pack).last_hidden_state
        found = logits_of(model, hidden)[0, 4:].float()
    except TypeError:  # the keyword `tree` did not reach the attention
        return "its attention does not receive what the tree hands to it"
    if model.dtype == torch.float16 and not expected.isfinite().all():
        return 'its own logits overflow float16 (set model.dtype = "float32")'
    if not expected.isfinite().all():
        return "its own logits are not finite: the weights are damaged, or training diverged"
    # Half precision: rounding differs between kernels, and may send a token to another expert.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25
    near = (found - expected).norm() <= tolerance * expected.norm()
    return "" if near else "on a few tokens, the tree's logits differ from the model's own"


def _attention_interface(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Attends,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert not dropout, "the model is in evaluation mode"
    dtype = value.dtype  # under autocast, rotary embeddings leave queries and keys in float32
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    out = tree.attend(module.layer_idx, query.to(dtype), key.to(dtype), value, rule)
    return out.transpose(1, 2), None
