"""`restem seeds`: runs that differ in their seed alone, as means over seeds with Student's interval; others are refused."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import Command, in_process
from restem.errors import RestemError
from restem.files import read_json, write_json
from restem.seeds import across_seeds, seeds_text, spread
from toy_runs import result, run, task_that_likes

T_2 = 4.302652729749461
"""The 97.5% quantile of Student's t with 2 degrees of freedom, (2 p - 1) sqrt(2 / (4 p (1 - p))) at p = 0.975."""
T_1 = 12.706204736174698
"""With 1 degree of freedom: tan(pi (p - 1/2))."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same recipe with seeds 0, 1 and 2; only read by the tests."""
    home = tmp_path_factory.mktemp("seeds")
    return [run(home / f"seed-{seed}", f"seed={seed}", "improve.learning_rate=0.9") for seed in range(3)]


@pytest.fixture
def copies(runs: list[Path], tmp_path: Path) -> list[Path]:
    """Runs to change."""
    return [Path(shutil.copytree(path, tmp_path / path.name)) for path in runs]


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process("seeds", monkeypatch, capsys, columns=200)


def metric(path: Path, iteration: int, name: str) -> dict[str, Any]:
    """Read without restem's own summary."""
    scores = read_json(path / f"iter-{iteration:02d}" / "eval" / "arithmetic" / "scores.json")
    return dict(scores["metrics"][name])


def change_recipe(path: Path, section: str, key: str, value: Any) -> None:
    facts = read_json(path / "run.json")
    facts["recipe"][section][key] = value
    write_json(path / "run.json", facts)


# --- the interval ----------------------------------------------------------------------------------------------------------


def test_the_quantiles_in_this_file_are_students() -> None:
    p = 0.975
    assert pytest.approx((2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))) == T_2
    assert pytest.approx(math.tan(math.pi * (p - 0.5))) == T_1


def test_the_interval_of_three_seeds_by_hand_row_54() -> None:
    found = spread([0.1, 0.2, 0.6])  # mean 0.3, squared deviations 0.04 + 0.01 + 0.09, so s^2 = 0.07
    half = T_2 * math.sqrt(0.07) / math.sqrt(3)
    assert found.mean == pytest.approx(0.3)
    assert (found.low, found.high) == (pytest.approx(0.3 - half), pytest.approx(0.3 + half))
    assert (found.min, found.max, found.n) == (0.1, 0.6, 3)


def test_two_seeds_have_a_wide_interval_that_is_not_cut_to_what_a_share_can_be() -> None:
    found = spread([0.2, 0.4])  # s / sqrt(2) is half of the distance
    assert (found.low, found.high) == (pytest.approx(0.3 - T_1 * 0.1), pytest.approx(0.3 + T_1 * 0.1))
    assert found.low is not None and found.low < 0


def test_one_seed_has_no_interval_equal_ones_have_none_to_speak_of_and_no_seed_is_an_error() -> None:
    assert spread([0.4]) == (0.4, None, None, 0.4, 0.4, 1)
    assert spread([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25, 0.25, 0.25, 3)
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_the_interval_of_three_seeds_holds_the_true_mean_about_as_often_as_it_says() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        found = spread([draw.gauss(0.3, 0.05) for _ in range(3)])
        assert found.low is not None and found.high is not None
        held += found.low <= 0.3 <= found.high
    assert 0.93 < held / 2000 < 0.97  # four standard errors


# --- the table -------------------------------------------------------------------------------------------------------------


def test_every_figure_can_be_recomputed_from_the_runs_row_54(runs: list[Path]) -> None:
    found = across_seeds(runs)
    assert [(r["seed"], r["accepted"]) for r in found["runs"]] == [
        (seed, result(path)["accepted"]["iteration"]) for seed, path in enumerate(runs)
    ]
    names = ["pass@1", "pass@1 sampled", "pass@4"]
    assert [(row["task"], row["metric"], row["iteration"]) for row in found["scores"]] == [
        ("arithmetic", name, iteration) for name in names for iteration in range(3)
    ]
    for row in found["scores"]:
        values = [metric(path, row["iteration"], row["metric"])["value"] for path in runs]
        mean = sum(values) / 3
        half = T_2 * math.sqrt(sum((value - mean) ** 2 for value in values) / 2 / 3)
        assert (row["mean"], row["n"], row["problems"]) == (pytest.approx(mean), 3, [20, 20])
        assert (row["low"], row["high"]) == (pytest.approx(mean - half), pytest.approx(mean + half))
        assert (row["min"], row["max"]) == (min(values), max(values))
    assert any(row["min"] < row["max"] for row in found["scores"]), "the seeds differ, or nothing was tested here"


def test_the_gain_is_that_of_each_seeds_own_accepted_iteration(runs: list[Path]) -> None:
    found = across_seeds(runs)
    assert [row["metric"] for row in found["gains"]] == ["pass@1", "pass@1 sampled", "pass@4"]
    for row in found["gains"]:
        gains = []
        for path in runs:
            accepted = result(path)["accepted"]["iteration"]
            gains.append(metric(path, accepted, row["metric"])["value"] - metric(path, 0, row["metric"])["value"])
        assert row["mean"] == pytest.approx(sum(gains) / 3)
        assert (row["gained"], row["n"]) == (sum(gain > 0 for gain in gains), 3)
        assert (row["min"], row["max"]) == (min(gains), max(gains))


def test_it_says_whether_the_test_problems_differ_too(runs: list[Path], tmp_path: Path) -> None:
    assert any("arithmetic differ between the seeds" in note for note in across_seeds(runs)["notes"])
    task = task_that_likes(tmp_path, train=0, val=0)
    same = [run(tmp_path / str(seed), f"seed={seed}", "iterations=1", task=task) for seed in range(2)]
    notes = across_seeds(same)["notes"]
    assert any("liking are the same for all seeds" in note for note in notes)
    assert any("two seeds say little" in note for note in notes)


def test_what_was_not_measured_in_a_run_is_not_made_up(copies: list[Path]) -> None:
    value = read_json(copies[0] / "result.json")
    value["iterations"][1]["test"]["arithmetic"]["metrics"]["pass@4"] |= {"value": math.nan, "n": 0}
    value["accepted"]["iteration"] = 2
    value["iterations"][2]["test"] = {}
    write_json(copies[0] / "result.json", value)
    found = across_seeds(copies)
    seeds = {(row["metric"], row["iteration"]): row["n"] for row in found["scores"]}
    assert seeds["pass@4", 1] == 2 and seeds["pass@1", 1] == 3 and seeds["pass@1", 2] == 2
    assert {row["n"] for row in found["gains"]} == {2}
    assert any(str(copies[0]) in note and "in no gain" in note for note in found["notes"])
    json.dumps(found, allow_nan=False)


def test_a_run_that_accepted_its_base_gained_nothing_and_counts(copies: list[Path]) -> None:
    value = read_json(copies[0] / "result.json")
    value["accepted"]["iteration"] = 0
    write_json(copies[0] / "result.json", value)
    for row in across_seeds(copies)["gains"]:
        assert row["n"] == 3 and row["gained"] < 3 and row["min"] <= 0 <= row["max"]


def test_without_iterations_there_is_no_gain_to_speak_of(tmp_path: Path) -> None:
    bases = [run(tmp_path / str(seed), f"seed={seed}", "iterations=0") for seed in range(2)]
    found = across_seeds(bases)
    assert {row["iteration"] for row in found["scores"]} == {0} and found["gains"] == []
    assert "gained" not in seeds_text(found)


# --- the command -----------------------------------------------------------------------------------------------------------


def test_json_is_one_line_with_what_the_function_found(runs: list[Path], seeds: Command) -> None:
    code, out, _ = seeds(*runs, "--json")
    assert code == 0 and out.count("\n") == 1
    assert json.loads(out) == across_seeds(runs)


def test_the_table_shows_n_mean_and_interval_row_54(runs: list[Path], seeds: Command) -> None:
    code, out, _ = seeds(*runs)
    assert code == 0
    found = across_seeds(runs)
    accepted = [r["accepted"] for r in found["runs"]]
    assert f"seed (accepted iteration): 0 ({accepted[0]}), 1 ({accepted[1]}), 2 ({accepted[2]})" in out
    base, gain = found["scores"][0], found["gains"][0]
    score = f"{100 * base['mean']:.1f} [{100 * base['low']:.1f}, {100 * base['high']:.1f}]"
    line = next(line for line in out.splitlines() if line.startswith("arithmetic  pass@1 (greedy)") and score in line)
    assert line.split()[3] == "0" and line.split()[-2:] == ["3", "20"]
    gains = f"{100 * gain['mean']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
    line = next(line for line in out.splitlines() if gains in line)
    assert line.endswith(f"{gain['gained']} of 3")
    assert "Student's t" in out
    _, out, _ = seeds(*runs, "--markdown")
    assert f"| arithmetic | pass@1 (greedy) | 0 | {score} |" in out


# --- what is refused -------------------------------------------------------------------------------------------------------


def test_one_run_is_refused(runs: list[Path], seeds: Command) -> None:
    code, out, err = seeds(runs[0])
    assert code == 1 and not out
    assert err.startswith("restem: ") and "Traceback" not in err
    assert str(runs[0]) in err and "two or more" in err and "--set seed=1" in err


def test_the_same_seed_twice_is_refused(runs: list[Path], copies: list[Path]) -> None:
    with pytest.raises(RestemError, match=r"both have seed 1.*counts once"):
        across_seeds([runs[0], runs[1], copies[1]])


def test_runs_of_different_recipes_are_refused_with_every_key_that_differs(copies: list[Path]) -> None:
    change_recipe(copies[2], "improve", "learning_rate", 0.1)
    change_recipe(copies[2], "evaluate", "k", [1, 4, 8])
    with pytest.raises(RestemError) as refused:
        across_seeds(copies)
    said = str(refused.value)
    assert f"improve.learning_rate: 0.9 in {copies[0]}, 0.1 in {copies[2]}" in said
    assert f"evaluate.k: [1, 4] in {copies[0]}, [1, 4, 8] in {copies[2]}" in said
    assert "only the seed may differ" in said and "  seed:" not in said


def test_runs_from_other_base_weights_are_refused(copies: list[Path]) -> None:
    write_json(copies[1] / "run.json", {**read_json(copies[1] / "run.json"), "base_fingerprint": "another"})
    with pytest.raises(RestemError, match=r"different base weights \(\w+ and another\)"):
        across_seeds(copies)


def test_an_unfinished_run_and_a_folder_that_is_none_are_refused(copies: list[Path], tmp_path: Path) -> None:
    (copies[1] / "result.json").unlink()
    with pytest.raises(RestemError, match=r"(?s)is not finished.*--resume") as refused:
        across_seeds(copies)
    assert str(copies[1]) in str(refused.value)
    with pytest.raises(RestemError, match="holds no run"):
        across_seeds([copies[0], tmp_path / "nothing"])
