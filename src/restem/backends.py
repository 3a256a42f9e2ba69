"""What a recipe's model means: where its base lies, how it is sampled, trained and told apart. One class for real models, one
for the toy; the loop sees neither."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from restem import sampling, toy, training
from restem.config import Recipe
from restem.errors import RestemError
from restem.processes import of_this_run
from restem.prompts import Prompt, Renderer
from restem.sampling import Sampler
from restem.sampling.shared_out import SharedSampler
from restem.selection import Renders, example_of
from restem.training import Trainer
from restem.tree import shared_length
from restem.types import Problem, Sample

Report = Callable[[int, int, dict[str, float]], None]


class Backend(Protocol):
    """A kind of model. Models are named by directory."""

    base: str
    stop: tuple[str, ...]
    """Texts that end a completion."""
    facts: dict[str, Any]
    """What the report says about where and how the model runs."""

    @property
    def renderer(self) -> Renders: ...
    def open_sampler(self, model: str, prompt: Prompt | None = None) -> Sampler:
        """A sampler of a model; `prompt`: another one than the run's."""
        ...

    def open_trainer(self, report: Report) -> Trainer: ...
    def free_sampler(self) -> None:
        """Give back the memory of the sampler."""
        ...

    def likelihoods(self, model: str, drawn: Sequence[tuple[Problem, Sample]]) -> list[tuple[float, int]] | None:
        """Log-probability of each completion under a model, at temperature 1, and its tokens; None if it cannot be told."""
        ...

    def fingerprint(self, model: str) -> str: ...


def open_backend(recipe: Recipe, prompt: Prompt, home: Path, say: Callable[[str], None]) -> Backend:
    """The backend of a recipe. `home`: a directory for what belongs to the run (the toy's base)."""
    for seam, name in ((sampling, recipe.engine.sampler), (training, recipe.engine.trainer)):
        if name not in ("auto", *seam.names()):
            seam.plugin(name)  # raises: better now than after hours of sampling
    if recipe.model.base.partition(":")[0] == "toy" or (Path(recipe.model.base) / "toy.json").is_file():
        return ToyBackend(recipe, home)
    return HFBackend(recipe, prompt, say)


class HFBackend:
    """A Hugging Face decoder: tree sampler, tree trainer. Holds at most one model for sampling.

    With several processes the first one's samplers are drawn from in all of them.
    """

    def __init__(self, recipe: Recipe, prompt: Prompt, say: Callable[[str], None]) -> None:
        from restem import models

        self.recipe, self.say = recipe, say
        self.device = models.pick_device(recipe.model.device)  # first: a model may have to be fetched
        self.base = models.locate(recipe.model.base, say=say)
        self.dtype = models.compute_dtype(recipe.model.dtype, self.device)
        self._training_dtype = models.compute_dtype(recipe.improve.dtype, self.device, training=True)
        self._try_device()
        tokenizer = models.load_tokenizer(self.base, trust_remote_code=recipe.model.trust_remote_code)
        self.renderer: Renderer = Renderer(prompt, tokenizer)
        self.stop = self.renderer.stop
        self._sampler: tuple[str, Renderer, Sampler] | None = None
        self._renderers: dict[Prompt, Renderer] = {}
        self._trainer: Any = None
        self._fingerprints: dict[str, str] = {}
        self.facts: dict[str, Any] = {"device": self.device, "sampler_dtype": str(self.dtype).removeprefix("torch.")}
        if of_this_run().count > 1:
            self.facts["processes"] = of_this_run().count
        if recipe.iterations and recipe.engine.trainer in ("auto", "tree") and of_this_run().is_main:
            self.facts |= self._training_memory()

    def _training_memory(self) -> dict[str, Any]:
        """What training will take of the device, said, and refused if it cannot fit, before anything is drawn."""
        import torch

        from restem.training import fit

        prompts = [self.renderer.encode(Problem(id=text, question=text)) for text in ("a", "b")]
        work = fit.work_of(
            self.recipe,
            device=self.device.partition(":")[0],
            arithmetic=str(self._training_dtype).removeprefix("torch."),
            sampler=self.facts["sampler_dtype"],
            shared=shared_length(prompts),
        )
        return fit.before_training(self.recipe, self.base, work, torch.device(self.device), self.say)

    def open_sampler(self, model: str, prompt: Prompt | None = None) -> Sampler:
        own, processes = partial(self.open_own_sampler, model, prompt), of_this_run()
        if processes.count == 1:
            return own()
        return SharedSampler(own, partial(_open_elsewhere, self.recipe, self.renderer.prompt, model, prompt), processes)

    def open_own_sampler(self, model: str, prompt: Prompt | None = None) -> Sampler:
        """One that draws in this process alone."""
        from restem import models

        renderer = self.renderer
        if prompt is not None:
            renderer = self._renderers.setdefault(prompt, Renderer(prompt, self.renderer.tokenizer))
        if self._sampler is not None and self._sampler[0] == model and self._sampler[1] is not renderer:
            loaded = getattr(self._sampler[2], "model", None)  # only the prompt changes
            self._sampler = None if loaded is None else (model, renderer, self._sampler_of(loaded, renderer))
        if self._sampler is None or self._sampler[0] != model:
            self._sampler = None  # free the former model before the next is loaded
            trust = self.recipe.model.trust_remote_code
            # What is being trained is in memory already.
            loaded = self._trainer.loaded(model, self.dtype) if hasattr(self._trainer, "loaded") else None
            if loaded is None:
                loaded = models.load_model(model, dtype=self.dtype, device=self.device, trust_remote_code=trust)
            self._sampler = (model, renderer, self._sampler_of(loaded, renderer))
        return self._sampler[2]

    def _sampler_of(self, model: Any, renderer: Renderer) -> Sampler:
        engine = self.recipe.engine
        if engine.sampler not in ("auto", "tree", "generate"):
            return cast(Sampler, sampling.plugin(engine.sampler)(model, renderer, rows=engine.rows))
        from restem.compatibility import Unsupported
        from restem.sampling.generate import GenerateSampler

        if engine.sampler != "generate":
            try:
                return sampling.TreeSampler(model, renderer, rows=engine.rows, say=self.say)
            except Unsupported as error:
                if engine.sampler == "tree" or (self.recipe.iterations and engine.trainer in ("auto", "tree")):
                    raise  # what cannot be trained need not be sampled first
                self.say(f"warning: {error} It is sampled with transformers' `generate`, which is many times slower.")
        return GenerateSampler(model, renderer, rows=engine.rows, say=self.say)

    def open_trainer(self, report: Report) -> Trainer:
        self.free_sampler()
        settings, name = self.recipe.improve, self.recipe.engine.trainer
        is_tree = name in ("auto", "tree")
        make: Any = training.TreeTrainer if is_tree else training.plugin(name)
        self._trainer = make(
            settings,
            device=self.device,
            dtype=self._training_dtype,
            trust_remote_code=self.recipe.model.trust_remote_code,
            report=report,
            **({"say": self.say} if is_tree else {}),
        )
        return cast(Trainer, self._trainer)

    def _try_device(self) -> None:
        """Before the first run on a device other than the CPU: does the tree compute there what the model does?"""
        from restem import models

        engine, trains = self.recipe.engine, self.recipe.iterations > 0 and self.recipe.engine.trainer in ("auto", "tree")
        if self.device == "cpu" or not (trains or engine.sampler in ("auto", "tree")):
            return
        from restem.first_use import on_first_use
        from restem.trial import Formats

        config = models.load_config(self.base, trust_remote_code=self.recipe.model.trust_remote_code)
        on_first_use(config, self.device, Formats(self.dtype, self._training_dtype), self.say, trains=trains)

    def free_sampler(self) -> None:
        self._sampler = None

    def likelihoods(self, model: str, drawn: Sequence[tuple[Problem, Sample]]) -> list[tuple[float, int]] | None:
        from restem.training.loss import log_likelihoods

        sampler = self.open_own_sampler(model)
        if not isinstance(sampler, sampling.TreeSampler):
            return None
        examples = [example_of(problem, sample, self.renderer) for problem, sample in drawn]
        return [
            (value, len(e.completion_ids)) for value, e in zip(log_likelihoods(sampler.model, examples), examples, strict=True)
        ]

    def fingerprint(self, model: str) -> str:
        from restem import models

        if model not in self._fingerprints:
            self._fingerprints[model] = models.fingerprint(model)
        return self._fingerprints[model]


def _open_elsewhere(recipe: Recipe, of_run: Prompt, model: str, prompt: Prompt | None, held: dict[str, Any]) -> Sampler:
    """In another process: a sampler of a model of the first one's. The backend is kept from job to job."""
    if "backend" not in held:
        held["backend"] = HFBackend(recipe, of_run, say=lambda text: None)
    return cast(HFBackend, held["backend"]).open_own_sampler(model, prompt)


class ToyBackend:
    """The toy: see `restem.toy`."""

    def __init__(self, recipe: Recipe, home: Path) -> None:
        self.recipe = recipe
        self.base = recipe.model.base
        if self.base in ("toy", "toy:table"):
            self.base = str(home / "toy-base")
            rows = 0 if recipe.model.base == "toy:table" else len(toy.BASE)
            toy.save_policy(toy.ToyPolicy(rows=rows, table={}), Path(self.base))
        elif not (Path(self.base) / "toy.json").is_file():
            raise RestemError(f'model.base = "{self.base}": the toys are "toy" and "toy:table"')
        self.renderer = toy.ToyRenderer(toy.load_policy(self.base))
        self.stop: tuple[str, ...] = ()
        self.facts: dict[str, Any] = {"device": "none: a table"}

    def open_sampler(self, model: str, prompt: Prompt | None = None) -> Sampler:
        return toy.ToySampler(toy.load_policy(model))

    def open_trainer(self, report: Report) -> Trainer:
        return toy.ToyTrainer(self.recipe.improve)

    def free_sampler(self) -> None:
        pass

    def likelihoods(self, model: str, drawn: Sequence[tuple[Problem, Sample]]) -> list[tuple[float, int]] | None:
        return None

    def fingerprint(self, model: str) -> str:
        return toy.fingerprint(model)
