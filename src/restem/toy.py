"""A toy model behind the real seams: a table of answer probabilities, exact and instant (`model.base = "toy"`).

The toy does not read; it has habits. A habit is a way to answer: it is right on some problems and wrong on others, for ever. A
policy is a table with one row of probabilities over the habits for each kind of problem, so that what is learnt on training
problems holds on others of their kind. "toy" has four kinds; "toy:table" has a row for every problem (the tabular policy of
the theory: nothing carries over). Whole runs, kills and resumes, and the promises of EM are tested and documented with it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from restem.config import ImproveConfig
from restem.errors import RestemError
from restem.files import finish_directory, read_json, write_json
from restem.sampling import Decoding, Owed, uniforms
from restem.training import Interval, check_examples
from restem.types import Example, Problem, Sample

SKILLS = (0.9, 0.5, 0.2, 0.05)
"""The share of problems on which each habit is right. Two more habits follow: one gives no answer, one never ends."""
NO_ANSWER, ENDLESS = len(SKILLS), len(SKILLS) + 1
HABITS = len(SKILLS) + 2
END = HABITS
"""The toy's end token; its other tokens are the numbers of the habits."""
BASE = (
    (0.05, 0.20, 0.30, 0.25, 0.15, 0.05),
    (0.10, 0.15, 0.25, 0.35, 0.10, 0.05),
    (0.20, 0.20, 0.20, 0.20, 0.10, 0.10),
    (0.02, 0.13, 0.30, 0.40, 0.10, 0.05),
)
"""The base policy of the four kinds of problems; its mean reward is about 0.25."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyPolicy:
    """p(habit | kind of problem)."""

    rows: int
    """Kinds of problems; 0 = every problem is its own kind."""
    table: Mapping[int, tuple[float, ...]]
    """Rows that differ from the base."""

    def of(self, row: int) -> tuple[float, ...]:
        return self.table.get(row, BASE[row % len(BASE)])

    def row(self, problem: Problem) -> int:
        return _number(problem.id, "kind") % self.rows if self.rows else _number(problem.id, "kind")

    def success(self, problem: Problem) -> float:
        """The exact probability of a correct completion at temperature 1."""
        return math.fsum(p for habit, p in enumerate(self.of(self.row(problem))) if is_right(habit, problem))


def is_right(habit: int, problem: Problem) -> bool:
    return habit < len(SKILLS) and _number(problem.id, f"habit {habit}") % 1000 < 1000 * SKILLS[habit]


class ToyRenderer:
    """The toy's prompts: two numbers, the row of the table and the problem."""

    end_id = END
    stop: tuple[str, ...] = ()

    def __init__(self, policy: ToyPolicy) -> None:
        self.policy = policy

    def encode(self, problem: Problem) -> tuple[int, ...]:
        return self.policy.row(problem), _number(problem.id, "name")

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """The toy has no words: whatever a human wrote is its best habit."""
        return (0,)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class ToySampler:
    """Draws habits from a policy's table."""

    def __init__(self, policy: ToyPolicy) -> None:
        self.policy = policy

    def sample(self, problems: Sequence[Problem], owed: Iterable[Owed], decoding: Decoding, *, stream: str) -> Iterator[Sample]:
        known = {problem.id: problem for problem in problems}
        for item in owed:
            problem = known[item.problem_id]
            p = np.array(self.policy.of(self.policy.row(problem)))
            q = truncate(p, decoding)
            habit = int(np.searchsorted(np.cumsum(q), uniforms(stream, item, 1)[0] * q.sum(), side="right"))
            yield Sample(
                problem_id=problem.id,
                index=item.index,
                token_ids=(habit,),
                text=_say(habit, problem),
                finish="length" if habit == ENDLESS else "stop",
                logprob=math.log(p[habit]),
            )


class ToyTrainer:
    """Moves each row towards the weighted maximum-likelihood table, which is known in closed form.

    After t epochs a row is (1 - m) start + m best, with m = 1 - (1 - learning_rate)^t: a rate of 1 makes the exact M-step.
    """

    def __init__(self, settings: ImproveConfig) -> None:
        self.settings = settings

    def train(self, start: str, examples: Sequence[Example], directory: Path, *, stream: str) -> Iterator[Interval]:
        check_examples(examples)
        policy, best = load_policy(start), best_rows(examples, self.settings.objective)
        for number in range(1, math.ceil(self.settings.epochs / self.settings.interval) + 1):
            epochs = min(number * self.settings.interval, self.settings.epochs)
            mix = 1 - (1 - min(1.0, self.settings.peak_learning_rate)) ** epochs
            rows = {
                row: tuple((1 - mix) * a + mix * b for a, b in zip(policy.of(row), target, strict=True))
                for row, target in best.items()
            }
            folder = directory / f"interval-{number}"
            if not (folder / "metrics.json").is_file():
                with finish_directory(folder) as temporary:
                    save_policy(ToyPolicy(rows=policy.rows, table={**policy.table, **rows}), temporary / "model")
                    write_json(temporary / "metrics.json", {"step": number, "loss": _loss(examples, rows)})
            yield Interval(number=number, model=str(folder / "model"), metrics=read_json(folder / "metrics.json"))


def best_rows(examples: Sequence[Example], objective: str) -> dict[int, tuple[float, ...]]:
    """The table that maximises J = E[r log p] over the examples: each row in proportion to its weights.

    "problem" gives every solved problem weight 1 (the exact M-step); the others weigh by reward (Eq. 3).
    """
    counted = [example for example in examples if example.weight > 0]
    solved: dict[int, float] = {}
    for example in counted:
        solved[example.prompt_ids[1]] = solved.get(example.prompt_ids[1], 0.0) + example.weight
    totals: dict[int, list[float]] = {}
    for example in counted:
        weight = example.weight / solved[example.prompt_ids[1]] if objective == "problem" else example.weight
        totals.setdefault(example.prompt_ids[0], [0.0] * HABITS)[example.completion_ids[0]] += weight
    return {row: tuple(w / math.fsum(ws) for w in ws) for row, ws in totals.items()}


def truncate(p: np.ndarray, decoding: Decoding) -> np.ndarray:
    """Probabilities after temperature, top-k, top-p and min-p, not normalised."""
    if decoding.temperature == 0:
        return np.asarray(np.arange(len(p)) == int(p.argmax()), dtype=float)
    q = p ** (1 / decoding.temperature)
    order = np.argsort(-q, kind="stable")
    if decoding.top_k:
        q[order[decoding.top_k :]] = 0
    q /= q.sum()
    q[order[np.cumsum(q[order]) - q[order] >= decoding.top_p]] = 0
    q[q < decoding.min_p * q.max()] = 0
    return q


def load_policy(path: str) -> ToyPolicy:
    file = Path(path) / "toy.json"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        return ToyPolicy(rows=value["rows"], table={int(row): tuple(ps) for row, ps in value["table"].items()})
    except (OSError, ValueError, KeyError) as error:
        raise RestemError(f"{file} is no toy model: {error}") from None


def save_policy(policy: ToyPolicy, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "toy.json", {"rows": policy.rows, "table": policy.table})


def fingerprint(path: str) -> str:
    """Identity of a toy model's table: 16 hexadecimal digits."""
    policy = load_policy(path)
    text = json.dumps([policy.rows, sorted(policy.table.items())])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _loss(examples: Sequence[Example], rows: Mapping[int, tuple[float, ...]]) -> float:
    weights = [e.weight for e in examples]
    nll = [-math.log(rows[e.prompt_ids[0]][e.completion_ids[0]]) for e in examples if e.weight]
    return math.fsum(w * n for w, n in zip(filter(None, weights), nll, strict=True)) / math.fsum(weights)


def _say(habit: int, problem: Problem) -> str:
    if habit == NO_ANSWER:
        return "I would rather not say."
    if habit == ENDLESS:
        return "Let me think. Let me think."
    if is_right(habit, problem):
        return f"Habit {habit} says so. The answer is {problem.reference}."
    return f"Habit {habit} says so. The answer is {_number(problem.id, f'wrong {habit}') % 9000 + 100000}."


def _number(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=4).digest(), "little") >> 1
