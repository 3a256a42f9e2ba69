"""A run's stages: samples of a model for some problems, drawn with its backend and judged by the verifier of their task.

`restem.estep` draws one stage. What a run's stages have in common is held here: one worker pool for each kind of verifier, the
E-step's decoding, the progress that the user sees, and the check that what is sampled is what the run means.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from restem.backends import Backend
from restem.candidate import Candidate
from restem.config import Recipe
from restem.estep import Stage, draw
from restem.progress import Talk
from restem.sampling import Decoding, Sampler
from restem.tasks import Task
from restem.types import Problem, Sample
from restem.verifiers.pool import VerifierPool


class Stages:
    """Draws stages for one run. `tests`: the run's task first, then the others that it is tested on."""

    def __init__(self, recipe: Recipe, tests: Sequence[Task], backend: Backend, talk: Talk) -> None:
        self.recipe, self.task, self.backend, self.talk = recipe, tests[0], backend, talk
        self._pools: dict[str, VerifierPool] = {}
        try:
            for spec in dict.fromkeys(task.verifier_spec for task in tests):
                self._pools[spec] = self._open_pool(spec)
        except BaseException:
            self.close(cancel=True)
            raise

    @property
    def verifiers(self) -> Iterable[str]:
        return self._pools.keys()

    @property
    def decoding(self) -> Decoding:
        """The decoding of the E-step."""
        g = self.recipe.generate
        return Decoding(
            temperature=g.temperature,
            top_k=g.top_k,
            top_p=g.top_p,
            min_p=g.min_p,
            max_tokens=g.max_tokens or self.task.max_tokens,
            stop=g.stop if g.stop is not None else self.backend.stop,
        )

    @property
    def samples_per_problem(self) -> int:
        return self.recipe.generate.samples or self.task.samples

    def draw(
        self,
        name: str,
        directory: Path,
        policy: Candidate,
        problems: Sequence[Problem],
        samples: int,
        decoding: Decoding,
        *,
        stream: str,
        task: Task | None = None,
        sampler: Sampler | None = None,
    ) -> list[Sample]:
        """All graded samples of a stage; draws and grades only what its directory does not hold yet.

        `name` is what the user reads. `stream` names the stage's randomness within the run. `task`: the problems', if it is
        not the run's own. `sampler`: one that draws without a model.
        """
        task = task or self.task
        stage = Stage(
            directory=directory,
            problems=problems,
            samples=samples,
            decoding=decoding,
            stream=f"{self.recipe.seed}/{stream}",
            model=policy.fingerprint,
            shard_problems=max(1, self.recipe.engine.shard_samples // samples),
        )
        with self.talk.stage(name, len(problems) * samples) as watch:
            present = [s for s in range(len(stage.shards())) if stage.samples_part(s).exists()]
            watch.resumed(sum(len(stage.shards()[shard]) * samples for shard in present))
            found = self.backend.fingerprint(policy.model) if not stage.is_complete() else policy.fingerprint
            assert found == policy.fingerprint, "the sampled weights are the policy's"
            prompt = None if task is self.task else task.prompt
            pool = self._pools[task.verifier_spec]
            return draw(stage, lambda: sampler or self.backend.open_sampler(policy.model, prompt), pool, watch)

    def close(self, *, cancel: bool) -> None:
        """End the workers. `cancel`: without waiting for what they are at."""
        with ExitStack() as last:  # all of them, even if one fails
            for pool in self._pools.values():
                last.callback(pool.close, cancel=cancel)

    def _open_pool(self, verifier: str) -> VerifierPool:
        engine = self.recipe.engine
        seconds = engine.grade_seconds or (300.0 if verifier == "code" else 10.0)
        return VerifierPool(verifier, workers=engine.grade_workers, seconds=seconds)
