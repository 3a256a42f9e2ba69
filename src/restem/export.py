"""A run's result as two directories that stand alone: the accepted model and the data set that made it, each with its card.

What a newcomer would get wrong: the data set is that of the accepted iteration only (each M-step starts from the base, so no
other iteration's data touched the model; the card says so where a recipe has it otherwise), and an accepted base has none.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from restem.errors import RestemError
from restem.estep import read_stage
from restem.files import finish_directory, read_json, read_rows, write_rows, write_text
from restem.report.facts import Facts, scored_metrics
from restem.report.text import interval
from restem.rundir import read_problems


def export_run(run: Path, directory: Path) -> str:
    """Copy the accepted model to DIRECTORY/model and its data set to DIRECTORY/data; return what was written, in words.

    DIRECTORY appears at once, complete. Raises RestemError if it is not empty, if the run is not finished, or if the model
    is gone.
    """
    facts, directory = Facts.read(run), directory.expanduser().resolve()
    if facts.result is None:
        raise RestemError(
            f"{run} is not finished ({facts.done} of {facts.recipe.iterations} iterations), so no model is accepted yet. "
            f"Finish it first: restem run RECIPE --out {run} --resume"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        what = "is not empty" if directory.is_dir() else "is a file"
        raise RestemError(
            f"{directory} {what}, and nothing is overwritten. Give a new directory: restem export {run} {directory}-2"
        )
    model, iteration = _model(run, facts.result["model"]), int(facts.result["accepted"]["iteration"])
    with finish_directory(directory) as made:
        # The base's own card does not fit the trained model; hidden files are a cache's bookkeeping.
        shutil.copytree(model, made / "model", ignore=shutil.ignore_patterns("README.md", ".*"))
        write_text(made / "model" / "README.md", model_card(facts, is_transformers=(model / "config.json").is_file()))
        if iteration:
            rows = data_set(run, iteration)
            write_rows(
                made / "data" / "train.parquet", rows, _schema(), {"fingerprint": facts.result["accepted"]["fingerprint"]}
            )
            write_text(made / "data" / "README.md", data_card(facts, rows))
    if not iteration:
        return (
            f"model    {directory / 'model'}   (the base, unchanged: no iteration beat it on D_val)\n"
            f"data     none: nothing trained this model. What was kept lies in {run}/iter-*/examples.parquet"
        )
    return (
        f"model    {directory / 'model'}   (iteration {iteration}, with README.md)\n"
        f"data     {directory / 'data' / 'train.parquet'}   ({len(rows)} solutions, with README.md)"
    )


def data_set(run: Path, iteration: int) -> list[dict[str, Any]]:
    """D_i with its questions, texts and grades, joined by (problem_id, index); in the order of examples.parquet."""
    folder = run / f"iter-{iteration:02d}"
    questions = {problem.id: problem.question for problem in read_problems(run / "problems" / "train.parquet")}
    samples = {(sample.problem_id, sample.index): sample for sample in read_stage(folder)}
    rows = []
    for example in read_rows(folder / "examples.parquet"):
        sample = samples[example["problem_id"], example["index"]]
        found = {name: getattr(sample, name) for name in ("reward", "answer", "logprob")}
        rows.append({"question": questions[sample.problem_id], "completion": sample.text, **example, **found})
    return rows


def model_card(facts: Facts, *, is_transformers: bool = True) -> str:
    """README.md of the model: what it is, how it scores beside its base, and where it comes from."""
    assert facts.result is not None, "only a finished run is exported"
    recipe, accepted = facts.recipe, facts.result["accepted"]
    base, license_ = base_identity(facts)
    source = _SOURCES[recipe.generate.source]
    iteration = accepted["iteration"]
    task = facts.task or recipe.task.name
    what = (
        f"`{base}` after iteration {iteration} of {source.method} (Singh et al., TMLR 2024, arXiv 2312.06585) on the task "
        f"`{task}`: fine-tuned from the base on solutions that a verifier found correct."
        if iteration
        else f"`{base}`, unchanged: no iteration of {source.method} on the task `{task}` beat it on D_val."
    )
    front = [f"base_model: {_quoted(base)}"]
    front += ["library_name: transformers", "pipeline_tag: text-generation"] if is_transformers else []
    front += [f"license: {license_}"] if license_ else []
    sections = [
        _front(front, ["rest-em", *source.tags, "restem"]),
        f"# {_line(base)} + ReST^EM on {_line(task)}\n\n{what}",
        "## Scores\n\n"
        + _scores(facts)
        + "\n\nBrackets are 95% intervals over n problems. pass@1 is greedy unless it says sampled; "
        "decodings differ between columns.\n\n" + "\n".join(f"{_line(sentence)}" for sentence in facts.verdict),
        "## Warnings\n\n" + _list([*facts.summary["warnings"], *_limits(license_)]),
        "## How it was made\n\n" + _list(_provenance(facts)),
        "## Recipe\n\n```json\n" + json.dumps(facts.run["recipe"], indent=2, ensure_ascii=False) + "\n```",
    ]
    return "\n\n".join(sections) + "\n"


def data_card(facts: Facts, rows: Sequence[dict[str, Any]]) -> str:
    """README.md of the data set."""
    assert facts.result is not None, "only a finished run is exported"
    iteration = facts.result["accepted"]["iteration"]
    selection = facts.selection(iteration)
    assert selection is not None, "an iteration that was trained has a selection"
    recipe = facts.recipe
    total = sum(selection["counts"].values())
    front = [
        "configs:",
        "- config_name: default",
        "  data_files: train.parquet",
        "task_categories:",
        "- text-generation",
    ]
    task = facts.task or recipe.task.name
    verifier = facts.run.get("verifier") or recipe.task.verifier or f"the one of the task {task}"
    sections = [
        _front(front, ["rest-em", *_SOURCES[recipe.generate.source].tags, "restem"]),
        f"# Verified solutions of {_line(task)}, iteration {iteration}\n\n{len(rows)} solutions of {selection['covered']} of "
        f"{selection['problems']} training problems ({selection['coverage']:.1%} covered). {_origin(facts, iteration)}",
        "## Columns\n\n`question`, `completion` (text), `problem_id` and `index` (identity of the sample), `weight` and "
        "`reward`, `answer` (as the verifier read it), `logprob` (natural log, of the completion with its end token, under the "
        "sampled model at temperature 1; null = not known), `prompt_ids` and "
        "`completion_ids` (the tokens trained on, end token included).",
        "## How it was made\n\n"
        + _list(
            [
                f"verifier: {verifier}; it sees the answer or the tests only, so a wrong way to a right answer is kept",
                *_sampling(facts, total // selection["problems"]),
                *_provenance(facts),
                *_earlier(facts, iteration),
            ]
        ),
        "## What became of every sample\n\n| fate | samples |\n| --- | ---: |\n"
        + "\n".join(f"| {name} | {count} |" for name, count in selection["counts"].items())
        + f"\n| all | {total} |",
    ]
    return "\n\n".join(sections) + "\n"


def base_identity(facts: Facts) -> tuple[str, str | None]:
    """The base's public name and its license, as far as its own card says; a local path is shortened to its last part."""
    name, card = facts.recipe.model.base, Path(str(facts.run.get("base", ""))) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = text.split("\n---", 1)[0] if text.startswith("---\n") else ""
    found = {
        key: match[1] for key in ("license", "base_model") if (match := re.search(rf"^{key}:\s*([\w./-]+)\s*$", front, re.M))
    }
    if name == "embedded":
        name = found.get("base_model", name)
    elif Path(name).expanduser().is_dir() or Path(name).is_absolute():
        name = Path(name).name
    return name, found.get("license")


def _model(run: Path, name: str) -> Path:
    for path in (run / name, Path(name)):  # relative to the run, unless it lies elsewhere
        if path.is_dir():
            return path
    raise RestemError(
        f"the accepted model of {run} is gone: there is no {run / name}. Bring it back, or make it again in another directory "
        "with the run's recipe (run.json) and seed."
    )


def _scores(facts: Facts) -> str:
    assert facts.result is not None
    chosen = list(dict.fromkeys([0, facts.result["accepted"]["iteration"]]))
    lines = ["| model | D_val reward | " + " | ".join(f"{task} {name}" for task, name in facts.columns) + " |"]
    lines.append("| --- " * (len(facts.columns) + 2) + "|")
    for number in chosen:
        row = facts.row(number)
        assert row is not None, "the accepted iteration is in the run"
        tests = [scored_metrics(row["test"][task])[name] if task in row["test"] else None for task, name in facts.columns]
        cells = [interval(metric) for metric in (row["val"], *tests)]
        lines.append(f"| {'base' if not number else f'iteration {number}'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


class _Source(NamedTuple):
    """What the cards call training on a kind of solutions (`generate.source`)."""

    method: str
    data: str
    tags: tuple[str, ...]


_SOURCES = {
    "model": _Source(
        "ReST^EM self-training",
        "self-generated and verifier-filtered: the training data (D_i) is the model's own output",
        ("self-training", "synthetic"),
    ),
    "human": _Source(
        "fine-tuning on human solutions, a baseline of ReST^EM",
        "human and verifier-filtered: the training data is what comes with the problems",
        (),
    ),
    "run": _Source(
        "distillation, a comparison of ReST^EM",
        "from another model and verifier-filtered: the training data is the output that another run has sampled",
        ("distillation", "synthetic"),
    ),
}


def _origin(facts: Facts, iteration: int) -> str:
    """Whose solutions a data set holds."""
    base, source = base_identity(facts)[0], facts.recipe.generate.source
    if source == "human":
        return "They are the human solutions that come with the problems, graded, and kept only if correct."
    if source == "run":
        name = Path(str(facts.recipe.generate.run)).name
        return f"They were sampled by another run ({name}), graded again, and kept only if correct."
    former = read_json(facts.at(iteration - 1) / "iteration.json")["iteration"] if iteration > 1 else 0
    model = f"iteration {former}'s model (trained from {base})" if former else base
    return f"They were sampled from {model}, graded, and kept only if correct; no human solution is among them."


def _sampling(facts: Facts, samples: int) -> list[str]:
    """How solutions were drawn; of those that were given, how many were kept."""
    g, most = facts.recipe.generate, f"at most {facts.recipe.select.max_per_problem} kept"
    if g.source != "model":
        return [f"{most} of each problem"]
    return [
        f"N: {samples} samples of each problem, {most}",
        f"decoding: temperature {g.temperature}, top-k {g.top_k}, top-p {g.top_p}, min-p {g.min_p}",
    ]


def _limits(license_: str | None) -> list[str]:
    words = ["Measured on this task only; what training did to other abilities was not measured here."]
    return (
        words
        if license_
        else [*words, "The license of the base is not known to restem; look it up before you share the model."]
    )


def _provenance(facts: Facts) -> list[str]:
    assert facts.result is not None
    run = facts.run
    return [
        f"{_SOURCES[facts.recipe.generate.source].data}, kept where the verifier gave a reward",
        f"seed {facts.recipe.seed}, peak learning rate {facts.recipe.improve.peak_learning_rate:g}, started {run['created']}",
        f"weights: base {run['base_fingerprint']}, this model {facts.result['accepted']['fingerprint']}",
        f"restem {run['versions'].get('restem', 'of a checkout')}, commit {run.get('commit') or 'not known'}",
        "problems: " + ", ".join(f"{name} {digest}" for name, digest in run["problems"].items()),
    ]


def _earlier(facts: Facts, iteration: int) -> list[str]:
    if facts.recipe.improve.start_from == "base" or iteration == 1:
        return []
    return ['improve.start_from is "last": the model was trained on the data of earlier iterations before this data set']


def _front(lines: Sequence[str], tags: Sequence[str]) -> str:
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {_line(item)}" for item in items)


def _line(text: str) -> str:
    return " ".join(text.split())


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a YAML string


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "question": pa.string(),
            "completion": pa.string(),
            "problem_id": pa.string(),
            "index": pa.int32(),
            "weight": pa.float64(),
            "reward": pa.float64(),
            "answer": pa.string(),
            "logprob": pa.float64(),
            "prompt_ids": pa.list_(pa.int32()),
            "completion_ids": pa.list_(pa.int32()),
        }
    )
