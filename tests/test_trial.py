"""Before a run relies on a device, the tree is compared there with the model's own pass, and stops the run where it differs."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pretend_gpu import pretend_gpu
from restem import attention_flex, doctor, models
from restem.attention import PackAttention, Rule
from restem.backends import HFBackend
from restem.cli import main
from restem.config import load_recipe
from restem.errors import RestemError
from restem.first_use import key_of, on_first_use, recall
from restem.miniature import miniature, miniature_config
from restem.prompts import Prompt
from restem.sampling import TreeSampler
from restem.training.loss import SharedPrompt
from restem.trial import Finding, Formats, trial
from tiny_models import REFUSED, SERVED, one_thread, save, tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

FULL, HALF = Formats(torch.float32, torch.float32), Formats(torch.bfloat16, torch.bfloat16)
MIXED = Formats(torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTEM_CACHE", str(tmp_path / "cache"))


def config_of(name: str, **changes: Any) -> Any:
    kind, settings = {**SERVED, **REFUSED}[name]
    return getattr(transformers, kind)(**{**settings, **changes})


def tried(name: str, formats: Formats = FULL) -> dict[str, Finding]:
    return {finding.what: finding for finding in trial(miniature(miniature_config(config_of(name)), "cpu"), formats)}


@pytest.mark.parametrize("formats", [FULL, HALF, MIXED], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2", "gpt2"])
def test_the_tree_is_right_on_this_cpu(name: str, formats: Formats) -> None:
    found = tried(name, formats)
    assert {what: finding.verdict for what, finding in found.items()} == dict.fromkeys(("logits", "decoding", "gradient"), "ok")
    for finding in found.values():
        assert finding.error is not None and finding.own is not None
        assert finding.error < (1e-5 if finding.dtype == "float32" else 0.1)
        assert (finding.own == 0) == (finding.dtype == "float32"), "the yardstick is the model's own pass in float32"


@pytest.mark.parametrize("formats", [FULL, MIXED], ids=["float32", "float16"])
def test_the_trial_itself_mixes_no_devices(formats: Formats) -> None:
    with pretend_gpu() as gpu:
        found = trial(gpu.place(miniature(miniature_config(config_of("qwen2-window")), "cpu")), formats)
    assert [finding.verdict for finding in found] == ["ok", "ok", "ok"], found


# --- what it must find ------------------------------------------------------------------------------------------------------


def test_probabilities_that_are_not_the_models_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = TreeSampler.sample

    def sample(self: TreeSampler, *args: Any, **kwargs: Any) -> Any:
        for found in own(self, *args, **kwargs):
            yield replace(found, logprob=(found.logprob or 0.0) + 0.1 * len(found.token_ids))

    monkeypatch.setattr(TreeSampler, "sample", sample)
    found = tried("llama")
    assert {what: f.verdict for what, f in found.items()} == {"logits": "ok", "decoding": "wrong", "gradient": "ok"}
    assert found["decoding"].error == pytest.approx(0.1, abs=1e-4)
    assert tried("llama", HALF)["decoding"].verdict == "wrong"


def test_a_gradient_that_lacks_a_part_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedPrompt, "backward", lambda self: None)
    for formats in (FULL, HALF):
        assert {what: f.verdict for what, f in tried("llama", formats).items()} == {
            "logits": "ok",
            "decoding": "ok",
            "gradient": "wrong",
        }


@pytest.mark.parametrize("formats", [FULL, HALF], ids=["float32", "bfloat16"])
def test_a_window_that_is_one_token_too_long_is_found(formats: Formats, monkeypatch: pytest.MonkeyPatch) -> None:
    own = PackAttention.attend

    def attend(self: PackAttention, layer: int, q: Any, k: Any, v: Any, rule: Rule) -> Any:
        return own(self, layer, q, k, v, rule._replace(window=rule.window and rule.window + 1))

    monkeypatch.setattr(PackAttention, "attend", attend)
    assert {f.verdict for f in tried("mistral-window", formats).values()} in ({"wrong"}, {"refused"})  # by the check at loading


def crash(self: SharedPrompt) -> None:
    raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16\nmore")


def test_a_crash_is_a_finding_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedPrompt, "backward", crash)
    finding = tried("llama")["gradient"]
    assert (finding.verdict, finding.error) == ("crash", None)
    assert finding.reason == "RuntimeError: self and mat2 must have the same dtype, but got Float and BFloat16"


def test_what_the_tree_serves_nowhere_is_no_fault_of_the_device() -> None:
    (finding,) = tried("gptj").values()
    assert finding.verdict == "refused" and "gptj" in finding.reason


# --- the model that is tried ------------------------------------------------------------------------------------------------


def test_a_miniature_keeps_the_widths_and_every_kind_of_attention() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    real = config_of("gemma3", num_hidden_layers=12, layer_types=kinds * 2, vocab_size=50_000, sliding_window=4096)
    model = miniature(miniature_config(real), "cpu")
    small = model.config
    assert (small.num_hidden_layers, small.layer_types) == (2, ["sliding_attention", "full_attention"])
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(small, name) == getattr(real, name)
    assert small.sliding_window < 50 and small.vocab_size < 1000
    assert real.num_hidden_layers == 12 and real.vocab_size == 50_000, "the given config stays as it is"


def test_making_one_uses_up_nobodys_random_numbers() -> None:
    config = miniature_config(config_of("llama"))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, other = miniature(config, "cpu"), miniature(config, "cpu")
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_one_that_would_be_huge_is_not_made() -> None:
    with pytest.raises(RestemError, match=r"1\.9 billion parameters"):
        miniature(
            miniature_config(config_of("llama", hidden_size=24_000, intermediate_size=12_000, num_attention_heads=240)), "cpu"
        )


# --- on first use -----------------------------------------------------------------------------------------------------------


def first_use(config: Any, formats: Formats = FULL, *, trains: bool = True) -> list[str]:
    said: list[str] = []
    on_first_use(config, "cpu", formats, said.append, trains=trains)
    return said


def test_a_device_is_tried_once_for_an_architecture_and_a_number_format() -> None:
    (said,) = first_use(config_of("llama"))
    assert said.startswith("checked tree against llama on the CPU") and "float32" in said
    assert re.search(r"logits \d[.\d]*e-05%, decoding \d\S+ nats a token, gradient \d\S+%$", said)
    assert first_use(config_of("llama")) == []
    assert len(first_use(config_of("llama"), HALF)) == 1
    assert len(first_use(config_of("llama", num_key_value_heads=3))) == 1
    assert first_use(config_of("llama", num_hidden_layers=9)) == [], "more layers of the kind that was tried"


def test_a_device_that_fails_stops_the_run_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SharedPrompt, "backward", crash)
        for _ in range(2):
            with pytest.raises(
                RestemError, match=r"gradient crash: RuntimeError: self and mat2.*model\.device = \"cpu\""
            ) as found:
                first_use(config_of("llama"))
            assert "logits" not in str(found.value), "only what differed"
        assert len(first_use(config_of("llama"), trains=False)) == 1, "an evaluation needs no gradient"
    assert len(first_use(config_of("llama"))) == 1
    assert first_use(config_of("llama")) == []


def test_a_device_on_which_flex_attention_fails_is_used_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a GPU whose FlexAttention does not compile: what is there without it passes, and is remembered."""

    def fails(*_: object) -> None:
        raise RuntimeError("no valid triton configs")

    monkeypatch.setattr(attention_flex, "serves", lambda device: device not in attention_flex._refused)
    monkeypatch.setattr(attention_flex, "attend", fails)
    for lines in (2, 1):
        monkeypatch.setattr(attention_flex, "_refused", {})  # a new process
        said = first_use(config_of("llama"))
        assert "FlexAttention fails" in said[0] and "no valid triton configs" in said[0]
        assert len(said) == lines
        assert not attention_flex.serves(torch.device("cpu"))


def test_other_versions_and_damaged_files_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_use(config_of("llama"))
    (file,) = (tmp_path / "cache" / "trials").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        assert len(first_use(config_of("llama"))) == 1
    file.write_text('{"key": {}, "findings": [{"what": "logi')
    assert len(first_use(config_of("llama"))) == 1


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert len(first_use(config_of("llama"))) == 1


def test_an_architecture_that_the_tree_serves_nowhere_is_left_to_the_check_at_loading() -> None:
    assert first_use(config_of("gptj")) == []


def test_an_architecture_of_which_no_small_model_can_be_made_is_said() -> None:
    (said,) = first_use(config_of("t5"))
    assert "could not be tried" in said and "t5" in said


def test_no_memory_for_the_trial_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: SharedPrompt) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(SharedPrompt, "backward", full)
    (said,) = first_use(config_of("llama"))
    assert "could not be tried" in said and "out of memory" in said


def test_a_run_tries_its_device_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU under another name stands for a device that is not known yet."""
    base = save(tiny(), tmp_path / "base")
    recipe = load_recipe({"model": {"base": base, "dtype": "float32"}, "improve": {"dtype": "float32"}})
    said: list[str] = []
    HFBackend(recipe, Prompt(), said.append)
    assert not [text for text in said if "checked" in text], "the CPU itself needs no trial"
    monkeypatch.setattr(models, "pick_device", lambda choice: "cpu:0")
    HFBackend(recipe, Prompt(), said.append)
    assert [text.startswith("checked tree against llama") for text in said if "checked" in text] == [True]
    monkeypatch.setattr(SharedPrompt, "backward", crash)
    with pytest.raises(RestemError, match="gradient crash"):
        HFBackend(load_recipe({"model": {"base": base}}, ["improve.dtype=bfloat16"]), Prompt(), said.append)


# --- restem doctor ----------------------------------------------------------------------------------------------------------


def test_the_doctor_tries_every_device_and_keeps_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tiny("qwen2-window"), tmp_path / "base")
    code, out = called(capsys, "doctor", "--model", base, "--json")
    assert code == 0 and out.count("\n") == 1
    facts = json.loads(out)
    assert [device["device"] for device in facts["devices"]] == doctor.devices() and doctor.devices()[0] == "cpu"
    for device in facts["devices"]:
        assert device["model"] == "qwen2"
        assert [finding["verdict"] for finding in device["findings"]] == ["ok", "ok", "ok"]
        small = miniature_config(models.load_config(base))
        formats = Formats(
            models.compute_dtype("auto", device["device"]), models.compute_dtype("auto", device["device"], training=True)
        )
        kept = recall(key_of(small, device["device"], formats))
        assert kept is not None and kept.findings == [Finding(**finding) for finding in device["findings"]]


def test_the_doctor_shows_a_wrong_device_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SharedPrompt, "backward", crash)
    code, out = called(capsys, "doctor")  # nothing in the cache, and nothing is fetched
    assert code == 1
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("cpu ")][:3] == ["ok", "ok", "crash"]
    assert "cpu: RuntimeError: self and mat2" in out and "small random llama" in out


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    before, sys.argv = sys.argv, ["restem", *arguments]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = before
    return int(stop.value.code or 0), capsys.readouterr().out
