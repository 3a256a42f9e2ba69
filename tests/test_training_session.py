"""Training as a whole: killed and resumed at any step, LoRA, less memory, several processes, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from restem import models
from restem.compatibility import own_logits
from restem.errors import RestemError
from restem.processes import Processes
from restem.sampling import Decoding, Owed, TreeSampler
from restem.training import Interval, TreeTrainer, checkpoints
from restem.training.batches import make_packs, plan_steps
from restem.training.budget import fitting
from restem.training.loss import log_likelihoods
from restem.training.session import Session
from restem.types import Example
from test_tree_trainer import SOME, distance, random_tree, row_gradients, settings, stored, timeless, train, weights_of
from tiny_models import END, SERVED, few_shot, one_thread, problems, save, tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

MANY = random_tree(branches=(1,) * 30, longest=6, seed=11)
HUNDRED = {"epochs": 4.0, "interval": 2.0, "batch_size": 1, "warmup": 0.1, "schedule": "linear", "learning_rate": 3e-4}


def fingerprints(intervals: list[Interval]) -> list[str]:
    return [models.fingerprint(interval.model) for interval in intervals]


# --- restart ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Interval]]:  # noqa: F811
    """A base, and two intervals of 60 steps each trained from it."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    start = save(tiny(), directory / "base")
    return start, train(start, directory / "out", examples=MANY, **HUNDRED)


@pytest.mark.parametrize("kills", [(50,), (60,), (61,), (17, 73), (1, 119)])
def test_training_killed_at_a_step_and_resumed_equals_training_without_a_kill(
    tmp_path: Path, uninterrupted: tuple[str, list[Interval]], kills: tuple[int, ...]
) -> None:
    """120 steps, 30 an epoch: killed at a step, at the end of an epoch, and twice. Same losses, norms, rates and weights."""
    start, expected = uninterrupted
    changes = settings(**HUNDRED, checkpoint_minutes=0)
    seen: list[list[int]] = []
    for kill in (*kills, 999):
        seen.append([])

        def report(done: int, total: int, metrics: dict[str, Any], kill: int = kill) -> None:
            if done == kill:
                raise KeyboardInterrupt
            seen[-1].append(done)

        try:
            found = list(TreeTrainer(changes, report=report).train(start, MANY, tmp_path, stream="s"))
        except KeyboardInterrupt:
            continue
    assert [step for steps in seen for step in steps] == list(range(1, 121))
    assert fingerprints(found) == fingerprints(expected)
    assert [timeless(i) for i in found] == [timeless(i) for i in expected]


def test_kill_minus_9_anywhere_in_the_m_step_changes_nothing(tmp_path: Path, uninterrupted: tuple[str, list[Interval]]) -> None:
    """A process of its own, killed with SIGKILL again and again at random instants until it gets through."""
    start, expected = uninterrupted
    chance, kills, delay = random.Random(7), 0, 0.0
    while True:
        running = trainer_process(start, tmp_path / "out", **HUNDRED, checkpoint_minutes=0)
        line = running.stdout.readline()  # training begins
        assert line == "begins\n"
        delay += 1.0
        time.sleep(chance.uniform(0, delay))
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
            kills += 1
        ended = running.wait()
        assert ended in (0, -signal.SIGKILL), "by nothing but the kill"
        if ended == 0:
            break
    assert kills >= 2
    found = train(start, tmp_path / "out", examples=MANY, **HUNDRED)
    assert [timeless(i) for i in found] == [timeless(i) for i in expected]
    assert fingerprints(found) == fingerprints(expected)


def trainer_process(start: str, out: Path, *launcher: str, **changes: Any) -> subprocess.Popen[str]:
    """tests/train_in_processes.py, on one thread."""
    script = str(Path(__file__).with_name("train_in_processes.py"))
    command = [sys.executable, *launcher, script, start, str(out), json.dumps(changes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_checkpoints_are_written_by_time_and_only_the_newest_stays(tmp_path: Path) -> None:
    start = save(tiny(), tmp_path / "base")
    states: list[list[str]] = []

    def look(done: int, total: int, metrics: dict[str, Any]) -> None:
        states.append(sorted(path.name for path in tmp_path.glob("out/state-*")))

    steps = {"epochs": 1.0, "batch_size": 1}
    list(TreeTrainer(settings(**steps, checkpoint_minutes=0), report=look).train(start, MANY, tmp_path / "out", stream="s"))
    assert states[:4] == [[], ["state-1"], ["state-2"], ["state-3"]]
    states.clear()
    list(TreeTrainer(settings(**steps), report=look).train(start, MANY, tmp_path / "again", stream="s"))
    assert not list(tmp_path.glob("again/state-*"))


# --- intervals, metrics, what the model's context holds -----------------------------------------------------------------------


def test_intervals_may_be_counted_in_steps() -> None:
    steps = plan_steps(MANY, settings(epochs=1.0, batch_size=1, interval_steps=12), stream="s")
    assert [number for number, step in enumerate(steps, start=1) if step.interval is not None] == [12, 24, 30]


def test_metrics_say_where_the_time_went_and_how_likely_the_targets_are(tmp_path: Path) -> None:
    start = save(tiny(), tmp_path / "base")
    metrics = train(start, tmp_path / "out", epochs=1.0, batch_size=99, interval=1.0, examples=unweighted())[-1].metrics
    assert metrics["target_logprob"] == pytest.approx(before_of(unweighted()), rel=1e-5)
    assert set(metrics["share_of_seconds"]) == {"pack", "forward", "backward", "communicate", "optimise"}
    assert 0.5 < sum(metrics["share_of_seconds"].values()) <= 1.0


def test_a_step_of_rewards_that_are_all_0_changes_nothing_but_fails_nothing(tmp_path: Path) -> None:
    session = open_session(save(tiny(), tmp_path / "base"))
    before = own_logits(session.model)
    metrics = session.step([replace(example, weight=0.0) for example in SOME], 1e-3)
    assert (metrics["loss"], metrics["target_tokens"], metrics["target_logprob"]) == (0.0, 0, 0.0)
    assert torch.equal(own_logits(session.model), before)


def unweighted() -> list[Example]:
    return random_tree(branches=(3, 2, 2, 3), longest=8, seed=8, weights=False)


def before_of(examples: list[Example]) -> float:
    return -row_gradients(tiny(), examples, "token-mean")[0]


def test_examples_that_exceed_the_context_are_left_out_and_named(tmp_path: Path) -> None:
    start = save(tiny(), tmp_path / "base")
    context = models.context_length(start)
    long = Example(prompt_ids=(2, 3), completion_ids=(4,) * context, problem_id="p99", index=3)
    said: list[str] = []
    trainer = TreeTrainer(settings(epochs=1.0), say=said.append)
    found = list(trainer.train(start, [*SOME, long], tmp_path / "with", stream="s"))
    assert said == [f"1 of {len(SOME) + 1} examples exceed the context of {context} tokens; left out: p99 #3"]
    assert fingerprints(found) == fingerprints(train(start, tmp_path / "without", epochs=1.0))


def test_too_little_disk_is_seen_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = save(tiny(), tmp_path / "base")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(RestemError, match=r"training needs up to .* GB in .*, and 0\.00 GB are free"):
        train(start, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- less memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3"])
def test_gradient_checkpointing_changes_no_weight(tmp_path: Path, name: str) -> None:
    start = save(tiny(name), tmp_path / "base")
    plain, again = (train(start, tmp_path / str(on), gradient_checkpointing=on) for on in (False, True))
    assert [timeless(i) for i in again] == [timeless(i) for i in plain]
    assert fingerprints(again) == fingerprints(plain)


def test_gradient_checkpointing_computes_the_layers_again(tmp_path: Path) -> None:
    start = save(tiny(), tmp_path / "base")
    calls = []
    for on in (False, True):
        session = open_session(start, gradient_checkpointing=on)
        count = [0]
        session.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        session.step(SOME, 1e-3)
        calls.append(count[0])
    assert calls[1] == 2 * calls[0]


def test_what_all_prompts_share_is_computed_once_however_many_packs_a_step_has(tmp_path: Path) -> None:
    start = save(tiny(), tmp_path / "base")
    examples = [Example(prompt_ids=(*range(2, 42), 50 + n, 60), completion_ids=(*range(70, 90), END)) for n in range(8)]
    for pack_tokens in (64, 4096):
        session, computed = open_session(start, pack_tokens=pack_tokens), []
        session.model.get_input_embeddings().register_forward_pre_hook(
            lambda _, ids, seen=computed: seen.append(ids[0].numel())
        )
        session.step(examples, 1e-3)
        assert sum(computed) == 40 + 8 * (2 + 20)  # the last target is never read
        assert len(computed) == (5 if pack_tokens == 64 else 2)


def open_session(start: str, *, arithmetic: torch.dtype = torch.float32, **changes: Any) -> Session:
    return Session(
        start,
        settings(**changes),
        device="cpu",
        dtype=arithmetic,
        trust_remote_code=False,
        processes=Processes(),
        stream="s",
    )


def out_of_memory_above(session: Session, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no pack of more tokens found its memory."""
    own = type(session.loss).forward

    def forward(self: Any, pack: Any, *rest: Any) -> Any:
        if len(pack.tree.tokens) > tokens:
            raise torch.OutOfMemoryError(f"tried to allocate {len(pack.tree.tokens)} tokens")
        return own(self, pack, *rest)

    monkeypatch.setattr(type(session.loss), "forward", forward)


def test_when_memory_runs_out_packs_are_halved_and_no_step_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and weights as with enough of it, and one line says so."""
    start, examples = save(tiny(), tmp_path / "base"), random_tree(branches=(4, 2, 5, 1), longest=60, seed=3)
    whole, said = open_session(start, pack_tokens=4096), list[str]()
    expected = [whole.step(examples, 1e-3)["loss"] for _ in range(3)]
    session = open_session(start, pack_tokens=4096)
    session.say = said.append
    out_of_memory_above(session, 130, monkeypatch)
    assert [session.step(examples, 1e-3)["loss"] for _ in range(3)] == pytest.approx(expected, rel=1e-5)
    size = len(make_packs(examples, "sum", 4096, is_apart=True)[0].tree.tokens)
    assert 260 < size < 520
    assert said[0] == f"out of memory in training with packs of {size} tokens; going on with {size // 2}"
    assert len(said) == 2  # the later steps begin where the first one ended
    assert distance(session.model.lm_head.weight, whole.model.lm_head.weight) < 1e-4


def test_memory_for_not_even_a_small_pack_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(save(tiny(), tmp_path / "base"))
    out_of_memory_above(session, 0, monkeypatch)
    with pytest.raises(RestemError, match=r"not enough to train on packs of \d+ tokens\. Set improve\.gradient_checkpointing"):
        session.step(SOME, 1e-3)


def test_an_error_that_is_not_about_memory_goes_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(save(tiny(), tmp_path / "base"))

    def broken(*_: Any) -> None:
        raise RuntimeError("a matrix is not square")

    monkeypatch.setattr(type(session.loss), "forward", broken)
    with pytest.raises(RuntimeError, match="not square"):
        session.step(SOME, 1e-3)


@pytest.mark.parametrize(
    ("largest", "bytes_of_pack", "free", "expected"),
    [
        (4000, 4 << 30, 64 << 30, 16384),  # four fifths of 64 GiB hold 51,200
        (4096, 4 << 30, 1 << 30, 4096),  # not one more fits beside
        (4096, 4 << 30, 10 << 30, 8192),  # two of them in 8 GiB
        (2048, 4 << 30, 10 << 30, 4096),
    ],
)
def test_the_first_step_says_how_large_packs_may_be(largest: int, bytes_of_pack: int, free: int, expected: int) -> None:
    """Four fifths of the free memory, in whole thousands of tokens; never fewer than were tried, nor more than are of use."""
    assert fitting(largest, bytes_of_pack, free) == expected


def test_pure_bfloat16_keeps_weights_and_optimiser_in_bfloat16_and_learns(tmp_path: Path) -> None:
    start = save(tiny(), tmp_path / "base", dtype=torch.bfloat16)
    session = open_session(start, weights="bfloat16")
    losses = [session.step(SOME, 1e-3)["loss"] for _ in range(20)]
    kinds = {value.dtype for state in session.optimiser.state.values() for value in state.values() if value.dim()}
    assert kinds == {parameter.dtype for parameter in session.model.parameters()} == {torch.bfloat16}
    assert losses[-1] < losses[0] - 0.3


# --- LoRA -------------------------------------------------------------------------------------------------------------------

LORA = {"lora_rank": 4, "learning_rate": 1e-2, "epochs": 3.0}


def test_lora_trains_only_the_adapter_and_hands_over_a_plain_model(tmp_path: Path) -> None:
    """The merged model's tensors are those of the base but for the adapted layers, which differ by a matrix of the rank."""
    start = save(tiny(), tmp_path / "base")
    reached = train(start, tmp_path / "out", **LORA)
    assert reached[-1].metrics["loss"] < reached[0].metrics["loss"]
    before, after = stored(start), stored(reached[-1].model)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".self_attn." in name or ".mlp." in name}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) <= 4
    assert not models.is_adapter(reached[-1].model)
    assert reached[-1].metrics["merge_error"] < 1e-5


def test_the_merged_model_says_what_the_adapter_on_its_base_says(tmp_path: Path) -> None:
    """The adapter beside it, loaded by peft on the base, has the logits of the merged model."""
    peft = pytest.importorskip("peft")
    start = save(tiny(), tmp_path / "base")
    interval = train(start, tmp_path / "out", **LORA)[-1]
    base = models.load_model(start, dtype=torch.float32)
    before = own_logits(base)
    expected = own_logits(peft.PeftModel.from_pretrained(base, Path(interval.model).parent / "adapter").eval())
    found = own_logits(models.load_model(interval.model, dtype=torch.float32))
    assert distance(found, expected) < 1e-5 < 0.01 < distance(found, before)


def test_a_resumed_lora_training_reaches_the_same_weights(tmp_path: Path) -> None:
    start = save(tiny(), tmp_path / "base")
    straight = train(start, tmp_path / "straight", **LORA)
    train(start, tmp_path / "stopped", stop_after=1, **LORA)
    assert fingerprints(train(start, tmp_path / "stopped", **LORA)) == fingerprints(straight)


def test_lora_gradients_equal_those_of_rows(tmp_path: Path) -> None:
    """Tree against one sequence per row, through the adapter alone."""
    start = save(tiny(), tmp_path / "base")
    session = open_session(start, **LORA, clip=1e9, weight_decay=0.0)
    with torch.no_grad():
        for parameter in session.optimiser.param_groups[0]["params"]:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    session.optimiser.step = lambda: None  # keeps the gradients to look at
    session.step(SOME, 1e-3)
    own = [parameter for parameter in session.model.parameters() if parameter.requires_grad]
    found = torch.cat([parameter.grad.flatten() for parameter in own])
    row_gradients(session.model, SOME, "token-mean")
    assert distance(found, torch.cat([parameter.grad.flatten() for parameter in own])) < 1e-5


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_frozen_weights_in_the_format_of_the_arithmetic_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, storage: torch.dtype
) -> None:
    """Loss and gradients of the adapter in bfloat16 arithmetic, with light frozen weights and without. A base that is not
    exact in bfloat16 stays as it is, and so do embeddings, norms and an output layer that is tied to the embeddings."""
    start = save(tiny(name), tmp_path / "base", dtype=storage)

    def trained(light: bool) -> tuple[Session, list[float], torch.Tensor]:
        if not light:
            monkeypatch.setattr("restem.training.lora.lighten", lambda model, dtype: None)
        session = open_session(start, arithmetic=torch.bfloat16, **LORA)
        losses = [session.step(SOME, 1e-2)["loss"] for _ in range(3)]
        gradients = [p.grad.flatten() for p in session.optimiser.param_groups[0]["params"]]
        return session, losses, torch.cat(gradients)

    light, *found = trained(True)
    heavy, *expected = trained(False)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1]) and float(found[1].norm()) > 0
    kinds = {n: p.dtype for n, p in light.model.named_parameters() if p.dtype != dict(heavy.model.named_parameters())[n].dtype}
    layers = {n for n in kinds if "base_layer.weight" in n}
    assert set(kinds.values()) == ({torch.bfloat16} if storage == torch.bfloat16 else set())
    assert len(layers) == (7 * len(light.model.model.layers) if storage == torch.bfloat16 else 0)
    assert set(kinds) - layers == ({"lm_head.weight"} if layers and name != "llama-tied" else set())
    written = [stored(s.write_interval(tmp_path / str(i), 1, {}).model) for i, s in enumerate((light, heavy))]
    assert all(torch.equal(written[0][key], value) for key, value in written[1].items())


def test_an_adapter_that_does_not_fit_is_a_clear_error(tmp_path: Path) -> None:
    start = save(tiny(), tmp_path / "base")
    with pytest.raises(RestemError, match=r"improve\.lora_targets = \('query',\) does not fit this llama model"):
        train(start, tmp_path / "out", **LORA, lora_targets=("query",))


def test_a_merge_that_changes_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a merge into a coarse number format can: here it drops the adapter."""
    start = save(tiny(), tmp_path / "base")
    session = open_session(start, **LORA)
    with torch.no_grad():
        for parameter in session.optimiser.param_groups[0]["params"]:
            parameter.fill_(0.3)
    monkeypatch.setattr(type(session.adapted), "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(RestemError, match=r"merged into the weights is not the trained model: its logits differ by \d"):
        session.write_interval(tmp_path, 1, {})
    assert not (tmp_path / "interval-1").exists()


# --- what is sampled and scored in between -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
@pytest.mark.parametrize(
    ("storage", "dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_the_model_in_memory_is_the_one_in_the_directory(
    tmp_path: Path, name: str, storage: torch.dtype, dtype: torch.dtype
) -> None:
    """What is sampled on D_val without reading it back has bit for bit the weights that were written."""
    start = save(tiny(name), tmp_path / "base", dtype=storage)
    trainer = TreeTrainer(settings(epochs=1.0))
    running = trainer.train(start, SOME, tmp_path / "out", stream="s")
    interval = next(running)
    held = trainer.loaded(interval.model, dtype)
    loaded = models.load_model(interval.model, dtype=dtype)
    assert held.dtype == dtype
    assert held.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(held.state_dict()[key], value) for key, value in loaded.state_dict().items())
    assert torch.equal(own_logits(held), own_logits(loaded))
    assert trainer.loaded(start, dtype) is None
    running.close()
    assert trainer.loaded(interval.model, dtype) is None


def test_the_model_that_samples_d_val_computes_each_layer_once_and_holds_no_gradient(tmp_path: Path) -> None:
    """With recomputed layers, too; and the training that goes on behind it still recomputes, and is not changed by it."""
    start, changes = save(tiny(), tmp_path / "base"), {"epochs": 2.0, "gradient_checkpointing": True}
    expected = train(start, tmp_path / "plain", **changes)
    trainer = TreeTrainer(settings(**changes))
    found = []
    for interval in trainer.train(start, SOME, tmp_path / "out", stream="s"):
        found.append(interval)
        session = trainer._held[1]
        assert all(parameter.grad is None for parameter in session.model.parameters())
        held = trainer.loaded(interval.model, torch.float32)
        for layer, copied in zip(session.model.model.layers, held.model.layers, strict=True):
            assert isinstance(layer.forward, partial)  # through `checkpoint`
            assert copied.forward.__func__ is type(layer).forward and copied.forward.__self__ is copied
        assert torch.equal(own_logits(held), own_logits(models.load_model(interval.model, dtype=torch.float32)))
    assert fingerprints(found) == fingerprints(expected)
    assert [timeless(i) for i in found] == [timeless(i) for i in expected]


def test_log_likelihoods_are_those_that_the_sampler_drew_with() -> None:
    model, renderer, stage = tiny(), few_shot(), problems(5)
    with torch.no_grad():
        model.lm_head.weight[END] *= 2
    owed = [Owed(problem.id, index) for problem in stage for index in range(4)]
    drawn = list(TreeSampler(model, renderer).sample(stage, owed, Decoding(temperature=1.0, max_tokens=20), stream="s"))
    prompts = {problem.id: renderer.encode(problem) for problem in stage}
    examples = [
        Example(prompt_ids=prompts[s.problem_id], completion_ids=(*s.token_ids, *[END] * (s.finish == "stop"))) for s in drawn
    ]
    assert {sample.finish for sample in drawn} == {"stop", "length"}
    assert log_likelihoods(model, examples, budget=300) == pytest.approx([sample.logprob for sample in drawn], abs=1e-3)


# --- several processes --------------------------------------------------------------------------------------------------------


TOGETHER = {"epochs": 2.0, "batch_size": 4, "learning_rate": 1e-3, "warmup": 0.2, "pack_tokens": 64, "interval": 1.0}
TRAININGS: dict[str, dict[str, Any]] = {
    "replicate": {},
    "shard": {"parallel": "shard"},
    "lora, replicate": {"lora_rank": 4, "weight_decay": 0.1},
    "lora, shard": {"lora_rank": 4, "weight_decay": 0.1, "parallel": "shard", "gradient_checkpointing": True},
    "experts, shard": {"parallel": "shard"},
}
GROWN = ("shard", "lora, shard")
EXPERTS = {"mixtral": ("MixtralConfig", SERVED["qwen2"][1] | {"num_local_experts": 4, "num_experts_per_tok": 2})}
"""Files name each expert's weights, the model holds them in one."""


@pytest.fixture(scope="module")
def together(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A base, and what two gloo processes made of it, one training after the other: each is dropped after its first interval
    and resumed, by the same two processes, or, where the name begins with "grown", by one."""
    folder = tmp_path_factory.mktemp("together")
    start, experts = save(tiny("llama-tied"), folder / "base"), save(tiny("mixtral", table=EXPERTS), folder / "experts")
    trainings = [{"out": name, "examples": "SOME", **TOGETHER, **changes} for name, changes in TRAININGS.items()]
    trainings = [job | {"start": experts} if job["out"].startswith("experts") else job for job in trainings]
    jobs = [job | {"stop_after": stop} for job in trainings for stop in (1, 99)]
    jobs += [job | {"out": f"grown {job['out']}", "stop_after": 1} for job in trainings if job["out"] in GROWN]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = str(Path(__file__).with_name("train_in_processes.py"))
    command = [sys.executable, *launcher, script, start, str(folder), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", [*TRAININGS, *(f"grown {name}" for name in GROWN)])
def test_two_processes_train_as_one_does_and_go_on_after_a_stop(tmp_path: Path, together: Path, name: str) -> None:
    """Data parallel and FSDP2, all weights and LoRA: the same loss curve and, up to rounding, the same weights. What two
    processes began with spread weights, one can go on with."""
    start = str(together / ("experts" if name.startswith("experts") else "base"))
    changes = TOGETHER | TRAININGS[name.removeprefix("grown ")]
    alone = train(start, tmp_path / "one", **changes)
    found = train(start, together / name, **changes)  # complete: read, not trained; if "grown": resumed here
    assert [interval.number for interval in found] == [1, 2]
    for one, two in zip(alone, found, strict=True):
        for key in ("loss", "gradient_norm"):
            expected = [step[key] for step in one.metrics["history"]]
            assert [step[key] for step in two.metrics["history"]] == pytest.approx(expected, rel=1e-4)
    expected, reached, base = (weights_of(place) for place in (alone[-1].model, found[-1].model, start))
    assert expected.keys() == reached.keys()
    moved = torch.cat([(expected[key] - base[key]).flatten() for key in expected]).norm()
    assert torch.cat([(expected[key] - reached[key]).flatten() for key in expected]).norm() < 0.01 * moved
    assert transformers.AutoModelForCausalLM.from_pretrained(found[-1].model) is not None
    files = [{path.name for path in Path(interval.model).iterdir()} for interval in (alone[-1], found[-1])]
    assert files[0] == files[1]
    if "lora" in name:
        assert found[-1].metrics["merge_error"] < 1e-5
        assert (Path(found[-1].model).parent / "adapter" / "adapter_model.safetensors").is_file()


def test_the_second_process_never_holds_more_than_one_gathered_tensor(together: Path) -> None:
    """At checkpoints and when a model is handed over. The largest tensors are the embedding and a layer's experts."""
    sizes = [weight.numel() * 4 for base in ("base", "experts") for weight in weights_of(str(together / base)).values()]
    assert int((together / "gathered-1").read_text()) == max(sizes)
    assert sum(sizes) > 6 * max(sizes)


def test_only_what_is_trained_is_summed_and_what_has_no_gradient_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen weight, and one that no process used, stay as they are under AdamW with weight decay."""
    summed: list[int] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: summed.append(tensor.numel()))
    frozen, unused, used = (torch.nn.Parameter(torch.ones(size), requires_grad=size > 3) for size in (3, 5, 7))
    used.grad = torch.ones(7)
    processes = Processes()
    processes.count = 2
    processes.sum_gradients([frozen, unused, used])
    assert summed == [2, 7]  # which of two have a gradient; the gradient
    torch.optim.AdamW([frozen, unused, used], lr=0.1, weight_decay=0.5).step()
    assert [bool((weight == 1).all()) for weight in (frozen, unused, used)] == [True, True, False]


def test_a_share_leaves_nothing_out_and_gives_everyone_as_many() -> None:
    everyone = []
    for rank in range(3):
        processes = Processes()
        processes.count, processes.rank = 3, rank
        everyone.append(processes.share(list(range(7))))
    assert [len(share) for share in everyone] == [3, 3, 3]
    assert sorted(item for share in everyone for item in share if item is not None) == list(range(7))
