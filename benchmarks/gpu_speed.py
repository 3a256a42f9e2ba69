"""How fast: the card's own ceilings, sampling against `generate`, training against one sequence per row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.gpu_models import (
    SIZES,
    Ids,
    Line,
    Options,
    free_memory,
    is_cuda,
    peak_gb,
    random_examples,
    random_model,
    random_prompts,
    seconds,
    stored_model,
)
from restem.config import ImproveConfig
from restem.sampling import Decoding, Owed, TreeSampler
from restem.types import Example


def ceilings(options: Options) -> Iterator[Line]:
    """What the device can do at best: copying, and a product of two large matrices."""
    device, bytes_, side = (options.device, 1 << 22, 256) if options.tiny else (options.device, 1 << 31, 8192)
    x = torch.zeros(bytes_ // 2, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    a, b = (torch.ones(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    y.copy_(x)
    a @ b
    copied = 2 * bytes_ / seconds(device, lambda: y.copy_(x), 10) / 1e12
    multiplied = 2 * side**3 / seconds(device, lambda: a @ b, 10) / 1e12
    facts: dict[str, Any] = {"copy_tb_s": round(copied, 3), "bf16_tflops": round(multiplied, 2), "torch": torch.__version__}
    if is_cuda(device):
        card = torch.cuda.get_device_properties(device)
        facts |= {"device": card.name, "memory_gb": round(card.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    text = f"{facts.get('device', device)}: copies {copied:.2f} TB/s, multiplies bfloat16 at {multiplied:.0f} TFLOP/s"
    yield Line(f"{text}, torch {torch.__version__}", facts)


# --- sampling -----------------------------------------------------------------------------------------------------------------


class Sampling(NamedTuple):
    """What is drawn of a size: problems x samples x tokens, behind `shared` tokens, with so many rows in flight."""

    rows: tuple[int | None, ...]
    """None = as the sampler finds best."""
    problems: int
    tokens: int
    batch: int
    """Rows of `generate`."""
    samples: int = 32
    shared: int = 600
    question: int = 80


SAMPLING = {
    "tiny": Sampling((16, None), 2, 8, 4, samples=8, shared=70, question=10),
    "0.1b": Sampling((256, 2048, None), 64, 96, 256),
    "1.5b": Sampling((256, 2048, None), 64, 96, 256),
    "7b": Sampling((256, 1024), 32, 64, 128),
}


def sampling(options: Options, size: str) -> Iterator[Line]:
    """Tokens per second at several numbers of rows, and of `generate`; then what a decoding step consists of."""
    plan = SAMPLING["tiny" if options.tiny else size]
    model = random_model("tiny" if options.tiny else size, options.device, torch.bfloat16)
    prompts = random_prompts(model.config.vocab_size, plan.problems, shared=plan.shared, question=plan.question)
    renderer: Any = Ids(prompts)
    peer = generate_speed(options, model, prompts, plan)
    yield Line(f"{size}: generate, {plan.batch} rows: {peer:,.0f} tokens/s", {"size": size, "generate": round(peer)})
    for rows in plan.rows:
        free_memory(options.device)
        sampler = TreeSampler(model, renderer, rows=rows)
        # At 256 rows a quarter of the samples says as much, in a quarter of the time.
        stage = renderer.stage[: max(1, len(prompts) // 4)] if rows == 256 else renderer.stage
        owed = [Owed(problem.id, index) for problem in stage for index in range(plan.samples)]
        decoding = Decoding(temperature=0.7, top_k=40, max_tokens=plan.tokens)
        warm = Decoding(temperature=0.7, top_k=40, max_tokens=4)
        list(sampler.sample(renderer.stage, owed[: rows or 256], warm, stream="warm"))
        drawn: list[Any] = []
        took = seconds(options.device, lambda: drawn.extend(sampler.sample(renderer.stage, owed, decoding, stream="timed")))  # noqa: B023
        speed = sum(len(sample.token_ids) for sample in drawn) / took
        facts = {"size": size, "rows": rows or "auto", "tokens_s": round(speed), "peak_gb": round(peak_gb(options.device), 1)}
        ratio = f"{speed / peer:.1f} times generate"
        text = f"{size}: tree, {rows or 'auto'} rows: {speed:,.0f} tokens/s, {ratio}, {facts['peak_gb']} GB"
        yield Line(text, {**facts, "generate": round(peer)})
    for rows in (256, 1024) if not options.tiny else (16,):
        yield decoding_step(options, model, renderer, size, rows)


def generate_speed(options: Options, model: Any, prompts: dict[str, tuple[int, ...]], plan: Sampling) -> float:
    """Tokens per second of transformers' own sampling: a batch of prompts of one length, so that nothing is padded."""
    least = min(map(len, prompts.values()))
    rows = [list(prompt[:least]) for prompt in prompts.values()]
    ids = torch.tensor([rows[n % len(rows)] for n in range(plan.batch)], device=options.device)
    tokens = max(4, plan.tokens // 3)

    def run(batch: torch.Tensor, count: int) -> None:
        settings = {"do_sample": True, "temperature": 0.7, "top_k": 40, "pad_token_id": 0}
        model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=count, min_new_tokens=count, **settings)

    run(ids[:8], 2)
    return plan.batch * tokens / seconds(options.device, lambda: run(ids, tokens))


def decoding_step(options: Options, model: Any, renderer: Any, size: str, rows: int) -> Line:
    """Milliseconds of a step, of them those in which the GPU works, its kernels, and the launches that the CPU makes.

    The difference of two runs, 8 and 24 tokens long: what comes before the first step falls out.
    """
    sampler = TreeSampler(model, renderer, rows=rows)
    owed = [Owed(problem.id, index) for problem in renderer.stage for index in range(32)][:rows]

    def run(tokens: int) -> None:
        list(sampler.sample(renderer.stage, owed, Decoding(temperature=0.7, top_k=40, max_tokens=tokens), stream="step"))

    run(24)
    short, long = (seconds(options.device, lambda: run(tokens)) for tokens in (8, 24))  # noqa: B023
    facts: dict[str, Any] = {"size": size, "rows": len(owed), "ms_a_step": round((long - short) / 16 * 1e3, 2)}
    if not is_cuda(options.device):
        return Line(f"{size}: a step of {len(owed)} rows: {facts['ms_a_step']} ms", facts)
    (busy, kernels, launches), (more, most, last) = (_profiled(lambda: run(tokens)) for tokens in (8, 24))  # noqa: B023
    facts |= {
        "gpu_ms_a_step": round((more - busy) / 16, 2),
        "kernels_a_step": round((most - kernels) / 16),
        "launches_a_step": round((last - launches) / 16),
    }
    text = f"{facts['gpu_ms_a_step']} ms of GPU, {facts['kernels_a_step']} kernels, {facts['launches_a_step']} launches"
    return Line(f"{size}: a step of {len(owed)} rows: {facts['ms_a_step']} ms, {text}", facts)


def _profiled(run: Any) -> tuple[float, int, int]:
    """Milliseconds that the GPU worked, kernels and copies that it ran, and calls that launched one, or a graph of many."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [(e.key, getattr(e, "self_device_time_total", 0), e.count) for e in profile.key_averages()]
    busy = [(time, count) for _, time, count in events if time > 0]
    launches = sum(count for key, _, count in events if "Launch" in key)
    return sum(time for time, _ in busy) / 1e3, sum(count for _, count in busy), launches


# --- training -----------------------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """One optimiser step: problems x solutions of about `tokens`, behind `shared` tokens."""

    problems: int
    solutions: int
    shared: int
    tokens: int
    question: int = 80
    recomputed: bool = False


TRAINING = {
    "few-shot": Training(16, 4, 600, 256),
    "zero-shot": Training(16, 4, 40, 256),
    "long": Training(4, 2, 40, 4096, recomputed=True),
}
TINY = {
    "few-shot": Training(4, 2, 70, 20, 10),
    "zero-shot": Training(4, 2, 10, 20, 10),
    "long": Training(2, 2, 10, 90, 10, True),
}


def training(options: Options, shape: str) -> Iterator[Line]:
    """Target tokens per second of a step's forward and backward passes, weights in float32, arithmetic in bfloat16."""
    size, plan = ("tiny", TINY[shape]) if options.tiny else ("1.5b", TRAINING[shape])
    vocabulary = SIZES[size]["vocab_size"]
    prompts = random_prompts(vocabulary, plan.problems, shared=plan.shared, question=plan.question)
    examples = random_examples(vocabulary, prompts, plan.solutions, plan.tokens)
    targets = sum(len(example.completion_ids) for example in examples)
    facts: dict[str, Any] = {"size": size, "shape": shape, "examples": len(examples), "targets": targets}
    row = rows_speed(options, size, examples, recomputed=plan.recomputed)
    text = f"{size} {shape}: rows: {row.speed:,.0f} target tokens/s, {row.peak_gb:.1f} GB"
    yield Line(text, {**facts, "who": "rows", "target_tokens_s": round(row.speed), "peak_gb": round(row.peak_gb, 1)})
    tree = tree_speed(options, size, examples, recomputed=plan.recomputed)
    times = tree.speed / row.speed
    text = f"{size} {shape}: tree: {tree.speed:,.0f} target tokens/s, {times:.2f} times rows, {tree.peak_gb:.1f} GB"
    found = {"target_tokens_s": round(tree.speed), "times_rows": round(times, 2)}
    yield Line(
        f"{text}; first step {tree.first:.1f} s, optimiser {1e3 * tree.optimise:.0f} ms",
        {
            **facts,
            "who": "tree",
            **found,
            "peak_gb": round(tree.peak_gb, 1),
            "first_s": round(tree.first, 2),
            "optimise_s": round(tree.optimise, 3),
            "same_loss": abs(tree.loss - row.loss) < 0.02 * abs(row.loss),
        },
    )


class Trained(NamedTuple):
    speed: float
    peak_gb: float
    loss: float
    first: float = 0.0
    optimise: float = 0.0


def session_of(options: Options, size: str, settings: ImproveConfig) -> Any:
    """What `restem run` trains with, on a model of random weights."""
    from restem.models import compute_dtype
    from restem.training import TreeTrainer
    from restem.training.session import Session

    dtype = compute_dtype("bfloat16" if is_cuda(options.device) else "float32", options.device, training=True)
    return Session(
        stored_model(size, options),
        settings,
        device=options.device,
        dtype=dtype,
        trust_remote_code=False,
        processes=TreeTrainer(settings).processes,
        stream="benchmark",
    )


def tree_speed(options: Options, size: str, examples: list[Example], *, recomputed: bool) -> Trained:
    """Three steps; the second and third count, the first has to compile."""
    free_memory(options.device)
    session = session_of(options, size, ImproveConfig(gradient_checkpointing=recomputed))
    free_memory(options.device)
    steps = [session.step(examples, 1e-9) for _ in range(3)]
    passes = [step["parts"]["forward"] + step["parts"]["backward"] for step in steps]
    targets = sum(len(example.completion_ids) for example in examples)
    return Trained(
        2 * targets / sum(passes[1:]), peak_gb(options.device), steps[0]["loss"], passes[0], steps[-1]["parts"]["optimise"]
    )


def rows_speed(options: Options, size: str, examples: list[Example], *, recomputed: bool) -> Trained:
    """Plain transformers: one sequence per row, sorted by length, batches of about 8,000 tokens, logits at the targets only."""
    free_memory(options.device)
    model = random_model(size, options.device, torch.bfloat16).float()
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # where transformers recomputes; these models have no dropout
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as after a first step
    ordered = sorted(examples, key=lambda e: -len(e.prompt_ids) - len(e.completion_ids))
    batch = max(1, 8192 // (len(ordered[0].prompt_ids) + len(ordered[0].completion_ids)))
    targets = sum(len(example.completion_ids) for example in examples)

    def run() -> float:
        parts = [ordered[first : first + batch] for first in range(0, len(ordered), batch)]
        return sum(_row_step(model, part, targets, is_cuda(options.device)) for part in parts)

    losses = [run()]
    took = seconds(options.device, lambda: losses.append(run()), 2)
    return Trained(targets / took, peak_gb(options.device), losses[0])


def _row_step(model: Any, part: list[Example], targets: int, lower: bool) -> float:
    device = model.device
    texts = [[*example.prompt_ids, *example.completion_ids] for example in part]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=lower):
        hidden_RTH = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        picked = [
            h[len(e.prompt_ids) - 1 : len(e.prompt_ids) + len(e.completion_ids) - 1]
            for h, e in zip(hidden_RTH, part, strict=True)
        ]
        wanted = torch.tensor([token for example in part for token in example.completion_ids], device=device)
        chunks = zip(torch.cat(picked).split(2048), wanted.split(2048), strict=True)
        head = model.get_output_embeddings()
        nll = sum(nn.functional.cross_entropy(head(h).float(), w, reduction="sum") for h, w in chunks)
    loss = torch.as_tensor(nll) / targets
    loss.backward()
    return loss.item()
