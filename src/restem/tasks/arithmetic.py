"""Short word problems made from a seed: the embedded task, small enough to watch a 135M model learn on a laptop.

The templates and the wording are our own; nothing here comes from a data set. The one thing a newcomer would get wrong:
which split a question may appear in is decided by the hash of its text, not by the seed, so the test problems of one
seed never meet the training problems of another, whatever the sizes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from restem.errors import RestemError
from restem.prompts import Exemplar, Prompt
from restem.tasks.arithmetic_templates import ITEMS, NAMES, TEMPLATES, Draw
from restem.tasks.splits import Sizes, closest, content_hash
from restem.tasks.task import Task
from restem.types import Problem

SIZES = {"train": 96, "val": 48, "test": 400}
"""Problems per split when no size is asked for: few, for a laptop's processor."""

BUCKETS = {"test": range(0, 6), "val": range(6, 8), "train": range(8, 16)}
"""The first hexadecimal digit of a question's content hash says which split may hold it."""

EXEMPLARS = (
    Exemplar(
        question="Pavel carries 5 baskets of 12 melons to the market. 7 melons fall out. How many melons are left?",
        solution="5 baskets of 12 is 60. 60 - 7 = 53. The answer is 53.",
    ),
    Exemplar(
        question="A choir of 57 singers has 31 altos. The others are tenors. How many tenors does it have?",
        solution="57 - 31 = 26. The answer is 26.",
    ),
    Exemplar(
        question="Greta cuts a rope of 48 metres into 6 equal pieces. How long is each piece?",
        solution="48 / 6 = 8. The answer is 8.",
    ),
    Exemplar(
        question="A tram has 3 cars with 20 riders each. 14 get off and 9 get on. How many riders are in the tram now?",
        solution="3 cars of 20 is 60. 60 - 14 = 46. 46 + 9 = 55. The answer is 55.",
    ),
)
"""Written by hand; their wording is in no template, so they are in no split."""


class Options(BaseModel):
    """What can be set about the problems, in a recipe under `[task.options]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weights: tuple[float, float, float] = (0.5, 0.3, 0.2)
    """How often a problem takes one, two or three steps. Chosen so that the embedded base solves about a tenth."""
    largest_added: int = Field(default=20, ge=5)
    """Largest number that is added, or left over by a subtraction."""
    largest_taken: int = Field(default=10, ge=5)
    """Largest number that is taken away."""
    largest_factor: int = Field(default=6, ge=5)
    """Largest factor of a product."""
    largest_divisor: int = Field(default=5, ge=5)
    """Largest number that something is divided by. All divisions are exact."""


def load(*, data: Path | None = None, sizes: Sizes, seed: int = 0, options: Mapping[str, Any] | None = None) -> Task:
    """Generate the three splits; a smaller size is a prefix of a larger one. `data` is not needed: nothing is read."""
    knobs = _read_options(options or {})
    splits = {name: _split(name, sizes.of(name, SIZES[name]), seed, knobs) for name in SIZES}
    return Task(
        name="arithmetic",
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        prompt=Prompt(style="few-shot", exemplars=EXEMPLARS),
        verifier_spec="math",
        max_tokens=48,
        answer_style="answer-is",
    )


def generate(seed: int, stream: str, options: Options) -> Iterator[Problem]:
    """Yield problems without end; the i-th one depends on (seed, stream, i) and the options alone, on any Python."""
    index = 0
    while True:
        yield _problem(random.Random(f"{seed}/{stream}/{index}"), options)
        index += 1


def _split(name: str, size: int, seed: int, options: Options) -> tuple[Problem, ...]:
    taken: dict[str, Problem] = {}
    for tries, problem in enumerate(generate(seed, name, options)):
        if len(taken) == size:
            break
        if tries > 1000 + 200 * size:
            raise RestemError(
                f"arithmetic: only {len(taken)} different {name} problems of the {size} asked for can be made with "
                f"{options!r}.\nRaise the largest operands in task.options, or lower task.{name}."
            )
        if int(problem.id[0], 16) in BUCKETS[name]:
            taken.setdefault(problem.id, problem)
    return tuple(taken.values())


def _problem(rng: random.Random, options: Options) -> Problem:
    steps = rng.choices((1, 2, 3), weights=options.weights)[0]
    template = rng.choice([template for template in TEMPLATES if template.steps == steps])
    draw = Draw(
        rng=rng,
        largest_added=options.largest_added,
        largest_taken=options.largest_taken,
        largest_factor=options.largest_factor,
        largest_divisor=options.largest_divisor,
    )
    values = template.values(draw)
    first, second = rng.sample(NAMES, 2)
    question = rng.choice(template.forms).format(n=first, m=second, item=rng.choice(ITEMS), **values)
    return Problem(
        id=content_hash(question),
        question=question,
        reference=str(values["answer"]),
        meta={"steps": steps, "kind": template.kind},
    )


def _read_options(options: Mapping[str, Any]) -> Options:
    for key in options:
        if key not in Options.model_fields:
            raise RestemError(f'arithmetic has no option "{key}"{closest(key, Options.model_fields)}')
    try:
        read = Options(**options)
    except ValidationError as error:
        raise RestemError(f"arithmetic: wrong value in task.options:\n{error}") from error
    if min(read.weights) < 0 or sum(read.weights) <= 0:
        raise RestemError(f"arithmetic: task.options.weights must be three shares, at least one above 0: {read.weights}")
    return read
