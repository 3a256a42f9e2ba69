"""The recipe: one frozen tree that holds every choice of a run, read from TOML.

A string under each field says what it is, its unit, and where its default comes from. "Paper" means Singh et al. 2024; "U3"
and the like name what the paper leaves open (docs/choices.md). Unknown keys are errors, so that a misspelt option never runs
for hours unnoticed. `None` means "the task or the machine decides", and says so in its string.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from restem.errors import RestemError


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    base: str = "embedded"
    """What every Improve starts from: "embedded" (SmolLM2-135M-Instruct), "toy", a hub id, or a local directory."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the sampler; "auto" = bfloat16 where the processor computes in it, else float16 on a CUDA card and
    float32 on a CPU."""
    device: str = "auto"
    """"auto" = CUDA, else the CPU; or "cpu", "cuda", "cuda:1"."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you ask for it."""


class TaskConfig(Section):
    name: str = "arithmetic"
    """A built-in task (`restem list tasks`), or a path: your own JSONL or Parquet file, or a folder of train/val/test files."""
    data: str | None = None
    """Folder with one folder per set; None = the Hugging Face hub (built-in sets only)."""
    question: str = "question"
    """Column of your own data that holds the question."""
    answer: str = "answer"
    """Column of your own data that holds the reference answer."""
    id: str | None = None
    """Column that identifies a problem; None = derived from the question's content."""
    verifier: str | None = None
    """"math", "choice", "exact", "package.module:function" or "file.py:function"; None = the task's own."""
    train: int | None = Field(None, ge=1)
    """At most this many training problems; None = all."""
    val: int | None = Field(None, ge=1)
    """Size of D_val, held out of the training problems; None = the task's own size (U2)."""
    test: int | None = Field(None, ge=1)
    """At most this many test problems; None = all."""
    options: dict[str, Any] = {}
    """Passed to the task: for example the mix of difficulties of `arithmetic`."""


class PromptConfig(Section):
    source: Literal["task", "lm-eval"] = "task"
    """Where the worked exemplars come from: the task's own, or the well-known originals of an installed lm-eval, with its
    wording and its ends of a completion, to the letter (gsm8k, bbh, math, math500)."""
    style: Literal["auto", "few-shot", "chat", "plain"] = "auto"
    """How a problem becomes a prompt; "auto" = the task's own style: few-shot (paper), plain for HumanEval."""
    shots: int | None = Field(None, ge=0)
    """How many worked exemplars to show; None = all that the task or the file has."""
    exemplars: str | None = None
    """File (JSONL, JSON or TOML) with your own worked exemplars: question, solution. None = the task's own."""
    instruction: str | None = None
    """Text before the exemplars; None = the task's own."""


class GenerateConfig(Section):
    source: Literal["model", "human", "run"] = "model"
    """Whose solutions Improve trains on: the model's own; the data's human ones, one a problem (the paper's baseline, U11,
    U12); or another run's samples (distillation). With "human" and "run" there is one iteration."""
    run: str | None = None
    """Folder of another run. With source = "run" its last iteration's samples are trained on; with "human" only the problems
    that it solved in that iteration, so that one model solution can be compared with one human solution."""
    samples: int | None = Field(None, ge=1)
    """N, samples per problem; None = the task's own (paper: 32 for mathematics, 64 for code)."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature; 0 = greedy. Paper: 0.7."""
    top_k: int = Field(40, ge=0)
    """Keep the k likeliest tokens; 0 = off. Paper: 40."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus; 1 = off. The paper names none for the E-step."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Drop tokens below this share of the likeliest token's probability; 0 = off."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest completion, in tokens; None = the task's own (U7)."""
    stop: tuple[str, ...] | None = None
    """Texts that end a completion (they are cut off); None = those of the prompt style (U7)."""

    @model_validator(mode="after")
    def _source_and_run(self) -> GenerateConfig:
        if self.source == "run" and self.run is None:
            raise ValueError('source = "run" needs generate.run, the folder of the run whose samples are trained on')
        if self.source == "model" and self.run is not None:
            raise ValueError('run is for source = "run" or source = "human"; this recipe samples its own model')
        return self


class SelectConfig(Section):
    max_per_problem: int = Field(10, ge=1)
    """At most this many solutions a problem. Paper: 10."""
    choose: Literal["random", "shortest", "first"] = "random"
    """Which ones when there are more (U4): a seeded random choice, the shortest in tokens, or the first drawn."""
    dedup: Literal["off", "exact", "normalised"] = "off"
    """Drop repeated solutions of a problem before the cut-off (U5): equal texts, or equal after folding case and blanks."""
    threshold: float = Field(0.0, ge=0, lt=1)
    """Keep samples whose reward is above this. With 0/1 rewards any value gives the same set (paper, remark in section 3)."""


class ImproveConfig(Section):
    start_from: Literal["base", "last"] = "base"
    """Where Improve starts: the base model (paper), or the last iteration's model (the ReST ablation)."""
    epochs: float = Field(3.0, gt=0)
    """Most passes over D_i; the stop rule may end earlier (U1). VinePPO used 8 with a 100-fold smaller learning rate."""
    interval: float = Field(1.0, gt=0)
    """Epochs between two measurements of the reward on D_val (U3)."""
    interval_steps: int | None = Field(None, ge=1)
    """Optimiser steps between two measurements; None = by epochs."""
    stop: Literal["first", "best"] = "first"
    """"first" = stop at the first interval that does not improve the reward on D_val (paper: "while reward improves");
    "best" = train all intervals, keep the best one (U3). Candidate 0 is the untrained start in both."""
    patience: int = Field(0, ge=0)
    """With stop = "first": how many intervals without improvement to allow before stopping. A tie is no improvement."""
    val_samples: int = Field(8, ge=1)
    """Completions per D_val problem (U3). One greedy completion is too coarse to see an improvement."""
    val_temperature: float = Field(0.7, ge=0)
    """Temperature on D_val; the other decoding options are those of [generate] (U3)."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of AdamW (U1). None = 1e-5, common for full fine-tuning of models of 0.1 to 7 billion parameters, and
    ten times that with an adapter, which wants more (improve.lora_rank)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up (U1). Constant, so that an interval's model does not depend on how many intervals follow."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of all steps with a linearly rising learning rate (U1; VinePPO: 0.03)."""
    batch_size: int = Field(32, ge=1)
    """Examples per optimiser step, rounded up to whole problems so that a problem's solutions share its tokens (U1)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (U1; VinePPO: 0)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's mean and square (Loshchilov and Hutter 2019)."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient (U1)."""
    objective: Literal["sum", "token-mean", "problem"] = "token-mean"
    """Weight of a token in an optimiser step: "sum" = Eq. 1, tokens summed and examples averaged; "token-mean" = all target
    tokens weigh the same, scale independent of length (U1); "problem" = every solved problem weighs 1 (the exact M-step)."""
    pack_tokens: int | None = Field(None, ge=64)
    """Most tokens computed at once in training, beside what all prompts share; only memory and speed depend on it, never the
    gradient. None = 4,096 on a GPU, 768 on a CPU; there up to 4,096 with parallel = "shard", where packs repeat that part."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of training (U1); "auto" = bfloat16 where the processor computes in it, else float32."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Number format of weights and gradients in training. bfloat16 takes half the memory, and loses steps that are smaller than
    its rounding, unless it is stochastic: a learning rate of 1e-5 changes few of its weights."""
    optimiser: Literal["adamw", "adamw-bfloat16"] = "adamw"
    """"adamw" = AdamW with moments in the format of the weights. "adamw-bfloat16" = moments in bfloat16; what is in bfloat16 is
    rounded up or down by chance, right on average, so that small steps are not lost, at the price of noise in every step. With
    improve.weights = "bfloat16" it trains in 8 bytes a weight instead of 16. Off by default: it changes results (U1)."""
    lora_rank: int = Field(0, ge=0)
    """Train a LoRA adapter of this rank, merged into the weights that are handed over; 0 = train all weights (paper)."""
    lora_alpha: float | None = Field(None, gt=0)
    """Scale of the adapter; None = twice the rank."""
    lora_targets: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: "all-linear", or the ends of their names (Hu et al. 2021 adapt attention only)."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass: less memory, about a third more time."""
    parallel: Literal["replicate", "shard"] = "replicate"
    """With several processes (`torchrun`): each holds the whole model, or a part of it (FSDP2)."""
    checkpoint_minutes: float = Field(10.0, ge=0)
    """Minutes of training that a kill can cost; a checkpoint is also written after every interval. 0 = after every step."""

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate in force: the recipe's, or what None stands for."""
        return self.learning_rate or (1e-4 if self.lora_rank else 1e-5)


class EvaluateConfig(Section):
    tasks: tuple[str, ...] = ()
    """More tasks to test every model on, by name: transfer and general capability (paper, section 5). Their prompts and lengths
    are their own; `task.data` and the sizes of this section apply to them too."""
    limit: int | None = Field(None, ge=1)
    """At most this many problems of each of these tasks; None = all."""
    every: bool = True
    """Evaluate on the test problems after every iteration (False: only the base and the last)."""
    k: tuple[int, ...] = (1, 8)
    """The K of pass@K; 1 is always reported too. Test decoding for it: temperature 1.0 and top-p 0.95 (paper)."""
    majority: tuple[int, ...] = ()
    """The k of majority votes over the same samples, for example [8, 64] (paper: 64); () = none."""
    samples: int | None = Field(None, ge=1)
    """Samples per test problem for pass@K and majority votes; None = the largest K."""
    problems: int | None = Field(None, ge=1)
    """How many test problems to sample for pass@K (the first ones); None = all. pass@1 is greedy on all of them (paper)."""
    temperature: float = Field(1.0, gt=0)
    """Temperature for pass@K. Paper: 1.0."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus for pass@K. Paper: 0.95."""
    train_samples: int = Field(4, ge=1)
    """Samples per training problem for the last model's train accuracy, at [generate]'s decoding; earlier models' comes from
    the E-step that follows them."""

    @field_validator("k")
    @classmethod
    def _has_a_k_above_1(cls, k: tuple[int, ...]) -> tuple[int, ...]:
        if min(k, default=0) < 1 or max(k) < 2:
            raise ValueError("every K is at least 1 and one is above 1: pass@1 is never shown without pass@K")
        return k


class EngineConfig(Section):
    sampler: str = "auto"
    """"auto" = the tree, and `generate` with a warning for a model that the tree cannot serve; "tree", "generate", "toy", or a
    name registered under the entry point `restem.samplers`."""
    trainer: str = "auto"
    """"auto", "tree", "toy", or a name registered under the entry point `restem.trainers`."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Where metrics are sent besides metrics.jsonl."""
    rows: int | None = Field(None, ge=1)
    """Most samples in flight; None = as many as make the machine faster, within a third of the free memory."""
    shard_samples: int = Field(256, ge=1)
    """Samples per Parquet part, rounded to whole problems: what a kill can cost at most."""
    grade_workers: int = Field(1, ge=1)
    """Verifier processes that run beside the sampler."""
    grade_seconds: float | None = Field(None, gt=0)
    """Longest grading of one sample; the worker is killed and the sample counted as verifier_error. None = 10, and 300 for
    programs, whose tests have limits of their own."""


class Recipe(Section):
    iterations: int = Field(3, ge=0)
    """I, the number of Generate + Improve rounds; 0 = only evaluate the base. Paper: up to 3 for MATH, 2 for APPS."""
    seed: int = 0
    """Seed of every random choice: which samples, which ten, which order."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    prompt: PromptConfig = PromptConfig()
    generate: GenerateConfig = GenerateConfig()
    select: SelectConfig = SelectConfig()
    improve: ImproveConfig = ImproveConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    engine: EngineConfig = EngineConfig()


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a TOML file, a built-in name (`restem list recipes`) or a mapping; then apply "a.b=value" strings.

    Values of overrides are TOML; what is no TOML value is taken as text. Raises RestemError naming every wrong key.
    """
    where = "the recipe"
    if isinstance(source, Mapping):
        tree: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in source.items()}
    else:
        path = find_recipe(source)
        where = str(path)
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise RestemError(f"{path} is not valid TOML: {error}") from None
        except UnicodeDecodeError:
            raise RestemError(f"{path} is not a text file in UTF-8, so it is no recipe") from None
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RestemError(f"{where} cannot be used:\n" + "\n".join(_explain(error))) from None


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a built-in one."""
    path = Path(source)
    if path.is_file():
        return path
    built_in = recipe_files()
    if str(source) in built_in:
        return built_in[str(source)]
    near = difflib.get_close_matches(path.stem, built_in, n=1)
    hint = f'Did you mean "{near[0]}"? ' if near else ""
    raise RestemError(f'there is no recipe "{source}": no such file. {hint}Built-in recipes: {", ".join(built_in)}.')


def recipe_files() -> dict[str, Path]:
    """The recipes that come with restem, by name."""
    for folder in (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.toml"))}
    return {}


def flatten(recipe: Recipe) -> dict[str, Any]:
    """{"generate.samples": 32, ...} for every leaf of the tree; the learning rate is the one in force."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, BaseModel):
            for name in type(value).model_fields:
                yield from walk(f"{prefix}.{name}" if prefix else name, getattr(value, name))
        else:
            yield prefix, list(value) if isinstance(value, tuple) else value

    return {**dict(walk("", recipe)), "improve.learning_rate": recipe.improve.peak_learning_rate}


def describe_fields() -> dict[str, str]:
    """{"generate.samples": "N, samples per problem; ..."} from the strings under the fields."""

    def walk(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
        for name, field in model.model_fields.items():
            key = f"{prefix}.{name}" if prefix else name
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from walk(key, field.annotation)
            else:
                yield key, field.description or ""

    return dict(walk("", Recipe))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise RestemError(f'--set "{override}" has no "=": write it as --set generate.samples=16')
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, leaf = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise RestemError(f'--set "{override}": "{section}" is a value, not a section')
    tree[leaf] = value


def _explain(error: ValidationError) -> Iterator[str]:
    known = describe_fields()
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            leaves = {name.rsplit(".", 1)[-1]: name for name in known}
            near = difflib.get_close_matches(key, known, n=1) or [
                leaves[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1)
            ]
            yield f"  {key}: no such key." + (f' Did you mean "{near[0]}"?' if near else "")
        else:
            about = known.get(key, "").split("\n")[0]
            value = "" if isinstance(item["input"], Mapping) else f" = {item['input']!r}"
            yield f"  {key}{value}: {item['msg']}." + (f" ({about})" if about else "")
