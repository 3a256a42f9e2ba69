"""Grading by hand: a sheet of the model's answers for a person, and the score of the points that come back (`restem sheet`).

For tasks that no program can grade, such as the Hungarian exam. What a newcomer would get wrong: answers are hostile input. A
cell that begins with "=" is a formula to a spreadsheet, and an answer may hold a heading or a fence of its own; so cells are
made harmless, and of a sheet that comes back only ids and numbers are read.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from restem.errors import RestemError
from restem.files import write_text
from restem.show_mask import visible
from restem.statistics import Interval, interval
from restem.types import Problem, Sample

COLUMNS = ("id", "sample", "question", "answer", "possible", "points")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One answer on a sheet."""

    id: str
    sample: int
    question: str = ""
    answer: str = ""
    possible: float | None = None
    """The rubric's points for a full answer; None = not filled in."""
    points: float | None = None
    """What a person gave; None = not graded yet, never the same as 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetScore:
    """The outcome of a graded sheet. With several answers to a question, their mean counts."""

    questions: int
    graded: int
    """Questions with an answer that has points; the others count neither for nor against."""
    points: float
    """Sum over the graded questions."""
    possible: float | None
    """The rubric's sum over the same questions; None where it is not filled in for all of them."""
    share: Interval | None
    """Points out of possible. The interval is over questions, which are taken as a draw from many like them; parts of one
    exercise stand or fall together, so it is too narrow where a question has several parts."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, ready for JSON."""
        return asdict(self) | {"share": self.share and self.share._asdict()}


def open_sheet(source: Path) -> list[Entry]:
    """The greedy answers of an evaluation: a folder RUN/iter-NN/eval/TASK, or a run that has only one."""
    from restem.estep import read_stage
    from restem.rundir import read_problems

    folder = _evaluation(source)
    problems = read_problems(folder.parents[2] / "problems" / f"test-{folder.name}.parquet")
    return entries(problems, read_stage(folder / "greedy"))


def entries(problems: Sequence[Problem], samples: Iterable[Sample]) -> list[Entry]:
    """An entry for every sample, in the order of the problems. Points possible come from "points" in a problem's meta."""
    by_problem: dict[str, list[Sample]] = {}
    for sample in samples:
        by_problem.setdefault(sample.problem_id, []).append(sample)
    return [
        Entry(
            id=problem.id,
            sample=sample.index,
            question=problem.question,
            answer=sample.text + ("\n[cut off at the longest length]" if sample.finish == "length" else ""),
            possible=None if problem.meta.get("points") is None else float(problem.meta["points"]),
        )
        for problem in problems
        for sample in sorted(by_problem.get(problem.id, []), key=lambda sample: sample.index)
    ]


def write_sheet(path: Path, sheet: Sequence[Entry]) -> None:
    """Write a new sheet: .csv to fill in, .md to read beside it. A file that exists may hold grades, and is never replaced."""
    writers = {".csv": _csv, ".md": _markdown}
    if path.suffix not in writers:
        raise RestemError(f"{path} is no sheet: end its name in .csv (to fill in) or .md (to read).")
    if path.exists():
        raise RestemError(f"{path} exists, and may hold grades: it is not replaced.\nGive another name, or move it away.")
    if not sheet:
        raise RestemError("there are no answers to write on a sheet.")
    write_text(path, writers[path.suffix](sheet))


def read_sheet(path: Path) -> list[Entry]:
    """Read a filled-in .csv sheet, as spreadsheets save it: commas or semicolons, 2.5 or 2,5. Only ids and numbers are read."""
    if path.suffix != ".csv" or not path.is_file():
        raise RestemError(f"{path} is no .csv sheet that exists. Write one with: restem sheet {path.stem}.csv --from RUN")
    text = path.read_text(encoding="utf-8-sig")
    delimiter = ";" if text.partition("\n")[0].count(";") > text.partition("\n")[0].count(",") else ","
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    if missing := [name for name in ("id", "possible", "points") if not rows or name not in rows[0]]:
        raise RestemError(f"{path} has no column {', '.join(missing)}, or no rows. A sheet has: {', '.join(COLUMNS)}.")
    found = [_read(row, f"{path}, row {number}") for number, row in enumerate(rows, start=2)]
    if len({(entry.id, entry.sample) for entry in found}) < len(found):
        raise RestemError(f"{path} has an answer twice. Each id and sample stands in one row.")
    return found


def score(sheet: Sequence[Entry]) -> SheetScore:
    """Add up the points of the graded questions."""
    by_question: dict[str, list[Entry]] = {}
    for entry in sheet:
        by_question.setdefault(entry.id, []).append(entry)
    graded = {name: done for name, group in by_question.items() if (done := [e for e in group if e.points is not None])}
    means = [sum(e.points or 0.0 for e in done) / len(done) for done in graded.values()]
    most = [done[0].possible for done in graded.values()]
    total = sum(m for m in most if m is not None) if most and None not in most else None
    # n * points / total has the exam's score as its mean: a question counts by its points.
    share = interval([len(means) * mean / total for mean in means]) if total else None
    return SheetScore(questions=len(by_question), graded=len(graded), points=math.fsum(means), possible=total, share=share)


def score_text(found: SheetScore) -> str:
    """The outcome in words."""
    lines = [f"{found.points:g} points" + ("" if found.possible is None else f" of {found.possible:g}")]
    if found.share is not None:
        low, high = 100 * found.share.low, 100 * found.share.high
        lines[0] += f": {found.share.value:.1%} [{low:.1f}, {high:.1f}], n = {found.share.n} questions"
    if found.graded < found.questions:
        lines.append(f"{found.questions - found.graded} of {found.questions} questions have no points yet; they count nowhere.")
    if found.graded and found.possible is None:
        lines.append('Fill in the column "possible" from the rubric for a score with an interval.')
    return "\n".join(lines)


def _evaluation(source: Path) -> Path:
    if (source / "scores.json").is_file():
        return source.resolve()
    found = sorted(file.parent for file in source.glob("iter-*/eval/*/scores.json"))
    if len(found) != 1:
        listed = "".join(f"\n  {folder}" for folder in found[:12])
        raise RestemError(
            f"{source} has {len(found)} evaluations; give the folder of one."
            + (listed or " They lie in RUN/iter-NN/eval/TASK.")
        )
    return found[0].resolve()


def _csv(sheet: Sequence[Entry]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for entry in sheet:
        cells = [_cell(entry.id), entry.sample, _cell(entry.question), _cell(entry.answer)]
        writer.writerow([*cells, _number(entry.possible), _number(entry.points)])
    return "\ufeff" + text.getvalue()  # the mark tells spreadsheets that this is UTF-8


def _markdown(sheet: Sequence[Entry]) -> str:
    blocks = []
    for entry in sheet:
        possible = "" if entry.possible is None else f" ({_number(entry.possible)} points possible)"
        title = _harmless(f"## {entry.id}, sample {entry.sample}{possible}").replace("\n", " ")
        blocks.append(f"{title}\n\nQuestion\n\n{_fenced(entry.question)}\n\nAnswer\n\n{_fenced(entry.answer)}\n\nPoints: ____")
    return "\n\n".join(blocks) + "\n"


def _fenced(text: str) -> str:
    """A block that nothing in the text can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{_harmless(text)}\n{fence}"


def _cell(text: str) -> str:
    """A cell that no spreadsheet computes: a quote in front of what would be a formula."""
    text = _harmless(text)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def _harmless(text: str) -> str:
    return "\n".join(visible(line) for line in text.split("\n"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _read(row: Mapping[str, str | None], where: str) -> Entry:
    values: dict[str, float | None] = {}
    for name in ("possible", "points"):
        cell = (row.get(name) or "").strip().replace(",", ".")
        try:
            values[name] = float(cell) if cell else None
        except ValueError:
            raise RestemError(f'{where}: "{name}" is {visible(cell)!r}, which is no number.') from None
        if not 0 <= (values[name] or 0.0) < math.inf:
            raise RestemError(f'{where}: "{name}" is {cell}; points are numbers, 0 or more.')
    if values["points"] is not None and values["possible"] is not None and values["points"] > values["possible"]:
        raise RestemError(f"{where}: {values['points']:g} points, where the rubric has {values['possible']:g} at most.")
    sample = (row.get("sample") or "0").strip()
    if not row.get("id") or not sample.isdigit():
        raise RestemError(f"{where}: an answer needs its id and the number of its sample, as the sheet was written with them.")
    return Entry(id=str(row["id"]), sample=int(sample), possible=values["possible"], points=values["points"])
