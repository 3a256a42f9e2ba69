"""The run directory: made once, locked by one process at a time, resumed only with the recipe that made it.

Its layout is documented in docs/run-directory.md; everything in it is JSON, Parquet, text or a model directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from restem import __version__
from restem.config import Recipe, flatten
from restem.errors import RestemError
from restem.files import read_json, remove_leftovers, write_json, write_rows
from restem.tasks import Task
from restem.types import Problem

FREE_TO_CHANGE = frozenset(
    {
        "iterations",
        "engine.rows",
        "engine.grade_workers",
        "engine.grade_seconds",
        "engine.trackers",
        "improve.checkpoint_minutes",
        "model.device",
    }
)
"""Keys that a resumed run may change: they move work or add to it, but change no part that exists."""


_BEFORE_A_RUN = frozenset({"lock", "log.txt", "toy-base", "problems"})
"""What a start that failed may leave; a directory with nothing else is as good as empty."""


def _is_of_a_run(name: str) -> bool:
    return name not in _BEFORE_A_RUN and not name.startswith(".tmp-")


class RunDirectory:
    """An open, locked run directory."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path, self._lock = path, lock

    @classmethod
    def open(cls, path: Path, *, resume: bool, command: str) -> RunDirectory:
        """Lock a new or empty directory, or with `resume` one that holds a run.

        `command` is what the user typed, without --out and --resume; errors quote it.
        """
        made = path / "run.json"
        if path.exists() and not path.is_dir():
            raise RestemError(f"{path} is a file; give another --out.")
        is_used = path.is_dir() and any(_is_of_a_run(item.name) for item in path.iterdir())
        if is_used and not (resume and made.is_file()):
            what = "holds a run already" if made.is_file() else "is not empty"
            raise RestemError(
                f"{path} {what}, and nothing is overwritten.\n"
                + (f"  to go on with it:     {command} --out {path} --resume\n" if made.is_file() else "")
                + f"  to start another one: {command} --out {path}-2"
            )
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise RestemError(
                f"{path} is in use by another process ({lock.read().strip() or 'unknown'}). Wait for it, or stop it first."
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        if made.is_file():
            remove_leftovers(path)
        return cls(path, lock)

    def close(self) -> None:
        self._lock.close()

    @property
    def is_new(self) -> bool:
        return not (self.path / "run.json").is_file()

    def create(self, recipe: Recipe, tasks: Sequence[Task], facts: dict[str, Any]) -> None:
        """Write the problems, then run.json, which makes the directory a run. `tasks`: the run's own first."""
        for name, problems in splits(tasks).items():
            write_rows(self.path / "problems" / f"{name}.parquet", [_row(p) for p in problems], _schema())
        write_json(
            self.path / "run.json",
            {
                "recipe": json.loads(recipe.model_dump_json()),
                "problems": problem_digests(tasks),
                "notes": [note for task in tasks for note in task.notes],
                "sandbox": None,
                **facts,
                "argv": sys.argv,
                "created": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                "versions": versions(),
                "commit": _commit(),
                "hardware": hardware(),
            },
        )

    def go_on(self, recipe: Recipe, tasks: Sequence[Task], facts: dict[str, Any], command: str) -> None:
        """Take up the run that lies here: RestemError if the recipe, the data or the base differ from those that made it."""
        saved = read_json(self.path / "run.json")
        old, new = flatten(Recipe.model_validate(saved["recipe"])), flatten(recipe)
        lines = [
            f"  {key}: {old[key]!r} in the run, {new[key]!r} now"
            for key in new
            if old[key] != new[key] and key not in FREE_TO_CHANGE
        ]
        if lines:
            keys = [line.split(":")[0].strip() for line in lines]
            settings = " ".join(f"--set {key}={_toml(old[key])}" for key in keys if old[key] is not None)
            raise RestemError(
                f"{self.path} was made with another recipe; it cannot go on with this one:\n"
                + "\n".join(lines)
                + f"\n  to go on with it:           {command} --out {self.path} --resume {settings}".rstrip()
                + f"\n  to run the changed recipe: {command} --out {self.path}-2"
            )
        found = problem_digests(tasks)
        changed = [name for name, digest in saved["problems"].items() if found.get(name) != digest]
        if changed:
            raise RestemError(
                f"the {', '.join(changed)} problems are not those that {self.path} was made with; the data or the task has "
                f"changed. Bring the data back, or start another run: {command} --out {self.path}-2"
            )
        if saved["base_fingerprint"] != facts["base_fingerprint"]:
            raise RestemError(
                f"the base model {facts['base']} has other weights ({facts['base_fingerprint']}) than the one that "
                f"{self.path} was made with ({saved['base_fingerprint']}). Start another run: {command} --out {self.path}-2"
            )
        if json.loads(recipe.model_dump_json()) != saved["recipe"]:  # in keys that are free to change
            write_json(self.path / "run.json", {**saved, "recipe": json.loads(recipe.model_dump_json())})


def splits(tasks: Sequence[Task]) -> dict[str, Sequence[Problem]]:
    """Training and D_val problems of the first task, test problems of all."""
    return {"train": tasks[0].train, "val": tasks[0].val, **{f"test-{task.name}": task.test for task in tasks}}


def problem_digests(tasks: Sequence[Task]) -> dict[str, str]:
    """A hash of every split's content, in order."""
    return {
        name: hashlib.blake2b(json.dumps([_row(p) for p in problems]).encode(), digest_size=8).hexdigest()
        for name, problems in splits(tasks).items()
    }


def read_problems(path: Path) -> list[Problem]:
    """Read back problems/*.parquet."""
    from restem.files import read_rows

    return [
        Problem(**{**row, "reference": json.loads(row["reference"]), "meta": json.loads(row["meta"])})
        for row in read_rows(path)
    ]


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    found = {"python": platform.python_version(), "restem": __version__}
    for name in ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "math-verify", "sympy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
    }


def _commit() -> str | None:
    """The commit of the checkout that restem runs from, with "+" if it has changes; None when installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")


def _row(problem: Problem) -> dict[str, Any]:
    return {
        "id": problem.id,
        "question": problem.question,
        "reference": json.dumps(problem.reference),
        "meta": json.dumps(dict(problem.meta)),
    }


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema({name: pa.string() for name in ("id", "question", "reference", "meta")})


def _toml(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"'{text}'" if any(c in text for c in ' "[{') else text
