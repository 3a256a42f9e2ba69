"""The curves: per iteration (train, D_val, test) and per interval of the M-step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from restem.files import read_json
from restem.report.charts import Figure, Series, line_chart
from restem.report.facts import Facts, largest_k, scored_metrics
from restem.report.text import is_measured, points

BARS = "Bars are 95% intervals over n problems."


def of_iterations(facts: Facts) -> list[Figure]:
    """Train against D_val against test, then every test metric, for each task."""
    places = ["base" if not row["iteration"] else str(row["iteration"]) for row in facts.rows]
    figures = []
    for task in facts.tasks:
        tests = [scored_metrics(row["test"][task]) if task in row["test"] else {} for row in facts.rows]
        names = list(dict.fromkeys(name for metrics in tests for name in metrics))
        most = largest_k(dict.fromkeys(names))
        labels = {"pass@1": "pass@1, greedy", "pass@1 sampled": "pass@1, sampled"}
        test = {name: Series(name=labels.get(name, name), points=[metrics.get(name) for metrics in tests]) for name in names}
        learnt = [
            Series(name="train accuracy, sampled", points=[row["train"] for row in facts.rows]),
            Series(name="D_val reward, sampled", points=[row["val"] for row in facts.rows]),
            *(Series(name=f"test {test[name].name}", points=test[name].points) for name in ("pass@1", most)),
        ]
        axes: dict[str, Any] = {"x": "iteration", "y": "problems solved, %", "places": places}
        figures += [
            line_chart(f"Train, D_val and test ({task})", BARS, series=learnt, **axes),
            line_chart(f"Test metrics ({task})", BARS, series=list(test.values()), **axes),
        ]
    return figures


def gap(facts: Facts) -> str | None:
    """What training and test gained since the base, in words; None if there is nothing to compare."""
    base, row = facts.row(0), facts.row(facts.accepted)
    before, after = facts.metrics(0, facts.task), facts.metrics(facts.accepted, facts.task)
    if not (facts.accepted and base and row and before and after):
        return None
    pairs = [
        ("train accuracy", base["train"], row["train"]),
        ("D_val reward", base["val"], row["val"]),
        ("test pass@1 (greedy)", before["pass@1"], after["pass@1"]),
        (f"test {largest_k(after)}", before.get(largest_k(after)), after[largest_k(after)]),
    ]
    gains = [f"{name} {points(b['value'] - a['value'])}" for name, a, b in pairs if is_measured(a) and is_measured(b)]
    return f"From the base to iteration {facts.accepted}, in points: {', '.join(gains)}."


def of_training(facts: Facts) -> dict[str, Any]:
    """The M-steps: a row for each interval, and the curves of the D_val reward and the loss."""
    steps = [list(_intervals(facts, row["iteration"])) for row in facts.rows if row["iteration"]]
    steps = [step for step in steps if len(step) > 1]
    names = list(dict.fromkeys(name for step in steps for row in step for name in row["metrics"]))
    names.sort(key=lambda name: name != "loss")
    return {
        "names": names,
        "rows": [row for step in steps for row in step],
        "figures": _training_figures(steps) if steps else [],
    }


def _intervals(facts: Facts, iteration: int) -> Iterator[dict[str, Any]]:
    """The untrained start as interval 0, then what was trained."""
    folder = facts.at(iteration)
    kept = read_json(folder / "iteration.json") if (folder / "iteration.json").is_file() else None
    start = facts.row(0 if facts.recipe.improve.start_from == "base" else iteration - 1)
    won = kept["interval"] if kept else None
    yield {"iteration": iteration, "interval": 0, "metrics": {}, "val": start["val"] if start else None, "won": won == 0}
    number = 1
    while (folder / "improve" / f"interval-{number}" / "metrics.json").is_file():
        home = folder / "improve" / f"interval-{number}"
        val = read_json(home / "val" / "candidate.json") if (home / "val" / "candidate.json").is_file() else None
        metrics = {k: v for k, v in read_json(home / "metrics.json").items() if isinstance(v, int | float)}
        reward = {"value": val["reward"], **{key: val[key] for key in ("low", "high", "n")}} if val else None
        yield {"iteration": iteration, "interval": number, "metrics": metrics, "val": reward, "won": won == number}
        number += 1


def _training_figures(steps: list[list[dict[str, Any]]]) -> list[Figure]:
    places = ["start", *(str(number) for number in range(1, max(len(step) for step in steps)))]
    axes: dict[str, Any] = {"x": "evaluation interval", "places": places}

    def padded(values: list[Any]) -> list[Any]:
        return values + [None] * (len(places) - len(values))

    def loss(row: dict[str, Any]) -> dict[str, Any] | None:
        value = row["metrics"].get("loss")
        return None if value is None else {"value": value, "low": value, "high": value, "n": 1}

    rewards = [Series(name=f"iteration {s[0]['iteration']}", points=padded([row["val"] for row in s])) for s in steps]
    figures = [line_chart("Reward on D_val in training", BARS, y="D_val reward, %", series=rewards, **axes)]
    if any("loss" in row["metrics"] for step in steps for row in step):
        losses = [Series(name=f"iteration {s[0]['iteration']}", points=padded([loss(row) for row in s])) for s in steps]
        note = "Per target token on D_i, as the trainer reports it; no interval, a point is one measurement."
        figures.append(line_chart("Loss in training", note, y="loss, nats", series=losses, percent=False, **axes))
    return figures
