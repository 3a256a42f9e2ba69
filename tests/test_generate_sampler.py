"""Models that the tree cannot serve are sampled with `generate`: named, with a warning, and never wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny_models
from restem import models
from restem.backends import HFBackend
from restem.compatibility import Unsupported
from restem.config import load_recipe
from restem.prompts import Prompt
from restem.sampling import Decoding, Owed, TreeSampler
from restem.sampling.generate import GenerateSampler
from restem.types import Problem, Sample
from tiny_models import END, REFUSED, few_shot, one_thread, problems, save, tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

PAPER = Decoding(temperature=0.7, top_k=40, max_tokens=12)


def drawn(sampler: Any, stage: list[Problem], count: int, decoding: Decoding = PAPER) -> dict[tuple[str, int], Sample]:
    owed = [Owed(problem.id, index) for problem in stage for index in range(count)]
    samples = list(sampler.sample(stage, owed, decoding, stream="run 1"))
    assert sorted((s.problem_id, s.index) for s in samples) == sorted(map(tuple, owed))
    return {(s.problem_id, s.index): s for s in samples}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_it_draws_the_very_samples_of_the_tree_where_both_can(name: str) -> None:
    """Two independent paths from the same random numbers to the same tokens, stops and log-probabilities."""
    model, stage = tiny(name), problems(5)
    decoding = Decoding(temperature=0.7, top_k=40, top_p=0.95, max_tokens=12, stop=("t", "9"))
    tree = drawn(TreeSampler(model, few_shot()), stage, 6, decoding)
    plain = drawn(GenerateSampler(model, few_shot(), rows=4), stage, 6, decoding)
    for key, sample in plain.items():
        assert (sample.token_ids, sample.finish, sample.text) == (tree[key].token_ids, tree[key].finish, tree[key].text)
        assert sample.logprob == pytest.approx(tree[key].logprob, abs=1e-3)
    assert {sample.finish for sample in plain.values()} == {"stop", "length"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_model_is_sampled_as_its_own_forward_pass_says(name: str) -> None:
    """State-space, encoder-decoder, and decoders whose attention cannot be exchanged: greedy tokens by plain forward passes."""
    model, renderer, stage = tiny(name, table=REFUSED), few_shot(), problems(3)
    with pytest.raises(Unsupported, match=model.config.model_type):
        TreeSampler(model, renderer)
    model.generation_config.decoder_start_token_id = 0
    for (problem_id, _), sample in drawn(
        GenerateSampler(model, renderer), stage, 2, Decoding(temperature=0, max_tokens=6)
    ).items():
        prompt = list(renderer.encode(next(problem for problem in stage if problem.id == problem_id)))
        written: list[int] = []
        while len(written) < 6:
            with torch.no_grad():
                if model.config.is_encoder_decoder:
                    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *written]])).logits
                else:
                    logits = model(torch.tensor([prompt + written])).logits
            token = int(logits[0, -1].argmax())
            if token == END:
                break
            written.append(token)
        assert list(sample.token_ids) == written


def test_the_fallback_is_announced_with_the_model_and_the_reason(tmp_path: Path) -> None:
    path, said = save(tiny("mamba", table=REFUSED), tmp_path), list[str]()
    recipe = load_recipe({"iterations": 0, "model": {"base": path, "device": "cpu", "dtype": "float32"}})
    backend = HFBackend(recipe, Prompt(), said.append)
    sampler = backend.open_sampler(path)
    assert isinstance(sampler, GenerateSampler)
    assert any("warning" in text and "mamba" in text and "generate" in text for text in said)
    assert len(drawn(sampler, problems(2), 2)) == 4


def test_a_run_that_could_not_train_the_model_stops_before_it_samples(tmp_path: Path) -> None:
    path = save(tiny("mamba", table=REFUSED), tmp_path)
    recipe = load_recipe({"iterations": 1, "model": {"base": path, "device": "cpu", "dtype": "float32"}})
    with pytest.raises(Unsupported, match="mamba"):
        HFBackend(recipe, Prompt(), lambda text: None).open_sampler(path)


def test_a_lora_adapter_is_sampled_as_its_base_with_the_adapter(tmp_path: Path) -> None:
    """Merged once; logits are those of peft's own model, and the fingerprint is neither the base's nor another adapter's."""
    peft = pytest.importorskip("peft")
    base = save(tiny(), tmp_path / "base")
    prints = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config
        ).eval()
        path = str(tmp_path / f"adapter-{seed}")
        adapted.save_pretrained(path)
        loaded = models.load_model(models.locate(path), dtype=torch.float32)
        ids = torch.randint(0, tiny_models.VOCABULARY, (2, 9))
        with torch.no_grad():
            assert torch.allclose(loaded(ids).logits, adapted(ids).logits, atol=1e-4)
        assert models.load_tokenizer(path).eos_token_id == END
        assert len(drawn(TreeSampler(loaded, few_shot()), problems(2), 2)) == 4
        prints.add(models.fingerprint(path))
    assert len(prints | {models.fingerprint(base)}) == 3


def test_an_adapter_that_does_not_fit_its_base_is_named(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    bases = [save(tiny(name), tmp_path / name) for name in ("llama", "qwen3")]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(bases[0]), config)
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace(bases[0], bases[1]))
    with pytest.raises(models.RestemError, match="does not fit its base"):
        models.load_model(str(tmp_path / "adapter"), dtype=torch.float32)
