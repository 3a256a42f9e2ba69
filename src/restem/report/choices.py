"""What had to be chosen: the points that the paper leaves open with this run's choice, every setting, and the machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from restem.config import Recipe, describe_fields, flatten
from restem.report.facts import Facts


class Open(NamedTuple):
    """A point that the paper does not state."""

    number: str
    question: str
    choice: str
    """What holds in every run."""
    keys: tuple[str, ...] = ()
    """Recipe keys whose values are this run's choice."""


OPEN = (
    Open(
        "U1",
        "Optimiser, learning rate, schedule, batch size, length of training",
        "AdamW, restarted in every M-step.",
        (
            "improve.optimiser",
            "improve.learning_rate",
            "improve.schedule",
            "improve.warmup",
            "improve.batch_size",
            "improve.epochs",
            "improve.weight_decay",
            "improve.clip",
            "improve.objective",
            "improve.dtype",
        ),
    ),
    Open("U2", "What D_val is", "Problems held out of training; never the test problems.", ("task.val",)),
    Open(
        "U3",
        "How often D_val is looked at, how it is sampled, and when training stops",
        "The untrained start is a candidate too; a tie is no improvement.",
        ("improve.interval", "improve.stop", "improve.patience", "improve.val_samples", "improve.val_temperature"),
    ),
    Open(
        "U4",
        "Which solutions are kept when more than the limit are correct",
        "Chosen per problem, and the same ones however the run is resumed.",
        ("select.choose", "select.max_per_problem"),
    ),
    Open("U5", "Whether equal solutions of a problem are merged", "Only if the recipe says so.", ("select.dedup",)),
    Open(
        "U6",
        "The prompt and how many worked exemplars it shows",
        "One rendering serves sampling, training and evaluation; null is the task's own.",
        ("prompt.style", "prompt.source", "prompt.shots", "prompt.exemplars", "prompt.instruction"),
    ),
    Open(
        "U7",
        "Longest completion, stop texts, and what becomes of a completion that is cut off",
        "A completion that was cut off is never correct and never trained on.",
        ("generate.max_tokens", "generate.stop"),
    ),
    Open(
        "U8",
        "The exact check of an answer",
        "The task's verifier, or the one that the recipe names; what it cannot judge counts as not graded, not as wrong.",
        ("task.verifier",),
    ),
    Open(
        "U9",
        "How programs are run, and for how long",
        "Verifiers work in processes of their own, which are killed when their time is up.",
        ("engine.grade_seconds",),
    ),
    Open(
        "U10",
        "Whether the test uses the few-shot prompt",
        "It does: the test prompt is the training prompt.",
        ("prompt.style", "prompt.shots"),
    ),
    Open(
        "U11",
        "The recipe of the baseline that trains on human solutions",
        'That of the run, but for the source: one human solution a problem. With "model" no human solution is used.',
        ("generate.source", "generate.run"),
    ),
    Open("U12", "Whether that baseline stops by the same rule", "It does: it is a run like any other.", ("improve.stop",)),
    Open(
        "U13",
        "Whether the limit per problem grows with more samples",
        "It does not: the limit is a setting of its own.",
        ("generate.samples", "select.max_per_problem"),
    ),
    Open(
        "U14",
        "How smaller training sets are drawn",
        "A smaller set is the beginning of the larger one (nested).",
        ("task.train",),
    ),
    Open(
        "U15",
        "Whether the reported model is chosen on D_val or on the test",
        "On D_val alone; an earlier iteration wins a tie.",
    ),
    Open("U16", "Which iteration is reported", "All are shown; the accepted one is marked.", ("iterations",)),
    Open(
        "U17",
        "How many kept solutions reach the right answer by a wrong way",
        "Not measured: the verifier sees the final answer or the tests only. Read some of the kept solutions.",
    ),
)


def of_run(facts: Facts) -> list[dict[str, Any]]:
    """U1 to U17: the point, what always holds, and this run's values."""
    values = flatten(facts.recipe)
    found = dict(_found(facts))
    return [
        {
            "number": point.number,
            "question": point.question,
            "choice": point.choice,
            "values": [f"{key} = {show(values[key])}" for key in point.keys],
            "found": found.get(point.number),
        }
        for point in OPEN
    ]


def _found(facts: Facts) -> Iterator[tuple[str, str]]:
    """What the task or the machine decided where the recipe left it to them, as far as the files say."""
    base = facts.row(0)
    if base and base["val"]:
        yield "U2", f"{base['val']['n']} D_val problems were graded."
    if base and facts.task in base["test"]:
        decoding = base["test"][facts.task]["decoding"]["greedy"]
        yield "U7", f"In force: at most {decoding['max_tokens']} tokens, stop texts {show(decoding['stop'])}."
    selections = [found for row in facts.rows if (found := facts.selection(row["iteration"])) and found["problems"]]
    if selections:
        samples = sum(selections[0]["counts"].values()) // selections[0]["problems"]
        yield "U13", f"{samples} samples were drawn of each problem."


def settings(facts: Facts) -> list[dict[str, Any]]:
    """Every key of the recipe with its value, and whether that differs from the default."""
    about, defaults = describe_fields(), flatten(Recipe())
    return [
        {"key": key, "value": show(value), "is_changed": value != defaults[key], "about": " ".join(about[key].split())}
        for key, value in flatten(facts.recipe).items()
    ]


def machine(facts: Facts) -> list[tuple[str, str]]:
    """Where and with what the run was made."""
    run = facts.run
    hardware = run.get("hardware", {})
    lines = [
        ("device", run.get("device")),
        ("sampler's number format", run.get("sampler_dtype")),
        ("system", hardware.get("system")),
        ("processor cores", hardware.get("cores")),
        ("memory", f"{hardware['memory_bytes'] / 2**30:.1f} GiB" if "memory_bytes" in hardware else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())),
        ("commit", run.get("commit") or "not known"),
        ("sandbox", run.get("sandbox") or "none: this run executed no programs of a model"),
        ("base", run.get("base")),
        ("fingerprint of the base", run.get("base_fingerprint")),
        ("fingerprint of the accepted model", facts.result["accepted"]["fingerprint"] if facts.result else None),
        ("hashes of the problems", ", ".join(f"{name} {digest}" for name, digest in run.get("problems", {}).items())),
        ("command", " ".join(run.get("argv", []))),
        *(("note", note) for note in run.get("notes", [])),
    ]
    return [(name, str(value)) for name, value in lines if value not in (None, "")]


def show(value: Any) -> str:
    """A recipe value as it is written in TOML or JSON."""
    import json

    return json.dumps(value, ensure_ascii=False)
