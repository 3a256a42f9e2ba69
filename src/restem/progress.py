"""What a person sees while a run works: one live line per stage on a terminal, one closing line per stage otherwise.

Everything goes to stderr; results go to stdout elsewhere. `Talk` also keeps the log of a run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from restem.types import Sample


class Talk:
    """Says things to the user and to the log. `quiet` silences all but warnings."""

    def __init__(self, log: Path | None = None, *, quiet: bool = False) -> None:
        self.log, self.quiet = log, quiet
        self.live = sys.stderr.isatty() and not quiet

    def say(self, text: str) -> None:
        self._record(text)
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        self._record(f"warning: {text}")
        self._print(f"warning: {text}")

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _record(self, text: str) -> None:
        if self.log is not None:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            with self.log.open("a", encoding="utf-8") as file:
                file.write("".join(f"{stamp}  {line}\n" for line in text.splitlines()))

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[StageWatch]:
        """Follow a stage of `total` samples, or of training steps."""
        watch = StageWatch(name, total)
        if not self.live:
            yield watch
        else:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description:<28}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[words]}"),
            )
            with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task(name, total=total, words="starting")
                watch.on_change = lambda: bar.update(task, completed=watch.done, words=watch.words())
                yield watch
        if watch.fresh:
            self.say(f"{name:<28} {watch.closing()}")


class StageWatch:
    """Counts of one stage. Told of samples by `restem.estep.draw`, of steps by a trainer."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.began = time.monotonic()
        self.done = self.fresh = self.tokens = self.graded_count = 0
        self.reward = 0.0
        self.seen: set[str] = set()
        self.solved: set[str] = set()
        self.loss: float | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called after every change; set by whoever shows the counts."""

    def drawn(self, sample: Sample) -> None:
        self.done += 1
        self.fresh += 1
        self.tokens += len(sample.token_ids)
        self.on_change()

    def graded(self, sample: Sample) -> None:
        self.seen.add(sample.problem_id)
        if sample.reward is not None:
            self.graded_count += 1
            self.reward += sample.reward
            if sample.reward > 0:
                self.solved.add(sample.problem_id)

    def resumed(self, count: int) -> None:
        """Samples of an earlier try are done, but tell nothing of the speed."""
        self.done += count

    def step(self, done: int, total: int, metrics: dict[str, float]) -> None:
        self.done, self.total = done, total
        self.fresh += 1
        self.tokens += int(metrics["target_tokens"])
        self.loss = metrics["loss"]
        self.on_change()

    def words(self) -> str:
        seconds = max(1e-9, time.monotonic() - self.began)
        left = (self.total - self.done) * seconds / max(1, self.fresh)
        parts = [f"{self.done}/{self.total}", f"{self.tokens / seconds:.0f} tokens/s", *self._findings()]
        return " | ".join([*parts, f"{duration(left)} left"])

    def closing(self) -> str:
        seconds = time.monotonic() - self.began
        what = "steps" if self.loss is not None else "samples"
        parts = [f"{self.done} {what} in {duration(seconds)}", f"{self.tokens / max(seconds, 1e-9):.0f} tokens/s"]
        return " | ".join([*parts, *self._findings()])

    def _findings(self) -> list[str]:
        if self.loss is not None:
            return [f"loss {self.loss:.3f}"]
        if not self.graded_count:
            return []
        return [
            f"correct {self.reward / self.graded_count:.1%}",
            f"covered {len(self.solved)}/{len(self.seen)}",
        ]


def duration(seconds: float) -> str:
    """ "42 s", "3 min 05 s", "2 h 10 min" """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
