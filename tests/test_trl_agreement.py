"""Our loss and gradient are those of TRL's SFTTrainer, an implementation that shares nothing with ours but the model.

TRL is no dependency of ours: without it these tests are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from restem.types import Example
from test_tree_trainer import distance, flat_gradients, random_tree, tree_gradients
from tiny_models import one_thread, tiny  # noqa: F401

pytest.importorskip("datasets")
pytest.importorskip("trl")

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = random_tree(branches=(3, 1, 4), seed=11, weights=False)


def trl_gradients(
    model: Any, examples: Sequence[Example], directory: Path, *, batch: int, packing: bool = False
) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one optimiser step on all examples, in micro-batches of `batch` rows."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    gradients: list[torch.Tensor] = []

    class KeepGradients(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            gradients.append(flat_gradients(model).clone())

    rows = [
        {
            "input_ids": [*example.prompt_ids, *example.completion_ids],
            "completion_mask": [0] * len(example.prompt_ids) + [1] * len(example.completion_ids),
        }
        for example in examples
    ]
    settings = SFTConfig(
        output_dir=str(directory),
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(examples),  # or as many as there are
        completion_only_loss=True,
        packing=packing,
        max_length=128,
        max_grad_norm=0.0,  # no clipping
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_models.tokenizer(),
        callbacks=[KeepGradients()],
    )
    trainer.train()
    (gradient,) = gradients
    return trainer.state.log_history[0]["loss"], gradient


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "granite"])
@pytest.mark.parametrize("batch", [3, 8])
def test_loss_and_gradients_equal_those_of_trl(tmp_path: Path, name: str, batch: int) -> None:
    """Loss on completions only, the mean over all target tokens of the step, in micro-batches or at once."""
    expected = trl_gradients(tiny(name), EXAMPLES, tmp_path, batch=batch)
    found = tree_gradients(tiny(name), EXAMPLES, "token-mean")
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5


def test_they_equal_those_of_trl_when_it_packs(tmp_path: Path) -> None:
    """TRL's packs, of whole sequences side by side, are what the benchmark compares us with: they too must be right."""
    expected = trl_gradients(tiny(), EXAMPLES, tmp_path, batch=1, packing=True)
    found = tree_gradients(tiny(), EXAMPLES, "token-mean")
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5
