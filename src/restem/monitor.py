"""What is watched while a run works: metrics.jsonl, trackers, and how far a model has drifted from the base.

Nothing here changes what a run does. The files are complete without any tracker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from restem.backends import Backend
from restem.candidate import Candidate
from restem.files import read_json, write_json, write_text
from restem.trackers import Tracker, grouped
from restem.training import Interval
from restem.types import Problem, Sample


class Monitor:
    """The numbers of the run in the directory `home`."""

    def __init__(self, home: Path, tracker: Tracker) -> None:
        self.home, self.tracker = home, tracker

    def steps(self, iterations: range) -> int:
        """Optimiser steps of these iterations, by metrics.jsonl."""
        last: dict[int, int] = {}
        for line in self._lines():
            last[line["iteration"]] = max(last.get(line["iteration"], 0), line.get("step", 0))
        return sum(steps for iteration, steps in last.items() if iteration in iterations)

    def began(self, base: Candidate) -> None:
        self.tracker.log(0, grouped("val", {"reward": base.reward}))

    def follow(
        self, iteration: int, watch: Callable[[int, int, dict[str, Any]], None]
    ) -> Callable[[int, int, dict[str, Any]], None]:
        """What to tell of every optimiser step; `watch` is told as well."""
        before = self.steps(range(1, iteration))

        def report(done: int, total: int, metrics: dict[str, Any]) -> None:
            watch(done, total, metrics)
            self.tracker.log(before + done, grouped("improve", metrics))

        return report

    def trained(self, iteration: int, interval: Interval) -> None:
        """One line of metrics.jsonl per interval; written once, however often the run is resumed."""
        lines = self._lines()
        if not any((line["iteration"], line["interval"]) == (iteration, interval.number) for line in lines):
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            lines.append({"iteration": iteration, "interval": interval.number, "time": when, **interval.metrics})
            write_text(self.home / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def validated(self, iteration: int, interval: Interval, candidate: Candidate, folder: Path) -> None:
        """`folder`: where the D_val samples lie."""
        file = folder / "drift.json"
        drift = read_json(file)["drift_per_token"] if file.is_file() else None
        steps = self.steps(range(1, iteration)) + interval.metrics.get("step", 0)
        self.tracker.log(steps, grouped("val", {"reward": candidate.reward, "drift_per_token": drift}))

    def tested(self, iteration: int, task: str, scores: dict[str, Any]) -> None:
        values = {f"{task}/{name}": metric["value"] for name, metric in scores["metrics"].items()}
        self.tracker.log(self.steps(range(1, iteration + 1)), grouped("test", values))

    def close(self, *, failed: bool) -> None:
        self.tracker.close(failed=failed)

    def _lines(self) -> list[dict[str, Any]]:
        file = self.home / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def write_drift(
    backend: Backend, model: str, problems: Sequence[Problem], of_base: Sequence[Sample], base: Path, folder: Path
) -> float | None:
    """Write drift.json: log p_base - log p per token of what the base itself wrote on D_val, in nats.

    An estimate of KL(base || model) where D_val is drawn at temperature 1 and untruncated; elsewhere it can be negative.
    `of_base`: the base's D_val samples, of which the first of each problem counts; `base`: their folder, whose drift.json holds
    the base's own likelihoods (when `folder` is that one, they are written). None if this kind of model has no likelihoods.
    """
    first = [sample for sample in of_base if sample.index == 0 and sample.token_ids]
    by_id = {problem.id: problem for problem in problems}
    found = backend.likelihoods(model, [(by_id[sample.problem_id], sample) for sample in first]) if first else None
    if found is None:
        return None
    logprob, tokens = [value for value, _ in found], [count for _, count in found]
    file = base / "drift.json"
    reference: list[float] = read_json(file)["logprob"] if file.is_file() else logprob
    drift = (sum(reference) - sum(logprob)) / sum(tokens)
    write_json(folder / "drift.json", {"drift_per_token": drift, "n": len(first), "logprob": logprob, "tokens": tokens})
    return drift
