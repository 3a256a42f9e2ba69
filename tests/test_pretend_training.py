"""Training on a device that is not the CPU: the same gradients, few launches, few copies, and no waiting in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_models
from plain_flex import flex_as_one_launch
from pretend_gpu import Counts, pretend_gpu
from restem.compatibility import tree_attention
from restem.training.batches import make_packs, shared_prompt
from restem.training.loss import PackLoss, SharedPrompt
from test_pretend_gpu import distance, train
from test_training_session import open_session
from test_tree_trainer import SOME
from tiny_models import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def test_gradients_through_flex_attention_are_those_of_the_cpu() -> None:
    """Of every kind of layer: plain, with a window, with capped scores."""
    for name in ("llama", "qwen2-window", "gemma2"):
        expected = train(tiny_models.tiny(name))
        with pretend_gpu() as gpu, flex_as_one_launch(gpu):
            assert distance(train(gpu.place(tiny_models.tiny(name))), expected) < 2e-5


def test_training_in_bfloat16_runs_under_the_rules_of_cuda() -> None:
    expected = train(tiny_models.tiny())
    with pretend_gpu() as gpu, flex_as_one_launch(gpu):
        found = train(gpu.place(tiny_models.tiny()), torch.bfloat16)
    rounded = train(tiny_models.tiny(), torch.bfloat16)
    apart = sum((rounded[name] - expected[name]).double().square().sum() for name in expected)
    assert distance(found, expected) < 1.5 * float(apart / sum(x.double().square().sum() for x in expected.values())) ** 0.5


def counts_of_a_pack(layers: int) -> Counts:
    """One pack behind a shared prompt, forward and backward; what the first one pays once is left out."""
    with pretend_gpu() as gpu, flex_as_one_launch(gpu):
        config = tiny_models.tiny().config
        config.num_hidden_layers = layers
        model = gpu.place(type(tiny_models.tiny())(config))
        loss = PackLoss(model, torch.bfloat16)
        with tree_attention(model):
            shared = SharedPrompt(loss, shared_prompt(SOME))
            first, second, *_ = make_packs(SOME, "sum", 64, is_apart=True)
            loss(first, shared.before).weighted.backward()
            with gpu.counting() as counts:
                loss(second, shared.before).weighted.backward()
    return counts


def test_a_pack_in_training_never_waits_and_copies_a_few_times_whatever_its_layers() -> None:
    few, many = counts_of_a_pack(2), counts_of_a_pack(5)
    assert not few.waits and not many.waits and few.from_device == many.from_device == 0
    # Token ids, positions, sources, targets, weights; the mask's two integers per token; where its blocks are: eight tables.
    assert few.to_device == many.to_device == 14
    a_layer = (many.launches.total() - few.launches.total()) / 3
    assert a_layer <= 190  # forward and backward, stock modules included, with autocast's casts


def test_a_whole_step_waits_for_two_numbers(tmp_path: Path) -> None:
    """Its sums, and the norm of its gradient; however many packs it has."""
    start = tiny_models.save(tiny_models.tiny(), tmp_path / "base")
    session = open_session(start, pack_tokens=64)
    with pretend_gpu() as gpu, flex_as_one_launch(gpu):
        gpu.place(session.model)
        session.optimiser = torch.optim.AdamW(session.model.parameters(), fused=True)
        session.step(SOME, 1e-3)
        with gpu.counting() as counts:
            metrics = session.step(SOME, 1e-3)
    assert metrics["loss"] > 0
    assert counts.from_device == 2 and counts.waits.total() <= 3
