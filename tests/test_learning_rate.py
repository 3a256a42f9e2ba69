"""The learning rate that an unset key stands for: what it is, that it is said and recorded, and that old runs go on."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import toy_runs
from restem import Recipe, Run, load_recipe, rest_em
from restem.config import flatten
from restem.errors import RestemError
from restem.files import read_json
from restem.report import choices
from restem.report.facts import Facts
from restem.show import announce
from restem.tasks.of_recipe import task_of
from restem.training import TreeTrainer

UNSET = toy_runs.MINI.replace("learning_rate = 0.5\n", "")


def recipe(*overrides: str) -> Recipe:
    return load_recipe(tomllib.loads(UNSET), overrides)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [((), 1e-5), (("improve.lora_rank=8",), 1e-4), (("improve.learning_rate=3e-6", "improve.lora_rank=8"), 3e-6)],
)
def test_an_adapter_gets_ten_times_the_rate_of_all_weights_unless_the_recipe_says_one(
    changes: tuple[str, ...], expected: float
) -> None:
    read = recipe(*changes)
    assert read.improve.peak_learning_rate == expected == flatten(read)["improve.learning_rate"]
    assert TreeTrainer(read.improve).learning_rate(99, 100) == expected


def test_what_was_taken_is_said_before_the_run() -> None:
    def said(*changes: str) -> str:
        read = recipe(*changes)
        return announce(read, task_of(read), Path("out"))

    assert "  training: all weights, peak learning rate 1e-05 (improve.learning_rate is unset)" in said()
    assert "a LoRA adapter of rank 8, peak learning rate 0.0001 (improve.learning_rate is unset)" in said("improve.lora_rank=8")
    assert (
        "all weights, adamw-bfloat16, peak learning rate 3e-06\n"
        in said("improve.learning_rate=3e-6", "improve.optimiser=adamw-bfloat16") + "\n"
    )
    assert "training" not in said("iterations=0")


def test_it_is_recorded_and_reported(tmp_path: Path) -> None:
    with Run(recipe("iterations=1", "improve.lora_rank=8"), tmp_path / "run", quiet=True) as run:
        rest_em(run)
    assert read_json(tmp_path / "run" / "run.json")["learning_rate"] == 1e-4
    found = choices.of_run(Facts.read(tmp_path / "run"))[0]
    assert "improve.learning_rate = 0.0001" in found["values"] and 'improve.optimiser = "adamw"' in found["values"]


def test_a_run_made_with_the_number_goes_on_without_it_and_the_other_way_round(tmp_path: Path) -> None:
    with Run(recipe("improve.learning_rate=1e-5"), tmp_path / "run", quiet=True):
        pass
    with Run(recipe(), tmp_path / "run", quiet=True, resume=True):
        pass
    with Run(recipe("improve.learning_rate=1e-5"), tmp_path / "run", quiet=True, resume=True):
        pass
    with Run(recipe("improve.lora_rank=8", "improve.learning_rate=1e-5"), tmp_path / "lora", quiet=True):
        pass
    with pytest.raises(
        RestemError, match=r"improve.learning_rate: 1e-05 in the run, 0.0001 now(.|\n)*--set improve.learning_rate"
    ):
        Run(recipe("improve.lora_rank=8"), tmp_path / "lora", quiet=True, resume=True)
