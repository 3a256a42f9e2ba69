r"""Mathematics: read the answer that a completion states and decide whether it equals the reference.

Layers, cheapest first, each saying yes, no or "I do not know": equal text, exact fractions, structure and formulas,
and last a symbolic library. Precision first: what passes here is trained on, so nothing is accepted by tolerance, by a
partial reading, or by being the last number in sight. Accepted on purpose: a missing unit, a missing "x =", 60% for
60, parts of a bare list in any order.
"""

from __future__ import annotations

from functools import lru_cache

from restem.types import Grade, Problem
from restem.verifiers.math.expression import parse
from restem.verifiers.math.extract import extract
from restem.verifiers.math.normalise import is_sane, key, normalise
from restem.verifiers.math.numbers import exact
from restem.verifiers.math.quantity import read as read_quantity
from restem.verifiers.math.structure import read, same

__all__ = ["canonical", "equivalent", "extract", "verify"]


class _Undecided(Exception):
    """Not cached: a limit that was hit on a busy machine may not be hit again."""


def equivalent(gold: str, answer: str) -> bool | None:
    r"""Whether `answer` means the same as `gold`, both without their sentence (extract first).

    None = could not decide: the gold is empty, too long, too deep or unbalanced, is a power tower that nobody can
    evaluate, or a comparison hit the limit of 2 seconds. An answer that is any of these is wrong. Not symmetric in
    that alone. No text makes it raise or run longer than the limit; safe to call from threads. RestemError means that
    the process for the last layer cannot be started, which is the installation's fault.

    >>> equivalent(r"\frac12", "0.5"), equivalent("100000000000", "99999999999")
    (True, False)
    """
    try:
        return _equivalent(gold, answer)
    except _Undecided:
        return None


@lru_cache(maxsize=65536)
def _equivalent(gold: str, answer: str) -> bool:
    if not gold.strip():
        raise _Undecided
    if gold.strip() == answer.strip():
        return True
    if len(gold) > 10_000 or len(answer) > 10_000:
        return _refuse(gold, answer)
    left, right = normalise(gold), normalise(answer)
    if not key(right):
        return False
    if key(left) == key(right):
        return True
    if not is_sane(left) or not is_sane(right):
        return _refuse(left, right)
    try:
        verdict = same(read(left), read(right))
    except RecursionError:
        raise _Undecided from None
    if verdict is None:
        from restem.verifiers.math import symbolic

        verdict = symbolic.same(left, right)
    if verdict is None:
        raise _Undecided
    return verdict


def _refuse(gold: str, answer: str) -> bool:
    if not is_sane(gold):
        raise _Undecided
    return False


def canonical(answer: str) -> str:
    """A text that equal answers share, for counting votes: exact numbers by their value, all else by normalised text.

    Cheaper than `equivalent` on every pair, and finer: answers that only algebra shows to be equal stay apart.

    >>> canonical(r"\\frac12") == canonical("0.50"), canonical("x+1") == canonical("1+x")
    (True, False)
    """
    text = normalise(answer[:10_000])
    quantity = read_quantity(text)
    tree = parse(quantity.number) if is_sane(text) else None
    value = exact(tree) if tree is not None else None
    return key(text) if value is None else f"{value} {quantity.unit}".strip()


def verify(problem: Problem, completion: str, *, style: str = "auto") -> Grade:
    """Grade a completion against `problem.reference`, the answer as text (an integer will do).

    Reward 1 for `correct`, 0 for `incorrect` and `no_answer`; None with `verifier_error` when the reference is missing
    or the comparison could not be decided. `style` is that of `extract`.
    """
    reference = problem.reference
    if isinstance(reference, int) and not isinstance(reference, bool):
        reference = str(reference)
    if not isinstance(reference, str) or not reference.strip():
        note = f"the reference must be an answer as text, not {reference!r:.80}"
        return Grade(reward=None, reason="verifier_error", note=note)
    answer = extract(completion, style=style)
    if answer is None:
        return Grade(reward=0.0, reason="no_answer")
    verdict = equivalent(reference, answer)
    if verdict is None:
        note = f"could not compare with the reference {reference!r:.80}"
        return Grade(reward=None, answer=answer, reason="verifier_error", note=note)
    return Grade(reward=float(verdict), answer=answer, reason="correct" if verdict else "incorrect")
