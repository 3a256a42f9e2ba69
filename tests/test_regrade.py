"""`restem grade`: a corrected verifier replays over old samples, and says what changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from restem.errors import RestemError
from restem.estep import read_stage
from restem.regrade import regrade
from restem.verifiers.math.second import hendrycks, math_verify
from toy_runs import run as toy_run

STRICT = """
from restem.types import Grade

def verify(problem, completion):
    return Grade(reward=0.0, answer="none", reason="incorrect", note="this one is never pleased")
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return toy_run(tmp_path / "run")


def test_the_same_verifier_changes_nothing(run: Path) -> None:
    found = regrade(run)
    assert found["samples"] > 100 and found["changed"] == 0 and not found["written"]


def test_another_verifier_shows_its_changes_and_writes_them_only_when_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "strict.py").write_text(STRICT)
    before = read_stage(run / "iter-01")
    correct = sum(sample.reward == 1 for stage in run.glob("iter-*/**/grades") for sample in read_stage(stage.parent))
    found = regrade(run, verifier=f"{tmp_path / 'strict.py'}:verify")
    assert found["changes"]["correct -> incorrect"] == correct > 0
    assert found["first_changes"][0]["now"]["note"] == "this one is never pleased"
    assert read_stage(run / "iter-01") == before
    regrade(run, verifier=f"{tmp_path / 'strict.py'}:verify", write=True)
    assert {sample.reward for sample in read_stage(run / "iter-01")} == {0.0}


def test_the_command_prints_a_table_or_json(run: Path) -> None:
    command = [sys.executable, "-m", "restem.cli", "grade", str(run)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "samples graded again" in text and "; 0 changed" in text
    line = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    assert json.loads(line)["changed"] == 0


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RestemError, match=r"is no run directory"):
        regrade(tmp_path)


@pytest.mark.parametrize(
    ("gold", "answer", "text", "symbolic"),
    [
        (r"\frac{1}{2}", "0.5", True, True),
        (r"\frac12", r"\dfrac{1}{2}", True, True),
        ("x=5", "5", True, True),
        ("10", r"10\text{ cm}", True, True),
        (r"50\%", "50", True, True),
        ("x+1", "1+x", False, True),
        ("3", "4", False, False),
    ],
)
def test_second_opinions(gold: str, answer: str, text: bool, symbolic: bool) -> None:
    assert hendrycks(gold, answer) is text
    assert math_verify(gold, answer) is symbolic
