"""Algorithm 1 of the paper (Singh et al., TMLR 2024, arXiv 2312.06585), and nothing else.

Where this differs from the paper's page, and why:

1. Algorithm 1 does not show that Improve restarts from the base model; section 3 and Table 1 say so, and it does here.
2. Algorithm 1 draws inputs from D; the implementation paragraph draws a fixed number of samples for every problem, as here.
3. "While reward improves" is measured every `improve.interval` epochs on samples of D_val (the paper does not say how, U3); the
   untrained start is candidate 0, so an Improve step that helps nothing returns it. A tie is no improvement.
4. The second stop rule (`improve.stop = "best"`) trains all intervals and keeps the best one; the first is the paper's.
5. If D_i is empty, the start is carried forward with a warning: there is nothing to improve on.
6. The policy that is returned is the one of the iteration with the best reward on D_val so far, never chosen on test problems
   (U15); each Generate step still samples from the last iteration's policy, as the paper's does.

Resume, logging, placement and timing live in `Run`; they never enter here.
"""

from __future__ import annotations

from collections.abc import Sequence

from restem.candidate import Candidate
from restem.run import Run
from restem.types import Example


def rest_em(run: Run) -> Candidate:
    """Run I iterations of Generate (E-step) and Improve (M-step); return the accepted policy with its reward on D_val."""
    policy = accepted = run.start(run.base)  # theta_0
    run.evaluate(policy, iteration=0)
    for iteration in run.iterations:
        samples = run.generate(policy, iteration)  # E-step: N samples per problem, the policy is frozen
        examples = run.select(samples, iteration)  # D_i: r(x, y) = 1, at most 10 per problem
        policy = improve(run, policy, examples, iteration)  # M-step
        run.evaluate(policy, iteration)
        if policy.reward > accepted.reward:
            accepted = policy
    return run.finish(accepted)


def improve(run: Run, policy: Candidate, examples: Sequence[Example], iteration: int) -> Candidate:
    """Maximise J = E[r log p] over D_i from the base model while the reward on D_val improves."""
    settings = run.recipe.improve
    start = run.start(run.base) if settings.start_from == "base" else policy
    best, misses = start, 0
    for model in run.train(start, examples, iteration):  # a model per interval; none if D_i is empty
        candidate = run.validate(model, iteration)
        if candidate.reward > best.reward:
            best, misses = candidate, 0
        else:
            misses += 1
        if settings.stop == "first" and misses > settings.patience:
            break
    return run.keep(best, iteration)
