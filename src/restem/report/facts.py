"""What the report says first: the run's table, the iteration that was accepted, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from restem.config import Recipe
from restem.errors import RestemError
from restem.estep import read_stage
from restem.evaluation import as_dict
from restem.files import read_json
from restem.report.text import interval, percent
from restem.rundir import read_problems
from restem.statistics import NOISE_LEVEL
from restem.statistics import interval as interval_of
from restem.summary import read_recipe, summarise
from restem.types import Problem, Sample


def scored_metrics(scores: dict[str, Any]) -> dict[str, Any]:
    """The metrics of scores.json, for showing: pass@1 is refused without a pass@K (K > 1) to stand beside it."""
    metrics: dict[str, Any] = scores["metrics"]
    if not any(name.startswith("pass@") and name.removeprefix("pass@").isdigit() and name != "pass@1" for name in metrics):
        raise RestemError(
            f"the scores of {scores['model']} on {scores['task']} hold pass@1 but no pass@K ({', '.join(metrics)}), and the "
            "one is not shown without the other: more right first answers may hide fewer solvable problems. "
            "Evaluate with a K above 1, such as evaluate.k = [1, 8]."
        )
    return metrics


def largest_k(metrics: dict[str, Any]) -> str:
    """ "pass@8": the metric that stands beside pass@1."""
    return max((name for name in metrics if name.removeprefix("pass@").isdigit()), key=lambda name: int(name[5:]))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A run directory, read."""

    path: Path
    run: dict[str, Any]
    """run.json."""
    recipe: Recipe
    summary: dict[str, Any]
    result: dict[str, Any] | None
    """result.json; None = the run is not finished."""

    @classmethod
    def read(cls, path: Path) -> Facts:
        recipe = read_recipe(path)
        result = path / "result.json"
        return cls(
            path=path,
            run=read_json(path / "run.json"),
            recipe=recipe,
            summary=summarise(path, recipe),
            result=read_json(result) if result.is_file() else None,
        )

    def at(self, iteration: int) -> Path:
        return self.path / f"iter-{iteration:02d}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.summary["iterations"]
        return rows

    @property
    def accepted(self) -> int | None:
        """The iteration whose model is the run's; of an unfinished run, the best on D_val so far."""
        found = self.result["accepted"]["iteration"] if self.result else self.summary["best_iteration"]
        return None if found is None else int(found)

    @property
    def done(self) -> int:
        """Iterations whose M-step has ended."""
        return sum(1 for row in self.rows if row["iteration"] and row["val"] is not None)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for row in self.rows for task in row["test"]))

    @property
    def task(self) -> str | None:
        """The task on which the base and the accepted iteration are compared."""
        return self.tasks[0] if self.tasks else None

    def row(self, iteration: int | None) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["iteration"] == iteration), None)

    def metrics(self, iteration: int | None, task: str | None) -> dict[str, Any] | None:
        row = self.row(iteration)
        return scored_metrics(row["test"][task]) if row and task in row["test"] else None

    def selection(self, iteration: int) -> dict[str, Any] | None:
        file = self.at(iteration) / "selection.json"
        return read_json(file) if file.is_file() else None

    @cached_property
    def test_problems(self) -> dict[str, Problem]:
        file = self.path / "problems" / f"test-{self.task}.parquet"
        return {problem.id: problem for problem in read_problems(file)} if file.is_file() else {}

    def test_samples(self, iteration: int, how: str) -> list[Sample]:
        """The "greedy" or "sampled" test samples of an iteration; none if it was not evaluated."""
        folder = self.at(iteration) / "eval" / str(self.task)
        return read_stage(folder / how) if (folder / "scores.json").is_file() else []

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(task, metric) of the table's test columns, pass@1 first."""
        found = [(task, name) for task in self.tasks for row in self.rows for name in row["test"].get(task, _EMPTY)["metrics"]]
        return list(dict.fromkeys(found))

    @property
    def headings(self) -> list[str]:
        several = len(self.tasks) > 1
        words = {"pass@1": "pass@1 (greedy)", "pass@1 sampled": "pass@1 (sampled)"}
        tests = [
            f"{task}: {words.get(name, name)}" if several else f"test {words.get(name, name)}" for task, name in self.columns
        ]
        return ["iteration", "kept", "coverage", "train accuracy", "D_val reward", *tests]

    def table(self) -> Iterator[dict[str, Any]]:
        """Rows of the table: the name, what was kept, and the metrics in the order of the headings."""
        for row in self.rows:
            number = row["iteration"]
            selection = self.selection(number)
            tests = [(self.metrics(number, task) or {}).get(name) for task, name in self.columns]
            yield {
                "name": "base" if not number else str(number),
                "is_accepted": number == self.accepted,
                "is_carried": bool(number and row["val"] is not None and not row["trained"]),
                "selection": selection,
                "drawn": sum(selection["counts"].values()) if selection else None,
                "metrics": [_coverage(selection), row["train"], row["val"], *tests],
            }

    @property
    def tone(self) -> str:
        """ "good", "bad", or "open" (within noise, unfinished, nothing to compare)."""
        row = self.row(self.accepted)
        paired = row["paired"] if row else None
        if not paired or self.result is None or paired["p_value"] >= NOISE_LEVEL or not paired["difference"]:
            return "open"
        return "good" if paired["difference"] > 0 else "bad"

    @property
    def verdict(self) -> list[str]:
        """One to three honest sentences."""
        return list(self._verdict())

    def _verdict(self) -> Iterator[str]:
        wanted = self.recipe.iterations
        if self.result is None:
            yield f"This run is not finished: {self.done} of {wanted} iterations are done. Below is what its files hold so far."
        accepted, task = self.accepted, self.task
        before = self.metrics(0, task)
        if accepted is None or before is None or task is None:
            yield "Nothing can be compared yet: the base has not been evaluated."
            return
        base = f"the base solves {interval(before['pass@1'])} greedily and {self._passes(before)}"
        if wanted == 0:
            yield f"0 iterations: nothing was trained. On {task}, {base}."
            return
        if accepted == 0:
            yield (
                "It did not help: no iteration beat the base on D_val."
                if self.result
                else "No iteration beat the base on D_val yet."
            )
            yield f"The accepted model is the base, unchanged. On {task}, {base}."
            return
        row, after = self.row(accepted), self.metrics(accepted, task)
        reward = interval(row["val"] if row else None)
        chosen = f"Iteration {accepted} was chosen by its reward on D_val ({reward}), not by the test."
        if not row or not row["paired"] or after is None:
            yield f"Whether it helped was not measured: the accepted iteration was not evaluated on test problems. {chosen}"
            return
        paired = row["paired"]
        opening = {"good": "It helped.", "bad": "It made the model worse.", "open": "This run did not show that it helped."}
        if self.result is not None:
            yield opening[self.tone]
        yield (
            f"Greedy pass@1 on {task} went from {percent(before['pass@1'])} to {percent(after['pass@1'])}, {paired['words']}; "
            f"{self._passes(before)} became {self._passes(after).removeprefix(largest_k(after) + ' ')}."
        )
        yield chosen

    def _passes(self, metrics: dict[str, Any]) -> str:
        name = largest_k(metrics)
        return f"{name} {interval(metrics[name])}"


def _coverage(selection: dict[str, Any] | None) -> dict[str, Any] | None:
    if selection is None:
        return None
    covered = selection["covered"]
    return as_dict(interval_of([1.0] * covered + [0.0] * (selection["problems"] - covered)))


def share(flags: Sequence[bool]) -> dict[str, Any]:
    """A share with its interval."""
    return as_dict(interval_of([float(flag) for flag in flags]))


_EMPTY: dict[str, Any] = {"metrics": {}}
