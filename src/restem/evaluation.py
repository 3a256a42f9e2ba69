"""Judging a model on problems: greedy pass@1, sampled pass@K, intervals and counts, all computed from stages of samples.

pass@1 is greedy over all problems and pass@K from samples at T 1.0 and top-p 0.95 (paper, sections 5 and 5.2). The one thing a
newcomer would get wrong: a problem whose samples could not be graded is left out of n and counted, never scored 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from restem.config import EvaluateConfig
from restem.sampling import Decoding
from restem.significance import detectable_difference
from restem.statistics import Interval, PairedTest, describe, interval, majority_at_k, paired_test, pass_at_k
from restem.types import Problem, Sample

GROUPS = ("level", "subject", "subtask", "difficulty", "steps")
"""Fields of a problem's meta by which scores are broken down."""


def greedy(decoding: Decoding) -> Decoding:
    """The decoding of test pass@1: the likeliest token, with the lengths and stops of another decoding."""
    return Decoding(temperature=0.0, max_tokens=decoding.max_tokens, stop=decoding.stop)


def sampled(decoding: Decoding, settings: EvaluateConfig) -> Decoding:
    """The decoding of pass@K."""
    return Decoding(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=decoding.max_tokens,
        stop=decoding.stop,
    )


def samples_for(settings: EvaluateConfig) -> int:
    """Samples per problem that pass@K needs."""
    return max(settings.samples or 0, *settings.k, *settings.majority)


def rewards_by_problem(samples: Iterable[Sample]) -> dict[str, list[float]]:
    """The rewards of the samples that could be graded; a problem with none is absent."""
    rewards: dict[str, list[float]] = {}
    for sample in samples:
        if sample.reward is not None:
            rewards.setdefault(sample.problem_id, []).append(sample.reward)
    return rewards


def mean_reward(samples: Iterable[Sample]) -> Interval:
    """Mean over problems of the mean reward, with its interval (problems are the clusters)."""
    return interval([sum(rewards) / len(rewards) for rewards in rewards_by_problem(samples).values()])


def pass_at(samples: Iterable[Sample], k: int) -> Interval:
    """Mean over problems of the unbiased pass@k; problems with fewer than k graded samples are left out of n."""
    return _pass_at(rewards_by_problem(samples), k)


def majority_at(samples: Iterable[Sample], k: int, canonical: Callable[[str], str] = str.strip) -> Interval:
    """Mean over problems of the chance that the most frequent of k answers is correct (`statistics.majority_at_k`).

    `canonical` makes answers that mean the same equal as text; it is called once for every distinct text. Samples that could
    not be graded do not count.
    """
    return _majority_at(_votes(samples, canonical), k)


def canonical_of(verifier: str) -> Callable[[str], str]:
    """What makes a verifier's answers comparable as text."""
    if verifier == "math":
        from restem.verifiers.math import canonical

        return canonical
    return str.strip


def variety(samples: Sequence[Sample]) -> dict[str, float]:
    """How the sampled completions are: what collapse and drift show in first.

    "distinct": share of a problem's completions that are different texts, mean over problems; "tokens": mean length;
    "entropy": minus the mean log-probability per token, in nats, under the model itself; shares cut off and without an answer.
    """
    texts: dict[str, list[str]] = {}
    for sample in samples:
        texts.setdefault(sample.problem_id, []).append(sample.text)
    tokens = [len(sample.token_ids) + (sample.finish == "stop") for sample in samples]
    known = [(s.logprob, n) for s, n in zip(samples, tokens, strict=True) if s.logprob is not None]
    return {
        "distinct": _mean([len(set(group)) / len(group) for group in texts.values()]),
        "tokens": _mean(tokens),
        "entropy": -sum(logprob for logprob, _ in known) / max(1, sum(count for _, count in known)),
        "truncated": _mean([float(sample.finish == "length") for sample in samples]),
        "no_answer": _mean([float(sample.reason == "no_answer") for sample in samples]),
    }


def score(
    *,
    model: str,
    task: str,
    split: str,
    greedy_samples: Sequence[Sample],
    sampled_samples: Sequence[Sample],
    decoding: Mapping[str, Decoding],
    ks: Sequence[int],
    majority: Sequence[int] = (),
    canonical: Callable[[str], str] = str.strip,
    problems: Sequence[Problem] = (),
) -> dict[str, Any]:
    """The content of scores.json. pass@1 never stands without pass@K. Greedy pass@1 also by level, subject and the like, where
    `problems` say what theirs is."""
    greedy_rewards, sampled_rewards = rewards_by_problem(greedy_samples), rewards_by_problem(sampled_samples)
    metrics = {"pass@1": as_dict(_pass_at(greedy_rewards, 1)), "pass@1 sampled": as_dict(_pass_at(sampled_rewards, 1))}
    for k in sorted(set(ks) - {1}):
        metrics[f"pass@{k}"] = as_dict(_pass_at(sampled_rewards, k))
    votes = _votes(sampled_samples, canonical) if majority else []
    for k in sorted(set(majority)):
        metrics[f"majority@{k}"] = as_dict(_majority_at(votes, k))
    counts = Counter(sample.reason for sample in greedy_samples)
    groups = {key: _by_group(problems, greedy_rewards, key) for key in GROUPS}
    return {
        "model": model,
        "task": task,
        "split": split,
        "n": len({sample.problem_id for sample in greedy_samples}),
        "decoding": {name: value.describe() for name, value in decoding.items()},
        "metrics": metrics,
        "groups": {key: {name: as_dict(v) for name, v in found.items()} for key, found in groups.items() if len(found) > 1},
        "sampled": variety(sampled_samples) if sampled_samples else {},
        "counts": {str(reason): count for reason, count in sorted(counts.items(), key=lambda item: str(item[0]))},
    }


def compare(before: Sequence[Sample], after: Sequence[Sample]) -> dict[str, Any]:
    """Paired comparison of two models' mean rewards on the problems that both were graded on."""
    one, two = rewards_by_problem(before), rewards_by_problem(after)
    both = [problem for problem in one if problem in two]
    test = paired_test([_mean(one[p]) for p in both], [_mean(two[p]) for p in both])
    least = detectable_difference(test.n, (test.wins + test.losses) / test.n if test.n else 0.0)
    return {**_paired(test), "detectable": None if math.isnan(least) else least, "words": describe(test)}


def by_group(problems: Sequence[Problem], samples: Iterable[Sample], key: str) -> dict[str, Interval]:
    """Mean reward by a field of the problems' meta: level, subject, steps."""
    return _by_group(problems, rewards_by_problem(samples), key)


def as_dict(value: Interval) -> dict[str, Any]:
    return {"value": value.value, "low": value.low, "high": value.high, "n": value.n}


def _pass_at(rewards: Mapping[str, Sequence[float]], k: int) -> Interval:
    return interval([pass_at_k(len(own), sum(r > 0 for r in own), k) for own in rewards.values() if len(own) >= k])


class _Votes(NamedTuple):
    """The graded samples of one problem, with canonical answers."""

    answers: list[str | None]
    rewards: list[float]


def _votes(samples: Iterable[Sample], canonical: Callable[[str], str]) -> list[_Votes]:
    read = cache(canonical)  # a problem's samples repeat few answers, and reading one is parsing it
    votes: dict[str, _Votes] = {}
    for sample in samples:
        if sample.reward is not None:
            own = votes.setdefault(sample.problem_id, _Votes([], []))
            own.answers.append(None if sample.answer is None else read(sample.answer))
            own.rewards.append(sample.reward)
    return list(votes.values())


def _majority_at(votes: Iterable[_Votes], k: int) -> Interval:
    return interval([majority_at_k(own.answers, own.rewards, k) for own in votes if len(own.answers) >= k])


def _by_group(problems: Sequence[Problem], rewards: Mapping[str, Sequence[float]], key: str) -> dict[str, Interval]:
    groups: dict[str, list[float]] = {}
    for problem in problems:
        if key in problem.meta and problem.id in rewards:
            groups.setdefault(str(problem.meta[key]), []).append(_mean(rewards[problem.id]))
    return {name: interval(values) for name, values in sorted(groups.items())}


def _paired(test: PairedTest) -> dict[str, Any]:
    return dict(test._asdict())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
