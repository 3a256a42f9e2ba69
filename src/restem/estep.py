"""Drawing and grading the samples of one stage: the E-step, D_val, and every evaluation are stages.

The unit of work is the shard: some problems x N samples, one Parquet part of samples and one of grades. Resume is arithmetic:
owed = wanted - parts present. The sampler streams across shard borders; grading runs beside it in worker processes, whose full
queue holds the sampler back. Samples and grades are separate parts, so a mended verifier can replay over old samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from restem.errors import RestemError
from restem.files import read_metadata, read_rows, read_table, write_rows
from restem.sampling import Decoding, Owed, Sampler
from restem.types import Grade, Problem, Sample
from restem.verifiers.pool import VerifierPool


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What to draw, and where it goes."""

    directory: Path
    """Holds samples/part-*.parquet and grades/part-*.parquet."""
    problems: Sequence[Problem]
    samples: int
    """Per problem (N)."""
    decoding: Decoding
    stream: str
    """Source of randomness: names the run's seed, the iteration and the stage."""
    model: str
    """Fingerprint of the sampled model; parts drawn from another one are refused."""
    shard_problems: int

    def shards(self) -> list[Sequence[Problem]]:
        step = self.shard_problems
        return [self.problems[start : start + step] for start in range(0, len(self.problems), step)]

    def samples_part(self, shard: int) -> Path:
        return self.directory / "samples" / f"part-{shard:05d}.parquet"

    def grades_part(self, shard: int) -> Path:
        return self.directory / "grades" / f"part-{shard:05d}.parquet"

    def is_complete(self) -> bool:
        return all(self.grades_part(shard).exists() for shard in range(len(self.shards())))


class Watch(Protocol):
    """Told how a stage gets on: what is drawn now, and every grade. Grades may come from another thread."""

    def drawn(self, sample: Sample) -> None: ...
    def graded(self, sample: Sample) -> None: ...


def draw(stage: Stage, open_sampler: Callable[[], Sampler], pool: VerifierPool, watch: Watch) -> list[Sample]:
    """Draw and grade what is owed of a stage; return all its graded samples, in order of problem and index.

    `open_sampler` is called only if something is owed.
    """
    shards = stage.shards()
    work = {number: _Shard(stage, number, shard, pool, watch) for number, shard in enumerate(shards)}
    owed = [item for number in work for item in work[number].owed()]
    home = {problem.id: number for number, shard in enumerate(shards) for problem in shard}
    grading: list[_Shard] = []
    if owed:
        for sample in open_sampler().sample(stage.problems, owed, stage.decoding, stream=stage.stream):
            number = home[sample.problem_id]
            if work[number].add(sample):
                grading.append(work[number])
            grading = [shard for shard in grading if not shard.write_if_graded()]
    for shard in work.values():
        shard.finish()
    return read_stage(stage.directory)


class _Shard:
    """The progress of one shard: drawn, grading, written."""

    def __init__(self, stage: Stage, number: int, problems: Sequence[Problem], pool: VerifierPool, watch: Watch) -> None:
        self.stage, self.number, self.pool, self.watch = stage, number, pool, watch
        self.problems = {problem.id: problem for problem in problems}
        self.wanted = {Owed(problem.id, index) for problem in problems for index in range(stage.samples)}
        self.samples: dict[Owed, Sample] = {}
        self.grades: dict[Owed, Future[Grade]] = {}
        self.done = stage.grades_part(number).exists()
        part = stage.samples_part(number)
        if part.exists():
            self._check(part)
            for sample in _read_samples(part):
                self._start_grading(sample)
            if self.samples.keys() != self.wanted:
                raise RestemError(
                    f"{part} does not hold the samples of this run ({len(self.samples)} of {len(self.wanted)} fit). "
                    "Delete it to have them drawn again."
                )
        if self.done:
            for sample in read_part(stage.directory, number):
                watch.graded(sample)

    def owed(self) -> list[Owed]:
        """In the problems' order: a problem's samples stand together."""
        return sorted(self.wanted - self.samples.keys(), key=self._order())

    def add(self, sample: Sample) -> bool:
        """Take a drawn sample; True when it was the shard's last."""
        if sample.logprob is not None and math.isnan(sample.logprob):
            raise RestemError(
                f"the model's probabilities are not numbers in sample {sample.index} of problem {sample.problem_id}: they "
                'overflow the number format, as float16 does in some models (model.dtype = "float32" does not), or the weights '
                "are damaged."
            )
        self._start_grading(sample)
        self.watch.drawn(sample)
        is_drawn = len(self.samples) == len(self.wanted)
        if is_drawn:
            rows = [_row(self.samples[key]) for key in sorted(self.samples, key=self._order())]
            metadata = {"stream": self.stage.stream, "model": self.stage.model}
            write_rows(self.stage.samples_part(self.number), rows, _sample_schema(), metadata)
        return is_drawn

    def write_if_graded(self) -> bool:
        """Write the grades of a drawn shard as soon as the last is in; True if they were."""
        if all(future.done() for future in self.grades.values()):
            self._write_grades()
        return self.done

    def finish(self) -> None:
        if not self.done:
            assert len(self.grades) == len(self.wanted), "a sampler yields every owed sample"
            self._write_grades()

    def _write_grades(self) -> None:
        keys = sorted(self.grades, key=self._order())
        write_grades(
            self.stage.directory, self.number, [self.samples[k] for k in keys], [self.grades[k].result() for k in keys]
        )
        self.done = True
        self.grades = {}

    def _start_grading(self, sample: Sample) -> None:
        key = Owed(sample.problem_id, sample.index)
        assert key in self.wanted and key not in self.samples, f"{key} is not owed"
        self.samples[key] = sample
        if not self.done:
            future = grade(self.pool, self.problems[sample.problem_id], sample)
            future.add_done_callback(lambda done: self._tell(sample, done))
            self.grades[key] = future

    def _tell(self, sample: Sample, done: Future[Grade]) -> None:
        if not done.cancelled() and not done.exception():
            self.watch.graded(_graded(sample, done.result()))

    def _order(self) -> Callable[[Owed], tuple[int, int]]:
        place = {name: number for number, name in enumerate(self.problems)}
        return lambda key: (place[key.problem_id], key.index)

    def _check(self, part: Path) -> None:
        found = read_metadata(part)
        for key, wanted in (("stream", self.stage.stream), ("model", self.stage.model)):
            if found.get(key) != wanted:
                raise RestemError(
                    f"{part} was drawn with another {key} ({found.get(key)}) than this run's ({wanted}). "
                    "Use another --out, or delete the part to have it drawn again."
                )


def grade(pool: VerifierPool, problem: Problem, sample: Sample) -> Future[Grade]:
    """Grade in a worker. A sample that was cut off is never correct, whatever it says."""
    if sample.finish == "length":
        future: Future[Grade] = Future()
        future.set_result(Grade(reward=0.0, reason="truncated"))
        return future
    return pool.submit(problem, sample.text)


def read_stage(directory: Path) -> list[Sample]:
    """All graded samples of a stage, in order of its parts."""
    count = len(list((directory / "grades").glob("part-*.parquet")))
    return [sample for number in range(count) for sample in read_part(directory, number)]


def read_part(directory: Path, number: int) -> Iterator[Sample]:
    """The graded samples of one part; joined by identity, never by position."""
    name = f"part-{number:05d}.parquet"
    grades = {(row["problem_id"], row["index"]): row for row in read_rows(directory / "grades" / name)}
    for sample in _read_samples(directory / "samples" / name):
        found = grades[sample.problem_id, sample.index]
        yield replace(sample, **{name: found[name] for name in _GRADE_FIELDS})


def write_grades(directory: Path, number: int, samples: Sequence[Sample], grades: Sequence[Grade]) -> None:
    """Write one part of grades, a row for every sample of the part."""
    rows = [
        {"problem_id": sample.problem_id, "index": sample.index, **{name: getattr(grade, name) for name in _GRADE_FIELDS}}
        for sample, grade in zip(samples, grades, strict=True)
    ]
    write_rows(directory / "grades" / f"part-{number:05d}.parquet", rows, _grade_schema())


_GRADE_FIELDS = ("reward", "answer", "reason", "note")


def _graded(sample: Sample, grade: Grade) -> Sample:
    return replace(sample, **{name: getattr(grade, name) for name in _GRADE_FIELDS})


def _row(sample: Sample) -> dict[str, Any]:
    return {**{name: getattr(sample, name) for name in _PLAIN_FIELDS}, "token_ids": list(sample.token_ids)}


_PLAIN_FIELDS = ("problem_id", "index", "text", "finish", "logprob")


def _read_samples(part: Path) -> list[Sample]:
    """The samples of one part, without grades."""
    table = read_table(part)
    runs = table["token_ids"].combine_chunks()
    ids_T = runs.values.to_numpy(zero_copy_only=False)
    tokens = _integers(int(ids_T.max(initial=0)).bit_length())[ids_T].tolist()
    ends = runs.offsets.to_pylist()
    columns = zip(*(table[name].to_pylist() for name in _PLAIN_FIELDS), strict=True)
    return [
        Sample(**dict(zip(_PLAIN_FIELDS, row, strict=True)), token_ids=tuple(tokens[start:end]))
        for row, (start, end) in zip(columns, pairwise(ends), strict=True)
    ]


@cache
def _integers(bits: int) -> Any:
    """0 to 2**bits - 1 as objects, of each just one: samples repeat few token ids, and an object takes 28 bytes."""
    import numpy as np

    return np.arange(2**bits).astype(object)


def _sample_schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "problem_id": pa.string(),
            "index": pa.int32(),
            "token_ids": pa.list_(pa.int32()),
            "text": pa.string(),
            "finish": pa.string(),
            "logprob": pa.float64(),
        }
    )


def _grade_schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "problem_id": pa.string(),
            "index": pa.int32(),
            "reward": pa.float64(),
            "answer": pa.string(),
            "reason": pa.string(),
            "note": pa.string(),
        }
    )
