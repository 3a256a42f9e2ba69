"""A packed training batch in words: which token is prompt, which is target, and what attends to what (`restem show-mask`).

It views the pack that `make_packs` makes for the trainer; nothing is packed here. It needs a tokenizer and a task or a run, no
weights. What a newcomer would get wrong: the last target of a completion (its end token) is predicted, never read, so it has no
place in the pack; and the first target is predicted by the last token of the prompt, which lies in another node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from restem.config import Recipe, load_recipe
from restem.errors import RestemError
from restem.files import read_json, read_rows
from restem.prompts import Renderer, Tokenizer
from restem.tasks import Task
from restem.training.batches import Pack, make_packs, pack_budget
from restem.types import Example, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskNode:
    """A node of the packed tree. Its tokens are packed at start..end, end excluded."""

    kind: Literal["prefix", "problem", "completion"]
    example: Example
    """The one that a completion is of; the first one below a prompt."""
    depth: int
    start: int
    end: int
    position: int
    """Where its first token stands in its text."""
    ancestors: tuple[int, ...]
    """The nodes that all its tokens attend to, from the root; within itself attention is causal."""
    tokens: tuple[int, ...]
    targets: tuple[int, ...] = ()
    """All tokens of a completion; all but the last are also its packed tokens. Prompts have none."""
    sources: tuple[int, ...] = ()
    """The packed index at which each target is predicted."""
    weight: float = 0.0
    """Factor of each target in the loss; 0 = read, not trained."""

    @property
    def name(self) -> str:
        if self.kind == "prefix":
            return "shared prefix"
        return f"problem {self.example.problem_id}" if self.kind == "problem" else f"completion {self.example.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskView:
    """A pack with what is needed to print it."""

    title: str
    origin: str
    """Where the completions come from."""
    objective: str
    nodes: tuple[MaskNode, ...]
    decode: Callable[[Sequence[int]], str]
    """Token ids as text, special tokens spelled out. It may hold anything: print it through `restem.show_mask.visible`."""

    @property
    def totals(self) -> dict[str, float]:
        """Tokens of the pack, and of training that computes one sequence a row, without padding."""
        completions = [node for node in self.nodes if node.kind == "completion"]
        shared = sum(len(self.nodes[parent].tokens) for node in completions for parent in node.ancestors)
        targets = sum(len(node.targets) for node in completions)
        return {
            "packed_tokens": self.nodes[-1].end,
            "rows": len(completions),
            "row_tokens": shared + targets,
            "targets": targets,
            "weight": sum(node.weight * len(node.targets) for node in completions),
        }

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, ready for JSON."""
        nodes = [
            {
                "node": number,
                "kind": node.kind,
                "name": node.name,
                "packed": [node.start, node.end],
                "positions": [node.position, node.position + len(node.tokens)],
                "attends_to": list(node.ancestors),
                "token_ids": list(node.tokens),
                "text": self.decode(node.tokens),
                "targets": list(node.targets),
                "sources": list(node.sources),
                "weight": node.weight,
            }
            for number, node in enumerate(self.nodes)
        ]
        return {"title": self.title, "origin": self.origin, "objective": self.objective, "nodes": nodes, "totals": self.totals}


def open_mask(
    source: str, overrides: Sequence[str] = (), *, problems: int = 2, completions: int = 2, say: Callable[[str], None]
) -> MaskView:
    """Pack the first few problems of a recipe or of a run directory, as the trainer would.

    A run gives the solutions that it kept last; without one, reference answers stand in for sampled solutions.
    """
    run = Path(source) if (Path(source) / "run.json").is_file() else None
    recipe = load_recipe(read_json(run / "run.json")["recipe"] if run else source, overrides)
    tokenizer = open_tokenizer(recipe, say)
    kept = _kept(run, problems, completions) if run else None
    if kept is None:
        lacking = f"{run} has kept no solutions yet" if run else "a recipe has no sampled solutions"
        say(f"{lacking}: reference answers stand in for them. A run directory in its place shows what that run has kept.")
        kept = Kept("reference answers as stand-ins", _stand_ins(recipe, tokenizer, problems, completions))
    budget = pack_budget(kept.examples, recipe.improve)
    packs = make_packs(kept.examples, recipe.improve.objective, budget)
    if len(packs) > 1:
        say(f"improve.pack_tokens = {budget} makes {len(packs)} packs of them; the first one is shown.")
    return MaskView(
        title=f"{recipe.task.name}, tokens of {recipe.model.base}",
        origin=kept.origin,
        objective=recipe.improve.objective,
        nodes=view_pack(packs[0], kept.examples),
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)),
    )


def view_pack(pack: Pack, examples: Sequence[Example]) -> tuple[MaskNode, ...]:
    """The nodes of a pack that was made of these examples. Its leaves are the completions, in the order of the targets."""
    tree, nodes = pack.tree, pack.tree.nodes
    ancestors = [tuple(reversed(tree.ancestors(number))) for number in range(len(nodes))]
    parents = {chain[-1] for chain in ancestors if chain}
    leaves = [number for number in range(len(nodes)) if number not in parents]
    example_of = {leaf: examples[place] for leaf, place in zip(leaves, pack.order, strict=True)}
    views, done = [], 0
    for number, node in enumerate(nodes):
        example = example_of[next(leaf for leaf in leaves if leaf >= number)]  # its own, or its first descendant's
        targets = slice(done, done + len(example.completion_ids) if number in example_of else done)
        view = MaskNode(
            kind="completion" if number in example_of else "problem" if node.depth else "prefix",
            example=example,
            depth=node.depth,
            start=node.start,
            end=node.end,
            position=tree.end_position(number) - (node.end - node.start),
            ancestors=ancestors[number],
            tokens=tuple(tree.tokens[node.start : node.end]),
            targets=tuple(pack.targets[targets]),
            sources=tuple(pack.sources[targets]),
            weight=pack.weights[done] if number in example_of else 0.0,
        )
        assert view.kind != "completion" or view.tokens == view.targets[:-1], "all targets but the last are read"
        views.append(view)
        done = targets.stop
    assert done == len(pack.targets), "every target is a completion's"
    return tuple(views)


class Kept(NamedTuple):
    """Examples, and in words where they come from."""

    origin: str
    examples: list[Example]


def _kept(run: Path, problems: int, completions: int) -> Kept | None:
    """The first examples of the first problems of the newest iteration that kept any."""
    for file in sorted(run.glob("iter-*/examples.parquet"), reverse=True):
        groups: dict[str, list[Example]] = {}
        for row in read_rows(file):
            ids = {name: tuple(row[name]) for name in ("prompt_ids", "completion_ids")}
            groups.setdefault(row["problem_id"], []).append(Example(**{**row, **ids}))
        if groups:
            chosen = [example for group in list(groups.values())[:problems] for example in group[:completions]]
            return Kept(f"solutions of {file}", chosen)
    return None


def _stand_ins(recipe: Recipe, tokenizer: Tokenizer, problems: int, completions: int) -> list[Example]:
    """What a model might have written, had it known the references, for the first training problems that have some."""
    from restem.tasks.of_recipe import task_of

    task = task_of(recipe)
    renderer = Renderer(task.prompt, tokenizer)
    written = ((problem, _reference_texts(task, problem)[:completions]) for problem in task.train)
    some = [(problem, texts) for problem, texts in written if texts][:problems]
    if not some:
        raise RestemError(
            f"no training problem of {task.name} has a reference that can be written down as a completion, so there is nothing "
            "to show. Give a run directory that has kept some solutions."
        )
    return [
        Example(
            prompt_ids=renderer.encode(problem),
            completion_ids=(*tokenizer(text, add_special_tokens=False)["input_ids"], renderer.end_id),
            problem_id=problem.id,
            index=index,
        )
        for problem, texts in some
        for index, text in enumerate(texts)
    ]


def _reference_texts(task: Task, problem: Problem) -> list[str]:
    """The worked solution, the answer in a sentence, the bare answer: those that there are, each once."""
    from restem.preflight import reference_completion

    solution, reference = problem.meta.get("solution"), problem.reference
    texts = [
        f" {solution.strip()}" if isinstance(solution, str) and solution.strip() else None,
        reference_completion(task, problem),
        f" {reference}" if isinstance(reference, str | int | float) else None,
    ]
    return list(dict.fromkeys(text for text in texts if text))


def open_tokenizer(recipe: Recipe, say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer of the recipe's model. Of a hub model nothing else is fetched; the embedded model comes whole."""
    from restem.models import load_tokenizer, locate

    base = recipe.model.base
    folder = Path(base).expanduser()
    if base.partition(":")[0] == "toy" or (folder / "toy.json").is_file():
        raise RestemError(
            f'model.base = "{base}": there is nothing to show. The toy is a table of probabilities; it has no text tokens and '
            "no attention, and is not trained on packs. Try a language model: --set model.base=embedded"
        )
    path = locate(base, say=say) if base == "embedded" or folder.is_dir() else base
    return load_tokenizer(path, trust_remote_code=recipe.model.trust_remote_code)
