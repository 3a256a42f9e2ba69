"""The EM view of method and toy, to the last digit: row 47 and row 48 (docs: the paper, section 3).

Policies here are tables of exact fractions over problems x outputs; the toy's M-step is given exact expectations instead of
samples, by weighing one example per output with r * p.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from restem import toy
from restem.files import read_rows
from restem.run import task_of
from restem.types import Example
from toy_runs import part_rows, recipe, run

F = Fraction
Row = Sequence[Fraction]

POLICY = [
    [F(1, 2), F(1, 4), F(1, 8), F(1, 8)],
    [F(1, 16), F(1, 16), F(3, 8), F(1, 2)],
    [F(1, 4), F(1, 4), F(1, 4), F(1, 4)],
]
REWARD = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
SUCCESS = [F(1, 2), F(1, 8), F(0)]
"""Z(x), by hand: the last problem is never solved."""
SOLVED = [0, 1]


def e_step(p: Row, r: Row | list[int]) -> list[Fraction]:
    """q*(y|x) = r p / Z."""
    z = sum((a * b for a, b in zip(p, r, strict=True)), F(0))
    return [a * b / z for a, b in zip(p, r, strict=True)]


def elbo(p: Sequence[float | Fraction], q: Sequence[float | Fraction], r: Sequence[float]) -> float:
    """E_q[log r] - KL(q || p), Eq. 2 with f the identity; 0 log 0 = 0."""
    return math.fsum(float(b) * math.log(float(c * a) / float(b)) for a, b, c in zip(p, q, r, strict=True) if b)


def expectation(policy: Sequence[Row], *, shared: bool) -> list[Example]:
    """One example per problem and output, weighing r * p: D_i with infinitely many samples."""
    return [
        Example(prompt_ids=(0 if shared else x, x), completion_ids=(y, toy.END), weight=float(p * REWARD[x][y]))
        for x, row in enumerate(policy)
        for y, p in enumerate(row)
    ]


def as_row(values: Sequence[float]) -> list[Fraction]:
    assert not any(values[4:])
    return [Fraction(value) for value in values[:4]]


@pytest.mark.parametrize("x", SOLVED)
def test_the_elbo_at_q_star_is_log_z_row_47(x: int) -> None:
    q = e_step(POLICY[x], REWARD[x])
    ratios = {p * r / b for p, r, b in zip(POLICY[x], REWARD[x], q, strict=True) if b}
    assert ratios == {SUCCESS[x]}  # every term of the ELBO is q log Z, and q sums to 1
    assert sum(q) == 1
    assert elbo(POLICY[x], q, REWARD[x]) == pytest.approx(math.log(SUCCESS[x]), rel=1e-15)


@pytest.mark.parametrize("x", SOLVED)
def test_no_other_q_has_a_larger_elbo_row_47(x: int) -> None:
    best = elbo(POLICY[x], e_step(POLICY[x], REWARD[x]), REWARD[x])
    for parts in itertools.product(range(17), repeat=2):
        if sum(parts) == 16:
            q = [F(parts[0], 16), F(parts[1], 16), F(0), F(0)]
            if all(r or not b for r, b in zip(REWARD[x], q, strict=True)):
                assert elbo(POLICY[x], q, REWARD[x]) <= best + 1e-15


@pytest.mark.parametrize("objective", ["problem", "sum", "token-mean"])
def test_one_exact_m_step_of_a_tabular_policy_is_q_star_and_success_1_row_47(objective: str) -> None:
    rows = toy.best_rows(expectation(POLICY, shared=False), objective)
    assert sorted(rows) == SOLVED  # where Z = 0 nothing is learnt
    for x in SOLVED:
        assert as_row(rows[x]) == e_step(POLICY[x], REWARD[x])
        assert sum(p * r for p, r in zip(as_row(rows[x]), REWARD[x], strict=True)) == 1


def test_with_one_row_for_two_problems_the_objectives_have_different_optima_row_48() -> None:
    # Weight 1 a problem: mean of q* = (1, 0, 0, 0) and (1/2, 1/2, 0, 0). Eq. 3: r p summed, (9/16, 1/16, 0, 0) / (5/8).
    examples = expectation(POLICY, shared=True)
    assert as_row(toy.best_rows(examples, "problem")[0]) == [F(3, 4), F(1, 4), F(0), F(0)]
    assert toy.best_rows(examples, "sum")[0][:4] == (float(F(9, 10)), float(F(1, 10)), 0.0, 0.0)
    assert toy.best_rows(examples, "token-mean") == toy.best_rows(examples, "sum")


@pytest.mark.parametrize("objective", ["problem", "sum"])
def test_the_toys_m_step_is_the_argmax_found_by_brute_force_row_48(objective: str) -> None:
    mass = {"problem": lambda x: SUCCESS[x], "sum": lambda x: F(1)}[objective]
    weights = [sum(POLICY[x][y] * REWARD[x][y] / mass(x) for x in SOLVED) for y in range(2)]

    def j(p: float) -> float:
        return float(weights[0]) * math.log(p) + float(weights[1]) * math.log(1 - p)

    grid = [i / 1000 for i in range(1, 1000)]
    assert max(grid, key=j) == toy.best_rows(expectation(POLICY, shared=True), objective)[0][0]


def test_the_elbo_never_falls_over_e_and_m_steps_of_a_shared_policy_row_47() -> None:
    rewards = [[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    p = [0.1, 0.2, 0.3, 0.4]
    q = [[0.5 * r for r in row] for row in rewards]  # any start: even over the two right answers
    bounds = []
    for _ in range(20):
        bounds.append(sum(elbo(p, b, r) for b, r in zip(q, rewards, strict=True)))
        z = [math.fsum(a * b for a, b in zip(p, row, strict=True)) for row in rewards]
        q = [[a * b / total for a, b in zip(p, row, strict=True)] for row, total in zip(rewards, z, strict=True)]
        bounds.append(sum(elbo(p, b, r) for b, r in zip(q, rewards, strict=True)))
        assert bounds[-1] == pytest.approx(sum(map(math.log, z)), rel=1e-14)
        examples = [
            Example(prompt_ids=(0, x), completion_ids=(y, toy.END), weight=p[y] * rewards[x][y])
            for x in range(3)
            for y in range(4)
        ]
        p = list(toy.best_rows(examples, "problem")[0][:4])
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(bounds))
    assert bounds[-1] > bounds[0] + 0.5


@pytest.mark.parametrize("objective", ["problem", "token-mean"])
def test_one_iteration_of_a_whole_tabular_run_solves_every_covered_problem_row_47(tmp_path: Path, objective: str) -> None:
    settings = ("model.base=toy:table", "iterations=1", "improve.learning_rate=1", f"improve.objective={objective}")
    task = task_of(recipe())
    # A table carries nothing over to other problems, so here, and only here, D_val are the training problems.
    out = run(tmp_path / "run", *settings, "generate.samples=8", task=replace(task, val=task.train))
    before, after = (toy.load_policy(str(out / model)) for model in ("toy-base", "iter-01/model"))
    covered = {row["problem_id"] for row in read_rows(out / "iter-01" / "examples.parquet")}
    assert 3 < len(covered) < len(task.train)
    for problem in task.train:
        assert before.success(problem) < 1
        assert after.success(problem) == (1.0 if problem.id in covered else before.success(problem))


def test_a_toy_samples_the_success_probability_that_it_says(tmp_path: Path) -> None:
    out = run(tmp_path / "run", "iterations=1", "task.train=2", "generate.samples=1000", "generate.temperature=1", "seed=3")
    rewards = part_rows(out / "iter-01" / "grades")
    for problem in task_of(recipe("task.train=2", "seed=3")).train:
        p = toy.load_policy(str(out / "toy-base")).success(problem)
        mean = sum(row["reward"] for row in rewards if row["problem_id"] == problem.id) / 1000
        assert abs(mean - p) < 4 * math.sqrt(p * (1 - p) / 1000) + 1e-9
