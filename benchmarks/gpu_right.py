"""Is it right on this device? Tokens against `generate` on the CPU, and every use of the tree against float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers

from benchmarks.gpu_models import FAMILIES, Ids, Line, Options, is_cuda, random_prompts
from restem.miniature import miniature, miniature_config
from restem.sampling import Decoding, Owed, TreeSampler
from restem.trial import Finding, Formats, trial

GREEDY, PAPER = Decoding(temperature=0.0, max_tokens=16), Decoding(temperature=0.7, top_k=40, max_tokens=16)
Key = tuple[str, int]


def families(options: Options) -> list[str]:
    return ["llama", "gemma2, windows and caps"] if options.tiny else list(FAMILIES)


def config_of(family: str) -> Any:
    kind, settings = FAMILIES[family]
    return miniature_config(getattr(transformers, kind)(**settings))


def parity(options: Options) -> Iterator[Line]:
    """In float32, greedy tokens are those of `generate` on the CPU, and samples are the CPU's, with and without a prefix."""
    torch.set_num_threads(1)
    for family in families(options):
        facts: dict[str, Any] = {"family": family}
        for kind, shared in (("with a prefix", 70), ("without", 0)):
            prompts = random_prompts(512, 6, shared=shared, question=9)
            here, there = miniature(config_of(family), "cpu"), miniature(config_of(family), "cpu").to(options.device)
            for model in (here, there):
                model.generation_config.eos_token_id = None
            expected = {name: _generated(here, prompt) for name, prompt in prompts.items()}
            greedy = _drawn(there, prompts, GREEDY)
            facts[f"greedy wrong, {kind}"] = sum(tokens != expected[name] for (name, _), tokens in greedy.items())
            own, other = _drawn(here, prompts, PAPER), _drawn(there, prompts, PAPER)
            facts[f"samples that differ, {kind}"] = sum(own[key] != other[key] for key in own)
        wrong = sum(value for key, value in facts.items() if key != "family")
        yield Line(f"{family}: {'all equal' if not wrong else facts}, of {4 * len(greedy)}", {**facts, "of": len(greedy)})


def _generated(model: Any, prompt: tuple[int, ...]) -> tuple[int, ...]:
    ids = torch.tensor([prompt], device=model.device)
    settings = {"max_new_tokens": GREEDY.max_tokens, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return tuple(out[0, len(prompt) :].tolist())


def _drawn(model: Any, prompts: dict[str, tuple[int, ...]], decoding: Decoding) -> dict[Key, tuple[int, ...]]:
    renderer: Any = Ids(prompts)
    owed = [Owed(name, index) for name in prompts for index in range(4)]
    samples = TreeSampler(model, renderer, rows=16).sample(renderer.stage, owed, decoding, stream="parity")
    return {(sample.problem_id, sample.index): sample.token_ids for sample in samples}


def trials(options: Options, dtype: str) -> Iterator[Line]:
    """Logits of a packed tree, decoding, gradients in a number format: how far from float32, with the model's own pass beside.

    In float16 only sampling: training is in float32 there.
    """
    torch.set_num_threads(1)  # others are tried at the same time
    sampling: torch.dtype = getattr(torch, dtype)
    formats = Formats(sampling, torch.float32 if dtype == "float16" else sampling)
    for family in families(options):
        yield _line(family, trial(miniature(config_of(family), options.device), formats))


def fallback(options: Options) -> Iterator[Line]:
    """The same without FlexAttention, as on a GPU without Triton."""
    from restem import attention_flex

    torch.set_num_threads(1)
    if not is_cuda(options.device):
        yield Line("a CPU computes no FlexAttention: nothing to compare")
        return
    for family in families(options)[::3]:
        model = miniature(config_of(family), options.device)
        attention_flex.refuse(model.device, "the benchmark tries what is there without it")
        yield _line(f"{family}, no Triton", trial(model, Formats(torch.float32, torch.bfloat16)))


def _line(family: str, findings: list[Finding]) -> Line:
    facts: dict[str, Any] = {"family": family}
    for finding in findings:
        keys = ("dtype", "verdict", "error", "own", "reason")
        facts[finding.what] = {key: getattr(finding, key) for key in keys}
    good = all(finding.verdict == "ok" for finding in findings)
    text = ", ".join(f"{f.what} {f.reason if f.error is None else f'{f.error:.1e} (own {f.own:.1e})'}" for f in findings)
    formats = "/".join(dict.fromkeys(finding.dtype for finding in findings))
    return Line(f"{family}, {formats}: {'ok' if good else 'WRONG'}: {text}", {**facts, "ok": good})
