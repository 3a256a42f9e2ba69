"""Sampler, training step and likelihoods on a device that is not the CPU: the same results, and what it is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import tiny_models
from plain_flex import flex_as_one_launch
from pretend_gpu import Counts, PretendGPU, PretendTensor, pretend_gpu
from restem.compatibility import tree_attention
from restem.sampling import Decoding, Owed, TreeSampler
from restem.sampling.deck_flight import DeckFlight
from restem.training.batches import make_packs, shared_prompt
from restem.training.loss import PackLoss, SharedPrompt, log_likelihoods
from restem.types import Problem
from test_tree_trainer import SOME
from tiny_models import few_shot, one_thread, problems  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

DECODINGS = [
    Decoding(temperature=0.7, top_k=40, max_tokens=6),
    Decoding(top_p=0.95, max_tokens=6),
    Decoding(min_p=0.1, max_tokens=6),
    Decoding(max_tokens=6),
    Decoding(temperature=0, max_tokens=6),
]


def draw(model: Any, decoding: Decoding, stage: Sequence[Problem] = problems(3)) -> dict[tuple[str, int], tuple[int, ...]]:
    owed = [Owed(problem.id, index) for problem in stage for index in range(3)]
    samples = TreeSampler(model, few_shot(), rows=16).sample(stage, owed, decoding, stream="s")
    return {(sample.problem_id, sample.index): sample.token_ids for sample in samples}


def train(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """One optimiser step, as a session takes it; the gradients."""
    loss, optimiser = PackLoss(model, dtype), torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with tree_attention(model):
        shared = SharedPrompt(loss, shared_prompt(SOME))
        for pack in make_packs(SOME, "sum", 64, is_apart=True):
            loss(pack, shared.before).weighted.backward()
        shared.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def distance(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> float:
    squares = sum((found[name].inner - expected[name]).double().square().sum() for name in expected)
    return float((squares / sum(x.double().square().sum() for x in expected.values())).sqrt())


# --- the device itself ------------------------------------------------------------------------------------------------------


def test_tensors_of_two_devices_do_not_mix() -> None:
    with pretend_gpu() as gpu:
        there = torch.ones(3, device=gpu.device)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number may come from anywhere


def test_launches_copies_and_waits_are_counted() -> None:
    with pretend_gpu() as gpu:
        with gpu.counting() as counts:
            x = torch.tensor([3.0, 1.0, 2.0], device=gpu.device)
            y = (x.view(3, 1).T @ x + 1).exp()
            y.cpu(), x[x > 1], x[[0, 2]], float(y)
        assert counts.launches == {"mv": 1, "add": 1, "exp": 1, "gt": 1, "index": 2}
        assert (counts.to_device, counts.from_device) == (2, 2)  # the numbers, and a list as index
        assert counts.waits == {"from the device": 1, "index by a mask": 1, "_local_scalar_dense": 1}


def test_memory_that_was_there_before_is_told_from_memory_that_is_new() -> None:
    with pretend_gpu() as gpu:
        x, unused = torch.ones(3, device=gpu.device), torch.ones(3, device=gpu.device)
        with gpu.watching() as addresses:
            (x + 1).mul_(2)[1:].sum()
        assert isinstance(x, PretendTensor) and addresses == {x.inner.data_ptr()} and unused is not x


def test_autocast_follows_the_rules_of_cuda() -> None:
    with pretend_gpu() as gpu, torch.autocast(gpu.device.type, torch.bfloat16):
        x = torch.ones(3, 3, device=gpu.device)
        product = x @ x
        assert (product.dtype, torch.softmax(product, -1).dtype) == (torch.bfloat16, torch.float32)


def test_one_function_can_count_as_one_kernel() -> None:
    """Forward and backward, with the same gradients."""
    expected = train(tiny_models.tiny())
    with pretend_gpu() as gpu:
        model = gpu.place(tiny_models.tiny())
        with gpu.counting() as counts, flex_as_one_launch(gpu):
            found = train(model)
        packs = len(make_packs(SOME, "sum", 64, is_apart=True))
        layers = model.config.num_hidden_layers
        assert counts.launches["attention"] == (packs + 1) * layers
        # Nothing reads what the last layer makes of the shared prompt; its keys and values do not pass here.
        assert counts.launches["attention backward"] == (packs + 1) * layers - 1
        assert distance(found, expected) < 2e-5


# --- what a decoding step asks of the device --------------------------------------------------------------------------------


def counted(gpu: PretendGPU, method: str, decoding: Decoding, *, model: str = "llama", stage: int = 3) -> list[Counts]:
    """The counts of each call of a method of `DeckFlight`, while a stage of so many problems is drawn."""
    found: list[Counts] = []
    own = getattr(DeckFlight, method)

    def called(flight: DeckFlight) -> Any:
        with gpu.counting() as counts:
            answer = own(flight)
        found.append(counts)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeckFlight, method, called)
        draw(gpu.place(tiny_models.tiny(model)), decoding, problems(stage))
    return found


@pytest.mark.parametrize("decoding", DECODINGS, ids=str)
def test_a_step_takes_one_copy_there_and_one_back_and_waits_for_nothing_else(decoding: Decoding) -> None:
    with pretend_gpu() as gpu:
        for counts in counted(gpu, "_step", decoding):
            assert (counts.to_device, counts.from_device) == (1, 1)
            assert counts.waits == {"from the device": 1}


def test_a_step_launches_58_operations_a_layer_and_as_many_besides() -> None:
    """Where steps cannot be recorded. 25 a layer are attention's, whatever the rows' lengths."""
    with pretend_gpu() as gpu:
        three, two = (counted(gpu, "_step", DECODINGS[0], model=name)[-1].launches.total() for name in ("llama", "llama-tied"))
        assert three - two == 58
        assert two - 2 * 58 < 70


@pytest.mark.parametrize("stage", [2, 5])
def test_admitting_problems_takes_four_copies_whatever_their_number_and_waits_for_nothing(stage: int) -> None:
    """Their tokens, positions, who sees whom, and where their keys are kept."""
    with pretend_gpu() as gpu:
        first, *later = counted(gpu, "_admit", DECODINGS[0], stage=stage)
        assert (first.to_device, first.from_device, first.waits) == (4, 0, {})
        assert not any(counts.launches for counts in later)


@pytest.mark.parametrize("decoding", DECODINGS[:2], ids=str)
def test_a_step_of_a_size_touches_the_same_memory_each_time(decoding: Decoding) -> None:
    """What a recorded step relies on: whatever was there before the step lies where it lay."""
    touched: list[set[int]] = []
    with pretend_gpu() as gpu:

        def record(step: Callable[[], None]) -> Callable[[], None]:
            sets: list[set[int]] = []
            touched.append(set())

            def replay() -> None:
                with gpu.watching() as addresses:
                    step()
                sets.append(set(addresses))
                assert sets[0] == sets[-1]
                touched[-1] |= addresses

            return replay

        stage = problems(3)
        sampler = TreeSampler(gpu.place(tiny_models.tiny()), few_shot(), rows=16)
        sampler.record = record
        owed = [Owed(problem.id, index) for problem in stage for index in range(3)]
        assert len(list(sampler.sample(stage, owed, decoding, stream="s"))) == 9
    assert touched and all(touched)


# --- the same results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", DECODINGS, ids=str)
def test_samples_are_those_of_the_cpu(decoding: Decoding) -> None:
    expected = draw(tiny_models.tiny(), decoding)
    with pretend_gpu() as gpu:
        assert draw(gpu.place(tiny_models.tiny()), decoding) == expected


def test_gradients_are_those_of_the_cpu() -> None:
    expected = train(tiny_models.tiny())
    with pretend_gpu() as gpu:
        assert distance(train(gpu.place(tiny_models.tiny())), expected) < 2e-5


def test_likelihoods_are_those_of_the_cpu() -> None:
    expected = log_likelihoods(tiny_models.tiny(), SOME, budget=64)
    with pretend_gpu() as gpu:
        assert log_likelihoods(gpu.place(tiny_models.tiny()), SOME, budget=64) == pytest.approx(expected, rel=1e-5)
