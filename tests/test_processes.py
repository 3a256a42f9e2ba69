"""Several processes: all of them draw samples, nobody waits in vain, and nothing outlives a run."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from restem import Run, load_recipe, models, rest_em
from restem.backends import open_backend
from restem.files import read_json
from restem.processes import Processes, of_this_run
from restem.prompts import Prompt
from restem.sampling import Decoding, Owed
from restem.sampling.shared_out import SharedSampler, share_out
from restem.tasks.of_recipe import task_of
from restem.training.processes import empty_model
from tiny_models import one_thread, save, tiny  # noqa: F401
from toy_runs import part_rows

pytestmark = pytest.mark.usefixtures("one_thread")

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DRAW = str(Path(__file__).with_name("draw_in_processes.py"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*arguments: object, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | more)


def outcome(running: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    try:
        out, err = running.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        running.terminate()  # torchrun takes its processes with it
        raise
    return running.returncode, out, err


# --- who draws what -----------------------------------------------------------------------------------------------------------


def test_problems_are_shared_out_whole_and_evenly() -> None:
    owed = [Owed(f"p{number}", index) for number, count in enumerate((9, 2, 2, 2, 2, 1)) for index in range(count)]
    shares = share_out(owed, 2)
    assert sorted(item for share in shares for item in share) == sorted(owed)
    assert [len(share) for share in shares] == [9, 9]
    assert not {item.problem_id for item in shares[0]} & {item.problem_id for item in shares[1]}
    assert share_out(owed[:9], 3) == [owed[:9], [], []]


class Cases(NamedTuple):
    """What came of tests/draw_in_processes.py: by case, rows of (problem, index, tokens, rank, process id, problems known,
    references known, stream)."""

    code: int
    drawn: dict[str, list[Any]]
    err: str
    seconds: float


@pytest.fixture(scope="module")
def cases() -> Cases:
    began = time.monotonic()
    code, out, err = outcome(start(*TORCHRUN, DRAW, "cases"))
    names = ("plain", "long", "dropped", "after it", "bug")
    return Cases(code, dict(zip(names, map(json.loads, out.splitlines()), strict=True)), err, time.monotonic() - began)


def test_every_process_draws_its_share_and_hears_of_the_whole_stage(cases: Cases) -> None:
    drawn = cases.drawn["plain"]
    assert sorted((problem, index) for problem, index, *_ in drawn) == [(f"p{p}", i) for p in range(5) for i in range(4)]
    assert Counter(row[3] for row in drawn) == {0: 12, 1: 8}
    assert len({row[4] for row in drawn}) == 2
    assert {(row[3], row[5], row[7]) for row in drawn} == {(0, 5, "plain"), (1, 5, "plain")}
    assert {row[6] for row in drawn if row[3] == 1} == {0}  # references are large, and stay where grading is


def test_a_sample_may_be_longer_than_what_the_store_takes_at_once(cases: Cases) -> None:
    assert [row[2] for row in cases.drawn["long"]] == [5_000_000] * 5


# --- how it ends --------------------------------------------------------------------------------------------------------------


def test_a_stage_that_is_dropped_is_dropped_everywhere_and_the_next_one_is_drawn(cases: Cases) -> None:
    """1,000 samples a problem would take each process 125 s."""
    assert len(cases.drawn["dropped"]) == 20
    assert Counter(row[3] for row in cases.drawn["after it"]) == {0: 9, 1: 6}
    assert cases.seconds < 100


def test_a_process_that_fails_ends_the_run_with_one_message(cases: Cases) -> None:
    assert cases.code == 1
    assert cases.err.count("restem: process 1, which drew a share of the samples, failed: memory is not enough") == 1


def test_a_bug_in_another_process_shows_its_own_stack(cases: Cases) -> None:
    assert cases.drawn["bug"] == ["process 1, which drew a share of the samples, failed: KeyError: 'what'; its stack is above"]
    assert cases.err.count("KeyError: 'what'\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_what_all_processes_meet_in_training_is_said_once_and_what_one_meets_ends_all(tmp_path: Path, parallel: str) -> None:
    base = save(tiny(), tmp_path / "base")
    script = str(Path(__file__).with_name("train_in_processes.py"))
    changes = {"examples": "SOME", "parallel": parallel}
    diverging = start(*TORCHRUN, script, base, tmp_path / "a", json.dumps(changes | {"learning_rate": 1e30}))
    code, _, err = outcome(diverging)
    assert code == 1 and err.count("restem: training diverged at step 2") == 1
    code, _, err = outcome(start(*TORCHRUN, script, base, tmp_path / "b", json.dumps(changes | {"fails": "1"})))
    assert code == 1 and "TypeError: 'NoneType' object is not callable" in err


@pytest.mark.parametrize(
    "who", ["torchrun", *(pytest.param(who, marks=pytest.mark.slow) for who in ("first", "second", "launcher"))]
)
def test_ctrl_c_and_kill_leave_no_process(who: str) -> None:
    """Ctrl-C reaches torchrun; the first process, the second or torchrun itself is killed."""
    running = start(*TORCHRUN, DRAW, "endless")
    assert running.stdout is not None
    pids: dict[int, int] = {}
    while len(pids) < 2:
        rank, pid, *_ = json.loads(running.stdout.readline())
        pids[rank] = pid
    processes = [psutil.Process(pid) for pid in pids.values()]
    if who == "torchrun":
        running.send_signal(signal.SIGINT)
    else:
        os.kill(running.pid if who == "launcher" else pids[who == "second"], signal.SIGKILL)
    code, _, _ = outcome(running, seconds=60)
    assert code != 0
    _, left = psutil.wait_procs(processes, timeout=10)
    assert not [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_without_a_launcher_the_others_end_when_the_first_is_gone() -> None:
    """Started by hand, nobody ends them; the store was the first one's, and is gone with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    first, second = (start(DRAW, "endless", RANK=str(rank), **place) for rank in range(2))
    assert first.stdout is not None
    first.stdout.readline()
    first.kill()
    first.wait()
    code, _, err = outcome(second, seconds=60)
    assert code != 0 and "Traceback" not in err
    assert "restem: the connection to the other processes of this run is lost" in err


# --- a whole run --------------------------------------------------------------------------------------------------------------

RECIPE = """
iterations = 1

[model]
base = "{base}"
dtype = "float32"
device = "cpu"

[task]
name = "{folder}/sums.jsonl"
verifier = "{folder}/grader.py:likes"
train = 6
val = 4
test = 4

[prompt]
style = "few-shot"

[generate]
samples = 3
max_tokens = 8

[improve]
epochs = 1
learning_rate = 1e-4
val_samples = 3
{improve}

[evaluate]
k = [1, 2]
train_samples = 2

[engine]
shard_samples = 6
"""


@pytest.fixture(scope="module")
def recipe(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A tiny model, a tiny task, and a verifier that likes every other completion."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"question": f"{number} + {number * 7 % 12}?", "answer": str(number)} for number in range(30)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "grader.py").write_text("def likes(problem, completion):\n    return sum(completion.encode()) % 2 == 0\n")
    base = save(tiny(), folder / "base")
    improve = 'lora_rank = 4\nparallel = "shard"'
    (folder / "recipe.toml").write_text(RECIPE.format(base=base, folder=folder, improve=improve))
    return folder / "recipe.toml"


def test_a_run_in_two_processes_draws_the_samples_of_one(recipe: Path, tmp_path: Path) -> None:
    """Bit for bit while it samples the base: D_val, test and E-step. With a sharded LoRA it trains and goes on to the end."""
    running = start(*TORCHRUN, "-m", "restem.cli", "run", recipe, "--out", tmp_path / "two")
    with Run(load_recipe(recipe), tmp_path / "one", quiet=True) as opened:
        rest_em(opened)
    code, _, err = outcome(running, seconds=240)
    assert code == 0, err
    base = [path.parent.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("samples")]
    stages = [stage for stage in base if stage.parts[0] == "iter-00" or stage == Path("iter-01")]
    assert len(stages) == 4
    for stage in base:
        one, two = (by_key(tmp_path / which / stage) for which in ("one", "two"))
        assert one.keys() == two.keys()
        if stage in stages:
            assert one == two
    assert read_json(tmp_path / "two" / "result.json")["iterations"][1]["kept"] > 0
    assert (tmp_path / "two" / "iter-01" / "improve" / "interval-1" / "adapter").is_dir()


def test_another_process_opens_the_sampler_that_the_first_one_would(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent to it, unpickled, draws what the first one's own sampler draws; with another prompt than the run's, too."""
    loaded = load_recipe(recipe)
    task = task_of(loaded)
    backend = open_backend(loaded, task.prompt, tmp_path, say=lambda text: None)
    monkeypatch.setattr(of_this_run(), "count", 2)
    held: dict[str, Any] = {}
    for prompt in (None, Prompt(instruction="Add.", exemplars=task.prompt.exemplars)):
        sampler = backend.open_sampler(backend.base, prompt)
        assert isinstance(sampler, SharedSampler)
        owed = [Owed(problem.id, index) for problem in task.test for index in range(2)]
        drawn = [
            sorted(opened.sample(task.test, owed, Decoding(max_tokens=6), stream="s"), key=lambda s: (s.problem_id, s.index))
            for opened in (sampler.own(), pickle.loads(pickle.dumps(sampler.elsewhere))(held))
        ]
        assert len(drawn[0]) == 8 and drawn[0] == drawn[1]


def by_key(stage: Path) -> dict[tuple[str, int], Any]:
    return {(row["problem_id"], row["index"]): row for row in part_rows(stage)}


# --- devices ------------------------------------------------------------------------------------------------------------------


def test_one_device_for_several_processes_is_refused_in_one_sentence(recipe: Path, tmp_path: Path) -> None:
    command = ("-m", "restem.cli", "run", recipe, "--out", tmp_path / "out", "--set", "model.device=cuda:1")
    code, _, err = outcome(start(*command, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0"))
    assert (code, err.count("restem: ")) == (1, 1)
    assert 'model.device = "cuda:1" names one device, and there are 2 processes: say "cuda"' in err
    assert not (tmp_path / "out").exists()


def test_each_process_takes_the_card_of_its_own_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [Processes().device(kind) for kind in ("cuda", "cpu")] == ["cuda:3", "cpu"]


# --- a model without weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2"])
def test_an_empty_model_is_the_loaded_one_but_for_its_weights(tmp_path: Path, name: str) -> None:
    """Buffers that are in no file, settings, and which weights are tied."""
    folder = save(tiny(name), tmp_path / "base")
    loaded = models.load_model(folder, dtype=torch.float32)
    empty = empty_model(folder, dtype=torch.float32, trust_remote_code=False)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    shapes = [{key: (weight.shape, weight.dtype) for key, weight in model.named_parameters()} for model in (loaded, empty)]
    assert shapes[0] == shapes[1]
    buffers = [dict(model.named_buffers()) for model in (loaded, empty)]
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(buffers[0][key], buffers[1][key]) for key in buffers[0])
    assert loaded.generation_config.to_dict() == empty.generation_config.to_dict()
