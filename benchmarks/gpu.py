"""restem on a GPU in four minutes: is it right, how fast is it, and does a base of 7B fit.

    python -m benchmarks.gpu [--device cuda] [--pieces parity,...] [--seconds 240] [--out FILE] [--tiny]
    python -m benchmarks.gpu --pieces embedded --model DIR

Each piece runs in a process of its own, ends at its own limit at the latest, and ends no other. Those of right and wrong run
side by side; what is timed runs alone. What no time was left for is named, so that a second call can run it. One line per
result is printed, and one line of JSON is written to --out. `--tiny --device cpu` runs everything small.

    ceilings    what the card copies and multiplies at best
    float32, bfloat16, float16    logits, decoding and gradients against float32, for every kind of attention
    parity      greedy tokens against `generate`, and samples against those of a CPU
    fallback    some of these without FlexAttention, as on a GPU without Triton
    sampling-X  tokens per second of a model of size X (0.1b, 1.5b, 7b) by rows in flight, against `generate`; a decoding step
    training-X  target tokens per second of 1.5B in the shape X (few-shot, zero-shot, long), against one sequence per row
    7b-lora, 7b-whole    one optimiser step and one D_val, and their peak memory against the estimate
    embedded    real weights (--model DIR): log-probabilities against float32

Nothing is fetched. On a machine without a package registry, carry this checkout (src, benchmarks) and what is missing of torch,
transformers, tokenizers, safetensors, accelerate, numpy, psutil, pydantic and, for 7b-lora, peft; neither duckdb, math-verify,
gguf nor the tests are needed. Set PYTHONPATH=src. Models of random weights are written to --folder (20 GB; for LoRA 35).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_models import Line, Options, use


class Piece(NamedTuple):
    """A function benchmarks.`module`.`name`(options, *arguments), and the seconds that it may take."""

    module: str
    name: str
    limit: float
    arguments: tuple[str, ...] = ()


PIECES = {
    "parity": Piece("gpu_right", "parity", 90),
    "float32": Piece("gpu_right", "trials", 90, ("float32",)),
    "bfloat16": Piece("gpu_right", "trials", 90, ("bfloat16",)),
    "float16": Piece("gpu_right", "trials", 90, ("float16",)),
    "fallback": Piece("gpu_right", "fallback", 90),
    "ceilings": Piece("gpu_speed", "ceilings", 20),
    "sampling-1.5b": Piece("gpu_speed", "sampling", 60, ("1.5b",)),
    "training-few-shot": Piece("gpu_speed", "training", 60, ("few-shot",)),
    "training-zero-shot": Piece("gpu_speed", "training", 60, ("zero-shot",)),
    "training-long": Piece("gpu_speed", "training", 75, ("long",)),
    "7b-lora": Piece("gpu_large", "large", 120, ("lora",)),
    "7b-whole": Piece("gpu_large", "large", 90, ("whole",)),
    "sampling-0.1b": Piece("gpu_speed", "sampling", 60, ("0.1b",)),
    "sampling-7b": Piece("gpu_speed", "sampling", 60, ("7b",)),
    "embedded": Piece("gpu_large", "embedded", 90),
}


_SLOW_TO_IMPORT = [
    "restem.training.session",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.generation.utils",
    "torch._dynamo",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pieces", default=",".join(name for name in PIECES if name != "embedded"))
    parser.add_argument("--seconds", type=float, default=240, help="for all pieces together")
    parser.add_argument("--out", type=Path, help="a file of JSON lines, written anew")
    parser.add_argument("--model", help="the model of the piece embedded")
    parser.add_argument(
        "--folder", help="where models of random weights are kept; default: a folder that is deleted at the end"
    )
    parser.add_argument("--tiny", action="store_true", help="small models and shapes, for a trial of the benchmark itself")
    options = parser.parse_args()
    names = options.pieces.split(",")
    if unknown := [name for name in names if name not in PIECES]:
        parser.error(f"there is no piece {', '.join(unknown)}. There are: {', '.join(PIECES)}.")
    if options.out is not None:
        options.out.write_text("", encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="restem-gpu-") as temporary:
        common = Options(options.device, options.tiny, options.model, options.folder or temporary)
        run_all(names, common, options.seconds, partial(tell, options.out, time.monotonic()))


Tell = Callable[[str, Line], None]


def tell(out: Path | None, began: float, piece: str, line: Line) -> None:
    """One result, for people and for machines."""
    at = time.monotonic() - began
    print(f"{at:6.1f} s  {piece}: {line.text}", flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"piece": piece, "at": round(at, 1), "text": line.text, **line.facts}) + "\n")


def run_all(names: list[str], options: Options, limit: float, say: Tell) -> None:
    """Right and wrong side by side, then what is timed, piece by piece."""
    end = time.monotonic() + limit
    context = forking([*sorted({f"benchmarks.{PIECES[name].module}" for name in names}), *_SLOW_TO_IMPORT])
    together = [name for name in names if PIECES[name].module == "gpu_right"]
    for group in [together, *([name] for name in names if name not in together)]:
        left = end - time.monotonic()
        if left < min(10, limit / 2):
            for name in group:
                say(name, Line(f"not run, no time left: --pieces {name}", {"error": "no time left"}))
            continue
        running = [Running.started(context, name, options, left) for name in group]
        while running:
            for piece in running:
                for line in piece.said():
                    say(piece.name, line)
            running = [piece for piece in running if not piece.is_over]
            time.sleep(0.02)


@dataclass
class Running:
    """A piece in its process."""

    name: str
    process: Any
    results: Any
    end: float
    limit: float
    is_over: bool = False

    @staticmethod
    def started(context: Any, name: str, options: Options, left: float) -> Running:
        results, limit = context.SimpleQueue(), min(left, PIECES[name].limit)
        process = context.Process(target=run_piece, args=(name, options, results))
        process.start()
        return Running(name, process, results, time.monotonic() + limit, limit)

    def said(self) -> Iterator[Line]:
        """Its results since the last call. A piece that has ended otherwise than it should, or is late, is over, too."""
        is_alive = self.process.is_alive()  # asked first: what it said last is there when it is gone
        while not self.results.empty():
            line = self.results.get()
            if line is None:
                self.is_over = True
                self.process.join()
                return
            yield line
        if not is_alive:
            self.is_over = True
            reason = f"its process ended with {self.process.exitcode}"
            yield Line(f"FAILED: {reason}", {"error": reason})
        elif time.monotonic() > self.end:
            self.is_over = True
            self.process.kill()
            self.process.join()
            yield Line(f"FAILED: not done in {self.limit:.0f} s", {"error": f"not done in {self.limit:.0f} s"})


def forking(modules: list[str]) -> Any:
    """How processes are made: forked after these imports, which then cost nothing; or anew, where the imports have asked CUDA
    for something, after which no fork may use it."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # which asks the driver, not CUDA, whether there is a GPU
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules)
    results = context.SimpleQueue()
    process = context.Process(target=_tell_if_spoilt, args=(results,))
    process.start()
    spoilt = results.get()
    process.join()
    return multiprocessing.get_context("spawn") if spoilt else context


def _tell_if_spoilt(results: Any) -> None:
    import torch

    results.put(torch.cuda._is_in_bad_fork())


def run_piece(name: str, options: Options, results: Any) -> None:
    """In the piece's own process."""
    piece = PIECES[name]
    try:
        use(options.device)
        for line in getattr(import_module(f"benchmarks.{piece.module}"), piece.name)(options, *piece.arguments):
            results.put(line)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = (
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]} ({Path(where.filename).name}:{where.lineno})"
        )
        results.put(Line(f"FAILED: {reason}", {"error": reason}))
    results.put(None)


if __name__ == "__main__":
    main()
