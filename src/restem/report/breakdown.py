"""Where the numbers come from: form and substance, what the E-step kept, difficulty, and samples side by side."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from restem import evaluation
from restem.config import EvaluateConfig
from restem.difficulty import THRESHOLDS, buckets
from restem.estep import read_stage
from restem.report.charts import Figure, Series, dot_chart, histogram, line_chart
from restem.report.curves import BARS
from restem.report.facts import Facts, largest_k, share
from restem.report.text import cut, interval, points
from restem.rundir import read_problems
from restem.types import Problem, Sample

FEW = 12
"""The most groups in a chart. A field of the problems' meta with more values becomes a table alone if it is one of
`evaluation.GROUPS`; any other tells problems apart rather than groups them, and is left out."""
SHOWN = 6
"""Test problems whose completions are shown."""
KINDS = ("correct", "no readable answer or cut off", "readable but wrong", "could not be graded")


def kind(sample: Sample) -> str:
    """Correct, wrong in form, wrong in substance (a program that fails is wrong in substance), or not graded."""
    if sample.reward is None:
        return KINDS[3]
    if sample.reward > 0:
        return KINDS[0]
    return KINDS[1] if sample.reason in ("no_answer", "truncated") else KINDS[2]


def form_and_substance(facts: Facts) -> dict[str, Any] | None:
    """The greedy test samples by kind, and what the change since the base is made of."""
    greedy = {row["iteration"]: facts.test_samples(row["iteration"], "greedy") for row in facts.rows}
    greedy = {number: samples for number, samples in greedy.items() if samples}
    if 0 not in greedy:
        return None
    kinds = {number: [kind(sample) for sample in samples] for number, samples in greedy.items()}
    used = [name for name in KINDS if any(name in found for found in kinds.values())]
    figure = line_chart(
        "Greedy test answers by kind",
        BARS,
        x="iteration",
        y="greedy answers, %",
        places=["base" if not number else str(number) for number in kinds],
        series=[Series(name=name, points=[share([k == name for k in found]) for found in kinds.values()]) for name in used],
    )
    return {"figure": figure, "gains": [_gain(greedy[0], greedy[number], number) for number in greedy if number]}


def _gain(before: Sequence[Sample], after: Sequence[Sample], number: int) -> dict[str, Any]:
    """A gain by the kind of the base's failure: problems won from it, less those lost to it."""
    old, new = ({sample.problem_id: sample for sample in samples if sample.reward is not None} for samples in (before, after))
    both = [(kind(old[name]), kind(new[name])) for name in old if name in new]
    parts = []
    for failure in KINDS[1:3]:
        won, lost = both.count((failure, KINDS[0])), both.count((KINDS[0], failure))
        parts.append({"won": won, "lost": lost, "points": points((won - lost) / len(both)) if both else "-"})
    return {"iteration": number, "n": len(both), "form": parts[0], "substance": parts[1]}


def harvest(facts: Facts) -> dict[str, Any]:
    """What each E-step yielded: counts by fate, a histogram of the solutions kept per problem, and its cost."""
    found = [_harvest(facts, row["iteration"]) for row in facts.rows if facts.selection(row["iteration"])]
    fates = [name for name in dict.fromkeys(name for one in found for name in one["counts"]) if name != "kept"]
    highest = max((max(one["histogram"].values()) for one in found), default=1)
    figures = [
        histogram(
            f"Solutions kept per problem, iteration {one['iteration']}",
            f"n = {one['problems']} training problems; at most {facts.recipe.select.max_per_problem} are kept of each.",
            x="solutions kept",
            y="problems",
            counts=one["histogram"],
            highest=highest,
            colour=number,
        )
        for number, one in enumerate(found)
    ]
    return {"rows": found, "fates": ["kept", *fates], "figures": figures}


def _harvest(facts: Facts, iteration: int) -> dict[str, Any]:
    import duckdb

    folder, selection = facts.at(iteration), facts.selection(iteration) or {}
    with duckdb.connect() as database:
        database.register("examples", _table([folder / "examples.parquet"]))
        for name in ("samples", "grades"):
            database.register(name, _table(sorted((folder / name).glob("part-*.parquet"))))
        kept = dict(
            database.execute(
                "select n, count(*) from (select count(*) as n from examples group by problem_id) group by n"
            ).fetchall()
        )
        row = database.execute(
            """
            select avg(len(token_ids)), sum(len(token_ids)), count(*) filter (reward > 0),
                   count(distinct (problem_id, text)) filter (reward > 0)
            from samples join grades using (problem_id, index)
            """
        ).fetchone()
    assert row is not None, "an aggregate has one row"
    problems, solved = selection["problems"], row[2]
    counts = {str(n): kept.get(n, 0) for n in range(1, facts.recipe.select.max_per_problem + 1)}
    return {
        "iteration": iteration,
        "counts": selection["counts"],
        "problems": problems,
        "drawn": sum(selection["counts"].values()),
        "histogram": {"0": problems - sum(counts.values()), **counts},
        "length": row[0],
        "distinct": f"{row[3]:,} of {solved:,}" if solved else "-",
        "cost": row[1] / selection["kept"] if selection["kept"] else None,
    }


def _table(files: Sequence[Path]) -> Any:
    """Parquet files as one Arrow table: unlike a path in a query, a file name with * or [ in it means itself."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pa.concat_tables([pq.ParquetFile(file).read() for file in files])


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """Samples of one test task of the models that are compared: the base, and the accepted iteration if it is another."""

    models: Sequence[str]
    greedy: Sequence[Sequence[Sample]]
    sampled: Sequence[Sequence[Sample]]
    k: int
    """The K of the pass@K that stands beside pass@1."""


def by_difficulty(facts: Facts) -> list[Figure]:
    """Each task's test problems by the base's success rate and by fields of their meta: base against accepted iteration."""
    figures = []
    for task in facts.tasks:
        answers = _answers(facts, task)
        if answers is None:
            continue
        of_task = f" ({task})" if len(facts.tasks) > 1 else ""
        by_success = buckets(answers.sampled[0])
        if any(by_success.values()):
            note = _about_success(answers, facts.recipe.evaluate)
            figures.append(_compared(f"Solved by the base's success rate{of_task}", "for the base", by_success, answers, note))
        file = facts.path / "problems" / f"test-{task}.parquet"
        problems = read_problems(file) if file.is_file() else []
        figures += [_compared(f"Solved by {key}{of_task}", key, _groups(problems, key), answers) for key in _keys(problems)]
    return figures


def _answers(facts: Facts, task: str) -> _Answers | None:
    """None if the base or the accepted iteration was not tested on this task."""
    accepted = facts.accepted or 0
    base, after = facts.metrics(0, task), facts.metrics(accepted, task)
    if base is None or after is None:
        return None
    shown = [0, accepted] if accepted else [0]
    folders = [facts.at(number) / "eval" / task for number in shown]
    return _Answers(
        models=["base" if not number else f"iteration {number}" for number in shown],
        greedy=[read_stage(folder / "greedy") for folder in folders],
        sampled=[read_stage(folder / "sampled") for folder in folders],
        k=int(largest_k(base).removeprefix("pass@")),
    )


def _about_success(answers: _Answers, settings: EvaluateConfig) -> str:
    """What the buckets are, and why pass@K must not be compared across them."""
    drawn, name = Counter(sample.problem_id for sample in answers.sampled[0]), f"pass@{answers.k}"
    hard, medium, easy = (f"{threshold:.0%}" for threshold in THRESHOLDS)
    return (
        f"Groups by how often the base was right in {max(drawn.values())} samples at T {settings.temperature:g}, drawn for "
        f"{len(drawn)} of the {len(answers.greedy[0])} test problems: easy from {easy}, medium from {medium}, hard from "
        f"{hard}, very hard below. The base's {name} comes from the same samples, so it is too high in easy and too low in "
        f"very hard, and a difference in {name} may be no more than that. Greedy answers had no part in the grouping: "
        "compare those."
    )


def _compared(title: str, key: str, groups: Mapping[str, set[str]], answers: _Answers, note: str = "") -> Figure:
    """Greedy pass@1 as a chart where there are few groups, and all numbers as its table."""
    name = f"pass@{answers.k}"
    ones = [_scores(samples, groups, 1) for samples in answers.greedy]
    many = [_scores(samples, groups, answers.k) for samples in answers.sampled]
    header = [key, *(f"pass@1, {model}" for model in answers.models), *(f"{name}, {model}" for model in answers.models)]
    rows = [[group, *(interval(scores[at]) for scores in (*ones, *many))] for at, group in enumerate(groups)]
    if len(groups) > FEW:
        about = f"Greedy pass@1 and sampled {name} on the test problems, with 95% intervals over n problems."
        return Figure(title=title, note=f"{about} {note}".strip(), header=header, rows=rows)
    about = f"Greedy pass@1 on the test problems; bars are 95% intervals over n problems; {name} is in the table below."
    chart = dot_chart(
        title,
        f"{about} {note}".strip(),
        y="problems solved",
        groups=[f"{key}: {group} (n {ones[0][at]['n']})" for at, group in enumerate(groups)],
        series=[Series(name=model, points=scores) for model, scores in zip(answers.models, ones, strict=True)],
    )
    return replace(chart, header=header, rows=rows)


def _scores(samples: Sequence[Sample], groups: Mapping[str, set[str]], k: int) -> list[dict[str, Any]]:
    """pass@k of each group."""
    own = [[sample for sample in samples if sample.problem_id in group] for group in groups.values()]
    return [evaluation.as_dict(evaluation.pass_at(found, k)) for found in own]


def _keys(problems: Iterable[Problem]) -> list[str]:
    """Fields of the meta to group by: those of `evaluation.GROUPS` whatever the number of values, and others with few."""
    values: dict[str, set[str]] = {}
    crowded = set()
    for problem in problems:
        for key, value in problem.meta.items():
            if isinstance(value, str | int | float):
                values.setdefault(key, set()).add(str(value))
            elif value is not None:
                crowded.add(key)
    grouped = [key for key, found in values.items() if len(found) > 1 and key not in crowded]
    return [key for key in grouped if key in evaluation.GROUPS or len(values[key]) <= FEW]


def _groups(problems: Iterable[Problem], key: str) -> dict[str, set[str]]:
    """Problem ids by the value of a field, in the order of the values: numbers by size. Without a value: in no group."""
    groups: dict[Any, set[str]] = {}
    for problem in problems:
        if problem.meta.get(key) is not None:
            groups.setdefault(problem.meta[key], set()).add(problem.id)
    order = sorted(groups, key=lambda value: (isinstance(value, str), value if not isinstance(value, str) else 0, str(value)))
    return {cut(str(value), 80): groups[value] for value in order}


def gallery(facts: Facts) -> dict[str, Any] | None:
    """Test problems with the greedy completions of the base and of the accepted iteration, chosen by a hash of their id."""
    before = {sample.problem_id: sample for sample in facts.test_samples(0, "greedy")}
    after = {sample.problem_id: sample for sample in facts.test_samples(facts.accepted or 0, "greedy")}
    names = [name for name in before if name in after and name in facts.test_problems]
    names.sort(key=lambda name: hashlib.blake2b(name.encode(errors="replace")).digest())
    graded = [name for name in names if before[name].reward is not None and after[name].reward is not None]
    kinds: dict[tuple[bool, bool], list[str]] = {}
    for name in graded:
        kinds.setdefault(((before[name].reward or 0) > 0, (after[name].reward or 0) > 0), []).append(name)
    words = {
        (False, True): "newly solved",
        (True, False): "newly lost",
        (False, False): "still wrong" if facts.accepted else "wrong",
        (True, True): "still right" if facts.accepted else "right",
    }
    chosen: list[tuple[tuple[bool, bool], str]] = []
    for take in range(max(map(len, kinds.values()), default=0)):  # in turn, so that each kind shows
        chosen += [(key, kinds[key][take]) for key in words if take < len(kinds.get(key, [])) and key != (True, True)]
    chosen += [((True, True), name) for name in kinds.get((True, True), [])]
    if not facts.accepted:  # one model: wrong and right in turn
        chosen = [pair for both in zip(chosen, reversed(chosen), strict=True) for pair in both][:SHOWN]
    chosen = sorted(dict.fromkeys(chosen[:SHOWN]), key=lambda pair: list(words).index(pair[0]))
    if not chosen:
        return None
    counts = {words[key]: len(kinds[key]) for key in words if key in kinds}
    sides = [("base", before)] + ([(f"iteration {facts.accepted}", after)] if facts.accepted else [])
    return {
        "counts": counts,
        "n": len(graded),
        "items": [
            {
                "kind": words[key],
                "problem": facts.test_problems[name],
                "question": cut(facts.test_problems[name].question),
                "reference": cut(str(facts.test_problems[name].reference), 300),
                "sides": [_side(label, samples[name]) for label, samples in sides],
            }
            for key, name in chosen
        ],
    }


def _side(label: str, sample: Sample) -> dict[str, Any]:
    return {
        "label": label,
        "text": cut(sample.text),
        "is_right": bool(sample.reward),
        "reason": sample.reason,
        "answer": None if sample.answer is None else cut(sample.answer, 200),
        "note": cut(sample.note, 300),
        "tokens": len(sample.token_ids),
    }
