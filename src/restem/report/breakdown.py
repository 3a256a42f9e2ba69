"""Where the numbers come from: form and substance, what the E-step kept, difficulty, and samples side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from restem import evaluation
from restem.report.charts import Figure, Series, dot_chart, histogram, line_chart
from restem.report.curves import BARS
from restem.report.facts import Facts, largest_k, share
from restem.report.text import cut, interval, points
from restem.types import Problem, Sample

GROUPS = 12
"""A field of the problems' meta with more values than this is no measure of difficulty."""
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


def by_difficulty(facts: Facts) -> list[Figure]:
    """Test problems by each field of their meta that has few values: the base against the accepted iteration."""
    shown = list(dict.fromkeys([0, facts.accepted or 0]))
    greedy = {number: facts.test_samples(number, "greedy") for number in shown}
    if not all(greedy.values()):
        return []
    sampled = {number: facts.test_samples(number, "sampled") for number in shown}
    name = largest_k(facts.metrics(0, facts.task) or {})
    names = {number: "base" if not number else f"iteration {number}" for number in shown}
    figures = []
    for key in _keys(facts.test_problems.values()):
        groups = _groups(facts.test_problems.values(), key)
        ones = {i: [_score(greedy[i], group, 1) for group in groups.values()] for i in shown}
        many = {i: [_score(sampled[i], group, int(name[5:])) for group in groups.values()] for i in shown}
        chart = dot_chart(
            f"Solved by {key}",
            f"Greedy pass@1 on the test problems; bars are 95% intervals over n problems; {name} is in the table below.",
            y="problems solved",
            groups=[f"{key}: {group} (n {ones[0][at]['n']})" for at, group in enumerate(groups)],
            series=[Series(name=names[i], points=ones[i]) for i in shown],
        )
        header = [key, *(f"pass@1, {names[i]}" for i in shown), *(f"{name}, {names[i]}" for i in shown)]
        rows = [
            [group, *(interval(column[at]) for column in (*ones.values(), *many.values()))] for at, group in enumerate(groups)
        ]
        figures.append(Figure(title=chart.title, note=chart.note, svg=chart.svg, legend=chart.legend, header=header, rows=rows))
    return figures


def _keys(problems: Iterable[Problem]) -> list[str]:
    values: dict[str, set[str]] = {}
    crowded = set()
    for problem in problems:
        for key, value in problem.meta.items():
            if isinstance(value, str | int | float):
                values.setdefault(key, set()).add(str(value))
            else:
                crowded.add(key)
    return [key for key, found in values.items() if 2 <= len(found) <= GROUPS and key not in crowded]


def _groups(problems: Iterable[Problem], key: str) -> dict[str, set[str]]:
    """Problem ids by the value of a field, in the order of the values: numbers by size."""
    groups: dict[Any, set[str]] = {}
    for problem in problems:
        if key in problem.meta:
            groups.setdefault(problem.meta[key], set()).add(problem.id)
    order = sorted(groups, key=lambda value: (isinstance(value, str), value if not isinstance(value, str) else 0, str(value)))
    return {cut(str(value), 80): groups[value] for value in order}


def _score(samples: Iterable[Sample], group: set[str], k: int) -> dict[str, Any]:
    return evaluation.as_dict(evaluation.pass_at((sample for sample in samples if sample.problem_id in group), k))


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
