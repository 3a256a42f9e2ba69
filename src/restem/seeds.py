"""Runs of one recipe that differ in their seed, in one table (`restem seeds`): how much of a gain is luck?

The paper has one run per experiment. Here the run is the unit: n is the number of seeds, and the interval is that of the mean
over seeds. What a newcomer would get wrong: the interval of a single run is about other problems with this seed, the one here
about other seeds; neither contains the other, and averaging the former does not give the latter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from restem.config import Recipe, flatten
from restem.errors import RestemError
from restem.files import read_json
from restem.rundir import FREE_TO_CHANGE
from restem.show import markdown_table, table
from restem.summary import read_recipe

_MAY_DIFFER = {"seed", *FREE_TO_CHANGE} - {"iterations"}


class Spread(NamedTuple):
    """A figure over seeds, in its own unit."""

    mean: float
    low: float | None
    """Lower limit of the interval of the mean; None for a single seed, which says nothing about the others."""
    high: float | None
    min: float
    max: float
    n: int
    """How many seeds."""


def spread(values: Sequence[float], *, level: float = 0.95) -> Spread:
    """Give the mean over seeds with its confidence interval; `values` holds one number per seed.

    The limits are mean -+ t s / sqrt(n): s is the standard deviation with n - 1 in its denominator, t the (1 + level) / 2
    quantile of Student's distribution with n - 1 degrees of freedom. This takes the seeds as independent and their figures as
    about normal. With two seeds t is 12.7, and the interval is wide: two runs say little about how far others would be.

    Limits are not cut to [0, 1], for a cut interval would look better known than it is. Equal values give one of width 0.

    Raises ValueError without values.
    """
    n = len(values)
    if not n:
        raise ValueError("a spread over seeds needs at least one value")
    mean = fmean(values)
    half: float | None = None
    if n > 1:
        from scipy.stats import t

        half = float(t.ppf((1 + level) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Spread(
        mean=mean,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        min=min(values),
        max=max(values),
        n=n,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A finished run, read."""

    path: Path
    recipe: Recipe
    facts: dict[str, Any]
    """run.json."""
    result: dict[str, Any]
    """result.json."""

    @property
    def accepted(self) -> int:
        return int(self.result["accepted"]["iteration"])

    def metric(self, iteration: int, task: str, name: str) -> dict[str, Any] | None:
        """{"value", "low", "high", "n"}; None if it was not measured."""
        for row in self.result["iterations"]:
            if row["iteration"] == iteration and task in row["test"]:
                found: dict[str, Any] | None = row["test"][task]["metrics"].get(name)
                return found if found and found["n"] else None
        return None


def across_seeds(runs: Sequence[Path]) -> dict[str, Any]:
    """Put two or more finished runs together that differ in `seed` alone; plain values, ready for JSON.

    "runs": path, seed and accepted iteration of each. "scores": a row for each test task, metric and iteration. "gains": a row
    for each task and metric, of the differences (accepted iteration minus base) of the runs, with how many of them "gained".
    A row holds "mean", "low", "high", "min", "max", its "n" seeds, and "problems", the smallest and largest number of
    problems behind a value. "notes": what to know when reading them.

    Raises RestemError for a single run, an unfinished one, two of one seed, and runs of different recipes or base weights,
    with what differs.
    """
    if len(runs) < 2:
        raise RestemError(
            f"got {' '.join(map(str, runs)) or 'no run'}, and one seed says nothing about the spread over seeds.\n"
            "Give two or more runs of one recipe. Make another one with: restem run RECIPE --set seed=1 --out DIR"
        )
    opened = [_read(run) for run in runs]
    _check(opened)
    names = list(dict.fromkeys(pair for run in opened for pair in _names(run)))
    iterations = opened[0].recipe.iterations
    scores = [_score(opened, task, name, number) for task, name in names for number in range(iterations + 1)]
    gains = [_gain(opened, task, name) for task, name in names] if iterations else []
    return {
        "runs": [{"run": str(run.path), "seed": run.recipe.seed, "accepted": run.accepted} for run in opened],
        "scores": [row for row in scores if row],
        "gains": [row for row in gains if row],
        "notes": list(_notes(opened, list(dict.fromkeys(task for task, _ in names)))),
    }


def seeds_text(found: dict[str, Any], *, markdown: bool = False) -> str:
    """The outcome of `restem seeds` in words and two tables, in plain columns or as Markdown."""
    layout, gap = (markdown_table, "\n\n") if markdown else (table, "\n")
    runs = ", ".join(f"{run['seed']} ({run['accepted']})" for run in found["runs"])
    header = ["task", "metric", "iteration", "mean over seeds, %", "min", "max", "seeds", "problems"]
    lines = [
        f"{len(found['runs'])} runs of one recipe; seed (accepted iteration): {runs}",
        layout(header, [[*_what(row), str(row["iteration"]), *_cells(row)] for row in found["scores"]]),
        "[low, high] are 95% intervals of the mean over seeds (Student's t, seeds - 1 degrees of freedom).",
    ]
    if found["gains"]:
        header = ["task", "metric", "mean gain, points", "min", "max", "seeds", "problems", "seeds that gained"]
        rows = [[*_what(row), *_cells(row, "+"), f"{row['gained']} of {row['n']}"] for row in found["gains"]]
        lines += ["From the base to the iteration that D_val accepted, within each seed:", layout(header, rows)]
    return gap.join([*lines, *(f"note: {words}" for words in found["notes"])])


def _read(path: Path) -> _Run:
    recipe = read_recipe(path)
    if not (path / "result.json").is_file():
        raise RestemError(
            f"{path} is not finished (no result.json), so its scores are not all there.\n"
            f"Go on with it: restem run RECIPE --out {path} --resume"
        )
    return _Run(path=path, recipe=recipe, facts=read_json(path / "run.json"), result=read_json(path / "result.json"))


def _check(runs: Sequence[_Run]) -> None:
    """RestemError unless the runs differ in their seed, and in nothing else that was chosen."""
    first = runs[0]
    more = f"Make another one with: restem run RECIPE --set seed={first.recipe.seed + 1} --out DIR"
    by_seed: dict[int, Path] = {}
    for run in runs:
        old, new = flatten(first.recipe), flatten(run.recipe)
        differing = [key for key in old if old[key] != new[key] and key not in _MAY_DIFFER]
        if differing:
            lines = [f"  {key}: {old[key]!r} in {first.path}, {new[key]!r} in {run.path}" for key in differing]
            raise RestemError(
                f"{first.path} and {run.path} are runs of different recipes; only the seed may differ:\n"
                + "\n".join(lines)
                + f"\n{more}"
            )
        weights = [one.facts["base_fingerprint"] for one in (first, run)]
        if weights[0] != weights[1]:
            raise RestemError(
                f"{first.path} and {run.path} started from different base weights ({weights[0]} and {weights[1]}); only the "
                f"seed may differ.\n{more}"
            )
        if run.recipe.seed in by_seed:
            raise RestemError(
                f"{by_seed[run.recipe.seed]} and {run.path} both have seed {run.recipe.seed}, and a seed counts once. Leave "
                f"one of them out.\n{more}"
            )
        by_seed[run.recipe.seed] = run.path


def _names(run: _Run) -> Iterator[tuple[str, str]]:
    """Each task and metric of a run's scores."""
    for row in run.result["iterations"]:
        for task, scores in row["test"].items():
            yield from ((task, name) for name in scores["metrics"])


def _score(runs: Sequence[_Run], task: str, name: str, iteration: int) -> dict[str, Any] | None:
    """A metric of one iteration over the runs; None if no run has it."""
    metrics = [metric for metric in (run.metric(iteration, task, name) for run in runs) if metric]
    if not metrics:
        return None
    return {"task": task, "metric": name, "iteration": iteration, **_row([metric["value"] for metric in metrics], metrics)}


def _gain(runs: Sequence[_Run], task: str, name: str) -> dict[str, Any] | None:
    """The runs' differences between the accepted iteration and the base; None if no run has both."""
    pairs = [(run.metric(0, task, name), run.metric(run.accepted, task, name)) for run in runs]
    both = [(before, after) for before, after in pairs if before and after]
    if not both:
        return None
    gains = [after["value"] - before["value"] for before, after in both]
    row = _row(gains, [metric for pair in both for metric in pair])
    return {"task": task, "metric": name, **row, "gained": sum(gain > 0 for gain in gains)}


def _row(values: Sequence[float], metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sizes = [metric["n"] for metric in metrics]
    return {**spread(values)._asdict(), "problems": [min(sizes), max(sizes)]}


def _notes(runs: Sequence[_Run], tasks: Sequence[str]) -> Iterator[str]:
    for task in tasks:
        if len({run.facts["problems"].get(f"test-{task}") for run in runs}) > 1:
            yield f"the test problems of {task} differ between the seeds: its intervals are about other problems too."
        else:
            yield f"the test problems of {task} are the same for all seeds: its intervals are about other seeds alone."
    if len(runs) == 2:
        yield "two seeds say little about their spread; that is why the intervals are wide."
    for run in runs:
        if run.accepted not in [row["iteration"] for row in run.result["iterations"] if row["test"]]:
            yield f"the accepted iteration of {run.path} was not tested (evaluate.every was off), so it is in no gain."


def _what(row: dict[str, Any]) -> list[str]:
    words = {"pass@1": "pass@1 (greedy)", "pass@1 sampled": "pass@1 (sampled)"}
    return [row["task"], words.get(row["metric"], row["metric"])]


def _cells(row: dict[str, Any], sign: str = "") -> list[str]:
    """Mean with its interval, min, max, seeds, problems; "+" writes every sign."""
    limits = "" if row["low"] is None else f" [{_percent(row['low'], sign)}, {_percent(row['high'], sign)}]"
    fewest, most = row["problems"]
    return [
        _percent(row["mean"], sign) + limits,
        _percent(row["min"], sign),
        _percent(row["max"], sign),
        str(row["n"]),
        str(most) if fewest == most else f"{fewest} to {most}",
    ]


def _percent(share: float, sign: str) -> str:
    text = f"{100 * share:{sign}.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text
