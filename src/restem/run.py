"""One run: everything that Algorithm 1 needs and that is not in it. Resume, files, logging and placement live here.

Each method is one line of `restem.algorithm`, and does only what its files do not hold yet: a resumed run walks through the
same algorithm and finds most of it done. A method's result is a function of the recipe and of what its files hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from restem import evaluation
from restem.backends import open_backend
from restem.candidate import Candidate, as_dict, from_dict, relative
from restem.config import Recipe
from restem.errors import RestemError
from restem.estep import read_stage
from restem.files import read_json, remove_directory, write_json
from restem.monitor import Monitor, write_drift
from restem.progress import Talk
from restem.rundir import RunDirectory
from restem.sampling.given import given_solutions
from restem.sandbox import choose
from restem.scoring import score_on_test
from restem.selection import select, write_selection
from restem.stages import Stages
from restem.statistics import Interval
from restem.summary import summarise
from restem.tasks import Task
from restem.tasks.of_recipe import more_tests, prompt_of, task_of
from restem.trackers import check_trackers, open_tracker
from restem.training import Interval as TrainingInterval
from restem.types import Example, Sample


class Run:
    """An open run directory with a recipe; a context manager. Hand it to `restem.rest_em`.

    `resume`: go on with what `out` holds; a missing or empty directory is started. `command`: what a user types to start this
    run, without --out, for messages. Raises RestemError for whatever a user can mend.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path,
        *,
        resume: bool = False,
        quiet: bool = False,
        command: str | None = None,
        task: Task | None = None,
    ) -> None:
        self.recipe, self.path = recipe, Path(out)
        self.command = command or "restem run RECIPE.toml"
        self.task = task or task_of(recipe)
        self.prompt = prompt_of(recipe, self.task)
        self.tests = [self.task, *more_tests(recipe, self.task)]
        self.directory = RunDirectory.open(self.path, resume=resume, command=self.command)
        self.talk = Talk(self.path / "log.txt", quiet=quiet)
        with ExitStack() as undo:
            undo.callback(self.directory.close)
            self.backend = open_backend(recipe, self.prompt, self.path, self.talk.say)
            self.base = self.backend.base
            self.given = given_solutions(recipe, replace(self.task, prompt=self.prompt), self.backend.renderer)
            facts = {
                "base": relative(self.path, self.base),
                "base_fingerprint": self.backend.fingerprint(self.base),
                "learning_rate": recipe.improve.peak_learning_rate,
                **self.backend.facts,
            }
            if not self.directory.is_new:
                self.directory.go_on(recipe, self.tests, facts, self.command)
                self.talk.say(f"resuming {self.path}")
            self.stages = Stages(recipe, self.tests, self.backend, self.talk)
            undo.callback(self.stages.close, cancel=True)
            check_trackers(recipe.engine.trackers)
            if self.directory.is_new:  # last: what cannot start makes no run
                sandbox = choose() if "code" in self.stages.verifiers else None
                self.directory.create(recipe, self.tests, {**facts, "sandbox": sandbox, "task": self._task_facts()})
            tracker = open_tracker(recipe.engine.trackers, self.path, recipe, say=self.talk.warn)
            self.monitor = Monitor(self.path, tracker)
            undo.pop_all()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with ExitStack() as last:
            last.callback(self.directory.close)
            last.callback(self.monitor.close, failed=kind is not None)
            last.callback(self.stages.close, cancel=kind is not None)

    @property
    def iterations(self) -> range:
        return range(1, self.recipe.iterations + 1)

    def at(self, iteration: int) -> Path:
        return self.path / f"iter-{iteration:02d}"

    # --- the lines of Algorithm 1 ------------------------------------------------------------------------------------------

    def start(self, model: str) -> Candidate:
        """A model as candidate 0: not trained, with its reward on D_val."""
        candidate = self._validated(model, self.at(0) / "val", iteration=0, interval=0)
        self.monitor.began(candidate)
        return candidate

    def unmeasured(self, model: str) -> Candidate:
        """A model whose reward on D_val is not known, nor needed."""
        nan = float("nan")
        return Candidate(model=model, fingerprint=self.backend.fingerprint(model), reward=nan, low=nan, high=nan, n=0)

    def generate(self, policy: Candidate, iteration: int) -> list[Sample]:
        """The E-step: N samples of the policy for every training problem, graded; or the solutions given in their place."""
        given = self.given
        return self.stages.draw(
            f"iteration {iteration}: {given.name if given else 'generate'}",
            self.at(iteration),
            policy,
            [problem for problem in self.task.train if given is None or given.covers(problem)],
            given.samples if given else self.stages.samples_per_problem,
            self.stages.decoding,
            stream=given.name if given else f"iteration {iteration}",
            sampler=given,
        )

    def select(self, samples: Sequence[Sample], iteration: int) -> tuple[Example, ...]:
        """D_i: written to examples.parquet, with what became of every sample in selection.json."""
        stream = f"{self.recipe.seed}/iteration {iteration}/select"
        selection = select(self.task.train, samples, self.backend.renderer, self.recipe.select, stream=stream)
        is_new = not (self.at(iteration) / "selection.json").is_file()
        write_selection(self.at(iteration), selection)
        if is_new:
            self.talk.say(
                f"iteration {iteration}: kept {len(selection.examples)} solutions of {selection.covered} problems "
                f"({selection.coverage:.0%} of {selection.problems} covered)"
            )
        if not selection.examples:
            cut = selection.counts.get("truncated", 0) / max(1, sum(selection.counts.values()))
            self.talk.warn(
                f"iteration {iteration} kept 0 of {sum(selection.counts.values())} samples; the model it starts from is "
                f"carried forward unchanged. Read {self.at(iteration)}/samples, check the verifier with `restem check`, raise "
                f"generate.samples, or raise generate.max_tokens ({cut:.0%} of the samples were cut off)."
            )
        return selection.examples

    def train(self, start: Candidate, examples: Sequence[Example], iteration: int) -> Iterator[TrainingInterval]:
        """The gradient steps of the M-step: a model after every interval. None if D_i is empty or the step is done."""
        if not examples or self._kept(iteration) is not None:
            return
        folder = self.at(iteration) / "improve"
        write_json(folder / "start.json", {"model": relative(self.path, start.model), "fingerprint": start.fingerprint})
        stream = f"{self.recipe.seed}/iteration {iteration}/improve"
        name = f"iteration {iteration}: improve"
        with self.talk.stage(name, 1) as watch:
            trainer = self.backend.open_trainer(self.monitor.follow(iteration, watch.step))
            for interval in trainer.train(start.model, examples, folder, stream=stream):
                self.monitor.trained(iteration, interval)
                yield interval
                self.backend.free_sampler()  # training goes on, and wants the memory

    def validate(self, interval: TrainingInterval, iteration: int) -> Candidate:
        """The reward of an interval's model on D_val."""
        folder = self.at(iteration) / "improve" / f"interval-{interval.number}" / "val"
        candidate = self._validated(interval.model, folder, iteration=iteration, interval=interval.number)
        self.monitor.validated(iteration, interval, candidate, folder)
        return candidate

    def keep(self, best: Candidate, iteration: int) -> Candidate:
        """End the M-step: the winner's model moves to iter-NN/model, the others are deleted."""
        kept = self._kept(iteration)
        if kept is None:
            if best.iteration != iteration:  # carried forward: its model stays where it is
                best = replace(best, interval=0)
            else:
                target = self.at(iteration) / "model"
                if Path(best.model).is_dir():
                    Path(best.model).replace(target)
                best = replace(best, model=str(target))
            write_json(self.at(iteration) / "iteration.json", as_dict(self.path, best))
            kept = best
            self.talk.say(f"iteration {iteration}: {_verdict(best)}")
        for folder in sorted((self.at(iteration) / "improve").glob("*")):
            if folder.name.startswith("state-"):
                remove_directory(folder)
            remove_directory(folder / "model")
        return kept

    def evaluate(self, policy: Candidate, iteration: int) -> None:
        """Scores on the test problems, and for the last policy its train accuracy."""
        last = iteration == self.recipe.iterations
        if last or self.given is not None:
            self._train_accuracy(policy, iteration)
        if self.recipe.evaluate.every or last or iteration == 0:
            for task in self.tests:
                self.test(policy, iteration, task)

    def test(self, policy: Candidate, iteration: int, task: Task | None = None) -> None:
        """Test problems: greedy pass@1 and sampled pass@K. The same weights are never scored twice."""
        task = task or self.task
        scores = score_on_test(self.stages, self.path, policy, iteration, task)
        self.monitor.tested(iteration, task.name, scores)

    def finish(self, accepted: Candidate) -> Candidate:
        """End the run: result.json and the report. The accepted policy is the run's model."""
        summary = summarise(self.path, self.recipe)
        result = {**summary, "model": relative(self.path, accepted.model), "accepted": as_dict(self.path, accepted)}
        write_json(self.path / "result.json", result)
        for warning in summary["warnings"]:
            self.talk.warn(warning)
        from restem.report import write_report

        write_report(self.path)
        return accepted

    # --- behind them ----------------------------------------------------------------------------------------------------------

    def _task_facts(self) -> dict[str, Any]:
        """What the task decided where the recipe left it to the task."""
        return {
            "name": self.task.name,
            "verifier": self.task.verifier_spec,
            "samples": self.stages.samples_per_problem,
            "decoding": self.stages.decoding.describe(),
            "prompt": {
                "style": self.prompt.style,
                "instruction": self.prompt.instruction,
                "frame": self.prompt.frame,
                "exemplars": [[e.question, e.solution] for e in self.prompt.shown],
            },
        }

    def _validated(self, model: str, folder: Path, *, iteration: int, interval: int) -> Candidate:
        file = folder / "candidate.json"
        if file.is_file():
            return from_dict(self.path, read_json(file))
        unknown = replace(self.unmeasured(model), iteration=iteration, interval=interval)
        decoding = replace(self.stages.decoding, temperature=self.recipe.improve.val_temperature)
        which = f"interval {interval}, D_val" if interval else "D_val"
        samples = self.stages.draw(
            f"iteration {iteration}: {which}",
            folder,
            unknown,
            self.task.val,
            self.recipe.improve.val_samples,
            decoding,
            stream="val",  # the same for all candidates: common random numbers
        )
        reward: Interval = evaluation.mean_reward(samples)
        finished = [sample for sample in samples if sample.finish == "stop"]  # one that was cut off needs no verifier
        if not reward.n or (finished and all(sample.reward is None for sample in finished)):
            raise RestemError(
                f"nothing on the {len(self.task.val)} D_val problems could be graded, so no improvement could be seen. "
                "Check the verifier and the references with `restem check`."
            )
        candidate = replace(unknown, reward=reward.value, low=reward.low, high=reward.high, n=reward.n)
        base = self.at(0) / "val"
        drift = write_drift(self.backend, model, self.task.val, read_stage(base), base, folder)
        write_json(file, as_dict(self.path, candidate))
        text = f"D_val reward {reward.value:.3f} [{reward.low:.3f}, {reward.high:.3f}], n = {reward.n}"
        self.talk.say(f"{'':<28} {text}" + (f", drift from the base {drift:+.4f} nats per token" if drift and interval else ""))
        return candidate

    def _train_accuracy(self, policy: Candidate, iteration: int) -> None:
        """Earlier policies' train accuracy comes from the E-step that follows them; the last one has none."""
        folder = self.at(iteration) / "train"
        samples = self.stages.draw(
            f"iteration {iteration}: train accuracy",
            folder,
            policy,
            self.task.train,
            self.recipe.evaluate.train_samples,
            self.stages.decoding,
            stream="train accuracy",
        )
        write_json(folder / "accuracy.json", evaluation.as_dict(evaluation.mean_reward(samples)))

    def _kept(self, iteration: int) -> Candidate | None:
        file = self.at(iteration) / "iteration.json"
        return from_dict(self.path, read_json(file)) if file.is_file() else None


def _verdict(best: Candidate) -> str:
    if not best.interval:
        return "no interval beat the start on D_val; it is carried forward unchanged"
    return f"interval {best.interval} won with D_val reward {best.reward:.3f} [{best.low:.3f}, {best.high:.3f}]"
