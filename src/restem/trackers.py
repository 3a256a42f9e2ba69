"""Copies of a run's numbers for TensorBoard, trackio and Weights & Biases. The run's own files are complete without them.

What a newcomer would get wrong: a resumed run does some things again, such as the optimiser steps since its last interval. It
may tell a tracker whatever it comes across: a metric takes only steps above its highest one, which RUN/trackers.json holds. And
a tracker that fails while a run works never stops the run.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from restem.config import Recipe, flatten
from restem.errors import MissingExtra, RestemError
from restem.files import read_json, write_json

PROJECT = "restem"
"""What runs are filed under, where the user's environment names no other (WANDB_PROJECT)."""


class Tracker(Protocol):
    """Takes numbers by name, "group/name", at a step: optimiser steps since the start of the run, over all iterations."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self, *, failed: bool = False) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Refuse unknown trackers and those that are not installed. Opens and imports nothing."""
    for name in names:
        if name not in TRACKERS:
            raise RestemError(f'there is no tracker "{name}". There are: {", ".join(TRACKERS)}.')
        # A folder of that name, such as the one that wandb leaves, looks like a package without an origin.
        if name not in sys.modules and getattr(find_spec(name), "origin", None) is None:
            raise MissingExtra(name, "trackers", f"The tracker {name}")


def open_tracker(
    names: Sequence[str], run_directory: Path, recipe: Recipe, *, say: Callable[[str], None] | None = None
) -> Tracker:
    """Open the trackers of these names as one; with no name, one that does nothing and writes nothing.

    A run that is opened again goes on with its own curves. RestemError if one cannot be opened: nothing is spent yet, and the
    user asked for it. `say` (default: print to stderr) is told once of each tracker that fails later.
    """
    check_trackers(names)
    return Trackers(list(dict.fromkeys(names)), run_directory, recipe, say or (lambda text: print(text, file=sys.stderr)))


def grouped(group: str, values: Mapping[str, Any]) -> dict[str, float]:
    """{"improve/loss": 0.5} of {"loss": 0.5, "history": [...]}: what is a number, under the name of its group."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {f"{group}/{name}": float(value) for name, value in numbers.items()}


class Trackers:
    """Several trackers as one; each metric of each step reaches them once, however often the run is resumed."""

    def __init__(self, names: Sequence[str], directory: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
        self._file, self._say, self._failed = directory / "trackers.json", say, set[str]()
        self._open: dict[str, Tracker] = {}
        if not names:
            return
        if self._file.is_file():
            state = read_json(self._file)
        else:
            state = {"id": uuid.uuid4().hex[:12], "steps": {}}
            write_json(self._file, state)
        self._id, self._steps = str(state["id"]), dict[str, int](state["steps"])
        for name in names:
            try:
                self._open[name] = TRACKERS[name](directory, recipe, self._id, max(self._steps.values(), default=None))
            except Exception as error:  # each library has its own kinds; all of them mean that there is no tracker
                self.close(failed=True)
                raise RestemError(
                    f'the tracker "{name}" cannot be opened: {_reason(error)}. Mend it, or leave it out: the run is complete '
                    "without trackers, and its numbers are in its own files."
                ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        fresh = {name: value for name, value in values.items() if step > self._steps.get(name, -1)} if self._open else {}
        if not fresh:
            return
        for name in self._open:
            self._attempt(name, lambda tracker: tracker.log(step, fresh))
        self._steps.update(dict.fromkeys(fresh, step))
        write_json(self._file, {"id": self._id, "steps": self._steps})

    def close(self, *, failed: bool = False) -> None:
        for name in self._open:
            self._attempt(name, lambda tracker: tracker.close(failed=failed))
        self._open = {}

    def _attempt(self, name: str, act: Callable[[Tracker], None]) -> None:
        try:
            act(self._open[name])
        except Exception as error:  # a network, a server, a full quota: nothing of it is worth a run
            if name not in self._failed:
                self._failed.add(name)
                self._say(
                    f"the tracker {name} failed ({_reason(error)}). The run goes on; what the tracker misses is in the files "
                    "of the run. This is said once."
                )


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, directory: Path, recipe: Recipe, identity: str, last_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier try wrote above the last step that is known will be written again: hide it.
        purge = None if last_step is None else last_step + 1
        self._writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a kill must not lose what trackers.json says is there

    def close(self, *, failed: bool = False) -> None:
        self._writer.close()


class Trackio:
    """A local dashboard, or a Hugging Face Space if TRACKIO_SPACE_ID names one."""

    def __init__(self, directory: Path, recipe: Recipe, identity: str, last_step: int | None) -> None:
        import trackio

        name = f"{directory.resolve().name}-{identity}"  # trackio takes up a run by its name
        with _talk_to_stderr():
            self._run: Any = trackio.init(project=PROJECT, name=name, config=_config(directory, recipe), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}  # it stores JSON
        if finite:
            with _talk_to_stderr():
                self._run.log(finite, step=step)

    def close(self, *, failed: bool = False) -> None:
        import trackio

        with _talk_to_stderr():
            trackio.finish()  # of the module: after the run's own it would finish, and print, once more at exit


class WandB:
    """Weights & Biases; reads its usual environment (WANDB_MODE, WANDB_ENTITY and so on)."""

    def __init__(self, directory: Path, recipe: Recipe, identity: str, last_step: int | None) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity,
            name=directory.resolve().name,
            resume="allow",
            dir=str(directory),
            config=_config(directory, recipe),
        )
        # wandb's own step must grow with every call and drops what is below it: rewards on D_val come behind later steps.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


TRACKERS: dict[str, Callable[[Path, Recipe, str, int | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}


def _config(directory: Path, recipe: Recipe) -> dict[str, Any]:
    return {**flatten(recipe), "run": str(directory.resolve())}


def _talk_to_stderr() -> contextlib.redirect_stdout[Any]:
    """trackio prints; our stdout is for results."""
    return contextlib.redirect_stdout(sys.stderr)


def _reason(error: Exception) -> str:
    first = str(error).strip().split("\n")[0][:200].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
