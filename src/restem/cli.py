"""The command line: each command is parsing, one call, printing. Results go to stdout, talk and progress to stderr.

Exit codes: 0, 1 an error that you can mend, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from restem import __version__
from restem.errors import RestemError

app = typer.Typer(
    name="restem",
    help="Make a language model better at problems whose answers can be checked, with its own checked answers (ReST^EM).",
    epilog="Begin with: restem run arithmetic --out runs/first",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one key of the recipe, for example generate.samples=16. Repeatable."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of a table.")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"restem {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or a built-in recipe: restem list recipes.")],
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/NAME-OF-RECIPE.")] = None,
    set_: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was stopped; starts it if there is none.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and load nothing heavy.")] = False,
    json_: JsonOption = False,
) -> None:
    """Run ReST^EM: sample, grade, select, improve, repeat. Leaves a model, its data set, scores and a report."""
    from restem.config import load_recipe
    from restem.show import announce, result_table

    loaded = load_recipe(recipe, set_ or [])
    out = out or Path("runs") / Path(recipe).stem
    command = shlex.join(["restem", "run", recipe, *[part for s in set_ or [] for part in ("--set", s)]])
    if dry_run:
        from restem.tasks.of_recipe import task_of

        typer.echo(announce(loaded, task_of(loaded), out))
        return
    from restem.algorithm import rest_em
    from restem.files import read_json
    from restem.run import Run
    from restem.training.launch import only_the_first_process_goes_on

    with only_the_first_process_goes_on(loaded.model.device) as is_first:
        if not is_first:
            return
        with Run(loaded, out, resume=resume, command=command) as opened:
            opened.talk.say(announce(loaded, opened.task, out))
            rest_em(opened)
    result = read_json(out / "result.json")
    typer.echo(json.dumps(result) if json_ else result_table(result, out))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help='A model directory, a hub id, "embedded" or "toy".')],
    task: Annotated[str, typer.Option(help="A task by name, or a file of your own problems.")],
    limit: Annotated[int | None, typer.Option(help="Only the first LIMIT test problems.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with one folder per set; default: the hub.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep samples and scores here; default: the user's cache.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Sample again, even what was evaluated before.")] = False,
    set_: SetOption = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    json_: JsonOption = False,
) -> None:
    """Score a model on a task's test problems: greedy pass@1, sampled pass@K, with intervals.

    The same weights, problems and settings are not sampled twice: scores and samples are kept in the user's cache.
    """
    from restem.config import load_recipe
    from restem.scoring import evaluate_model
    from restem.show import scores_table
    from restem.training.launch import only_the_first_process_goes_on

    given = {"name": task, "data": data, "test": limit}
    settings = {"iterations": 0, "model": {"base": model}, "task": {k: v for k, v in given.items() if v is not None}}
    loaded = load_recipe(settings, set_ or [])
    command = f"restem evaluate {model} --task {task}"
    with only_the_first_process_goes_on(loaded.model.device) as is_first:
        if not is_first:
            return
        scores = evaluate_model(loaded, out=out, fresh=fresh, command=command, say=lambda text: typer.echo(text, err=True))
    typer.echo(json.dumps(scores) if json_ else scores_table(scores, markdown=markdown))


@app.command()
def check(
    task_or_recipe: Annotated[str, typer.Argument(help="A task by name, a file of your own problems, or a recipe.")],
    data: Annotated[str | None, typer.Option(help="Folder with one folder per set; default: the hub.")] = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Pre-flight: grade every reference against itself, and show that the splits do not overlap."""
    from restem.config import load_recipe
    from restem.preflight import check as check_task
    from restem.show import check_text
    from restem.tasks.of_recipe import task_of

    report = check_task(task_of(load_recipe(_source(task_or_recipe, data), set_ or []))).as_dict()
    typer.echo(json.dumps(report) if json_ else check_text(report))
    if not report["ok"]:
        raise typer.Exit(1)


def _source(task_or_recipe: str, data: str | None) -> Any:
    """What `load_recipe` takes: the recipe of that name, or one that only evaluates the task of that name."""
    from restem.config import recipe_files
    from restem.tasks import names

    if task_or_recipe not in names() and (task_or_recipe.endswith(".toml") or task_or_recipe in recipe_files()):
        return task_or_recipe
    return {"iterations": 0, "task": {"name": task_or_recipe, **({"data": data} if data else {})}}


@app.command("show-prompt")
def show_prompt(
    task_or_recipe: Annotated[str, typer.Argument(help="A task by name, a file of your own problems, or a recipe.")],
    model: Annotated[str | None, typer.Option(help='Whose tokens: a model directory, a hub id or "embedded".')] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    index: Annotated[int, typer.Option(min=0, help="Which problem of the split, from 0.")] = 0,
    id_: Annotated[str | None, typer.Option("--id", help="The problem with this id, in place of an index.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with one folder per set; default: the hub.")] = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Show exactly what a model sees: a problem's prompt with its special tokens, how long it is, and what ends a completion.

    Only the tokenizer and the task are loaded, no weights.
    """
    from restem.show_prompt import open_prompt

    def say(text: str) -> None:
        typer.echo(text, err=True)

    overrides = [*([f"model.base={model}"] if model else []), *(set_ or [])]
    view = open_prompt(_source(task_or_recipe, data), overrides, split=split, index=index, id=id_, say=say)
    if json_:
        typer.echo(json.dumps(view.as_dict()))
        return
    from rich.console import Console

    from restem.show_prompt import print_prompt

    print_prompt(view, Console())


@app.command()
def sheet(
    file: Annotated[Path, typer.Argument(help="The sheet: .csv to fill in, .md to read.")],
    from_: Annotated[
        Path | None, typer.Option("--from", help="Write it new, with the answers of this run or RUN/iter-NN/eval/TASK.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Grade by hand: write a sheet of a model's answers, or read the points back from one and add them up."""
    from restem.sheet import open_sheet, read_sheet, score, score_text, write_sheet

    if from_ is not None:
        answers = open_sheet(from_)
        write_sheet(file, answers)
        typer.echo(f"{len(answers)} answers in {file}", err=True)
        return
    found = score(read_sheet(file))
    typer.echo(json.dumps(found.as_dict()) if json_ else score_text(found))


@app.command("show-mask")
def show_mask(
    recipe_or_run: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe (file or name), or a run directory to see what it kept.")
    ],
    problems: Annotated[int, typer.Option(min=1, help="How many training problems to pack.")] = 2,
    completions: Annotated[int, typer.Option(min=1, help="At most so many completions of each.")] = 2,
    full: Annotated[bool, typer.Option("--full", help="Show long prompts whole.")] = False,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Show one packed training batch: which tokens are prompt, which are trained on, and what attends to what.

    Training packs examples into a tree: the shared prompt once, each problem once below it, each completion below its problem.
    A token attends to its ancestors and its own past, never to a sibling, and text positions restart at a branch. So a
    completion is trained as if its prompt and it stood alone in a row. The loss falls on completions only, end token included.

    Only the tokenizer and the task are loaded, no weights. Given a recipe, reference answers stand in for sampled solutions.
    """
    from restem.mask import open_mask

    def say(text: str) -> None:
        typer.echo(text, err=True)

    view = open_mask(recipe_or_run, set_ or [], problems=problems, completions=completions, say=say)
    if json_:
        typer.echo(json.dumps(view.as_dict()))
        return
    from rich.console import Console

    from restem.show_mask import print_mask

    print_mask(view, Console(), full=full)


@app.command()
def grade(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    verifier: Annotated[str | None, typer.Option(help="Another verifier than the run's: a name or file.py:function.")] = None,
    second_opinion: Annotated[
        bool, typer.Option("--second-opinion", help="Mathematics: ask hendrycks-style equality and Math-Verify as well.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Replace the run's grades. What it has trained on stays as it was.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that grade.")] = 1,
    json_: JsonOption = False,
) -> None:
    """Replay the verifier over a run's samples and show what would change; nothing is sampled again."""
    from restem.regrade import regrade
    from restem.show import regrade_text

    found = regrade(run, verifier=verifier, second=second_opinion, write=write, workers=workers)
    typer.echo(json.dumps(found) if json_ else regrade_text(found))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write the report of a run again: one self-contained HTML file."""
    from restem.report import write_report

    typer.echo(str(write_report(run)))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run (its accepted model) or a folder eval/NAME of one.")],
    second: Annotated[Path, typer.Argument(help="The same, compared with the first.")],
    json_: JsonOption = False,
) -> None:
    """Compare two models on the same test problems, paired, with an interval."""
    from restem.show import compare_runs, comparison_text

    found = compare_runs(first, second)
    typer.echo(json.dumps(found) if json_ else comparison_text(first, second, found))


@app.command()
def seeds(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Finished runs of one recipe, each with a seed of its own.")
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    json_: JsonOption = False,
) -> None:
    """Put runs that differ in their seed into one table: means over seeds, their intervals, and the gain over the base."""
    from restem.seeds import across_seeds, seeds_text

    found = across_seeds(runs)
    typer.echo(json.dumps(found) if json_ else seeds_text(found, markdown=markdown))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    directory: Annotated[Path, typer.Argument(help="Where to; must not exist or be empty.")],
) -> None:
    """Copy a run's accepted model and the data set that made it, with their cards, to a directory of their own."""
    from restem.export import export_run

    typer.echo(export_run(run, directory))


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="tasks, recipes, samplers, trainers, verifiers, models or keys.")],
) -> None:
    """List what a recipe may name."""
    from restem.show import listing

    typer.echo(listing(what))


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Whose architecture to try: a model directory or a hub id. Only its config is read, no weights."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Say what this machine has, and try whether each of its devices computes rightly.

    On the CPU and every CUDA device a small random model is sampled and trained through the tree, for a second, and compared
    with its own forward pass and one sequence per row. "wrong" and "crash" mean: do not run there. A run tries its device in
    the same way on first use, and stops if it fails. Default: the embedded model's architecture, if it was fetched before.
    """
    from restem.doctor import is_right, machine, machine_text

    facts = machine(model)
    typer.echo(json.dumps(facts) if json_ else machine_text(facts))
    if not is_right(facts):
        raise typer.Exit(1)


def main() -> NoReturn:
    """The console script. Turns what a user can mend into one message and an exit code."""
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # what typer makes of Ctrl-C, without a word
            raise KeyboardInterrupt
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted; what was finished is kept. Go on with the same command and --resume.")
        code = 130
    except RestemError as error:
        _complain(str(error))
        code = 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong usage, as click reports it
            error.show()
            code = error.exit_code
        elif is_disk_full(error):
            _complain(f"the disk is full ({error}). Free some space, then go on with the same command and --resume.")
            code = 1
        else:
            raise
    sys.exit(code)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that nothing more can be written: from Python, or in words from a library."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(words in str(error) for words in ("No space left on device", "Disk quota exceeded", "File too large"))


def _complain(text: str) -> None:
    print(f"restem: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
