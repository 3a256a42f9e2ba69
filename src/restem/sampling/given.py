"""Solutions that are given instead of drawn from the run's own model: the paper's comparisons (section 5.3).

`generate.source = "human"` is fine-tuning on human data, "run" on another run's samples: distillation from a teacher, or, with
the same base and one solution a problem, one model solution against one human solution of the same problems. They go the way of
samples: written, graded, selected, trained on with the same prompt, base and stop rule, so that nothing else differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from restem.config import Recipe
from restem.errors import RestemError
from restem.estep import read_stage
from restem.evaluation import rewards_by_problem
from restem.sampling import Decoding, Owed
from restem.sampling.human import HumanSolutions
from restem.selection import Renders
from restem.tasks.task import Task
from restem.types import Problem, Sample


class Given(Protocol):
    """A sampler without a model."""

    name: str
    """What they are, in words: "human solutions"."""
    samples: int
    """Solutions of a problem."""

    def covers(self, problem: Problem) -> bool:
        """Whether there may be solutions of a problem."""
        ...

    def sample(self, problems: Sequence[Problem], owed: Iterable[Owed], decoding: Decoding, *, stream: str) -> Iterator[Sample]:
        """See `restem.sampling.Sampler`."""
        ...


def given_solutions(recipe: Recipe, task: Task, renderer: Renders) -> Given | None:
    """What a recipe gives to train on; None if its own model is to be sampled. Raises RestemError if it cannot be had."""
    settings = recipe.generate
    if settings.source == "model":
        return None
    if recipe.iterations > 1:
        raise RestemError(
            f'generate.source = "{settings.source}" with iterations = {recipe.iterations}: these solutions are the same in '
            "every iteration, and each starts from the base. Set iterations = 1."
        )
    drawn = read_last_samples(Path(settings.run)) if settings.run is not None else {}
    if settings.source == "run":
        assert settings.run is not None, "the recipe says so"
        return RunSolutions(drawn, renderer, f"solutions of {settings.run}", task)
    solved = None
    if settings.run is not None:
        rewards = rewards_by_problem(sample for samples in drawn.values() for sample in samples)
        solved = frozenset(name for name, own in rewards.items() if max(own) > 0)
    return HumanSolutions(task, renderer, solved)


class RunSolutions:
    """A sampler that hands out what another run has sampled, right or wrong: this run's own verifier grades it again.

    `drawn`: samples by problem. Where this run's tokenizer makes the same text of a sample's token ids, these are trained on as
    they were sampled; another model's text is tokenised anew. Raises RestemError if none is of a training problem of the task.
    """

    def __init__(self, drawn: dict[str, list[Sample]], renderer: Renders, name: str, task: Task) -> None:
        self.drawn, self.renderer, self.name = drawn, renderer, name
        self.samples = max(map(len, drawn.values()), default=0)
        if not any(self.covers(problem) for problem in task.train):
            raise RestemError(
                f"{name}: not one is of a training problem of this recipe ({task.name}). Give generate.run a run of the same "
                "task, with the same task.train and task.split_seed."
            )

    def covers(self, problem: Problem) -> bool:
        return len(self.drawn.get(problem.id, ())) == self.samples

    def sample(self, problems: Sequence[Problem], owed: Iterable[Owed], decoding: Decoding, *, stream: str) -> Iterator[Sample]:
        for name, index in owed:
            found = self.drawn[name][index]
            kept = found.token_ids
            if self.renderer.decode(kept) != found.text:
                kept = self.renderer.encode_completion(found.text)
            yield Sample(problem_id=name, index=index, token_ids=kept, text=found.text, finish=found.finish)


def read_last_samples(run: Path) -> dict[str, list[Sample]]:
    """The graded samples of the last E-step that a run has finished, by problem, in the order of their index."""
    finished = sorted(file.parent for file in run.glob("iter-*/selection.json"))
    if not finished:
        raise RestemError(
            f'generate.run = "{run}" holds no run that has sampled its training problems (no iter-*/selection.json). '
            "Give the folder that `restem run --out` wrote to."
        )
    drawn: dict[str, list[Sample]] = {}
    for sample in read_stage(finished[-1]):
        drawn.setdefault(sample.problem_id, []).append(sample)
    return drawn
