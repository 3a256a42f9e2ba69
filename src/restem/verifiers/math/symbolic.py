r"""Ask Math-Verify, last, and believe its "equal" only where its known false positives cannot be the reason.

Nothing here evaluates text before the guard: length, nesting, a list of allowed names, no towers, no factorials, no
quotes, no dotted access. The comparison can still take for ever, so it runs where it can be killed: in a process of
its own, or in the verifier pool's worker, which is one already (`in_worker`).
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import threading
from typing import TYPE_CHECKING, Any

from restem.verifiers.math.expression import FUNCTIONS
from restem.verifiers.math.normalise import is_sane

if TYPE_CHECKING:
    from restem.verifiers.worker import Worker

SECONDS = 2.0
"""Time limit of one comparison in the process of its own; grading a sample is not worth more."""
MEMORY_MB = 2048

# fmt: off
_COMMANDS = FUNCTIONS | {
    "frac", "sqrt", "pi", "cdot", "times", "div", "pm", "le", "ge", "ne", "in", "cup", "cap", "infty", "mathbb",
    "text", "ldots", "alpha", "beta", "gamma", "theta", "lambda", "mu", "phi", "omega", "begin", "end", "emptyset",
    "setminus", "mid", "binom",
}
# fmt: on
_WORDS = FUNCTIONS | {"sqrt", "pi", "pmatrix", "bmatrix", "matrix", "vmatrix", "or", "and"}
_NAMES = re.compile(r"\\[A-Za-z]+|" + "|".join(sorted(_WORDS, key=len, reverse=True)))
_HUGE = re.compile(r"\^\s*(?:\{[^{}]*\^|\([^()]*\^|[\w\\]+\s*\^|\{?-?\d{4})|!|\d{400}")
_FORBIDDEN = re.compile(r"__|[\"'`@#$;:?~]|\.(?=\s*[A-Za-z(\[{])|(?<!\\)lambda|\d{40}")
_worker: Worker | None = None
_lock = threading.Lock()


def is_within_limits(text: str) -> bool:
    """Whether `text` is free of what nobody can evaluate: towers, factorials, huge exponents, deep nesting."""
    return is_sane(text) and not _HUGE.search(text)


def is_safe(text: str) -> bool:
    """Whether `text` may be handed to a symbolic library: within limits, and made of known names only."""
    if not is_within_limits(text) or _FORBIDDEN.search(text) or not text.isascii():
        return False
    if not set(re.findall(r"\\([A-Za-z]+)", text)) <= _COMMANDS:
        return False
    words = re.findall(r"[A-Za-z]+", re.sub(r"\\[A-Za-z]+", " ", text))
    return all(len(word) <= 2 or word in _WORDS for word in words)


def same(gold: str, answer: str) -> bool | None:
    """Whether Math-Verify finds two normalised answers equal; None when the gold is beyond limits or the time limit
    was hit.

    A gold with words or unknown commands equals only its own text, which an earlier layer has compared.
    """
    if not is_within_limits(gold):
        return None
    if not (is_safe(gold) and is_safe(answer)):
        return False
    if os.environ.get("RESTEM_WORKER"):
        return compare(gold, answer)
    return _in_own_process(gold, answer)


def compare(gold: str, answer: str) -> bool:
    """Compare in this process, without any time limit. Whatever the library raises on a formula means: not shown
    equal."""
    try:
        return _compare(gold, answer)
    except (ImportError, MemoryError):
        raise
    except Exception:
        return False


def _compare(gold: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [LatexExtractionConfig()]
    parsed = []
    for text in (gold, answer):
        found = parse(rf"\boxed{{{text}}}", extraction_config=config, parsing_timeout=None, fallback_mode="no_fallback")
        if not found or isinstance(found[0], str) or not _is_whole(text, found[0]):
            return False
        parsed.append(found[0])
    if "." in gold or "." in answer:
        return False  # Math-Verify rounds decimals to six places; the exact layer has seen what is exact.
    return _is_equal(*parsed)


def _is_equal(gold: Any, answer: Any) -> bool:
    from math_verify import verify
    from sympy import S, Set, logic
    from sympy.core.relational import Equality, Relational

    relations = [isinstance(side, Relational | logic.boolalg.Boolean) for side in (gold, answer)]
    if any(relations):
        # Equations: the earlier layer knows better; two that hold always, or never, would pass here as equal.
        if gold.has(Equality) or answer.has(Equality) or not all(isinstance(side, Relational | Set) for side in (gold, answer)):
            return False
        if len(gold.free_symbols | answer.free_symbols) != 1:
            return False
        sets = [side if isinstance(side, Set) else side.as_set() for side in (gold, answer)]
        # What holds always or never is no answer, so two of them are not the same answer.
        return bool(sets[0] == sets[1] and sets[0] not in (S.EmptySet, S.Reals, S.UniversalSet))
    return bool(verify(gold, answer, timeout_seconds=None)) and _is_confirmed(gold, answer)


def _is_whole(text: str, parsed: Any) -> bool:
    """Whether every number and every letter of the text is in what was parsed: no prefix, no equation collapsed to
    0."""
    from sympy import Number

    numbers = {str(abs(part)) for atom in parsed.atoms(Number) if atom.is_Rational for part in (atom.p, atom.q)}
    letters = {symbol.name.lstrip("\\") for symbol in getattr(parsed, "free_symbols", ())}
    plain = _NAMES.sub(" ", text)
    wanted = set(re.findall(r"[A-Za-z]", plain)) - {"e", "i"}
    return set(re.findall(r"\d+", plain)) <= numbers and all(any(name in letter for letter in letters) for name in wanted)


def _is_confirmed(gold: Any, answer: Any) -> bool:
    """Two constants must agree relative to their size: Math-Verify's own test is absolute."""
    from sympy import Expr, N

    if not (isinstance(gold, Expr) and isinstance(answer, Expr)) or gold.free_symbols or answer.free_symbols:
        return True
    left, right = N(gold, 60), N(answer, 60)
    return bool(abs(left - right) <= max(abs(left), abs(right)) * 10**-45)


def _in_own_process(gold: str, answer: str) -> bool | None:
    global _worker
    from restem.verifiers.worker import Worker, WorkerLost

    with _lock:
        if _worker is None:
            _worker = Worker("restem.verifiers.math.symbolic:start", memory_mb=MEMORY_MB)
            atexit.register(close)
        elif not _worker.is_alive():
            _worker.restart()
        try:
            outcome = _worker.call((gold, answer), seconds=SECONDS)
        except WorkerLost:
            return None
    return bool(outcome.value) if outcome.ok else None


def start() -> Any:
    """What the own process serves; importing the library here keeps it outside the time limit."""
    import math_verify  # noqa: F401

    compare("x+1", "1+x")
    return compare


def _forget() -> None:
    """In a forked child the process belongs to the parent; the child must neither use nor end it."""
    global _worker, _lock
    _worker, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def close() -> None:
    """End the own process, if there is one; the next comparison starts another."""
    global _worker
    with _lock:
        if _worker is not None:
            _worker.close()
            _worker = None
