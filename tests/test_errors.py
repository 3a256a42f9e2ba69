"""What a user can mend gets one message that says what, where and what to do, an exit code, and a run that can go on."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from restem.cli import main
from toy_runs import MINI, cli, content, run, write_recipe, write_verifiers

Restem = Callable[..., "Said"]


class Said(str):
    """What went to stderr."""

    code: int


@pytest.fixture
def restem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Restem:
    """The console script in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["restem", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = Said(capsys.readouterr().err)
        said.code = int(stop.value.code or 0)
        return said

    return call


def assert_clear(said: Said, *parts: str) -> None:
    """One message, no traceback, exit code 1, and every part in it."""
    assert said.code == 1
    assert "Traceback" not in said
    assert said.count("restem: ") == 1 and said.startswith("restem: ")
    for part in parts:
        assert part in said


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- the recipe ------------------------------------------------------------------------------------------------------------


def test_a_misspelt_key_is_named_with_the_likely_one(restem: Restem, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, MINI.replace("samples = 4", "sampels = 4", 1))
    assert_clear(restem("run", recipe), str(recipe), "generate.sampels: no such key", 'Did you mean "generate.samples"?')
    assert_clear(restem("run", recipe, "--set", "itertions=2"), "itertions: no such key", 'Did you mean "iterations"?')
    assert not (tmp_path / "runs").exists()


def test_a_value_of_the_wrong_type_is_shown_with_what_the_key_is(restem: Restem, tmp_path: Path) -> None:
    said = restem("run", write_recipe(tmp_path), "--set", "generate.samples=many", "--set", "improve.stop=never")
    assert_clear(
        said, "generate.samples = 'many'", "integer", "samples per problem", "improve.stop = 'never'", "'first' or 'best'"
    )


def test_values_that_could_only_fail_after_hours_are_refused_at_once(restem: Restem, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for k in ("[1]", "[]", "[0, 8]"):
        assert_clear(restem("run", recipe, "--set", f"evaluate.k={k}"), "evaluate.k", "pass@1 is never shown without pass@K")
    said = restem("run", recipe, "--set", "engine.trainer=lora9000")
    assert_clear(said, 'engine.trainer = "lora9000": there is no such trainer', "tree")


def test_a_set_without_a_value_shows_how_to_write_it(restem: Restem, tmp_path: Path) -> None:
    said = restem("run", write_recipe(tmp_path), "--set", "generate.samples")
    assert_clear(said, '--set "generate.samples" has no "="', "--set generate.samples=16")


def test_a_recipe_that_is_not_toml_names_the_line(restem: Restem, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "iterations = 3\nseed == 4\n")
    assert_clear(restem("run", recipe), f"{recipe} is not valid TOML", "line 2")
    recipe.write_bytes(b"\xff\xfe\x00\x01")
    assert_clear(restem("run", recipe), f"{recipe} is not a text file in UTF-8")


def test_a_missing_recipe_names_the_built_in_ones(restem: Restem) -> None:
    assert_clear(restem("run", "tory"), 'there is no recipe "tory"', 'Did you mean "toy"?', "arithmetic")


# --- the model, the data, the names ----------------------------------------------------------------------------------------


def test_a_missing_model_directory_says_what_may_be_given(restem: Restem, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    said = restem("run", recipe, "--set", "model.base=./nowhere", "--out", "run")
    assert_clear(said, 'there is no model "./nowhere"', '"embedded"')
    said = restem("run", recipe, "--set", "model.base=toy:tabel", "--out", "run")
    assert_clear(said, 'model.base = "toy:tabel"', '"toy:table"')
    assert restem("run", recipe, "--out", "run").code == 0  # the same folder, without another word


def test_a_directory_that_is_no_model_is_named(restem: Restem, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = restem("run", write_recipe(tmp_path), "--set", "model.base=./empty")
    assert_clear(said, "the model directory empty has no config.json", "save_pretrained")


def test_missing_data_is_named(restem: Restem, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    write_rows(tmp_path / "mine.jsonl", [{"question": "a", "answer": "1"}])
    said = restem("run", recipe, "--set", "task.name=mien.jsonl")
    assert_clear(said, "there is no file mien.jsonl", 'did you mean "mine.jsonl"?')
    said = restem("run", recipe, "--set", "task.name=gsm8k", "--set", "task.data=nowhere")
    assert_clear(said, "task.data = nowhere: there is no such folder", "one folder per set")


def test_wrong_columns_and_missing_references_are_named_with_the_columns_there_are(restem: Restem, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    data = write_rows(tmp_path / "mine.jsonl", [{"question": f"{i}?", "solution": "so"} for i in range(40)])
    said = restem("run", recipe, "--set", "task.name=mine.jsonl")
    assert_clear(said, 'mine.jsonl has no column "answer"', "question, solution", 'task.answer = "COLUMN"')
    write_rows(data, [{"question": f"{i}?", "answer": None} for i in range(40)])
    said = restem("run", recipe, "--set", "task.name=mine.jsonl")
    assert_clear(said, "none of the 40 rows of mine.jsonl has a reference", 'task.answer = "COLUMN"')


def test_an_unknown_task_verifier_or_sampler_is_named_with_those_there_are(restem: Restem, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    said = restem("run", recipe, "--set", "task.name=arithmetik", "--out", "run")
    assert_clear(said, 'no task and no file "arithmetik"', 'did you mean "arithmetic"?')
    said = restem("run", recipe, "--set", "task.verifier=maths", "--out", "run")
    assert_clear(said, 'there is no verifier "maths"', 'Did you mean "math"?', "file.py:function")
    said = restem("run", recipe, "--set", "engine.sampler=vlm", "--out", "run")
    assert_clear(said, 'engine.sampler = "vlm": there is no such sampler', "tree")
    assert restem("run", recipe, "--out", "run").code == 0  # none of them made the folder a run of the wrong recipe


# --- the run directory -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("errors") / "run", "iterations=0")


def test_nothing_is_overwritten_and_both_commands_are_given(restem: Restem, finished: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    before = content(finished)
    said = restem("run", recipe, "--set", "iterations=0", "--out", finished)
    command = f"restem run {recipe} --set iterations=0 --out {finished}"
    assert_clear(said, "holds a run already", f"{command} --resume\n", f"{command}-2")
    assert content(finished) == before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("Dear")
    said = restem("run", recipe, "--out", "letters")
    assert_clear(said, "letters is not empty", "--out letters-2")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["mother.txt"]
    assert_clear(restem("run", recipe, "--out", recipe), f"{recipe} is a file; give another --out")


def test_a_changed_recipe_is_refused_with_its_keys_and_a_command_that_works(
    restem: Restem, finished: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path)
    changed = ("--set", "iterations=0", "--set", "generate.samples=5", "--set", "evaluate.k=[1, 2]")
    said = restem("run", recipe, *changed, "--out", finished, "--resume")
    assert_clear(said, "generate.samples: 4 in the run, 5 now", "evaluate.k: [1, 4] in the run, [1, 2] now", f"{finished}-2")
    assert "seed" not in said
    (line,) = [line for line in said.splitlines() if "to go on with it" in line]
    assert restem(*shlex.split(line.partition(": ")[2])[1:]).code == 0


def test_changed_data_is_refused_on_resume(restem: Restem, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    data = write_rows(tmp_path / "mine.jsonl", [{"question": f"{i} + 1?", "answer": i + 1} for i in range(40)])
    arguments = ("run", recipe, "--set", "task.name=mine.jsonl", "--set", "iterations=0", "--out", "run")
    assert restem(*arguments).code == 0
    rows = data.read_text()
    write_rows(data, [{"question": f"{i} + 1?", "answer": i + 2} for i in range(40)])
    said = restem(*arguments, "--resume")
    assert_clear(said, "train", "problems are not those that run was made with", "--out run-2")
    data.write_text(rows)
    assert restem(*arguments, "--resume").code == 0


def test_a_second_process_on_the_same_run_is_refused(restem: Restem, finished: Path, tmp_path: Path) -> None:
    with (finished / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        said = restem("run", write_recipe(tmp_path), "--set", "iterations=0", "--out", finished, "--resume")
    assert_clear(said, f"{finished} is in use by another process (process {os.getpid()} on ", "Wait for it")
    assert restem("run", write_recipe(tmp_path), "--set", "iterations=0", "--out", finished, "--resume").code == 0


def test_a_folder_without_a_run_or_scores_is_named(restem: Restem, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert_clear(restem("compare", "a", "a"), "a is neither a finished run nor a folder with scores.json")


# --- the machine: a full disk, Ctrl-C --------------------------------------------------------------------------------------


def assert_resumes_to_the_same_run(out: Path, arguments: Sequence[object], tmp_path: Path) -> None:
    done = cli(*arguments, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    whole = cli(*arguments, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert content(out) == content(tmp_path / "whole")


@pytest.fixture
def quick(tmp_path: Path) -> tuple[object, ...]:
    """A run whose verifier starts fast."""
    return ("run", write_recipe(tmp_path), "--set", f"task.verifier={write_verifiers(tmp_path)}:ends")


def test_a_full_disk_is_said_in_one_line_and_the_run_goes_on_later(quick: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "run"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # Python itself ignores SIGXFSZ

    done = cli(*quick, "--out", out, preexec_fn=limit)
    assert done.returncode == 1
    assert "restem: the disk is full" in done.stderr and "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert (out / "iter-00").is_dir() and not (out / "result.json").exists()
    assert not list(out.rglob(".tmp-*"))
    assert_resumes_to_the_same_run(out, quick, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_file_system_is_said_in_one_line_and_the_run_goes_on_later(quick: tuple[object, ...], tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = cli(*quick, "--out", small / "run")
        assert done.returncode == 1
        assert "restem: the disk is full" in done.stderr and "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        assert_resumes_to_the_same_run(small / "run", quick, tmp_path)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_ctrl_c_exits_130_and_the_run_goes_on_identically(quick: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "restem.cli", *map(str, quick), "--out", str(out)]

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which tests that a shell runs in the background ignore, and so would it

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        deadline = time.monotonic() + 60
        while not (out / "iter-00" / "val" / "samples").is_dir():  # early: the whole run takes a second or two
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == "" and "Traceback" not in stderr
    assert stderr.count("restem: interrupted") == 1 and "--resume" in stderr
    assert not (out / "result.json").exists()
    assert_resumes_to_the_same_run(out, quick, tmp_path)


# --- wrong usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "toy", "--samples", "4"], ["run", "toy", "extra"], ["fly"], ["evaluate", "toy"], ["run", "toy", "--out"]],
)
def test_wrong_flags_exit_2_and_name_what_was_wrong(restem: Restem, arguments: list[str]) -> None:
    said = restem(*arguments)
    assert said.code == 2
    assert "Error: " in said and "Traceback" not in said
