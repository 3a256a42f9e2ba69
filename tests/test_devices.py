"""Where restem computes and in which number format: only where it was shown to be right, and refused in words elsewhere."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from restem import models
from restem.backends import HFBackend
from restem.compatibility import Unsupported
from restem.config import load_recipe
from restem.errors import RestemError
from restem.estep import Stage, draw
from restem.prompts import Prompt
from restem.sampling import Decoding, Owed, TreeSampler
from restem.sampling.generate import GenerateSampler
from restem.types import Example, Problem, Sample
from tiny_models import END, few_shot, one_thread, problems, save, tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

PAPER = Decoding(temperature=0.7, top_k=40, max_tokens=12)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has two CUDA devices; whoever begins to use one fails."""

    def touched() -> None:
        raise AssertionError("CUDA was touched")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)


def test_auto_is_the_cpu_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert models.pick_device("auto") == "cpu"


@pytest.mark.usefixtures("two_gpus")
def test_auto_is_cuda_where_there_is_one() -> None:
    assert models.pick_device("auto") == "cuda"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("mps", "no float64"),
        ("xpu", "never tried"),
        ("meta", "never tried"),
        ("gpu", 'Use "auto", "cpu", "cuda" or "cuda:1"'),
        ("cuda:2", "2 of them, cuda:0 to cuda:1"),
    ],
)
def test_another_device_is_refused_in_a_sentence_before_anything_is_loaded(device: str, says: str) -> None:
    recipe = load_recipe({"model": {"base": "./there-is-no-such-model", "device": device}})
    with pytest.raises(RestemError, match=re.escape(says)) as caught:
        HFBackend(recipe, Prompt(), lambda text: None)
    assert f'model.device = "{device}"' in str(caught.value) and '"cpu"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RestemError, match=r"there is no CUDA device here\. Use"):
        models.pick_device("cuda")


@pytest.mark.parametrize("native", [True, False])
def test_a_card_without_bfloat16_samples_in_float16_and_trains_in_float32(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    @contextlib.contextmanager
    def device(name: str) -> Iterator[None]:
        asked.append(name)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    found = [models.compute_dtype("auto", "cuda:1", training=training) for training in (False, True)]
    assert found == ([torch.bfloat16] * 2 if native else [torch.float16, torch.float32])
    assert asked == ["cuda:1", "cuda:1"], "it is the card in use that matters, not the first one"


# --- beside a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "lora"])
def test_a_run_on_the_cpu_does_not_touch_the_gpu_beside_it(rank: int, tmp_path: Path) -> None:
    if rank:
        pytest.importorskip("peft")
    base = save(tiny(), tmp_path / "base")
    settings = {"base": base, "device": "cpu", "dtype": "float32"}
    improve = {"lora_rank": rank, "epochs": 1, "dtype": "float32"}
    backend = HFBackend(load_recipe({"model": settings, "improve": improve}), Prompt(), lambda text: None)
    stage = problems(2)
    drawn = list(backend.open_sampler(base).sample(stage, [Owed(p.id, 0) for p in stage], PAPER, stream="s"))
    found = backend.likelihoods(base, [(problem, next(s for s in drawn if s.problem_id == problem.id)) for problem in stage])
    assert found is not None and len(found) == 2
    examples = [Example(problem_id="p", index=n, prompt_ids=(5, 6, 7), completion_ids=(9, n + 2, END)) for n in range(3)]
    trained = list(backend.open_trainer(lambda *_: None).train(base, examples, tmp_path / "improve", stream="s"))
    assert len(trained) == 1 and backend.open_sampler(trained[0].model)


@pytest.mark.usefixtures("two_gpus")
def test_an_adapter_is_loaded_without_the_gpu(tmp_path: Path) -> None:
    """peft would read it to the first GPU that there is."""
    peft = pytest.importorskip("peft")
    base = save(tiny(), tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert models.load_model(str(tmp_path / "adapter"), dtype=torch.float32).device.type == "cpu"


# --- float16 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2"])
def test_samples_in_float16_have_the_probabilities_of_the_model(name: str) -> None:
    """Nearer than bfloat16 could come: half a per cent a token against a forward pass in float32."""
    renderer, stage, exact = few_shot(), problems(4), tiny(name)
    sampler = TreeSampler(tiny(name).half(), renderer)
    sampler.end_ids = frozenset()
    drawn = list(sampler.sample(stage, [Owed(p.id, n) for p in stage for n in range(4)], PAPER, stream="s"))
    assert len(drawn) == 16
    for sample in drawn:
        prompt = renderer.encode(next(problem for problem in stage if problem.id == sample.problem_id))
        with torch.no_grad():
            logits = exact(torch.tensor([[*prompt, *sample.token_ids]])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(sample.token_ids)[:, None])
        assert sample.logprob == pytest.approx(logprobs.sum().item(), abs=0.01 * len(sample.token_ids))


def test_a_model_that_overflows_float16_is_refused_with_the_format_to_take() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e4)
    TreeSampler(model, few_shot())
    with pytest.raises(Unsupported, match=r'overflow float16.*model\.dtype = "float32"'):
        TreeSampler(model.half(), few_shot())


def test_a_sample_whose_probability_is_not_a_number_ends_the_stage(tmp_path: Path) -> None:
    class Broken:
        def sample(self, problems: Any, owed: Any, decoding: Any, *, stream: str) -> Iterator[Sample]:
            yield Sample(problem_id="p", index=0, token_ids=(5,), text="x", finish="stop", logprob=float("nan"))

    stage = Stage(
        directory=tmp_path,
        problems=[Problem(id="p", question="?")],
        samples=1,
        decoding=PAPER,
        stream="s",
        model="m",
        shard_problems=1,
    )
    nobody: Any = None
    with pytest.raises(RestemError, match=r"sample 0 of problem p.*float16"):
        draw(stage, Broken, nobody, nobody)


# --- memory -----------------------------------------------------------------------------------------------------------------


def test_running_out_of_memory_in_generate_halves_the_rows_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device refuses more than 3 rows at once; every sample still comes, once, and is the one that it would have been."""
    model, stage = tiny(), problems(2)
    owed = [Owed(problem.id, index) for problem in stage for index in range(11)]

    def drawn(sampler: GenerateSampler) -> dict[tuple[str, int], tuple[int, ...]]:
        samples = list(sampler.sample(stage, owed, PAPER, stream="s"))
        assert len(samples) == len(owed)
        return {(s.problem_id, s.index): s.token_ids for s in samples}

    expected, own = drawn(GenerateSampler(model, few_shot())), model.generate

    def generate(ids: torch.Tensor, **settings: Any) -> Any:
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(ids, **settings)

    monkeypatch.setattr(model, "generate", generate)
    said: list[str] = []
    sampler = GenerateSampler(model, few_shot(), say=said.append)
    assert drawn(sampler) == expected
    assert [re.findall(r"\d+", text) for text in said] == [["11", "5"], ["5", "2"]]


def test_no_memory_for_one_sample_of_generate_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stage = tiny(), problems(1)

    def generate(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(RestemError, match=r"generate\.max_tokens"):
        list(GenerateSampler(model, few_shot()).sample(stage, [Owed("p0", 0)], PAPER, stream="s"))


def test_another_error_of_generate_is_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stage = tiny(), problems(1)

    def generate(*_: Any, **__: Any) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(RuntimeError, match="device-side"):
        list(GenerateSampler(model, few_shot()).sample(stage, [Owed("p0", 0)], PAPER, stream="s"))


def test_a_model_that_does_not_fit_is_an_error_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tiny(), tmp_path)
    weights = sum(parameter.numel() for parameter in tiny().parameters())

    def to(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(transformers.PreTrainedModel, "to", to)
    with pytest.raises(RestemError, match=rf"does not fit cpu: its weights take {4 * weights / 1e9:.2f} GB.* are free"):
        models.load_model(base, dtype=torch.float32)


# --- models that cannot be loaded -------------------------------------------------------------------------------------------


def test_a_quantised_model_is_an_error_that_names_its_method(tmp_path: Path) -> None:
    """The packages that read such weights are absent here, or refuse a CPU: each with an error of its own."""
    base = save(tiny(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    methods: Sequence[dict[str, Any]] = [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors"},
    ]
    for method in methods:
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
        with pytest.raises(RestemError, match=rf"cannot be loaded: \S+.*\n.*quantised \({method['quant_method']}\)"):
            models.load_model(base, dtype=torch.float32)


def test_an_error_without_words_is_named_by_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tiny(), tmp_path)

    def from_pretrained(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(RestemError, match=r"cannot be loaded: NotImplementedError$"):
        models.load_model(base, dtype=torch.float32)
