"""Tokens per second of the tree sampler against `generate`, continuous batching and vLLM, and against the roofline.

    python -m benchmarks.sampling [--shape few-shot] [--peers generate,generate-n,continuous,vllm] [--rounds 3]
                                  [--vllm-python DIR/bin/python] [--model embedded] [--device auto]

Everyone gets the same token ids, draws the same number of samples of the same number of tokens (end tokens are off), at
temperature 0.7 and top-k 40 or greedily. One round measures ours and then each peer; the medians of the rounds are compared.
`generate` is slow, so it draws a part of the samples, in full batches: its speed does not depend on how many batches follow.
The roofline is the sampler's own matrix products alone (linear layers, output layer, attention), at the rows and mean length
of the shape, timed in every round. vLLM lives in an environment of its own, keeps its prefix cache, and is timed warm; how long
each takes from a cold process to its first sample is reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.vllm_client import VLLM
from restem.models import compute_dtype, load_model, load_tokenizer, locate, pick_device
from restem.prompts import Prompt, Renderer
from restem.sampling import Decoding, Owed, TreeSampler
from restem.tasks import load_task
from restem.tasks.gsm8k import EXEMPLARS
from restem.types import Problem


@dataclass(frozen=True)
class Shape:
    """Problems x samples x tokens, behind so many exemplars. `part`: samples that a slow peer draws."""

    problems: int
    samples: int
    tokens: int
    shots: int
    part: int
    temperature: float = 0.7


SHAPES = {
    "few-shot": Shape(32, 32, 128, 8, 32),
    "zero-shot": Shape(32, 32, 128, 0, 128),
    "greedy": Shape(128, 1, 128, 8, 32, temperature=0.0),
    "long": Shape(16, 32, 512, 8, 16),
    "smoke": Shape(4, 4, 8, 2, 8),
}


@dataclass
class Work:
    """A shape with its prompts, rendered once for all."""

    shape: Shape
    path: str
    model: Any
    renderer: Renderer
    stage: list[Problem]

    @property
    def prompts(self) -> list[list[int]]:
        return [list(self.renderer.encode(problem)) for problem in self.stage]

    def for_vllm(self) -> dict[str, Any]:
        return {
            "model": self.path,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "prompts": self.prompts,
            "samples": self.shape.samples,
            "tokens": self.shape.tokens,
            "temperature": self.shape.temperature,
        }

    @property
    def decoding(self) -> Decoding:
        return Decoding(temperature=self.shape.temperature, top_k=40, max_tokens=self.shape.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="few-shot,zero-shot,greedy,long", help=", ".join(SHAPES))
    parser.add_argument("--peers", default="generate,generate-n,continuous,vllm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--problems", type=int, help="fewer problems than the shape has, for everyone")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--vllm-python", default="", help="the Python of an environment with vLLM; without it vLLM is left out")
    options = parser.parse_args()
    began = time.perf_counter()
    path, device = locate(options.model), pick_device(options.device)
    model = load_model(path, dtype=compute_dtype("auto", device), device=device)
    tokenizer = load_tokenizer(path)
    print(f"model and tokenizer loaded {time.perf_counter() - began:.1f} s after the imports", file=sys.stderr)
    for name in options.shape.split(","):
        shape = SHAPES[name]
        shape = replace(shape, problems=min(shape.problems, options.problems or shape.problems))
        prompt = Prompt(exemplars=EXEMPLARS[: shape.shots])
        stage = list(load_task("arithmetic").test[: shape.problems])
        work = Work(shape, path, model, Renderer(prompt, tokenizer), stage)
        compare(name, work, [peer for peer in options.peers.split(",") if peer], options)


def compare(name: str, work: Work, peers: list[str], options: argparse.Namespace) -> None:
    """Measure one shape and print its line."""
    sampler = TreeSampler(work.model, work.renderer, say=lambda text: print(text, file=sys.stderr))
    sampler.end_ids = frozenset()
    runs: dict[str, Callable[[], float]] = {"ours": lambda: ours(work, sampler), "roofline": lambda: roofline(work, sampler)}
    notes = []
    served = None
    for peer in peers:
        if peer == "vllm":
            if options.vllm_python:
                served = VLLM(work.for_vllm(), options.vllm_python)
                runs[peer] = served.measure
                notes.append(f"vLLM was ready {served.seconds:.0f} s after its process began")
            else:
                notes.append("vLLM left out: no --vllm-python")
        else:
            runs[peer] = lambda measure=PEERS[peer]: measure(work)  # type: ignore[misc]
    speeds: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for who, run in list(runs.items()):
            try:
                speeds.setdefault(who, []).append(run())
            except Exception as error:  # a peer that does not run here is a finding, not the end
                if who in ("ours", "roofline"):
                    raise
                notes.append(f"{who} did not run: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
                del runs[who]
                continue
            print(f"{name}, round {number + 1}: {who} {speeds[who][-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    if served is not None:
        served.close()
    median = {who: round(statistics.median(values), 1) for who, values in speeds.items() if values}
    lengths = [len(prompt) for prompt in work.prompts]
    line = {
        "benchmark": "sampling",
        "shape": name,
        "unit": "sampled tokens per second",
        "ours": median.pop("ours"),
        "peers": median,
        "ratios": {who: round(statistics.median(speeds["ours"]) / value, 2) for who, value in median.items()},
        "rounds": options.rounds,
        "size": f"{work.shape.problems} problems x {work.shape.samples} samples x {work.shape.tokens} tokens, "
        f"prompts of {min(lengths)} to {max(lengths)} tokens",
        "machine": machine(work.model.device),
        "notes": "; ".join(
            [f"everyone in {work.for_vllm()['dtype']}", *notes, f"generate draws {work.shape.part} of the samples"]
        ),
    }
    print(json.dumps(line), flush=True)


def ours(work: Work, sampler: TreeSampler) -> float:
    owed = [Owed(problem.id, index) for problem in work.stage for index in range(work.shape.samples)]
    sampler._prefix = None  # computing it is part of the work
    began = time.perf_counter()
    drawn = sum(len(sample.token_ids) for sample in sampler.sample(work.stage, owed, work.decoding, stream="benchmark"))
    assert drawn == work.shape.problems * work.shape.samples * work.shape.tokens
    return drawn / (time.perf_counter() - began)


def generate(work: Work, *, copies: bool = False) -> float:
    """transformers' `generate` on one batch: left-padded prompts of many problems, or copies of one (num_return_sequences)."""
    from transformers import GenerationConfig

    shape = work.shape
    settings: dict[str, Any] = {"min_new_tokens": shape.tokens, "max_new_tokens": shape.tokens, "pad_token_id": 0}
    settings |= {"do_sample": True, "temperature": 0.7, "top_k": 40} if shape.temperature else {"do_sample": False}
    if copies and shape.samples > 1:
        rows = work.prompts[:1]
        settings["num_return_sequences"] = shape.part
    else:
        repeats = -(-shape.part // len(work.prompts))
        rows = (work.prompts * repeats)[: shape.part]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=work.model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=work.model.device)
    began = time.perf_counter()
    with torch.inference_mode():
        out = work.model.generate(ids, attention_mask=mask, generation_config=GenerationConfig(**settings))
    seconds = time.perf_counter() - began
    assert out.shape[1] - longest == shape.tokens
    return float(len(out) * shape.tokens / seconds)


def continuous(work: Work) -> float:
    """transformers' continuous batching, if it runs here."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    shape = work.shape
    rows = [prompt for prompt in work.prompts for _ in range(shape.samples)][: shape.part]
    settings: dict[str, Any] = {"max_new_tokens": shape.tokens, "eos_token_id": -1, "pad_token_id": 0}
    settings |= {"do_sample": True, "temperature": 0.7, "top_k": 40} if shape.temperature else {"do_sample": False}
    began = time.perf_counter()
    cache = ContinuousBatchingConfig(max_memory_percent=0.3)  # by default it takes all the memory that the others need
    out = work.model.generate_batch(
        inputs=rows, generation_config=GenerationConfig(**settings), continuous_batching_config=cache
    )
    tokens = sum(len(result.generated_tokens) for result in out.values())
    if tokens != len(rows) * shape.tokens:
        raise RuntimeError(f"it drew {tokens} of {len(rows) * shape.tokens} tokens")
    return tokens / (time.perf_counter() - began)


PEERS: dict[str, Callable[[Work], float]] = {
    "generate": generate,
    "generate-n": lambda work: generate(work, copies=True),
    "continuous": continuous,
}


@torch.inference_mode()
def roofline(work: Work, sampler: TreeSampler) -> float:
    """The matrix products of a decoding step alone, each with the weights or keys of its own layer."""
    model, config = work.model, work.model.config.get_text_config()
    rows = min(256, work.shape.problems * work.shape.samples)
    lengths = [len(prompt) for prompt in work.prompts]
    shared = sampler._compute_prefix({str(n): tuple(prompt) for n, prompt in enumerate(work.prompts)}).length
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", heads)
    own = round(statistics.mean(lengths)) - shared + work.shape.tokens // 2
    new = torch.randn
    kind = {"dtype": model.dtype, "device": model.device}
    inputs = {layer.in_features: new(rows, layer.in_features, **kind) for layer in linears(model)}
    query, weight = new(groups, rows * heads // groups, size, **kind), new(groups, rows * heads // groups, shared or 1, **kind)
    keys, values = new(groups, size, shared or 1, **kind), new(groups, shared or 1, size, **kind)
    asks, weighs = new(rows * groups, heads // groups, size, **kind), new(rows * groups, heads // groups, own, **kind)
    slots = [(new(rows * groups, size, own, **kind), new(rows * groups, own, size, **kind)) for _ in range(4)]

    def step() -> None:
        with sampler._packed:
            for layer in linears(model):
                layer(inputs[layer.in_features])
        for number in range(config.num_hidden_layers):
            if shared:
                torch.bmm(query, keys)
                torch.bmm(weight, values)
            torch.bmm(asks, slots[number % 4][0])
            torch.bmm(weighs, slots[number % 4][1])
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    step()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return rows / statistics.median(times)


def linears(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    main()
