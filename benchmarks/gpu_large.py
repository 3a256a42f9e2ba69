"""What needs more than a glance: a base of 7B on one card, and the embedded model's real weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_models import (
    SIZES,
    Ids,
    Line,
    Options,
    free_memory,
    peak_gb,
    random_examples,
    random_prompts,
    seconds,
    stored_model,
)
from benchmarks.gpu_speed import session_of
from restem.config import ImproveConfig
from restem.errors import RestemError
from restem.models import load_model, load_tokenizer
from restem.prompts import Prompt, Renderer
from restem.sampling import Decoding, Owed, TreeSampler
from restem.training.estimate import Work, estimate, read_shape
from restem.types import Problem, Sample

LORA: dict[str, Any] = {"lora_rank": 16, "gradient_checkpointing": True}
WHOLE: dict[str, Any] = {"weights": "bfloat16", "optimiser": "adamw-bfloat16", "gradient_checkpointing": True}
_VAL = 8  # samples of a problem on D_val


def large(options: Options, how: str) -> Iterator[Line]:
    """One optimiser step of a model of random weights, then one D_val, and the peak memory of both against the estimate."""
    size = "tiny" if options.tiny else "7b"
    chosen = LORA if how == "lora" else WHOLE
    settings, few = ImproveConfig(**chosen), (4, 2, 70, 10, 20) if options.tiny else (8, 4, 600, 80, 256)
    problems, solutions, shared, question, tokens = few
    prompts = random_prompts(SIZES[size]["vocab_size"], problems, shared=shared, question=question)
    examples = random_examples(SIZES[size]["vocab_size"], prompts, solutions, tokens)
    path = stored_model(size, options)
    expected = estimated(path, settings, options, shared=shared, tokens=tokens, rows=_VAL * problems)
    session = session_of(options, size, settings)
    free_memory(options.device)
    metrics = session.step(examples, 1e-5)
    facts = {"size": size, "how": how, "settings": chosen, "loss": metrics["loss"], "seconds": round(metrics["seconds"], 2)}
    yield _against("step", facts, peak_gb(options.device), expected.get("training"))
    free_memory(options.device)
    took = seconds(options.device, lambda: d_val(session, prompts, options, tokens))
    yield _against("D_val", {**facts, "seconds": round(took, 2)}, peak_gb(options.device), expected.get("validation"))


def _against(what: str, facts: dict[str, Any], peak: float, expected: float | None) -> Line:
    text = f"{facts['size']} {facts['how']}, {what}: {facts['seconds']} s, peak {peak:.1f} GB"
    text += "" if expected is None else f", estimated {expected:.1f}"
    return Line(text, {**facts, "what": what, "peak_gb": round(peak, 2), "estimated_gb": expected})


def estimated(path: str, settings: ImproveConfig, options: Options, *, shared: int, tokens: int, rows: int) -> dict[str, float]:
    """GB that restem says before it trains, by phase; empty where it has no estimate for such a model."""
    shape = read_shape(path)
    if shape is None:
        return {}
    device = torch.device(options.device).type
    arithmetic = "bfloat16" if device == "cuda" else "float32"
    pack = 4096 if device == "cuda" else 768
    sizes = {"pack": pack, "shared": shared, "tokens": tokens, "rows": rows}
    work = Work(arithmetic=arithmetic, sampler="bfloat16", device=device, **sizes)
    memory = estimate(shape, settings, work)
    return {"training": memory.training / 1e9, "validation": memory.validation / 1e9}


def d_val(session: Any, prompts: dict[str, tuple[int, ...]], options: Options, tokens: int) -> list[Sample]:
    """What follows an interval: the model as it would be handed over, and some samples of each prompt."""
    session.optimiser.zero_grad(set_to_none=True)
    model = session.for_sampling(torch.bfloat16)
    if model is None:  # an adapter is merged on its way through a model directory
        interval = session.write_interval(Path(options.folder) / "interval", 1, {})
        model = load_model(interval.model, dtype=torch.bfloat16, device=options.device)
    model.generation_config.eos_token_id = None
    renderer: Any = Ids(prompts)
    owed = [Owed(name, index) for name in prompts for index in range(_VAL)]
    decoding = Decoding(temperature=0.7, top_k=40, max_tokens=tokens)
    return list(TreeSampler(model, renderer).sample(renderer.stage, owed, decoding, stream="val"))


# --- the embedded model -------------------------------------------------------------------------------------------------------


def embedded(options: Options) -> Iterator[Line]:
    """Real weights: log-probabilities against float32, beside transformers' own; greedy tokens against `generate`."""
    if options.model is None:
        raise RestemError("the piece embedded needs --model DIR: the embedded model, or another one")
    renderer = Renderer(Prompt(instruction=_INSTRUCTION), load_tokenizer(options.model))
    stage = [
        Problem(id=f"p{n}", question=f"What is {n + 2} times {3 * n + 4}, plus {n}?") for n in range(2 if options.tiny else 16)
    ]
    exact, half = (load_model(options.model, dtype=d, device=options.device) for d in (torch.float32, torch.bfloat16))
    for model in (exact, half):
        model.generation_config.eos_token_id = None
    tokens = 8 if options.tiny else 48
    for name, model in (("bfloat16", half), ("float32", exact)):
        drawn = _drawn(model, renderer, stage, 4, Decoding(temperature=1.0, max_tokens=tokens))
        ours, theirs = ([_off(m, exact, renderer, stage, sample) for sample in drawn] for m in (None, half))
        facts = {"format": name, "samples": len(drawn), "sampler": _rms(ours), "transformers_bf16": _rms(theirs)}
        text = f"log-probability off by {_rms(ours):.1e} nats a token (rms), transformers in bfloat16 by {_rms(theirs):.1e}"
        yield Line(f"{name}: {text}", facts)
    greedy = _drawn(exact, renderer, stage, 1, Decoding(temperature=0.0, max_tokens=tokens))
    equal = sum(sample.token_ids == _generated(exact, _prompt(renderer, stage, sample), tokens) for sample in greedy)
    yield Line(f"greedy in float32: {equal} of {len(greedy)} equal generate", {"greedy_equal": equal, "of": len(greedy)})


_INSTRUCTION = (
    "Solve the problem step by step and end with a line that says: The answer is N. Use whole numbers only, check every "
    "product twice, and write no more than you need. The reader is a child who has just learnt to multiply, so name every step."
)


def _drawn(model: Any, renderer: Renderer, stage: list[Problem], count: int, decoding: Decoding) -> list[Sample]:
    sampler = TreeSampler(model, renderer)
    sampler.end_ids = frozenset()
    owed = [Owed(problem.id, index) for problem in stage for index in range(count)]
    return list(sampler.sample(stage, owed, decoding, stream="embedded"))


def _prompt(renderer: Renderer, stage: list[Problem], sample: Sample) -> tuple[int, ...]:
    return renderer.encode(next(problem for problem in stage if problem.id == sample.problem_id))


def _off(model: Any, exact: Any, renderer: Renderer, stage: list[Problem], sample: Sample) -> float:
    """Nats a token by which a sample's log-probability differs from float32's: its own, or that of another model."""
    prompt = _prompt(renderer, stage, sample)
    found = sample.logprob or 0.0 if model is None else _logprob(model, prompt, sample.token_ids)
    return (found - _logprob(exact, prompt, sample.token_ids)) / len(sample.token_ids)


@torch.no_grad()
def _logprob(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    logprobs = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].float(), -1)
    return float(logprobs.gather(1, ids[0, len(prompt) :, None]).sum())


def _generated(model: Any, prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt], device=model.device)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return tuple(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist())


def _rms(values: list[float]) -> float:
    return float((sum(value * value for value in values) / len(values)) ** 0.5)
