"""The paper's ablations are settings of an ordinary run (section 5.3 of the paper; recipes/math.toml names them)."""

from __future__ import annotations

import json
from pathlib import Path

from restem.files import read_json
from toy_runs import result, run


def test_one_iteration_with_three_times_the_samples_and_either_limit_row_38(tmp_path: Path) -> None:
    kept = {}
    for limit in (10, 30):
        settings = ("iterations=1", "generate.samples=36", f"select.max_per_problem={limit}")
        where = run(tmp_path / str(limit), *settings)
        selection = read_json(where / "iter-01" / "selection.json")
        assert sum(selection["counts"].values()) == 12 * 36
        assert read_json(where / "run.json")["recipe"]["select"]["max_per_problem"] == limit
        kept[limit] = selection["kept"]
    assert kept[10] <= 12 * 10 and kept[10] < kept[30], "the limit of 10 binds here"


def test_restart_and_continue_are_both_scored_on_the_task_and_on_its_neighbour_row_41(tmp_path: Path) -> None:
    neighbour = tmp_path / "neighbour"
    neighbour.mkdir()
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(8)]
    (neighbour / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for start in ("base", "last"):
        found = result(run(tmp_path / start, f"improve.start_from={start}", f'evaluate.tasks=["{neighbour}"]'))
        assert [list(row["test"]) for row in found["iterations"]] == [["arithmetic", "neighbour"]] * 3
        starts = [read_json(tmp_path / start / f"iter-0{n}" / "improve" / "start.json")["fingerprint"] for n in (1, 2)]
        assert (starts[0] == starts[1]) == (start == "base")
