"""The tree trainer: full fine-tuning on packed trees, one copy of the prefix and of each problem for all its solutions.

Weights and optimiser stay in float32; the arithmetic may be bfloat16. There is no dropout. Everything needed to go on after a
kill is written after every interval, complete or not at all; between intervals a kill costs the steps since the last one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from restem.attention import AttentionPlan, PackAttention
from restem.compatibility import refuse_unsupported, tree_attention
from restem.config import ImproveConfig
from restem.errors import RestemError
from restem.files import finish_directory, remove_directory
from restem.memory import keep_freed_memory
from restem.models import load_model, load_tokenizer, logits_of, save_model, storage_dtype
from restem.training import Interval, check_examples
from restem.training.batches import Pack, Step, make_packs, plan_steps
from restem.types import Example

_CHUNK = 512  # targets whose logits are in memory at once


class TreeTrainer:
    """See `restem.training.Trainer` for the contract. `report(done, total, metrics)` is called after every step."""

    def __init__(
        self,
        settings: ImproveConfig,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        report: Callable[[int, int, dict[str, float]], None] = lambda done, total, metrics: None,
    ) -> None:
        self.settings, self.device, self.dtype, self.report = settings, device, dtype, report
        self.trust_remote_code = trust_remote_code

    def train(self, start: str, examples: Sequence[Example], directory: Path, *, stream: str) -> Iterator[Interval]:
        check_examples(examples)
        keep_freed_memory()
        steps = plan_steps(examples, self.settings, stream=stream)
        done = 0
        for interval in _complete_intervals(directory):
            yield interval
            done = interval.number
        last = max((step.interval or 0 for step in steps), default=0)
        if done >= last:
            return
        model = load_model(start, dtype=torch.float32, device=self.device, trust_remote_code=self.trust_remote_code)
        refuse_unsupported(model)
        tokenizer = load_tokenizer(start, trust_remote_code=self.trust_remote_code)
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay, fused=True
        )
        first = 0
        if done:
            _restore(directory / f"state-{done}", model, optimiser)
            first = next(number for number, step in enumerate(steps) if step.interval == done) + 1
        yield from self._intervals(model, tokenizer, optimiser, steps, first, directory, storage_dtype(start))

    def _intervals(
        self, model: Any, tokenizer: Any, optimiser: Any, steps: list[Step], first: int, directory: Path, storage: Any
    ) -> Iterator[Interval]:
        history: list[dict[str, float]] = []
        for number, step in enumerate(steps[first:], start=first):
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate(number, len(steps))
            history.append(self._step(model, optimiser, step, number))
            self.report(number + 1, len(steps), history[-1])
            if step.interval is not None:
                metrics = _summary(history, number + 1, len(steps))
                if number + 1 < len(steps):  # nothing goes on from the last one
                    _write_state(directory / f"state-{step.interval}", model, optimiser)
                yield _write(directory, step.interval, model, tokenizer, storage, metrics)
                history = []

    def learning_rate(self, step: int, steps: int) -> float:
        """Peak after a linear warm-up, then constant, or falling to 0 at the end linearly or as a cosine. Steps from 0."""
        warm = math.ceil(self.settings.warmup * steps)
        if step < warm:
            return self.settings.learning_rate * (step + 1) / warm
        share = (step - warm) / max(1, steps - warm)
        falling = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
        return self.settings.learning_rate * falling[self.settings.schedule]

    def _step(self, model: Any, optimiser: Any, step: Step, number: int) -> dict[str, float]:
        began = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        loss, targets = 0.0, 0
        with tree_attention(model):
            for pack in make_packs(step.examples, self.settings.objective, self.settings.pack_tokens):
                part = self.loss(model, pack)
                part.backward()
                loss += part.item()
                targets += len(pack.targets)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), self.settings.clip))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            optimiser.step()
            finite = step.interval is None or all(bool(p.isfinite().all()) for p in model.parameters())
        if not finite:
            raise RestemError(
                f"training diverged at step {number + 1}: loss {loss}, gradient norm {norm}, learning rate "
                f"{self.settings.learning_rate}. Lower improve.learning_rate; the run can go on from its last interval."
            )
        return {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": optimiser.param_groups[0]["lr"],
            "examples": len(step.examples),
            "target_tokens": targets,
            "seconds": time.perf_counter() - began,
        }

    def loss(self, model: Any, pack: Pack) -> Tensor:
        """The weighted negative log-likelihood of a pack's target tokens. Call it inside `tree_attention(model)`."""
        with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = model.base_model(
                input_ids=self._tensor([pack.tree.tokens]),
                position_ids=self._tensor([pack.tree.positions]),
                use_cache=False,
                tree=PackAttention(AttentionPlan.of(pack.tree, self.device)),
            ).last_hidden_state[0, self._tensor(pack.sources)]
            targets = self._tensor(pack.targets)
            weights = torch.tensor(pack.weights, dtype=torch.float32, device=self.device)
            parts = [
                checkpoint(_weighted_nll, model, *chunk, use_reentrant=False)
                for chunk in zip(hidden.split(_CHUNK), targets.split(_CHUNK), weights.split(_CHUNK), strict=True)
            ]
        return torch.stack(parts).sum()

    def _tensor(self, rows: Any) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.device)


def _weighted_nll(model: Any, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    nll = torch.nn.functional.cross_entropy(logits_of(model, hidden).float(), targets, reduction="none")
    return (nll * weights).sum()


def _summary(history: list[dict[str, float]], step: int, steps: int) -> dict[str, Any]:
    tokens, seconds = sum(h["target_tokens"] for h in history), sum(h["seconds"] for h in history)
    return {
        "step": step,
        "steps": steps,
        "loss": sum(h["loss"] * h["examples"] for h in history) / sum(h["examples"] for h in history),
        "gradient_norm": max(h["gradient_norm"] for h in history),
        "learning_rate": history[-1]["learning_rate"],
        "target_tokens": tokens,
        "seconds": seconds,
        "target_tokens_per_second": tokens / seconds,
        "history": history,
    }


def _complete_intervals(directory: Path) -> Iterator[Interval]:
    number = 1
    while (metrics := directory / f"interval-{number}" / "metrics.json").is_file():
        model = str(directory / f"interval-{number}" / "model")
        yield Interval(number=number, model=model, metrics=json.loads(metrics.read_text(encoding="utf-8")))
        number += 1


def _write_state(path: Path, model: Any, optimiser: Any) -> None:
    """What training goes on from. Written before the interval: whoever sees an interval finds the state behind it."""
    from safetensors.torch import save_file

    state = {f"weights/{name}": tensor for name, tensor in _unshared(model)}
    for index, values in optimiser.state_dict()["state"].items():
        state.update({f"optimiser/{index}/{key}": value for key, value in values.items()})
    with finish_directory(path) as folder:
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, folder / "state.safetensors")


def _write(directory: Path, number: int, model: Any, tokenizer: Any, storage: Any, metrics: dict[str, Any]) -> Interval:
    with finish_directory(directory / f"interval-{number}") as folder:
        save_model(model, tokenizer, folder / "model", dtype=storage)
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    remove_directory(directory / f"state-{number - 1}")
    return Interval(number=number, model=str(directory / f"interval-{number}" / "model"), metrics=metrics)


def _restore(folder: Path, model: Any, optimiser: Any) -> None:
    from safetensors.torch import load_file

    state = load_file(folder / "state.safetensors")
    with torch.no_grad():
        for name, tensor in _unshared(model):
            tensor.copy_(state[f"weights/{name}"])
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("optimiser/"):
            _, index, key = name.split("/")
            values.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": values})


def _unshared(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; tied weights once."""
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield name, tensor
