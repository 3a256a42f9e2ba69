"""The estimate of training's memory against what tensors really take, the sizes of a 7B base by hand, and what cannot fit."""

from __future__ import annotations

import random
import weakref
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import toy_runs
from restem.config import ImproveConfig
from restem.errors import RestemError
from restem.files import read_json
from restem.memory import total_bytes
from restem.run import Run
from restem.training import estimate, fit
from restem.training.estimate import Shape, Work, read_shape
from restem.types import Example
from test_training_session import open_session
from tiny_models import REFUSED, one_thread, save, tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

LIGHT = {"weights": "bfloat16", "optimiser": "adamw-bfloat16"}
PARTS = ("weights", "gradients", "moments", "activations", "output_layer")
RECOMPUTED = {"gradient_checkpointing": True}


class Watch(TorchDispatchMode):
    """Bytes of all tensors made inside, while they live, and the most at once."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                self._began(tensor.untyped_storage())
        return out

    def _began(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._ended, key, size)

    def _ended(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


# --- against what tensors take -----------------------------------------------------------------------------------------------

SHARED, OWN, SOLUTION, SOLUTIONS = 100, 30, 60, 4
PACK = OWN + SOLUTIONS * (SOLUTION - 1)


def base(folder: Path, *, is_tied: bool) -> str:
    """A Llama of 4.6 million weights, stored in bfloat16."""
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8, "vocab_size": 12_000 if is_tied else 3_000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": is_tied}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes, **heads, **ends))
    return save(model, folder, dtype=torch.bfloat16)


def solutions() -> list[Example]:
    """Three problems with four solutions each: three packs of one problem, behind 100 tokens that all share."""
    chance = random.Random(0)
    return [
        Example(
            problem_id=f"p{problem}",
            index=index,
            prompt_ids=tuple([7] * SHARED + [100 + problem] * OWN),
            completion_ids=tuple(chance.randrange(3_000) for _ in range(SOLUTION)),
        )
        for problem in range(3)
        for index in range(SOLUTIONS)
    ]


@pytest.mark.parametrize(
    ("changes", "arithmetic"),
    [
        ({}, "float32"),
        ({}, "bfloat16"),
        (RECOMPUTED, "bfloat16"),
        (RECOMPUTED, "float32"),
        (LIGHT, "bfloat16"),
        ({"optimiser": "adamw-bfloat16"}, "float32"),
        ({"lora_rank": 8}, "bfloat16"),
        ({"lora_rank": 8}, "float32"),
        ({"lora_rank": 8, "lora_targets": ("q_proj", "v_proj"), **RECOMPUTED}, "bfloat16"),
    ],
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_two_steps_take_what_the_estimate_says(tmp_path: Path, changes: dict[str, Any], arithmetic: str, is_tied: bool) -> None:
    """Weights, gradients and moments to the byte; with activations and the output layer at the peak within a quarter."""
    start = base(tmp_path / "base", is_tied=is_tied)
    settings = ImproveConfig(**changes, pack_tokens=PACK)
    session = open_session(start, arithmetic=getattr(torch, arithmetic), **changes, pack_tokens=PACK)
    weights = {t.untyped_storage()._cdata: t for t in session.model.state_dict().values()}
    with Watch(list(weights.values())) as watch:
        for _ in range(2):
            session.step(solutions(), 1e-5)
    gradients = sum(p.grad.nbytes for p in session.model.parameters() if p.grad is not None)
    moments = sum(v.nbytes for state in session.optimiser.state.values() for name, v in state.items() if name != "step")
    shape = read_shape(start)
    assert shape is not None
    work = Work(arithmetic=arithmetic, sampler="float32", pack=PACK, shared=SHARED)
    found = estimate.estimate(shape, settings, work)
    taken = sum(t.untyped_storage().nbytes() for t in weights.values())
    assert (found.weights, found.gradients, found.moments) == (taken, gradients, moments)
    assert watch.peak + taken == pytest.approx(found.training, rel=0.25)
    rest = watch.peak - gradients - moments
    assert rest == pytest.approx(found.activations + found.output_layer, rel=0.6)


def test_while_d_val_is_drawn_there_is_what_the_estimate_says(tmp_path: Path) -> None:
    """A copy of the weights in the sampler's number format, or none where it is that of training and of the files."""
    start = base(tmp_path / "base", is_tied=True)
    shape = read_shape(start)
    assert shape is not None
    for changes in ({}, LIGHT):
        session = open_session(start, **changes)
        weights = {t.untyped_storage()._cdata: t for t in session.model.state_dict().values()}
        with Watch(list(weights.values())) as watch:
            held = session.for_sampling(torch.bfloat16)
        work = Work(arithmetic="float32", sampler="bfloat16")
        assert held is not None
        assert watch.now == pytest.approx(estimate.estimate(shape, ImproveConfig(**changes), work).sampler, abs=10_000)


def test_sizes_are_read_from_the_files_as_they_are_in_memory(tmp_path: Path) -> None:
    for name in ("llama", "llama-tied", "qwen3", "gpt2", "gpt-neox", "gemma2", "phi3", "starcoder2"):
        model = tiny(name)
        shape = read_shape(save(model, tmp_path / name))
        assert shape is not None
        assert shape.weights == sum(p.numel() for p in model.parameters())
        assert (shape.layers, shape.hidden) == (model.config.num_hidden_layers, 48)
        assert shape.is_tied == model.config.tie_word_embeddings
    assert read_shape(save(tiny("llama"), tmp_path / "bf16", dtype=torch.bfloat16)).storage == "bfloat16"


# --- a base of 7B ------------------------------------------------------------------------------------------------------------

LAYERS, HIDDEN, INNER, VOCABULARY = 28, 3_584, 18_944, 152_064
MATRICES = {"q": (3_584, 3_584), "k": (512, 3_584), "v": (512, 3_584), "o": (3_584, 3_584)}
MATRICES |= {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
SEVEN = Shape(
    weights=7_615_616_512,
    linear={f"layers.{i}.{name}_proj.weight": size for i in range(LAYERS) for name, size in MATRICES.items()},
    layers=LAYERS,
    hidden=HIDDEN,
    intermediate=INNER,
    heads=28,
    queries=3_584,
    keys=512,
    vocabulary=VOCABULARY,
    is_tied=False,
    storage="bfloat16",
)
"""Qwen2.5-7B."""
ON_GPU = Work(arithmetic="bfloat16", sampler="bfloat16", device="cuda", pack=4_096, shared=600)
CARD = 85_000_000_000
"""What a card of 80 GB has, in bytes."""


def gigabytes(**changes: Any) -> estimate.Memory:
    return estimate.estimate(SEVEN, ImproveConfig(**changes), ON_GPU)


def test_the_sizes_of_a_7b_base_worked_out_by_hand() -> None:
    assert (
        SEVEN.weights
        == sum(map(prod, SEVEN.linear.values())) + 2 * VOCABULARY * HIDDEN + LAYERS * (2 * HIDDEN + 3_584 + 2 * 512) + HIDDEN
    )
    whole = gigabytes()
    assert (whole.weights, whole.gradients, whole.moments) == (4 * SEVEN.weights, 4 * SEVEN.weights, 8 * SEVEN.weights)
    assert whole.sampler == 2 * SEVEN.weights
    assert whole.keys == 2 * 2 * 28 * 512 * (600 + 256 * 512)
    light = gigabytes(**LIGHT)
    assert light.certain == 8 * SEVEN.weights and light.sampler == 0
    lora = gigabytes(lora_rank=16)
    adapter = 16 * 28 * (2 * (3_584 + 3_584) + 2 * (512 + 3_584) + 3 * (INNER + HIDDEN))
    assert lora.moments == 8 * adapter and lora.gradients == 4 * adapter
    embeddings_and_norms = SEVEN.weights - sum(map(prod, SEVEN.linear.values())) - VOCABULARY * HIDDEN
    assert lora.weights == 2 * (SEVEN.weights - embeddings_and_norms) + 4 * (embeddings_and_norms + adapter)


def test_a_7b_base_fits_a_card_of_80_gb_whole_and_with_lora() -> None:
    assert gigabytes().certain > CARD
    assert gigabytes(**LIGHT, **RECOMPUTED).peak < 0.85 * CARD < CARD < gigabytes(**LIGHT).peak
    assert gigabytes(lora_rank=16, **RECOMPUTED).peak < 45e9
    sharded = estimate.estimate(SEVEN, ImproveConfig(parallel="shard"), replace(ON_GPU, processes=4))
    assert sharded.certain == pytest.approx(gigabytes().certain / 4)


def test_what_cannot_fit_is_refused_with_the_numbers_and_what_would() -> None:
    settings = ImproveConfig()
    with pytest.raises(RestemError) as refused:
        fit.refuse_what_cannot_fit(gigabytes(), SEVEN, settings, ON_GPU, CARD)
    said = str(refused.value)
    assert (
        "cannot fit on cuda: weights 30.5 GB, gradients 30.5 GB and moments 60.9 GB make 121.8 GB, and it has 85.0 GB" in said
    )
    ways = list(fit.ways_to_fit(SEVEN, settings, ON_GPU, CARD))
    assert [way in said for way in ways] == [True] * 3
    assert ways[0].startswith(
        'improve.gradient_checkpointing = true, improve.weights = "bfloat16", improve.optimiser = "adamw-bfloat16": '
    )
    assert ways[1].startswith("improve.lora_rank = 16: ")
    assert ways[2].startswith('improve.parallel = "shard", improve.gradient_checkpointing = true, 2 processes: ')


def test_only_what_is_certain_is_refused() -> None:
    """Recomputed, it fits; as it is, it may run out of memory, and is told what would fit."""
    memory, settings = gigabytes(**LIGHT), ImproveConfig(**LIGHT)
    assert memory.certain < CARD < memory.peak
    fit.refuse_what_cannot_fit(memory, SEVEN, settings, ON_GPU, CARD)
    assert next(fit.ways_to_fit(SEVEN, settings, ON_GPU, CARD)).startswith("improve.gradient_checkpointing = true: ")


def test_where_nothing_helps_a_smaller_model_is_advised() -> None:
    with pytest.raises(RestemError, match="nothing but a smaller model fits"):
        fit.refuse_what_cannot_fit(gigabytes(), SEVEN, ImproveConfig(), ON_GPU, 10**8)


# --- in a run ----------------------------------------------------------------------------------------------------------------


def opened(start: str, out: Path, *changes: str) -> dict[str, Any]:
    """run.json of a run that was opened, and no more."""
    with Run(toy_runs.recipe(f'model.base="{start}"', "model.device=cpu", *changes), out, quiet=True):
        return dict(read_json(out / "run.json"))


def test_a_run_says_what_training_takes_before_anything_is_drawn(tmp_path: Path) -> None:
    start = save(tiny(), tmp_path / "base")
    facts = opened(start, tmp_path / "run", "improve.dtype=float32", "model.dtype=float32")
    weights = sum(parameter.numel() for parameter in tiny().parameters())
    memory, machine = facts["training_memory"], total_bytes(torch.device("cpu"))
    assert (memory["weights"], memory["moments"], memory["of"]) == (4 * weights, 8 * weights, machine)
    assert memory["training"] == sum(memory[part] for part in PARTS)
    said = (tmp_path / "run" / "log.txt").read_text()
    assert f"memory for improve on cpu ({machine / 1e9:.1f} GB): weights " in said and "while D_val is drawn: " in said
    assert not list((tmp_path / "run").glob("iter-*"))


def test_nothing_is_said_where_nothing_is_trained(tmp_path: Path) -> None:
    start = save(tiny(), tmp_path / "base")
    assert "training_memory" not in opened(start, tmp_path / "none", "iterations=0")
    assert "training_memory" not in opened("toy", tmp_path / "toy")
    assert not [log for log in tmp_path.glob("*/log.txt") if "memory" in log.read_text()]


def test_a_run_that_cannot_fit_makes_no_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = save(tiny(), tmp_path / "base")
    monkeypatch.setattr(fit, "total_bytes", lambda device: 1_000_000)
    with pytest.raises(RestemError, match=r"training cannot fit on cpu: weights 0\.0\d+ GB"):
        opened(start, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    opened(start, tmp_path / "run", "iterations=0")


def test_a_gpu_that_others_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 GB of 24 are free, and one holds our own tensors: three are gone. A card is judged by all it has, all the same."""
    start, said = save(tiny(), tmp_path / "base"), list[str]()
    monkeypatch.setattr(fit, "total_bytes", lambda device: 24_000_000_000)
    monkeypatch.setattr(fit, "free_bytes", lambda device: 20_000_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000_000_000)
    found = fit.before_training(toy_runs.recipe(), start, ON_GPU, torch.device("cuda:1"), said.append)
    assert said[1] == "  3.0 GB of cuda:1 are in use by other programs, and will be missing if they stay"
    assert found["training_memory"]["of"] == 24_000_000_000
    said.clear()
    fit.before_training(toy_runs.recipe(), start, replace(ON_GPU, device="cpu"), torch.device("cpu"), said.append)
    assert len(said) == 1


def test_what_is_no_decoder_is_not_counted(tmp_path: Path) -> None:
    """It is refused by its own reason, when it is loaded."""
    assert read_shape(save(tiny("mamba", table=REFUSED), tmp_path / "mamba")) is None
