"""`benchmarks.gpu` runs on a CPU with everything small: each piece says what it found, and one that fails ends no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MISSING = ("duckdb", "math_verify", "gguf", "pytest", "tiny_models")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What a run says, by piece, on a machine without the packages that it is not to need."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("gpu")
    for name in MISSING:
        (folder / f"{name}.py").write_text(f'raise ImportError("{name} is not carried")')
    pieces = "float32,bfloat16,ceilings,embedded,sampling-7b,training-few-shot,7b-lora,7b-whole"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--pieces", pieces]
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "src")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RESTEM_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [*command, "--out", str(folder / "out.jsonl")], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / "out.jsonl").read_text().splitlines():
        facts = json.loads(line)
        found.setdefault(facts["piece"], []).append(facts)
        assert f"{facts['piece']}: {facts['text']}" in done.stdout, "each result has a line for people"
    assert set(found) == set(pieces.split(","))
    return found


def test_a_piece_that_fails_ends_no_other(lines: dict[str, list[dict[str, Any]]]) -> None:
    assert [piece for piece, found in lines.items() if any("error" in facts for facts in found)] == ["embedded"]
    assert "--model DIR" in lines["embedded"][0]["error"]


def test_the_tree_is_right_in_the_trials(lines: dict[str, list[dict[str, Any]]]) -> None:
    for dtype in ("float32", "bfloat16"):
        assert [(facts["ok"], facts["gradient"]["dtype"]) for facts in lines[dtype]] == [(True, dtype)] * 2


def test_speeds_are_given_beside_those_of_the_peers(lines: dict[str, list[dict[str, Any]]]) -> None:
    assert lines["ceilings"][0]["copy_tb_s"] > 0
    drawn = [facts for facts in lines["sampling-7b"] if "tokens_s" in facts]
    assert [facts["rows"] for facts in drawn] == [16, "auto"] and all(facts["generate"] > 0 for facts in drawn)
    rows, tree = lines["training-few-shot"]
    assert rows["target_tokens_s"] > 0 and tree["target_tokens_s"] > 0
    assert tree["same_loss"], "both train the same model on the same examples"


def test_a_large_base_makes_a_step_and_a_d_val(lines: dict[str, list[dict[str, Any]]]) -> None:
    for how in ("lora", "whole"):
        assert [facts["what"] for facts in lines[f"7b-{how}"]] == ["step", "D_val"]
