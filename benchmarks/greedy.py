"""Our side of `benchmarks.evaluation`: a model in memory, and its greedy completions through the tree sampler."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from restem.models import compute_dtype, load_model, load_tokenizer, locate, pick_device
from restem.prompts import Prompt, Renderer
from restem.sampling import Decoding, Owed, TreeSampler
from restem.types import Problem, Sample


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The model that everyone evaluates."""

    path: str
    device: str
    dtype: torch.dtype
    model: Any
    tokenizer: Any

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def load(name: str, device: str) -> Loaded:
    path, device = locate(name), pick_device(device)
    dtype = compute_dtype("auto", device)
    model = load_model(path, dtype=dtype, device=device)
    return Loaded(path=path, device=device, dtype=dtype, model=model, tokenizer=load_tokenizer(path))


def greedy(problems: Sequence[Problem], prompt: Prompt, loaded: Loaded, longest: int) -> list[Sample]:
    """A completion of each problem, in their order, of at most `longest` tokens and with the prompt's stop texts."""
    renderer = Renderer(prompt, loaded.tokenizer)
    sampler = TreeSampler(loaded.model, renderer, say=lambda text: print(text, file=sys.stderr))
    decoding = Decoding(temperature=0.0, max_tokens=longest, stop=renderer.stop)
    owed = [Owed(problem.id, 0) for problem in problems]
    drawn = {sample.problem_id: sample for sample in sampler.sample(problems, owed, decoding, stream="evaluation")}
    return [drawn[problem.id] for problem in problems]
