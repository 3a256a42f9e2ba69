"""A sampler for models that the tree cannot serve: transformers' own `generate`, one problem at a time.

It draws what the tree sampler would: the same truncation, the same random numbers, the same stops, so that a sample depends on
its stream, problem and index alone. All rows of a batch have one prompt, so nothing is ever padded. It is slow: every row
computes its whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from restem.errors import RestemError
from restem.memory import is_out_of_memory
from restem.models import end_ids
from restem.prompts import Renderer
from restem.sampling import Decoding, Owed, by_problem, check_lengths, uniforms
from restem.sampling.decoding import choose
from restem.sampling.finish import Finisher
from restem.types import Problem, Sample


class GenerateSampler:
    """See `restem.sampling.Sampler` for the contract of `sample`. `model`: decoder-only, or an encoder-decoder, whose encoder
    then reads the prompt. `rows`: samples computed at once, halved when memory runs out; `say` is told then."""

    def __init__(
        self, model: Any, renderer: Renderer, *, rows: int | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.model, self.renderer, self.rows, self.say = model.eval(), renderer, rows or 32, say
        self.end_ids = end_ids(model, renderer)
        self.context = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)

    def sample(self, problems: Sequence[Problem], owed: Iterable[Owed], decoding: Decoding, *, stream: str) -> Iterator[Sample]:
        prompts = {problem.id: self.renderer.encode(problem) for problem in problems}
        check_lengths(prompts, self.context)
        for name, indices in by_problem(owed).items():
            while indices:
                batch = [Owed(name, index) for index in indices[: self.rows]]
                try:
                    samples = self._draw(prompts[name], batch, decoding, stream)
                except RuntimeError as error:
                    self.rows = self._fewer_rows(error, len(batch))
                    continue  # the same samples again: they come out the same in a smaller batch
                yield from samples
                indices = indices[len(batch) :]

    def _fewer_rows(self, error: RuntimeError, rows: int) -> int:
        """Half the rows that were computed when memory ran out; any other error goes on its way."""
        if not is_out_of_memory(error):
            raise error
        if rows == 1:
            raise RestemError(
                "memory is not enough for a single sample. Lower generate.max_tokens, use fewer exemplars (prompt.shots), or "
                "free memory on this device."
            ) from error
        error.__traceback__ = None  # it holds the frames that hold the tensors
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"out of memory with {rows} samples at once; going on with {rows // 2}")
        return rows // 2

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
