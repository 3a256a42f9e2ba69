"""The tree trainer: fine-tuning on packed trees, one copy of the prefix and of each problem for all its solutions.

There is no dropout. Everything needed to go on after a kill is written after every interval and every few minutes, complete or
not at all: a resumed training follows the uninterrupted one, and a kill costs the steps since the last checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from restem.config import ImproveConfig
from restem.errors import RestemError
from restem.memory import keep_freed_memory
from restem.models import context_length
from restem.processes import Processes, of_this_run
from restem.training import Interval, check_examples, checkpoints
from restem.training.batches import Step, plan_steps
from restem.training.processes import TrainingJob
from restem.training.session import Session
from restem.types import Example

_WARM_STEPS = 3  # after so many, a step takes what all further ones will


class TreeTrainer:
    """See `restem.training.Trainer` for the contract. `report(done, total, metrics)` is called after every step.

    `device`: where to train; `dtype`: number format of the arithmetic. `say` is told what is left out.
    """

    def __init__(
        self,
        settings: ImproveConfig,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        report: Callable[[int, int, dict[str, Any]], None] = lambda done, total, metrics: None,
        say: Callable[[str], None] = lambda text: None,
        processes: Processes | None = None,
    ) -> None:
        self.settings, self.device, self.dtype = settings, device, dtype
        self.trust_remote_code, self.report, self.say = trust_remote_code, report, say
        self.processes = processes or of_this_run()
        self._held: tuple[str, Session] | None = None

    def train(self, start: str, examples: Sequence[Example], directory: Path, *, stream: str) -> Iterator[Interval]:
        check_examples(examples)
        fitting = self._fitting(start, examples)
        steps = plan_steps(fitting, self.settings, stream=stream)
        done = 0
        for interval in _complete_intervals(directory):
            yield interval
            done = interval.number
        if done >= max((step.interval or 0 for step in steps), default=0):
            return
        settings = {name: getattr(self, name) for name in ("settings", "device", "dtype", "trust_remote_code")}
        job = {"start": start, "steps": steps, "directory": directory, "done": done, "stream": stream}
        self.processes.send(TrainingJob(settings, job))
        yield from self.follow(start, steps, directory, done, stream)

    def follow(self, start: str, steps: list[Step], directory: Path, done: int, stream: str) -> Iterator[Interval]:
        """Train from the newest checkpoint on; `done` intervals are complete. Every process runs this."""
        keep_freed_memory()
        session = Session(
            start,
            self.settings,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            processes=self.processes,
            stream=stream,
            say=self.say,
        )
        first, history = self.processes.tell(checkpoints.newest(directory)), []
        if first:
            history = checkpoints.restore(directory, first, session.model, session.optimiser)
            session.budget.go_on_with(history[-1].get("pack_tokens"))
        else:
            intervals = sum(step.interval is not None for step in steps)
            checkpoints.check_disk(directory, session.model, intervals, session.storage)
        killed_between = first and (steps[first - 1].interval or 0) > done  # checkpoint and interval
        if killed_between and not (yield from self._hand_over(session, directory, steps, first, history)):
            return
        written = time.monotonic()
        for number, step in enumerate(steps[first:], start=first + 1):
            metrics = session.step(step.examples, self.learning_rate(number - 1, len(steps)))
            self._check(session, number, metrics, ends_interval=step.interval is not None)
            history.append(metrics)
            self.report(number, len(steps), metrics)
            if number == first + _WARM_STEPS:
                session.compile_if_worth(metrics["seconds"] * (len(steps) - number))
            is_due = time.monotonic() - written >= 60 * self.settings.checkpoint_minutes
            if number < len(steps) and (step.interval is not None or self.processes.tell(is_due)):
                is_main = self.processes.is_main
                checkpoints.write(directory, number, session.model, session.optimiser, history, is_main=is_main)
                written = time.monotonic()
            if step.interval is not None and not (yield from self._hand_over(session, directory, steps, number, history)):
                return

    def learning_rate(self, step: int, steps: int) -> float:
        """Peak after a linear warm-up, then constant, or falling to 0 at the end linearly or as a cosine. Steps from 0."""
        warm = math.ceil(self.settings.warmup * steps)
        if step < warm:
            return self.settings.peak_learning_rate * (step + 1) / warm
        share = (step - warm) / max(1, steps - warm)
        falling = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
        return self.settings.peak_learning_rate * falling[self.settings.schedule]

    def loaded(self, model: str, dtype: torch.dtype) -> Any | None:
        """The model of the interval that was handed over last, from memory; None if it is not this directory's."""
        if self._held is None or self._held[0] != model:
            return None
        return self._held[1].for_sampling(dtype)

    def _hand_over(
        self, session: Session, directory: Path, steps: list[Step], done: int, history: checkpoints.History
    ) -> Generator[Interval, None, bool]:
        """Write the interval that step `done` ended, and yield it. Returns, in every process, whether more is asked for."""
        number = steps[done - 1].interval
        assert number is not None
        before = max((n for n, step in enumerate(steps[: done - 1], start=1) if step.interval is not None), default=0)
        metrics = _summary(history[before:], done, len(steps))
        session.free_gradients()  # the sampler of D_val wants the memory
        interval = session.write_interval(directory, number, metrics)
        self._held = (interval.model, session)
        goes_on = False
        try:
            yield interval
            goes_on = True
        finally:
            self._held = None
            goes_on = bool(self.processes.meet(goes_on))  # the others draw samples until then
        return goes_on

    def _check(self, session: Session, number: int, metrics: dict[str, Any], *, ends_interval: bool) -> None:
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])
        if not finite or (ends_interval and not session.is_finite()):
            raise RestemError(
                f"training diverged at step {number}: loss {metrics['loss']}, gradient norm "
                f"{metrics['gradient_norm']}, learning rate {metrics['learning_rate']:g}. Lower improve.learning_rate; the run "
                "can go on from its last interval."
            )

    def _fitting(self, start: str, examples: Sequence[Example]) -> list[Example]:
        """The examples that the model's context holds; names the others."""
        context = context_length(start, trust_remote_code=self.trust_remote_code)
        too_long = [example for example in examples if len(example.prompt_ids) + len(example.completion_ids) > context]
        if too_long:
            names = ", ".join(f"{example.problem_id} #{example.index}" for example in too_long[:10])
            more = f" and {len(too_long) - 10} more" if len(too_long) > 10 else ""
            self.say(
                f"{len(too_long)} of {len(examples)} examples exceed the context of {context} tokens; left out: {names}{more}"
            )
        return [example for example in examples if len(example.prompt_ids) + len(example.completion_ids) <= context]


def _summary(history: checkpoints.History, step: int, steps: int) -> dict[str, Any]:
    """The metrics of an interval: means over its examples or tokens, and where the time went."""
    tokens, seconds = sum(h["target_tokens"] for h in history), sum(h["seconds"] for h in history)
    parts = {part for h in history for part in h["parts"]}
    return {
        "step": step,
        "steps": steps,
        "loss": sum(h["loss"] * h["examples"] for h in history) / sum(h["examples"] for h in history),
        "target_logprob": sum(h["target_logprob"] * h["target_tokens"] for h in history) / max(1, tokens),
        "gradient_norm": max(h["gradient_norm"] for h in history),
        "learning_rate": history[-1]["learning_rate"],
        "target_tokens": tokens,
        "seconds": seconds,
        "target_tokens_per_second": tokens / seconds,
        "share_of_seconds": {part: sum(h["parts"].get(part, 0.0) for h in history) / seconds for part in sorted(parts)},
        "history": history,
    }


def _complete_intervals(directory: Path) -> Iterator[Interval]:
    number = 1
    while (metrics := directory / f"interval-{number}" / "metrics.json").is_file():
        model = str(directory / f"interval-{number}" / "model")
        yield Interval(number=number, model=model, metrics=json.loads(metrics.read_text(encoding="utf-8")))
        number += 1
