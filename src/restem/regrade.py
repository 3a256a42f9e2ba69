"""Replaying a verifier over the samples of a run: what would change, and what other graders say.

Samples and grades are separate parts, so a corrected verifier needs no new samples. Nothing in the run is changed unless asked;
what a run has selected and trained on stays what it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restem.errors import RestemError
from restem.estep import grade, read_part, write_grades
from restem.files import read_json
from restem.rundir import read_problems
from restem.types import Grade, Problem, Sample
from restem.verifiers.pool import VerifierPool

SHOWN = 20
"""How many changes and disagreements are listed; all are counted."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of samples, with the problems that it belongs to."""

    directory: Path
    number: int
    problems: Mapping[str, Problem]


def parts_of(run: Path) -> Iterator[Part]:
    """All graded parts of a run directory, in the order of their paths."""
    if not (run / "run.json").is_file():
        raise RestemError(f"{run} is no run directory: it has no run.json")
    problems = {
        file.stem: {problem.id: problem for problem in read_problems(file)} for file in (run / "problems").glob("*.parquet")
    }
    for folder in sorted(run.glob("iter-*/**/grades")):
        stage = folder.parent
        for file in sorted(folder.glob("part-*.parquet")):
            yield Part(stage, int(file.stem.removeprefix("part-")), problems[_split(stage.relative_to(run))])


def _split(stage: Path) -> str:
    """The problems' file of a stage, from its place in the run."""
    if "eval" in stage.parts:
        return f"test-{stage.parts[stage.parts.index('eval') + 1]}"
    return "val" if stage.name == "val" else "train"


def regrade(
    run: Path,
    *,
    verifier: str | None = None,
    second: bool = False,
    write: bool = False,
    workers: int = 1,
    seconds: float = 30.0,
) -> dict[str, Any]:
    """Grade all samples of a run again and compare with the grades that lie there.

    `verifier`: another one than the run's. `second`: add second opinions on mathematics. `write`: replace the grades. Returns
    counts per change ("incorrect -> correct"), the first changes, and with `second` how often each opinion disagrees.
    """
    settings = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    spec = verifier or settings.get("task", {}).get("verifier")
    changes: Counter[str] = Counter()
    listed: list[dict[str, Any]] = []
    opinions = _Opinions() if second else None
    total = 0
    with VerifierPool(spec or "math", workers=workers, seconds=seconds) as pool:
        for part in parts_of(run):
            old = list(read_part(part.directory, part.number))
            new = [future.result() for future in [grade(pool, part.problems[s.problem_id], s) for s in old]]
            total += len(old)
            for sample, found in zip(old, new, strict=True):
                if (sample.reward, sample.reason) != (found.reward, found.reason):
                    changes[f"{sample.reason} -> {found.reason}"] += 1
                    if len(listed) < SHOWN:
                        listed.append(_change(run, part, sample, found))
                if opinions is not None:
                    opinions.ask(part.problems[sample.problem_id], sample, found)
            if write:
                write_grades(part.directory, part.number, old, new)
    return {
        "run": str(run),
        "verifier": spec,
        "samples": total,
        "changed": sum(changes.values()),
        "changes": dict(changes.most_common()),
        "first_changes": listed,
        **({"second_opinions": opinions.as_dict()} if opinions else {}),
        "written": write,
    }


def _change(run: Path, part: Part, sample: Sample, found: Grade) -> dict[str, Any]:
    return {
        "stage": str(part.directory.relative_to(run)),
        "problem_id": sample.problem_id,
        "index": sample.index,
        "reference": part.problems[sample.problem_id].reference,
        "before": {"reward": sample.reward, "reason": sample.reason, "answer": sample.answer},
        "now": {"reward": found.reward, "reason": found.reason, "answer": found.answer, "note": found.note},
    }


class _Opinions:
    """What other graders of mathematics say of the same answers, counted where they differ from ours."""

    def __init__(self) -> None:
        from restem.verifiers.math.second import OPINIONS

        self.graders = OPINIONS
        self.compared = 0
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in OPINIONS}
        self.listed: list[dict[str, Any]] = []
        self._known: dict[tuple[str, str], dict[str, bool | None]] = {}

    def ask(self, problem: Problem, sample: Sample, ours: Grade) -> None:
        if ours.answer is None or ours.reward is None or not isinstance(problem.reference, str | int):
            return
        self.compared += 1
        pair = (str(problem.reference), ours.answer)
        is_new = pair not in self._known
        if is_new:
            self._known[pair] = {name: opinion(*pair) for name, opinion in self.graders.items()}
        differing = {name: said for name, said in self._known[pair].items() if said is not (ours.reward > 0)}
        for name, said in differing.items():
            self.counts[name]["fails" if said is None else "says right, ours wrong" if said else "says wrong, ours right"] += 1
        if differing and is_new and len(self.listed) < SHOWN:
            self.listed.append({"reference": pair[0], "answer": pair[1], "ours": ours.reward > 0, **differing})

    def as_dict(self) -> dict[str, Any]:
        return {
            "compared": self.compared,
            "disagreements": {name: dict(counts) for name, counts in self.counts.items()},
            "first": self.listed,
        }
