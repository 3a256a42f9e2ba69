"""What the command line prints: tables and texts made of results, with every number beside its n or its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from restem.config import ImproveConfig, Recipe, describe_fields, recipe_files
from restem.errors import RestemError
from restem.files import read_json
from restem.summary import form_and_substance
from restem.tasks import Task


def announce(recipe: Recipe, task: Task, out: Path) -> str:
    """The first screen: what will run, how much of it, and where it goes."""
    samples = recipe.generate.samples or task.samples
    lines = [
        f"restem: {recipe.model.base} on {task.name}, {recipe.iterations} iterations, seed {recipe.seed}, into {out}",
        f"  problems: {len(task.train)} train, {len(task.val)} D_val, {len(task.test)} test",
        f"  each iteration: {len(task.train)} x {samples} = {len(task.train) * samples} samples, "
        f"at most {recipe.select.max_per_problem} correct ones a problem train the base model",
    ]
    if recipe.iterations:
        lines.append(f"  training: {_trained(recipe.improve)}")
    return "\n".join([*lines, *(f"  {note}" for note in task.notes)])


def _trained(improve: ImproveConfig) -> str:
    what = f"a LoRA adapter of rank {improve.lora_rank}" if improve.lora_rank else "all weights"
    source = " (improve.learning_rate is unset)" if improve.learning_rate is None else ""
    optimiser = f", {improve.optimiser}" if improve.optimiser != "adamw" else ""
    return f"{what}{optimiser}, peak learning rate {improve.peak_learning_rate:g}{source}"


def result_table(result: dict[str, Any], out: Path) -> str:
    """The last screen of a run: the table, the comparison with the base, where things are, what to try next."""
    rows = result["iterations"]
    ks = _sampled_names(rows)
    header = [
        "iteration",
        "kept",
        "coverage",
        "train",
        "D_val reward",
        "test pass@1 (greedy)",
        *(f"test {k}" for k in ks),
    ]
    cells = [_cells(row, ks) for row in rows]
    text = [table(header, cells), "[low, high] are 95% intervals over n problems.", ""]
    trained = [row for row in rows if row["paired"]]
    for row in trained:
        paired = row["paired"]
        text.append(f"iteration {row['iteration']} against the base, greedy pass@1 on {paired['task']}: {paired['words']}")
        text.append("  " + _form_text(rows[0], row, paired["task"]))
    text += [f"warning: {words}" for words in result["warnings"]]
    best = result["accepted"]["iteration"]
    model = Path(result["model"]) if Path(result["model"]).is_absolute() else out / result["model"]
    text += [
        "",
        f"model    {model}   (iteration {best}, D_val reward {result['accepted']['reward']:.3f})",
        f"data     {out}/iter-*/examples.parquet",
        f"report   {out}/report.html",
        "",
        "next:    " + f"restem export {out} DIR        the model and its data set, with cards",
        f"         restem run RECIPE --set seed=1 --out {out}-seed1        is it more than luck?",
        "         restem run mine.toml        your own problems: docs/your-own-task.md",
    ]
    return "\n".join(text)


def scores_table(scores: dict[str, Any], *, markdown: bool = False) -> str:
    """One model's scores on one task, in plain columns or as Markdown."""
    rows = [[name, percent(metric), str(metric["n"])] for name, metric in scores["metrics"].items()]
    counts = ", ".join(f"{name} {count}" for name, count in scores["counts"].items())
    title = f"{scores['model']} on {scores['task']} ({scores['split']})"
    layout, gap = (markdown_table, "\n\n") if markdown else (table, "\n")
    return gap.join([title, layout(["metric", "value", "n"], rows), f"greedy samples: {counts}"])


def check_text(report: dict[str, Any]) -> str:
    """The outcome of a pre-flight in words (`restem.preflight.CheckReport.as_dict`)."""
    rows = [
        [name, *(str(split[key]) for key in ("problems", "accepted", "rejected", "ungradable", "unchecked"))]
        for name, split in report["splits"].items()
    ]
    lines = [
        f"{report['task']}, verifier {report['verifier']}: every reference graded against itself",
        table(["split", "problems", "accepted", "rejected", "ungradable", "unchecked"], rows),
        f"{1000 * report['seconds_per_grading']:.2g} ms a grading"
        + (f", sandbox {report['sandbox']}" if report["sandbox"] else ""),
        *report["notes"],
    ]
    overlaps = {pair: ids for pair, ids in report["overlap"].items() if ids}
    lines += [f"overlap of {pair}: {len(ids)} problems ({', '.join(ids[:5])})" for pair, ids in overlaps.items()]
    lines += [f"{name} repeats {len(s['repeated'])} problems" for name, s in report["splits"].items() if s["repeated"]]
    if not overlaps:
        lines.append("overlap of train, val, test and exemplars by content hash: none")
    shared = {pair: ids for pair, ids in report["shared_13grams"].items() if ids}
    lines += [
        f"13 words in a row in {pair}: {len(ids)} problems of {pair.partition(' and ')[0]} ({', '.join(ids[:5])}); worth a look"
        for pair, ids in shared.items()
    ]
    if not shared:
        lines.append("13 words in a row in two of train, val, test and exemplars: none")
    lines += [f"{f['split']} {f['problem_id']}: {f['reference']!r:.80} {f['reason']} {f['note']}" for f in report["findings"]]
    return "\n".join([*lines, "ok" if report["ok"] else "not ok: mend what is listed, or give another task.verifier"])


def regrade_text(found: dict[str, Any]) -> str:
    """The outcome of `restem grade` in words."""
    share = found["changed"] / max(1, found["samples"])
    lines = [
        f"{found['run']}: {found['samples']} samples graded again with {found['verifier']}; "
        f"{found['changed']} changed ({share:.1%})"
    ]
    lines += [f"  {count:6}  {change}" for change, count in found["changes"].items()]
    for change in found["first_changes"]:
        before, now = change["before"], change["now"]
        lines.append(
            f"{change['stage']} {change['problem_id']} #{change['index']}: {before['reason']} -> {now['reason']}, "
            f"answer {now['answer']!r:.80}, reference {change['reference']!r:.80} {now['note']}"
        )
    if opinions := found.get("second_opinions"):
        lines.append(f"second opinions on {opinions['compared']} answers:")
        lines += [f"  {name}: {counts or 'agrees with all'}" for name, counts in opinions["disagreements"].items()]
        lines += [f"  {row}" for row in opinions["first"]]
    if found["changed"] and not found["written"]:
        lines.append("Nothing was changed. Replace the grades with --write.")
    return "\n".join(lines)


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Paired comparison of two runs' accepted models, or of two evaluation folders."""
    from restem.estep import read_stage
    from restem.evaluation import compare

    one, two = _evaluation_folder(first), _evaluation_folder(second)
    return {"task": two.name, **compare(read_stage(one / "greedy"), read_stage(two / "greedy"))}


def comparison_text(first: Path, second: Path, found: dict[str, Any]) -> str:
    """The outcome of `restem compare` in words."""
    lines = [f"{second} against {first}, greedy pass@1 on {found['task']}: {found['words']}"]
    if found["detectable"] is not None:
        lines.append(
            f"With {found['n']} problems, of which {found['wins'] + found['losses']} changed, a difference below "
            f"{100 * found['detectable']:.1f} points is missed more often than one time in five."
        )
    return "\n".join(lines)


def _evaluation_folder(path: Path) -> Path:
    if (path / "scores.json").is_file():
        return path
    if not (path / "result.json").is_file():
        raise RestemError(f"{path} is neither a finished run nor a folder with scores.json, such as RUN/iter-01/eval/TASK.")
    result = read_json(path / "result.json")
    found = sorted((path / f"iter-{result['accepted']['iteration']:02d}" / "eval").glob("*/scores.json"))
    if not found:
        raise RestemError(f"{path} has no test scores for its accepted model (evaluate.every was off).")
    return found[0].parent


def listing(what: str) -> str:
    """What a recipe may name, one a line."""
    from restem import sampling, tasks, training, verifiers

    known: dict[str, Callable[[], list[str]]] = {
        "tasks": tasks.names,
        "recipes": lambda: [f"{name:<20} {_first_comment(path)}" for name, path in recipe_files().items()],
        "samplers": sampling.names,
        "trainers": training.names,
        "verifiers": verifiers.names,
        "models": lambda: [
            "embedded    SmolLM2-135M-Instruct, fetched once, no hub needed",
            "toy         a table of probabilities: whole runs in seconds",
            "toy:table   the same with a row for every problem",
            "a local directory, or a hub id",
        ],
        "keys": lambda: [f"{key}\n    {' '.join(text.split())}" for key, text in describe_fields().items()],
    }
    if what not in known:
        raise RestemError(f'there is no list of "{what}". There are: {", ".join(known)}.')
    return "\n".join(known[what]())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain columns, aligned; reads the same in a terminal, a log and a mail."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as GitHub and notebooks render it."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(metric: dict[str, Any] | None) -> str:
    """ "17.5% [14.1, 21.5]" """
    if metric is None:
        return "-"
    return f"{metric['value']:.1%} [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"


def _cells(row: dict[str, Any], ks: Sequence[str]) -> list[str]:
    metrics = next(iter(row["test"].values()))["metrics"] if row["test"] else {}
    reward = row["val"]
    return [
        str(row["iteration"]) if row["trained"] or not row["iteration"] else f"{row['iteration']} (carried)",
        "-" if row["kept"] is None else str(row["kept"]),
        "-" if row["coverage"] is None else f"{row['coverage']:.0%}",
        percent(row["train"]),
        f"{reward['value']:.3f} [{reward['low']:.3f}, {reward['high']:.3f}] n {reward['n']}" if reward else "-",
        f"{percent(metrics['pass@1'])} n {metrics['pass@1']['n']}" if metrics else "-",
        *(f"{percent(metrics[k])} n {metrics[k]['n']}" if k in metrics else "-" for k in ks),
    ]


def _sampled_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = [name for row in rows for scores in row["test"].values() for name in scores["metrics"]]
    return [name for name in dict.fromkeys(names) if name not in ("pass@1", "pass@1 sampled")]


def _form_text(base: dict[str, Any], row: dict[str, Any], task: str) -> str:
    before, after = (form_and_substance(r["test"][task]["counts"]) for r in (base, row))
    return (
        f"of {row['test'][task]['n']} greedy answers, not readable or cut off: {before['form']} -> {after['form']}; "
        f"readable but wrong: {before['wrong']} -> {after['wrong']}; correct: {before['correct']} -> {after['correct']}"
    )


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
