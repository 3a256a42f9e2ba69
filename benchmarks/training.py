"""Target tokens per second and peak memory of the tree trainer against TRL, padded and packed, and against plain rows.

    python -m benchmarks.training [--shape few-shot,zero-shot,worst] [--peers trl,trl-packed,rows] [--rounds 3] [--problems N]
                                  [--dtype auto] [--checkpointing] [--trl-python DIR/bin/python] [--model embedded]

Everyone trains the same token ids in the same optimiser steps of 32 examples, all weights, in the same arithmetic (weights and
optimiser in float32), with the same AdamW and the same clipping; the loss is the mean over the target tokens. Target tokens are
those of the completions, with their end tokens. Every step has the same lengths, so that a slow peer may train fewer steps.

`trl` is its SFTTrainer with its own collator, given each step sorted by length; `trl-packed` the same with each step packed
by its "bfd" strategy; `rows` is what our trainer would do without the tree: transformers' forward on one sequence per row,
sorted by length, with logits at the targets only. Each uses the fastest of a few sizes of its micro-batches, tried beforehand
on a quarter of a step.

Everyone runs in a process of its own, so that the peak memory is its own. Loading and the first step are not timed. One round
measures ours and then each peer; the medians of the rounds are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sampling import machine
from restem.config import ImproveConfig
from restem.memory import keep_freed_memory
from restem.models import compute_dtype, load_model, load_tokenizer, locate, logits_of, pick_device
from restem.training.processes import Processes
from restem.training.session import Session
from restem.types import Example


@dataclass(frozen=True)
class Shape:
    """Problems, with these numbers of solutions in turn, of about so many tokens. `part`: steps that a slow peer trains."""

    problems: int
    solutions: tuple[int, ...]
    tokens: int
    shared: int
    """Tokens that all prompts begin with."""
    own: int
    """Further tokens of each prompt."""
    part: int
    batch: int = 32
    """Examples per optimiser step: a whole number of turns."""

    @property
    def steps(self) -> int:
        turns = self.batch // sum(self.solutions)
        return max(2, self.problems // (turns * len(self.solutions)))


SHAPES = {
    "few-shot": Shape(64, (10, 10, 8, 4), 150, 600, 60, part=1),
    "zero-shot": Shape(64, (10, 10, 8, 4), 150, 24, 36, part=2),
    "worst": Shape(128, (1,), 150, 0, 200, part=2),
    "smoke": Shape(8, (2, 2), 12, 20, 8, part=1, batch=4),
}

SIZES: dict[str, tuple[int, ...]] = {"ours": (0,), "trl": (2, 4, 8), "trl-packed": (2048, 4096), "rows": (2, 4, 8)}
"""Sizes of micro-batches to try: sequences; when packed, tokens. Ours has a budget of tokens, and is used as it is."""

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="few-shot,zero-shot,worst", help=", ".join(SHAPES))
    parser.add_argument("--peers", default="trl,trl-packed,rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--problems", type=int, help="fewer problems than the shape has; two steps are trained in any case")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass, everyone")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trl-python", default=sys.executable, help="the Python of an environment with TRL and restem")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)  # this process is one contestant, and prints what it measured
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.shape.split(","):
        shape = SHAPES[name]
        shape = replace(shape, problems=min(shape.problems, options.problems or shape.problems))
        if options.contestant:
            print(json.dumps(contest(options.contestant, shape, options)), flush=True)
        else:
            compare(name, shape, [peer for peer in options.peers.split(",") if peer], options)


def compare(name: str, shape: Shape, peers: list[str], options: argparse.Namespace) -> None:
    """Measure one shape and print its line."""
    notes, sizes = [], {}
    for who in ("ours", *peers):
        try:
            sizes[who] = fastest_size(who, name, options)
        except RuntimeError as error:  # a peer that does not run here is a finding, not the end
            notes.append(f"{who} did not run: {error}")
            continue
        if len(SIZES[who]) > 1 and name != "smoke":
            notes.append(f"{who}: micro-batches of {sizes[who]}, the fastest of {', '.join(map(str, SIZES[who]))}")
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in sizes}
    for number in range(options.rounds):
        for who, found in list(runs.items()):
            try:
                found.append(run(who, name, sizes[who], options))
            except RuntimeError as error:
                if who == "ours":
                    raise
                notes.append(f"{who} did not run: {error}")
                del runs[who]
                continue
            speed, peak = found[-1]["speed"], found[-1]["peak_gb"]
            text = f"{name}, round {number + 1}: {who} {speed:.0f} target tokens/s, at most {peak:.1f} GB"
            print(text, file=sys.stderr, flush=True)
    median = {who: statistics.median(run["speed"] for run in found) for who, found in runs.items()}
    speeds = {who: round(value, 1) for who, value in median.items()}
    if shape.steps > 1 + shape.part:
        notes.append(f"peers train {shape.part} of {shape.steps - 1} steps")
    notes.append("loss of the first step: " + ", ".join(f"{who} {found[0]['loss']:.4f}" for who, found in runs.items()))
    low, high = lengths(shape)[0], lengths(shape)[-1]
    line = {
        "benchmark": "training",
        "shape": name,
        "unit": "target tokens per second",
        "ours": speeds.pop("ours"),
        "peers": speeds,
        "ratios": {who: round(median["ours"] / median[who], 2) for who in speeds},
        "peak_gb": {who: round(statistics.median(run["peak_gb"] for run in found), 2) for who, found in runs.items()},
        "rounds": options.rounds,
        "size": f"{shape.steps} steps of {shape.batch} solutions, {min(shape.solutions)} to {max(shape.solutions)} a problem, "
        f"of {low} to {high} tokens, prompts of {shape.shared + shape.own} tokens of which {shape.shared} are shared",
        "machine": machine(torch.device(pick_device(options.device))),
        "notes": "; ".join([f"arithmetic in {arithmetic(options)}", *notes]),
    }
    print(json.dumps(line), flush=True)


def fastest_size(who: str, name: str, options: argparse.Namespace) -> int:
    sizes = SIZES[who]
    if len(sizes) == 1 or name == "smoke":
        return sizes[0]
    speeds = {}
    for size in sizes:
        speeds[size] = run(who, name, size, options, probe=True)["speed"]
        print(f"{name}, {who}: {speeds[size]:.0f} target tokens/s with micro-batches of {size}", file=sys.stderr, flush=True)
    return max(speeds, key=lambda size: speeds[size])


def run(who: str, name: str, size: int, options: argparse.Namespace, *, probe: bool = False) -> dict[str, float]:
    """What a contestant measures of itself, in a process of its own."""
    python = options.trl_python if who.startswith("trl") else sys.executable
    command = [python, "-m", "benchmarks.training", "--contestant", who, "--shape", name, "--size", str(size)]
    command += ["--dtype", options.dtype, "--model", options.model, "--device", options.device]
    command += ["--problems", str(options.problems)] if options.problems else []
    command += ["--checkpointing"] if options.checkpointing else []
    command += ["--probe"] if probe else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"exit code {done.returncode}: {last[:200]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def arithmetic(options: argparse.Namespace) -> torch.dtype:
    return compute_dtype(options.dtype, pick_device(options.device))  # type: ignore[no-any-return]


def lengths(shape: Shape) -> list[int]:
    """Of the completions of one step, from two thirds to four thirds of the shape's tokens, in even spaces."""
    return [round(shape.tokens * (2 / 3 + 2 / 3 * place / (shape.batch - 1))) for place in range(shape.batch)]


def make_steps(shape: Shape, vocabulary: int, end: int) -> list[tuple[Example, ...]]:
    """Examples of random tokens; which tokens they are has no influence on the speed."""
    chance = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(vocabulary // 50, vocabulary) for _ in range(count))

    shared, steps = ids(shape.shared), []
    for _ in range(shape.steps):
        examples: list[Example] = []
        drawn = lengths(shape)
        chance.shuffle(drawn)
        while len(examples) < shape.batch:
            for solutions in shape.solutions:
                prompt = (*shared, *ids(shape.own))
                found = [(*ids(drawn.pop() - 1), end) for _ in range(solutions)]
                examples += [Example(prompt_ids=prompt, completion_ids=completion) for completion in found]
        steps.append(tuple(examples))
    return steps


# --- in the process of a contestant ----------------------------------------------------------------------------------------


def contest(who: str, shape: Shape, options: argparse.Namespace) -> dict[str, float]:
    path, device = locate(options.model), pick_device(options.device)
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    end = config["eos_token_id"]
    steps = make_steps(shape, config["vocab_size"], end[0] if isinstance(end, list) else end)
    if options.probe:
        steps = [tuple(by_length(step)[2::4]) for step in steps[:2]]
    elif who != "ours":
        steps = steps[: 1 + shape.part]
    clock = Clock(device)
    CONTESTANTS[who](Work(path, device, arithmetic(options), options.checkpointing, steps, options.size), clock)
    assert len(clock.ends) == len(steps)
    tokens = sum(len(example.completion_ids) for step in steps[1:] for example in step)
    return {"speed": tokens / (clock.ends[-1] - clock.ends[0]), "peak_gb": peak_gb(device), "loss": clock.losses[0]}


def peak_gb(device: str) -> float:
    """Most memory that this process ever had: of the accelerator if it has one, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    # Linux starts it at the peak of the process that started this one: some 0.5 GB, less than loading a model takes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def by_length(examples: Sequence[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: len(example.prompt_ids) + len(example.completion_ids), reverse=True)


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
        clock.losses.append(session.step(examples, settings.learning_rate)["loss"])
        clock.step_ended()


def rows(work: Work, clock: Clock) -> None:
    keep_freed_memory()
    model, decay = work.model(), SETTINGS.weight_decay
    optimiser = torch.optim.AdamW(model.parameters(), lr=SETTINGS.learning_rate, weight_decay=decay, fused=True)
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
            learning_rate=SETTINGS.learning_rate,
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


if __name__ == "__main__":
    main()
