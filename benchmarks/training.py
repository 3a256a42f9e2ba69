"""Target tokens per second and peak memory of the tree trainer against TRL, padded and packed, and against plain rows.

    python -m benchmarks.training [--shape few-shot,zero-shot,worst] [--peers trl,trl-packed,rows] [--rounds 3] [--problems N]
                                  [--batch 32] [--dtype auto] [--checkpointing] [--trl-python DIR/bin/python] [--model embedded]

Everyone trains the same token ids in the same optimiser steps of 32 examples (or `--batch`), all weights, in the same
arithmetic (weights and optimiser in float32), with the same AdamW and the same clipping; the loss is the mean over the target
tokens. Target tokens are those of the completions, with their end tokens. Every step has the same lengths, so that a slow peer
may train fewer steps.

`trl` is its SFTTrainer with its own collator, given each step sorted by length; `trl-packed` the same with each step packed
by its "bfd" strategy; `rows` is what our trainer would do without the tree: transformers' forward on one sequence per row,
sorted by length, with logits at the targets only. Each uses the fastest of a few sizes of its micro-batches, tried beforehand
on eight examples of a step.

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
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.sampling import machine
from benchmarks.trainers import CONTESTANTS, Clock, Work, by_length
from restem.models import compute_dtype, locate, pick_device
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

    def with_batch(self, batch: int) -> Shape:
        """The same with fewer examples a step: the first problems of a turn, the last of them with what is left."""
        left, solutions = batch, []
        for count in self.solutions:
            solutions.append(min(count, left))
            left -= solutions[-1]
            if not left:
                break
        return replace(self, solutions=tuple(solutions), batch=batch)


SHAPES = {
    "few-shot": Shape(64, (10, 10, 8, 4), 150, 600, 60, part=1),
    "zero-shot": Shape(64, (10, 10, 8, 4), 150, 24, 36, part=2),
    "worst": Shape(128, (1,), 150, 0, 200, part=2),
    "smoke": Shape(8, (2, 2), 12, 20, 8, part=1, batch=4),
}

SIZES: dict[str, tuple[int, ...]] = {"ours": (0,), "trl": (2, 4, 8), "trl-packed": (2048, 4096), "rows": (2, 4, 8)}
"""Sizes of micro-batches to try: sequences; when packed, tokens. Ours has a budget of tokens, and is used as it is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="few-shot,zero-shot,worst", help=", ".join(SHAPES))
    parser.add_argument("--peers", default="trl,trl-packed,rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--problems", type=int, help="fewer problems than the shape has; two steps are trained in any case")
    parser.add_argument("--batch", type=int, help="fewer examples per step than the 32 of a shape, for a slow machine")
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
        shape = shape.with_batch(options.batch) if options.batch else shape
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
    command += ["--batch", str(options.batch)] if options.batch else []
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
        apart = max(1, shape.batch // 8)
        steps = [tuple(by_length(step)[apart // 2 :: apart]) for step in steps[:2]]
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


if __name__ == "__main__":
    main()
