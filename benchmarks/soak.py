"""Sample at full batch for a long time: is memory flat, and is the last minute as fast as the first?

    python -m benchmarks.soak [--minutes 30] [--samples 32] [--tokens 128] [--model embedded]

One sampler draws the `arithmetic` problems behind eight exemplars over and over, with a new stream each time; rows end at their
own end tokens and are refilled. Every minute gives tokens per second and resident memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import psutil

from benchmarks.sampling import machine
from restem.models import compute_dtype, load_model, load_tokenizer, locate, pick_device
from restem.prompts import Prompt, Renderer
from restem.sampling import Decoding, Owed, TreeSampler
from restem.tasks import load_task
from restem.tasks.gsm8k import EXEMPLARS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--model", default="embedded")
    options = parser.parse_args()
    path, device = locate(options.model), pick_device("auto")
    model = load_model(path, dtype=compute_dtype("auto", device), device=device)
    renderer = Renderer(Prompt(exemplars=EXEMPLARS), load_tokenizer(path))
    sampler = TreeSampler(model, renderer, say=lambda text: print(text, file=sys.stderr))
    stage = list(load_task("arithmetic").train[:256])
    decoding = Decoding(temperature=0.7, top_k=40, max_tokens=options.tokens, stop=renderer.stop)
    owed = [Owed(problem.id, index) for problem in stage for index in range(options.samples)]
    process = psutil.Process()
    speeds: list[float] = []
    memory: list[float] = []
    began = minute = time.perf_counter()
    tokens = total = passes = 0
    while len(speeds) < options.minutes:
        for sample in sampler.sample(stage, owed, decoding, stream=f"soak {passes}"):
            tokens += len(sample.token_ids) + 1
            total += 1
            now = time.perf_counter()
            if now - minute >= 60:
                speeds.append(tokens / (now - minute))
                memory.append(process.memory_info().rss / 1e9)
                print(f"minute {len(speeds)}: {speeds[-1]:.0f} tokens/s, {memory[-1]:.2f} GB", file=sys.stderr, flush=True)
                tokens, minute = 0, now
                if len(speeds) >= options.minutes:
                    break
        passes += 1
    third = max(1, len(speeds) // 3)
    line = {
        "benchmark": "soak",
        "shape": f"{options.minutes:g} minutes",
        "unit": "sampled tokens per second",
        "ours": round(statistics.median(speeds), 1),
        "first_third": round(statistics.median(speeds[:third]), 1),
        "last_third": round(statistics.median(speeds[-third:]), 1),
        "gigabytes": {"minute 2": round(memory[min(1, len(memory) - 1)], 3), "last": round(memory[-1], 3)},
        "samples": total,
        "peers": {},
        "ratios": {},
        "machine": machine(model.device),
        "notes": f"{time.perf_counter() - began:.0f} s; at most {options.tokens} tokens a sample, refilled at once",
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
