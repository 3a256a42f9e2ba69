"""A model being trained: loaded, spread over processes, stepped, saved. What to train on, and when to stop, is not its
business.

The one thing a newcomer would get wrong: `model` is always the transformers model. With LoRA its linear layers hold the
adapter, and `adapted` is peft's view of the same layers.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from restem.compatibility import own_logits, refuse_unsupported, tree_attention
from restem.config import ImproveConfig
from restem.files import finish_directory
from restem.memory import is_out_of_memory
from restem.models import load_model, load_tokenizer, save_model, storage_dtype
from restem.processes import Processes
from restem.training import Interval, checkpoints, fused, lora, optimiser
from restem.training.batches import Pack, make_packs, shared_prompt
from restem.training.budget import PackBudget
from restem.training.clock import Clock
from restem.training.loss import Losses, PackLoss, SharedPrompt
from restem.training.processes import empty_model, fill, gathered, layers, shard, whole, whole_pass, with_stand_ins
from restem.types import Example


class Session:
    """A model and its optimiser. `start`: the model's directory; `dtype`: number format of the arithmetic."""

    def __init__(
        self,
        start: str,
        settings: ImproveConfig,
        *,
        device: str,
        dtype: torch.dtype,
        trust_remote_code: bool,
        processes: Processes,
        stream: str,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.settings, self.processes, self.say = settings, processes, say
        self.start, self.trust_remote_code = start, trust_remote_code
        self.storage = storage_dtype(start)
        self.tokenizer = load_tokenizer(start, trust_remote_code=trust_remote_code)
        self.is_sharded = processes.count > 1 and settings.parallel == "shard"
        self._open(processes.device(device), dtype, stream)
        self.optimiser = optimiser.make(self.model.parameters(), settings)

    def _open(self, device: str, dtype: torch.dtype, stream: str) -> None:
        """The model, its adapter, and the loss: loaded whole, or spread over all processes without being whole anywhere."""
        weights, trust = getattr(torch, self.settings.weights), self.trust_remote_code
        attach = partial(lora.attach, settings=self.settings, stream=stream) if self.settings.lora_rank else lambda model: None
        if self.is_sharded:
            self.model = empty_model(self.start, dtype=weights, trust_remote_code=trust)
            self.adapted = with_stand_ins(self.model, attach)
        else:
            # Frozen weights are made light before they reach the device, which may not hold them as they are.
            first = "cpu" if self.settings.lora_rank else device
            self.model = load_model(self.start, dtype=weights, device=first, trust_remote_code=trust)
            self.adapted = attach(self.model)
            if self.adapted is not None:
                lora.lighten(self.model, dtype)
                self.model.to(device)
            refuse_unsupported(self.model)
        if self.settings.gradient_checkpointing:
            _recompute(self.model)
        self.loss = PackLoss(self.model, dtype)
        self.budget = PackBudget(self.settings, torch.device(device))
        if self.is_sharded:
            shard(self.loss, self.model, device, self.processes.count)
            fill(self.model, self.start, device, trust_remote_code=trust, processes=self.processes)
            whole_pass(self.loss, refuse_unsupported)

    def step(self, examples: Sequence[Example], learning_rate: float) -> dict[str, Any]:
        """One optimiser step; returns its metrics. If the loss or the gradient is not finite, no weight is changed.

        If memory runs out in a pass, the step begins again with smaller packs.
        """
        clock = Clock(self.model.device)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        while (sums := self._try_gradient(examples, clock)) is None:
            pass
        with clock("communicate"):
            self.processes.sum_gradients(self.model.parameters())
            loss, nll, targets = self.processes.sum(sums).tolist()
        with clock("optimise"):
            norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)))
            if math.isfinite(loss) and math.isfinite(norm):
                self.optimiser.step()
        self.budget.stepped()
        if self.budget.tokens is not None:
            self.budget.tokens = self.processes.least(self.budget.tokens)  # all pack alike
        return {
            "loss": loss,
            "target_logprob": -nll / max(1.0, targets),  # a step of rewards that are all 0 has none
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            "examples": len(examples),
            "target_tokens": int(targets),
            "pack_tokens": self.budget.tokens,
            "parts": clock.seconds(),
            "seconds": clock.total(),
        }

    def _try_gradient(self, examples: Sequence[Example], clock: Clock) -> Tensor | None:
        """The gradient of a step, in the parameters, and its sums over this process's packs: loss, negative log-likelihood,
        target tokens. None if memory ran out: the packs are smaller the next time."""
        self.optimiser.zero_grad(set_to_none=True)
        size, sums, failed = self.budget.of(examples, is_apart=not self.is_sharded), None, False
        with clock("pack"):
            packs = self._packs(examples, size)
        try:
            sums = self._gradient(examples, packs, clock)
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.is_sharded:  # the others wait in a pass that this one has left
                raise
            failed = True
        if self.processes.sum(torch.tensor(float(failed))) == 0:
            return sums
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        size = min(size, max(len(pack.tree.tokens) for pack in packs))
        self.budget.halve(size)
        self.say(f"out of memory in training with packs of {size} tokens; going on with {size // 2}")
        return None

    def _gradient(self, examples: Sequence[Example], all_packs: list[Pack], clock: Clock) -> Tensor:
        done: list[tuple[Pack, Losses]] = []
        packs = self.processes.share(all_packs)
        self.budget.begin()
        with tree_attention(self.model):
            with clock("forward"):
                shared = SharedPrompt(self.loss, () if self.is_sharded or packs == [None] else shared_prompt(examples))
            for pack in packs:
                if pack is None and not self.is_sharded:
                    continue
                # Where weights are spread, the others wait for this process's part of them.
                pack = _weightless(examples) if pack is None else pack
                with clock("forward"):
                    losses = self.loss(pack, shared.before)
                with clock("backward"):
                    losses.weighted.backward()
                done.append((pack, Losses(losses.weighted.detach(), losses.nll_N)))
            with clock("backward"):
                shared.backward()
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.budget.passed(max((len(pack.tree.tokens) for pack, _ in done), default=1), gradients)
        return _sums(done)

    def compile_if_worth(self, seconds_left: float) -> None:
        """With so much left to train on a GPU, try whether its layers are faster compiled; says what came of it."""
        if self.model.device.type == "cuda" and not self.is_sharded and seconds_left > fused.WORTH_SECONDS:
            self.say(fused.fuse(self.model, self.loss.arithmetic))

    def is_finite(self) -> bool:
        """Whether all weights are. A step with a finite gradient can still overflow them."""
        good = all(bool(whole(p.isfinite().all())) for _, p in checkpoints.trained(self.model))
        return bool(self.processes.sum(torch.tensor(float(not good))) == 0)

    def write_interval(self, directory: Path, number: int, metrics: dict[str, Any]) -> Interval:
        """Write directory/interval-`number`: the model as an ordinary directory, a LoRA adapter beside it, and the metrics.

        Every process calls it; the main one writes.
        """
        path = directory / f"interval-{number}"
        says = whole_pass(self.loss, own_logits) if self.adapted is not None else None
        state = self._stored() if self.is_sharded else None
        if self.processes.is_main:
            with finish_directory(path) as folder:
                model = self.model
                if self.adapted is not None:
                    lora.save(self.adapted, folder / "adapter", state)
                    base = load_model(self.start, dtype=torch.float32, trust_remote_code=self.trust_remote_code)
                    model, metrics["merge_error"] = lora.merged(base, folder / "adapter", says, self.storage)
                    state = None
                save_model(model, self.tokenizer, folder / "model", dtype=self.storage, state=state)
                (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        return Interval(number=number, model=str(path / "model"), metrics=metrics)

    def for_sampling(self, dtype: torch.dtype) -> Any | None:
        """The model as it would be loaded from what `write_interval` wrote; None if its weights are spread, or in an adapter.

        Its tensors are the trained ones themselves where the number formats agree, and its layers are computed once.
        """
        if self.is_sharded or self.adapted is not None:
            return None
        memo: dict[int, Any] = {}
        for parameter in self.model.parameters():
            rounded = parameter.detach().to(self.storage).to(dtype)
            memo[id(parameter)] = nn.Parameter(rounded, requires_grad=False)
        copied = copy.deepcopy(self.model, memo).eval()
        for layer in layers(copied):  # what `_recompute` set stands in the layer itself, before its class's
            vars(layer).pop("forward", None)
        return copied

    def free_gradients(self) -> None:
        """Give back their memory. Every step makes them anew."""
        self.optimiser.zero_grad(set_to_none=True)

    def _stored(self) -> dict[str, torch.Tensor]:
        """What is to be stored of weights that are spread, for the main process: all of them, as they are stored, or the
        adapter's. Tied weights are gathered once, and stay one tensor."""
        if self.adapted is not None:
            own = [(name, weight) for name, weight in self.adapted.named_parameters() if weight.requires_grad]
            return dict(gathered(own, is_main=self.processes.is_main))
        places = {name: weight for name, weight in self.model.state_dict(keep_vars=True).items() if torch.is_tensor(weight)}
        own = [(str(key), weight) for key, weight in {id(weight): weight for weight in places.values()}.items()]
        kept = {key: self._rounded(full) for key, full in gathered(own, is_main=self.processes.is_main)}
        return {name: kept[str(id(weight))] for name, weight in places.items()} if kept else {}

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.storage) if tensor.is_floating_point() else tensor

    def _packs(self, examples: Sequence[Example], size: int) -> list[Pack]:
        """The step's packs, enough of them for every process to have one. With sharded weights each holds the shared part of
        the prompts: FSDP hands out the weights of one forward pass at a time."""
        objective, is_apart = self.settings.objective, not self.is_sharded
        packs = make_packs(examples, objective, size, is_apart=is_apart)
        if len(packs) < self.processes.count:
            targets = sum(len(pack.targets) for pack in packs)
            packs = make_packs(examples, objective, max(64, targets // self.processes.count), is_apart=is_apart)
        return packs


def _sums(done: Sequence[tuple[Pack, Losses]]) -> Tensor:
    """Loss, negative log-likelihood of the targets that count, and their number: read from the device in one copy."""
    if not done:
        return torch.zeros(3, dtype=torch.float64)
    found = torch.cat([*(losses.weighted[None] for _, losses in done), *(losses.nll_N for _, losses in done)]).cpu().double()
    counted = torch.tensor([weight for pack, _ in done for weight in pack.weights]) > 0
    return torch.stack([found[: len(done)].sum(), found[len(done) :][counted].sum(), counted.sum().double()])


def _weightless(examples: Sequence[Example]) -> Pack:
    (pack, *_) = make_packs(examples[:1], "sum", 64)
    pack.weights[:] = [0.0] * len(pack.weights)
    return pack


def _recompute(model: Any) -> None:
    """Keep only what goes into each layer, and compute the layer again in the backward pass.

    Not through the model's own method, which works only in training mode, and that would switch dropout on.
    """
    for layer in layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
