"""Draws samples in several processes, from samplers that say who drew: for tests of what travels between processes.

Argument: "endless", or "cases": one line of JSON each, from the first process; the last one ends in an error.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from restem.errors import RestemError
from restem.processes import of_this_run
from restem.sampling import Decoding, Owed
from restem.sampling.shared_out import SharedSampler
from restem.training.launch import only_the_first_process_goes_on
from restem.types import Problem, Sample

PROBLEMS = [Problem(id=f"p{number}", question="?", reference=number) for number in range(5)]


class Says:
    """A sampler whose completions name the process, its process id, and what it was told."""

    def __init__(self, case: str) -> None:
        self.case, self.rank = case, of_this_run().rank

    def sample(self, problems: Sequence[Problem], owed: Iterable[Owed], decoding: Decoding, *, stream: str) -> Iterator[Sample]:
        for drawn, (problem, index) in enumerate(owed):
            if self.case == "error" and self.rank == 1 and drawn == 2:
                raise RestemError("memory is not enough")
            if self.case == "bug" and self.rank == 1:
                raise KeyError("what")
            if self.case in ("dropped", "endless"):
                time.sleep(0.05)
            text = json.dumps([self.rank, os.getpid(), len(problems), sum(p.reference is not None for p in problems), stream])
            yield Sample(
                problem_id=problem, index=index, token_ids=(1,) * decoding.max_tokens, text=text, finish="stop", logprob=0.0
            )


def elsewhere(case: str, held: dict[str, Any]) -> Says:
    return Says(case)


def draw(case: str, samples: int, *, tokens: int = 1) -> Iterator[Sample]:
    owed = [Owed(problem.id, index) for problem in PROBLEMS for index in range(samples)]
    sampler = SharedSampler(partial(Says, case), partial(elsewhere, case), of_this_run())
    return sampler.sample(PROBLEMS, owed, Decoding(max_tokens=tokens), stream=case)


def main() -> None:
    with only_the_first_process_goes_on("cpu") as is_first:
        if is_first and sys.argv[1] == "endless":
            for sample in draw("endless", 100_000):
                print(sample.text, flush=True)
        elif is_first:
            tell(draw("plain", 4))
            tell(draw("long", 1, tokens=5_000_000))
            tell(islice(draw("dropped", 1000), 20))
            tell(draw("after it", 3))
            tell(draw("bug", 3))
            tell(draw("error", 4))


def tell(samples: Iterator[Sample]) -> None:
    try:
        found = [[s.problem_id, s.index, len(s.token_ids), *json.loads(s.text)] for s in samples]
    except RuntimeError as error:
        found = [str(error)]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    try:
        main()
    except RestemError as error:
        print(f"restem: {error}", file=sys.stderr)
        sys.exit(1)
