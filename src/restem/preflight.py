"""What to know of a task before anything is spent on it: does its verifier accept its references, are its splits apart?

A pure function of the task: no model is loaded and nothing is sampled. Equal problems in two splits are a fault; 13 words in a
row that two problems share are a reason to look at them. What it cannot see: a reference that is wrong, and problems that say
the same thing in other words.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from restem.contamination import shared_ngrams
from restem.tasks.splits import content_hash
from restem.tasks.task import Task
from restem.types import Problem
from restem.verifiers.pool import as_grade

SHOWN = 20
"""How many findings are listed with their notes; all are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A reference that does not pass its own verifier."""

    split: str
    problem_id: str
    reference: str
    reason: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """The counts of one split; problems = accepted + rejected + ungradable + unchecked."""

    problems: int
    accepted: int
    """The reference, written as an answer, earns a reward."""
    rejected: int
    """It earns reward 0: every right answer to this problem may be thrown away."""
    ungradable: int
    """The verifier gives no grade, or fails."""
    unchecked: int
    """The reference is not an answer that can be written down (tests, for example) and comes without a solution."""
    repeated: tuple[str, ...]
    """Ids of problems that repeat an earlier one of the split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The result of `check`."""

    task: str
    verifier: str
    splits: Mapping[str, SplitReport]
    overlap: Mapping[str, tuple[str, ...]]
    """ "train and test": ids (of the first-named split) that both hold. Every pair of splits and exemplars is there."""
    shared_13grams: Mapping[str, tuple[str, ...]]
    """For the same pairs, ids (of the first-named split) of problems that share 13 words in a row with the second, wording that
    more than 10 problems of a split have left out. Training problems and exemplars count with their solutions, val and test
    problems with their questions alone: what may be learnt against what is asked. No fault in itself, so not in `is_clean`."""
    findings: tuple[Finding, ...]
    """The first 20 references that were rejected or could not be graded."""
    notes: tuple[str, ...]
    """What was left out when the task was loaded."""
    seconds_per_grading: float
    """Median over the references."""
    sandbox: str | None
    """The rung that programs run in; None = this task runs none."""

    @property
    def is_clean(self) -> bool:
        """Whether the splits and exemplars are apart and without repeats. Says nothing about the verifier."""
        return not any(self.overlap.values()) and not any(split.repeated for split in self.splits.values())

    @property
    def is_gradable(self) -> bool:
        """Whether every reference that could be checked was accepted."""
        return not any(split.rejected or split.ungradable for split in self.splits.values())

    @property
    def ok(self) -> bool:
        return self.is_clean and self.is_gradable

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self) | {"is_clean": self.is_clean, "is_gradable": self.is_gradable, "ok": self.ok}


def check(task: Task) -> CheckReport:
    """Grade every reference against itself, and compare the splits and the exemplars: equal content, shared runs of words."""
    splits: dict[str, tuple[Problem, ...]] = {"train": task.train, "val": task.val, "test": task.test}
    exemplars = tuple(
        Problem(id=f"exemplar {number}", question=exemplar.question, meta={"solution": exemplar.solution})
        for number, exemplar in enumerate(task.prompt.shown, start=1)
    )
    reports, findings, seconds = {}, [], []
    for name, problems in splits.items():
        counts: Counter[Outcome] = Counter()
        for problem in problems:
            began = time.perf_counter()
            outcome, finding = _grade_reference(task, name, problem)
            seconds.append(time.perf_counter() - began)
            counts[outcome] += 1
            findings += [finding] if finding else []
        reports[name] = SplitReport(
            problems=len(problems),
            accepted=counts["accepted"],
            rejected=counts["rejected"],
            ungradable=counts["ungradable"],
            unchecked=counts["unchecked"],
            repeated=_repeated(problems),
        )
    groups = {**splits, "exemplars": exemplars}
    return CheckReport(
        task=task.name,
        verifier=task.verifier_spec,
        splits=reports,
        overlap=_overlap(groups),
        shared_13grams=shared_ngrams(groups, question_only=("val", "test")),
        findings=tuple(findings[:SHOWN]),
        notes=task.notes,
        seconds_per_grading=statistics.median(seconds) if seconds else 0.0,
        sandbox=_rung() if task.verifier_spec == "code" else None,
    )


def _rung() -> str:
    from restem.sandbox import choose

    return choose()


Outcome = Literal["accepted", "rejected", "ungradable", "unchecked"]


def _grade_reference(task: Task, split: str, problem: Problem) -> tuple[Outcome, Finding | None]:
    completion = reference_completion(task, problem)
    if completion is None:
        return "unchecked", None
    try:
        grade = as_grade(task.verifier(problem, completion))
    except Exception as error:  # finding out that a user's verifier fails is what this check is for
        return "ungradable", _finding(split, problem, "verifier_error", f"{type(error).__name__}: {error}")
    if grade.reward is None:
        return "ungradable", _finding(split, problem, grade.reason, grade.note)
    if grade.reward > 0:
        return "accepted", None
    return "rejected", _finding(split, problem, grade.reason, grade.note or f"read as {grade.answer!r}")


def reference_completion(task: Task, problem: Problem) -> str | None:
    """Write the reference as a model would write its answer; None if it cannot be written down."""
    if not isinstance(problem.reference, str | int | float):
        solution = problem.meta.get("solution")
        return solution if isinstance(solution, str) else None
    if task.answer_style in ("boxed", "minerva"):
        return f" The answer is $\\boxed{{{problem.reference}}}$."
    if task.answer_style == "gsm8k":
        return f" #### {problem.reference}"
    return f" The answer is {problem.reference}."


def _finding(split: str, problem: Problem, reason: str, note: str) -> Finding:
    return Finding(split=split, problem_id=problem.id, reference=str(problem.reference), reason=reason, note=note)


def _repeated(problems: Iterable[Problem]) -> tuple[str, ...]:
    seen: set[str] = set()
    repeated = []
    for problem in problems:
        name = content_hash(problem.question)
        if name in seen:
            repeated.append(problem.id)
        seen.add(name)
    return tuple(repeated)


def _overlap(groups: Mapping[str, tuple[Problem, ...]]) -> dict[str, tuple[str, ...]]:
    hashes = {name: {content_hash(problem.question) for problem in problems} for name, problems in groups.items()}
    names = list(groups)
    return {
        f"{one} and {other}": tuple(p.id for p in groups[one] if content_hash(p.question) in hashes[other])
        for position, one in enumerate(names)
        for other in names[position + 1 :]
    }
