"""On a CUDA device: the same tokens as on a CPU, the gradients of row training, and a way on when memory runs out.

Skipped where there is no such device. `benchmarks/gpu.py` tries more, and measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from restem import models
from restem.backends import HFBackend
from restem.compatibility import tree_attention
from restem.config import ImproveConfig, load_recipe
from restem.errors import RestemError
from restem.prompts import Prompt
from restem.sampling import Decoding, Owed, TreeSampler
from restem.sampling.generate import GenerateSampler
from restem.training import TreeTrainer
from restem.training.batches import make_packs, shared_prompt, token_weights
from restem.training.loss import PackLoss, SharedPrompt, log_likelihoods
from restem.trial import Formats, trial
from restem.types import Example
from tiny_models import END, SERVED, VOCABULARY, bare, few_shot, one_thread, problems, save, tiny  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    pytest.mark.usefixtures("one_thread"),
]

GREEDY, PAPER = Decoding(temperature=0, max_tokens=16), Decoding(temperature=0.7, top_k=40, max_tokens=16)
NAMES = ["llama", "qwen2", "mistral-window", "gemma2", "gemma3", "cohere2", "gpt2"]
"""Full attention, windows, capped scores, both; heads of 8; learned positions."""
Key = tuple[str, int]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RESTEM_CACHE", str(tmp_path / "cache"))
    yield
    torch.cuda.empty_cache()


def drawn(sampler: Any, decoding: Decoding) -> dict[Key, tuple[int, ...]]:
    stage = problems()
    owed = [Owed(problem.id, index) for problem in stage for index in range(3)]
    return {(s.problem_id, s.index): s.token_ids for s in sampler.sample(stage, owed, decoding, stream="run 1")}


@pytest.mark.parametrize("renderer", [few_shot, bare], ids=["a shared prefix", "nothing shared"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_in_float32_are_those_of_the_cpu(name: str, renderer: Any) -> None:
    """Greedy ones and samples; that the CPU's are the model's own is shown elsewhere."""
    for decoding in (GREEDY, PAPER):
        here, there = (drawn(TreeSampler(tiny(name).to(d), renderer(), rows=16), decoding) for d in ("cpu", "cuda"))
        assert there == here


def examples() -> list[Example]:
    chance = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, VOCABULARY, (count,), generator=chance).tolist())

    shared, made = ids(70), []
    for number, solutions in enumerate((3, 1, 4)):
        prompt = (*shared, *ids(3 + number))
        made += [
            Example(problem_id=str(number), index=n, prompt_ids=prompt, completion_ids=(*ids(5 + 9 * n), END), weight=0.5 + n)
            for n in range(solutions)
        ]
    return made


def row_gradient(model: Any, dtype: torch.dtype) -> torch.Tensor:
    """One sequence a row, on the model's device; a lower format by autocast."""
    model.zero_grad()
    for example, weight in zip(examples(), token_weights(examples(), "sum"), strict=True):
        ids = torch.tensor([[*example.prompt_ids, *example.completion_ids]], device=model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1]
        targets = ids[0, len(example.prompt_ids) :]
        (weight * torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")).backward()
    return flat(model)


def flat(model: Any) -> torch.Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]).cpu()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("is_apart", [True, False], ids=["shared part once", "shared part in each pack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_row_training(name: str, dtype: torch.dtype, is_apart: bool) -> None:
    """In bfloat16 as near to float32's as rows in bfloat16 come, but for a little."""
    exact, model = row_gradient(tiny(name), torch.float32), tiny(name).to("cuda")
    own = distance(row_gradient(model, dtype), exact)
    model.zero_grad()
    loss = PackLoss(model, dtype)
    with tree_attention(model):
        shared = SharedPrompt(loss, shared_prompt(examples()) if is_apart else ())
        for pack in make_packs(examples(), "sum", 64, is_apart=is_apart):
            loss(pack, shared.before).weighted.backward()
        shared.backward()
    assert distance(flat(model), exact) < (1e-3 if dtype == torch.float32 else 0.01 + 2 * own)


@pytest.mark.parametrize("formats", [Formats(torch.bfloat16, torch.bfloat16), Formats(torch.float16, torch.float32)], ids=str)
def test_the_trial_finds_the_device_right(formats: Formats) -> None:
    for name in ("llama", "gemma2"):
        assert [finding.verdict for finding in trial(tiny(name).to("cuda"), formats)] == ["ok", "ok", "ok"]


def test_likelihoods_are_those_of_the_cpu() -> None:
    here, there = (log_likelihoods(tiny().to(device), examples()) for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, rel=1e-4)


@pytest.mark.parametrize("name", SERVED)
def test_a_training_step_in_bfloat16_ends_and_lowers_the_loss(name: str, tmp_path: Path) -> None:
    """The default on CUDA, through the trainer: every architecture's own output layer is met."""
    settings = ImproveConfig(epochs=8, interval=8, learning_rate=1e-3)
    losses: list[float] = []
    trainer = TreeTrainer(
        settings, device="cuda", dtype=torch.bfloat16, report=lambda done, total, metrics: losses.append(metrics["loss"])
    )
    (interval,) = trainer.train(save(tiny(name), tmp_path / "base"), examples(), tmp_path / "improve", stream="s")
    assert len(losses) == 8 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert all(bool(p.isfinite().all()) for p in models.load_model(interval.model, dtype=torch.float32).parameters())


@pytest.mark.parametrize("device", ["cuda:0", "cuda", "auto"])
def test_a_device_may_be_spelled_out(device: str, tmp_path: Path) -> None:
    base, said = save(tiny(), tmp_path / "base"), list[str]()
    backend = HFBackend(load_recipe({"model": {"base": base, "device": device}}), Prompt(), said.append)
    assert backend.device == ("cuda" if device == "auto" else device)
    assert said[0].startswith(f"checked tree against llama on {torch.cuda.get_device_name(0)}")
    sampler: Any = backend.open_sampler(base)
    assert sampler.model.device == torch.device("cuda", 0)
    assert len(drawn(sampler, PAPER)) == 30


def test_the_last_of_several_devices_computes_as_the_first() -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("there is one CUDA device here")
    path = f"cuda:{count - 1}"
    model = tiny().to(path)
    torch.cuda.set_device(path)
    try:
        assert drawn(TreeSampler(model, few_shot(), rows=16), PAPER) == drawn(TreeSampler(tiny(), few_shot(), rows=16), PAPER)
        assert distance(row_gradient(model, torch.float32), row_gradient(tiny(), torch.float32)) < 1e-3
    finally:
        torch.cuda.set_device(0)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(RestemError, match=r'model\.device = "cuda:99" cannot be used'):
        models.pick_device("cuda:99")


# --- out of memory ----------------------------------------------------------------------------------------------------------


class Limited:
    """Lets this process have no more memory on the device than it holds now and `more` bytes."""

    def __init__(self, more: int) -> None:
        self.more = more

    def __enter__(self) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + self.more) / total)

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_evaluation_with_generate_goes_on_with_fewer_rows() -> None:
    wide = {**SERVED["llama"][1], "hidden_size": 384, "vocab_size": 60_000, "num_hidden_layers": 6}
    table = {"wide": ("LlamaConfig", wide)}
    model = tiny("wide", table=table).to("cuda")
    expected = rows_of(GenerateSampler(model, few_shot(), rows=4))
    said: list[str] = []
    with Limited(300 << 20):  # float64 sums over 60,000 tokens: 2,000 rows take a gigabyte
        found = rows_of(GenerateSampler(model, few_shot(), rows=2048, say=said.append), count=2048)
    assert any("out of memory" in text for text in said)
    assert len(found) == 2048 and {key: found[key] for key in expected} == expected


def rows_of(sampler: Any, count: int = 8) -> dict[Key, tuple[int, ...]]:
    stage = problems(1)
    owed: Sequence[Owed] = [Owed(stage[0].id, index) for index in range(count)]
    samples = sampler.sample(stage, owed, Decoding(temperature=1.0, max_tokens=4), stream="s")
    return {(s.problem_id, s.index): s.token_ids for s in samples}


def test_a_model_that_does_not_fit_is_an_error_with_the_numbers(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**SERVED["llama"][1], "vocab_size": 400_000, "hidden_size": 96})
    base = save(transformers.AutoModelForCausalLM.from_config(config), tmp_path)
    with Limited(64 << 20), pytest.raises(RestemError, match=r"does not fit cuda: its weights take 0\.3\d GB"):
        models.load_model(base, dtype=torch.float32, device="cuda")
