"""What a run found, computed from its files alone: the rows of the table, the paired comparisons, and the warnings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from restem import evaluation
from restem.config import Recipe
from restem.errors import RestemError
from restem.estep import read_stage
from restem.files import read_json


def summarise(run: Path, recipe: Recipe | None = None) -> dict[str, Any]:
    """The content of result.json without the model; what is not there yet is None. Iteration 0 is the untouched base."""
    recipe = recipe or read_recipe(run)
    rows = [_row(run, number) for number in range(recipe.iterations + 1) if (run / f"iter-{number:02d}").is_dir()]
    measured = [row for row in rows if row["val"] is not None]
    best = max(measured, key=lambda row: (row["val"]["value"], -row["iteration"])) if measured else None
    return {
        "run": str(run),
        "iterations": rows,
        "best_iteration": best["iteration"] if best else None,
        "paired": best["paired"] if best else None,
        "warnings": warnings(rows),
    }


def read_recipe(run: Path) -> Recipe:
    """The recipe of a run directory."""
    if not (run / "run.json").is_file():
        raise RestemError(f"{run} holds no run (no run.json). Give the directory that `restem run` wrote to.")
    return Recipe.model_validate(read_json(run / "run.json")["recipe"])


def warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must not overlook: collapse (coverage or pass@K falling), no gain, and D_val against the test."""
    found = []
    for before, after in pairwise(rows):
        number = after["iteration"]
        if before["coverage"] is not None and after["coverage"] is not None and after["coverage"] < before["coverage"]:
            found.append(
                f"coverage fell from {before['coverage']:.1%} to {after['coverage']:.1%} in iteration {number}: the sampler "
                "solves fewer training problems than before. Often the last iteration to trust is the one before."
            )
        for task, scores in after["test"].items():
            for name, metric in scores["metrics"].items():
                old = before["test"].get(task, {"metrics": {}})["metrics"].get(name)
                if old and name not in ("pass@1", "pass@1 sampled") and metric["value"] < old["value"]:
                    found.append(
                        f"{name} on {task} fell from {old['value']:.1%} to {metric['value']:.1%} in iteration {number}: "
                        "less diverse solutions, or noise; see the intervals."
                    )
    last = rows[-1] if rows else None
    if last and last["iteration"] and last["paired"] and last["paired"]["p_value"] >= 0.05:
        found.append(f"this run did not show that it helped: on the test, {last['paired']['words']}.")
    if last and last["iteration"] and last["paired"] and last["val"] and rows[0]["val"]:
        gain = last["val"]["value"] - rows[0]["val"]["value"]
        if gain > 0 > last["paired"]["high"]:
            found.append("the reward on D_val rose while the test fell; D_val may be too small, or unlike the test.")
    return found


def form_and_substance(counts: dict[str, int]) -> dict[str, int]:
    """Greedy test samples in three kinds: correct, wrong in form (nothing readable, or cut off), wrong in substance."""
    form = sum(counts.get(reason, 0) for reason in ("no_answer", "truncated"))
    correct = counts.get("correct", 0)
    return {"correct": correct, "form": form, "wrong": counts.get("incorrect", 0)}


def _row(run: Path, number: int) -> dict[str, Any]:
    folder = run / f"iter-{number:02d}"
    selection = _read(folder / "selection.json") or {}
    candidate = _read(folder / "iteration.json") if number else _read(folder / "val" / "candidate.json")
    own = read_json(run / "run.json")["task"]["name"] if (run / "run.json").is_file() else ""
    files = sorted(folder.glob("eval/*/scores.json"), key=lambda file: (file.parent.name != own, file.parent.name))
    test = {file.parent.name: read_json(file) for file in files}  # the run's own task first
    return {
        "iteration": number,
        "kept": selection.get("kept"),
        "coverage": selection.get("coverage"),
        "at_limit": selection.get("at_limit"),
        "discarded": {k: v for k, v in selection.get("counts", {}).items() if k != "kept"} or None,
        "interval": candidate["interval"] if candidate else None,
        "trained": bool(candidate and candidate["interval"]),
        "train": _train_accuracy(run, number),
        "val": _interval(candidate),
        "test": test,
        "paired": _paired(run, number, list(test)),
    }


def _paired(run: Path, number: int, tasks: list[str]) -> dict[str, Any] | None:
    """Greedy test rewards of this iteration against the base's, on the same problems."""
    base = run / "iter-00" / "eval"
    for task in tasks:
        if number and (base / task / "scores.json").is_file():
            after = run / f"iter-{number:02d}" / "eval" / task / "greedy"
            found = evaluation.compare(read_stage(base / task / "greedy"), read_stage(after))
            return {"task": task, "iteration": number, "against": 0, **found}
    return None


def _train_accuracy(run: Path, number: int) -> dict[str, Any] | None:
    """Sampled accuracy of iteration i's model on the training problems: its own stage, or the E-step that follows it."""
    following = run / f"iter-{number + 1:02d}"
    if own := _read(run / f"iter-{number:02d}" / "train" / "accuracy.json"):
        return own  # type: ignore[no-any-return]
    if (following / "selection.json").is_file():
        return evaluation.as_dict(evaluation.mean_reward(read_stage(following)))
    return None


def _interval(candidate: dict[str, Any] | None) -> dict[str, Any] | None:
    if candidate is None:
        return None
    return {"value": candidate["reward"], **{key: candidate[key] for key in ("low", "high", "n")}}


def _read(path: Path) -> Any:
    return read_json(path) if path.is_file() else None
