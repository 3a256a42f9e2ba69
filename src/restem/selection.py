"""From graded samples to D_i: correct ones only, never a truncated one, at most so many a problem.

What a newcomer would get wrong: the examples hold the token ids that were sampled, plus the end token; text is never tokenised
again, and no reference solution is ever among them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from restem.config import SelectConfig
from restem.files import write_json, write_rows
from restem.types import Example, Problem, Sample


class Renders(Protocol):
    """What is needed of a `restem.prompts.Renderer`, here and where solutions are given."""

    @property
    def end_id(self) -> int: ...
    def encode(self, problem: Problem) -> tuple[int, ...]: ...
    def encode_completion(self, text: str) -> tuple[int, ...]: ...
    def decode(self, ids: tuple[int, ...]) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """D_i, and what became of every sample."""

    examples: tuple[Example, ...]
    counts: Mapping[str, int]
    """Samples by fate: kept, duplicate, over_the_limit, or the reason of the grade. Sums to all samples."""
    problems: int
    covered: int
    """Problems with at least one correct sample."""
    at_limit: int
    """Problems of which the most allowed were kept."""

    @property
    def coverage(self) -> float:
        return self.covered / self.problems if self.problems else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "kept": len(self.examples),
            "problems": self.problems,
            "covered": self.covered,
            "coverage": self.coverage,
            "at_limit": self.at_limit,
            "counts": dict(self.counts),
        }


def select(
    problems: Sequence[Problem], samples: Iterable[Sample], renderer: Renders, settings: SelectConfig, *, stream: str
) -> Selection:
    """Choose the examples of one iteration. The random choice depends on `stream` and the problem only."""
    by_problem: dict[str, list[Sample]] = {problem.id: [] for problem in problems}
    counts: Counter[str] = Counter()
    for sample in samples:
        if is_kept(sample, settings.threshold):
            by_problem[sample.problem_id].append(sample)
        else:
            counts[_fate(sample)] += 1
    examples: list[Example] = []
    covered = at_limit = 0
    for problem in problems:
        correct = sorted(by_problem[problem.id], key=lambda sample: sample.index)
        distinct = _without_repeats(correct, settings.dedup)
        chosen = _choose(distinct, settings, f"{stream}\0{problem.id}")
        covered += bool(correct)
        at_limit += len(chosen) == settings.max_per_problem
        counts["duplicate"] += len(correct) - len(distinct)
        counts["over_the_limit"] += len(distinct) - len(chosen)
        counts["kept"] += len(chosen)
        examples.extend(example_of(problem, sample, renderer) for sample in chosen)
    return Selection(
        examples=tuple(examples),
        counts={name: count for name, count in sorted(counts.items()) if count},
        problems=len(problems),
        covered=covered,
        at_limit=at_limit,
    )


def write_selection(folder: Path, selection: Selection) -> None:
    """Write D_i to examples.parquet, then what became of every sample to selection.json."""
    import pyarrow as pa

    schema = pa.schema(
        {
            "problem_id": pa.string(),
            "index": pa.int32(),
            "weight": pa.float64(),
            "prompt_ids": pa.list_(pa.int32()),
            "completion_ids": pa.list_(pa.int32()),
        }
    )
    rows = [{name: getattr(example, name) for name in schema.names} for example in selection.examples]
    write_rows(folder / "examples.parquet", rows, schema)
    write_json(folder / "selection.json", selection.as_dict())


def is_kept(sample: Sample, threshold: float) -> bool:
    """f(r) = 1[r > threshold]; with 0/1 rewards every threshold in [0, 1) is the same (paper, section 3)."""
    return sample.reward is not None and sample.reward > threshold and sample.finish == "stop"


def _fate(sample: Sample) -> str:
    if sample.finish != "stop":
        return "truncated"
    return "below_threshold" if sample.reason in (None, "correct") else sample.reason


def _without_repeats(samples: Sequence[Sample], how: str) -> list[Sample]:
    if how == "off":
        return list(samples)
    first: dict[str, Sample] = {}
    for sample in samples:
        text = sample.text if how == "exact" else " ".join(sample.text.casefold().split())
        first.setdefault(text, sample)
    return list(first.values())


def _choose(samples: list[Sample], settings: SelectConfig, stream: str) -> list[Sample]:
    limit = settings.max_per_problem
    if len(samples) <= limit:
        return samples
    if settings.choose == "shortest":
        chosen = sorted(samples, key=lambda sample: (len(sample.token_ids), sample.index))[:limit]
    elif settings.choose == "first":
        chosen = samples[:limit]
    else:
        chosen = random.Random(stream).sample(samples, limit)
    return sorted(chosen, key=lambda sample: sample.index)


def example_of(problem: Problem, sample: Sample, renderer: Renders) -> Example:
    """A sample as an example, weighted by its reward. One that was cut off has no end token."""
    return Example(
        prompt_ids=renderer.encode(problem),
        completion_ids=(*sample.token_ids, renderer.end_id) if sample.finish == "stop" else sample.token_ids,
        weight=0.0 if sample.reward is None else sample.reward,
        problem_id=problem.id,
        index=sample.index,
    )
