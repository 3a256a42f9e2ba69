"""The contestants of `benchmarks.training`: each trains the same optimiser steps, and notes when each of them ended."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from restem.config import ImproveConfig
from restem.memory import keep_freed_memory
from restem.models import load_model, load_tokenizer, logits_of
from restem.processes import Processes
from restem.training.session import Session
from restem.types import Example

SETTINGS = ImproveConfig(objective="token-mean", learning_rate=1e-5, schedule="constant", warmup=0.0, weight_decay=0.0)


@dataclass
class Clock:
    """When each optimiser step ended, and its loss."""

    device: str
    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step_ended(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


@dataclass(frozen=True)
class Work:
    """What a contestant trains on, and how."""

    path: str
    device: str
    dtype: torch.dtype
    checkpointing: bool
    steps: list[tuple[Example, ...]]
    size: int

    def model(self) -> Any:
        model = load_model(self.path, dtype=torch.float32, device=self.device)
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()  # these models have no dropout


def ours(work: Work, clock: Clock) -> None:
    keep_freed_memory()
    settings = SETTINGS.model_copy(update={"gradient_checkpointing": work.checkpointing})
    session = Session(
        work.path,
        settings,
        device=work.device,
        dtype=work.dtype,
        trust_remote_code=False,
        processes=Processes(),
        stream="benchmark",
    )
    for examples in work.steps:
        clock.losses.append(session.step(examples, settings.peak_learning_rate)["loss"])
        clock.step_ended()


def rows(work: Work, clock: Clock) -> None:
    keep_freed_memory()
    model, decay = work.model(), SETTINGS.weight_decay
    optimiser = torch.optim.AdamW(model.parameters(), lr=SETTINGS.peak_learning_rate, weight_decay=decay, fused=True)
    for examples in work.steps:
        optimiser.zero_grad(set_to_none=True)
        ordered, loss = by_length(examples), 0.0
        targets = sum(len(example.completion_ids) for example in examples)
        for first in range(0, len(ordered), work.size):
            with torch.autocast(work.device.split(":")[0], dtype=torch.bfloat16, enabled=work.dtype == torch.bfloat16):
                part = rows_nll(model, ordered[first : first + work.size], work.device) / targets
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip)
        optimiser.step()
        clock.losses.append(loss)
        clock.step_ended()


def rows_nll(model: Any, examples: Sequence[Example], device: str) -> Tensor:
    texts = [[*example.prompt_ids, *example.completion_ids] for example in examples]
    longest = max(map(len, texts))
    # Padding on the right needs no mask: no token sees what follows it. Attention is then the plain causal one, the fastest.
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    parts = [
        row[len(example.prompt_ids) - 1 : len(example.prompt_ids) + len(example.completion_ids) - 1]
        for row, example in zip(hidden, examples, strict=True)
    ]
    targets = torch.tensor([token for example in examples for token in example.completion_ids], device=device)
    return torch.nn.functional.cross_entropy(logits_of(model, torch.cat(parts)).float(), targets, reduction="sum")


def trl(work: Work, clock: Clock, *, packed: bool = False) -> None:
    from datasets import Dataset, concatenate_datasets
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer, pack_dataset

    class StepEnds(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_ended()

    parts = [Dataset.from_list([labelled(example) for example in by_length(examples)]) for examples in work.steps]
    if packed:
        # Step by step, and not all at once, so that everyone's steps hold the same examples.
        parts = [pack_dataset(part, work.size, "bfd") for part in parts]
        assert len({len(part) for part in parts}) == 1
    size = 1 if packed else min(work.size, len(parts[0]))
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=len(parts),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=len(parts[0]) // size,
            train_sampling_strategy="sequential",
            packing=packed,
            max_length=work.size if packed else None,
            dataset_kwargs={"skip_prepare_dataset": True},  # it is prepared already
            optim="adamw_torch_fused",
            learning_rate=SETTINGS.peak_learning_rate,
            lr_scheduler_type="constant",
            weight_decay=SETTINGS.weight_decay,
            max_grad_norm=SETTINGS.clip,
            bf16=work.dtype == torch.bfloat16,
            use_cpu=work.device == "cpu",
            gradient_checkpointing=work.checkpointing,
            dataloader_pin_memory=work.device != "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=work.model(),
            args=settings,
            train_dataset=concatenate_datasets(parts),
            processing_class=load_tokenizer(work.path),
            callbacks=[StepEnds()],
        )
        trainer.train()
    clock.losses.extend(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def labelled(example: Example) -> dict[str, list[int]]:
    ids = [*example.prompt_ids, *example.completion_ids]
    return {"input_ids": ids, "labels": [-100] * len(example.prompt_ids) + list(example.completion_ids)}


CONTESTANTS: dict[str, Callable[[Work, Clock], None]] = {
    "ours": ours,
    "trl": trl,
    "trl-packed": lambda work, clock: trl(work, clock, packed=True),
    "rows": rows,
}


def by_length(examples: Sequence[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: len(example.prompt_ids) + len(example.completion_ids), reverse=True)
