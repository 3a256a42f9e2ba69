"""A sampler for models that the tree cannot serve: transformers' own `generate`, one problem at a time.

It draws what the tree sampler would: the same truncation, the same random numbers, the same stops, so that a sample depends on
its stream, problem and index alone. All rows of a batch have one prompt, so nothing is ever padded. It is slow: every row
computes its whole prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from restem.models import end_ids
from restem.prompts import Renderer
from restem.sampling import Decoding, Owed, by_problem, check_lengths, uniforms
from restem.sampling.decoding import choose
from restem.sampling.finish import Finisher
from restem.types import Problem, Sample


class GenerateSampler:
    """See `restem.sampling.Sampler` for the contract of `sample`. `model`: decoder-only, or an encoder-decoder, whose encoder
    then reads the prompt. `rows`: samples computed at once."""

    def __init__(self, model: Any, renderer: Renderer, *, rows: int | None = None) -> None:
        self.model, self.renderer, self.rows = model.eval(), renderer, rows or 32
        self.end_ids = end_ids(model, renderer)
        self.context = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)

    def sample(self, problems: Sequence[Problem], owed: Iterable[Owed], decoding: Decoding, *, stream: str) -> Iterator[Sample]:
        prompts = {problem.id: self.renderer.encode(problem) for problem in problems}
        check_lengths(prompts, self.context)
        for name, indices in by_problem(owed).items():
            for start in range(0, len(indices), self.rows):
                batch = [Owed(name, index) for index in indices[start : start + self.rows]]
                yield from self._draw(prompts[name], batch, decoding, stream)

    @torch.inference_mode()
    def _draw(self, prompt: tuple[int, ...], batch: list[Owed], decoding: Decoding, stream: str) -> list[Sample]:
        from transformers import GenerationConfig

        limit = decoding.max_tokens
        if not self.model.config.is_encoder_decoder:
            limit = min(limit, self.context - len(prompt))
        draws = _Draws(self, batch, decoding, stream, limit)
        ids = torch.tensor([prompt] * len(batch), device=self.model.device)
        start = getattr(self.model.generation_config, "decoder_start_token_id", None)
        settings = GenerationConfig(max_new_tokens=limit, do_sample=False, pad_token_id=0, decoder_start_token_id=start)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=[draws.choose],
            stopping_criteria=[draws.ended],
        )
        return [draws.sample(row, owed) for row, owed in enumerate(batch)]


class _Draws:
    """The tokens of one batch, drawn inside `generate`: as a logits processor that leaves one token each to choose from."""

    def __init__(self, sampler: GenerateSampler, batch: list[Owed], decoding: Decoding, stream: str, limit: int) -> None:
        self.sampler, self.decoding, self.limit = sampler, decoding, limit
        self.finisher = Finisher(sampler.renderer, decoding.stop)
        self.uniform_RT = torch.stack([torch.from_numpy(uniforms(stream, owed, limit)) for owed in batch])
        self.tokens: list[list[int]] = [[] for _ in batch]
        self.logprobs = [0.0] * len(batch)
        self.finish: list[str | None] = [None] * len(batch)
        self.step = 0

    def choose(self, ids: Tensor, logits_RV: Tensor) -> Tensor:
        uniform_R = self.uniform_RT[:, self.step].to(logits_RV.device)
        token_R, logprob_R = choose(logits_RV, uniform_R, self.decoding)
        self.step += 1
        for row, (token, logprob) in enumerate(zip(token_R.tolist(), logprob_R.tolist(), strict=True)):
            if self.finish[row] is not None:
                continue
            self.logprobs[row] += logprob
            if token in self.sampler.end_ids:
                self.finish[row] = "stop"
                continue
            self.tokens[row].append(token)
            if self.finisher.stops(self.tokens[row]):
                self.finish[row] = "stop"
            elif len(self.tokens[row]) >= self.limit:
                self.finish[row] = "length"
        return torch.full_like(logits_RV, float("-inf")).scatter_(1, token_R[:, None], 0.0)

    def ended(self, ids: Tensor, logits: Any, **_: Any) -> Tensor:
        return torch.tensor([finish is not None for finish in self.finish], device=ids.device)

    def sample(self, row: int, owed: Owed) -> Sample:
        token_ids, text = self.finisher.close(self.tokens[row])
        return Sample(
            problem_id=owed.problem_id,
            index=owed.index,
            token_ids=tuple(token_ids),
            text=text,
            finish="stop" if self.finish[row] == "stop" else "length",
            logprob=self.logprobs[row],
        )
