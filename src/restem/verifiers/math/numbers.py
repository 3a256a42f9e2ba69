r"""Decide whether two formulas have one value: exactly where both are rational, else to fifty digits at chosen points.

Soundness first: there is no absolute tolerance (2^{-99} is not 2^{-98}), rationals are compared as fractions, and
letters get positive and negative values, so sqrt(x^2) is not x. Everything is bounded before it is computed; a tower
is "unknown".
"""

from __future__ import annotations

import random
from fractions import Fraction
from functools import lru_cache
from math import factorial, isqrt, log2
from typing import Any

from restem.verifiers.math.expression import Node, parse

MAX_BITS = 20_000
MAX_MAGNITUDE = 1_000_000
MAX_FACTORIAL = 2_500
_DIGITS = (50, 100)
_RANGE = 200
"""Binary orders of magnitude within which the digits suffice to call two values equal: 10^300 + 1 is not 10^300."""
_POINTS = 5


class _TooBig(Exception):
    """The value could be computed, but not within bounds."""


class _NotExact(Exception):
    """The value is not rational, or not seen to be."""


def same_value(gold: str, answer: str) -> bool | None:
    """Whether two formulas are equal as functions of their letters; None when either cannot be read or is too big."""
    left, right = parse(gold), parse(answer)
    if left is None or right is None:
        return None
    exact_left, exact_right = exact(left), exact(right)
    if exact_left is not None and exact_right is not None:
        return exact_left == exact_right
    return _agree(left, right, proportional=False)


def same_equation(gold: tuple[str, str], answer: tuple[str, str]) -> bool | None:
    """Whether two equations differ by a constant factor only. An equation that holds everywhere proves nothing:
    None."""
    sides = [parse(side) for side in (*gold, *answer)]
    trees = [side for side in sides if side is not None]
    if len(trees) < 4:
        return None
    left = Node("add", (trees[0], Node("neg", (trees[1],))))
    right = Node("add", (trees[2], Node("neg", (trees[3],))))
    return _agree(left, right, proportional=True)


@lru_cache(maxsize=8192)
def exact(node: Node) -> Fraction | None:
    """The value as a fraction, or None when it is not rational or too big."""
    try:
        return _exact(node)
    except (_NotExact, _TooBig, ZeroDivisionError, RecursionError):
        return None


def _exact(node: Node) -> Fraction:
    if node.op == "num":
        assert isinstance(node.value, Fraction)
        return node.value
    if not node.args:
        raise _NotExact
    values = [_exact(argument) for argument in node.args]
    if any(max(abs(value.numerator), value.denominator).bit_length() > MAX_BITS for value in values):
        raise _TooBig
    match node.op:
        case "add":
            return _exact_sum(values)
        case "neg":
            return -values[0]
        case "mul":
            return values[0] * values[1]
        case "div":
            return values[0] / values[1]
        case "abs":
            return abs(values[0])
        case "pow":
            return _exact_power(values[0], values[1])
        case "root" if values[1] > 0:
            return _exact_power(values[0], 1 / values[1])
        case "fact" if values[0].denominator == 1 and 0 <= values[0] <= MAX_FACTORIAL:
            return Fraction(factorial(int(values[0])))
        case "binom" if all(value.denominator == 1 and 0 <= value <= MAX_FACTORIAL for value in values):
            from math import comb

            return Fraction(comb(int(values[0]), int(values[1])))
    raise _NotExact


def _exact_sum(values: list[Fraction]) -> Fraction:
    total = Fraction(0)
    for value in values:
        total += value
        if total.denominator.bit_length() > 2 * MAX_BITS:
            raise _TooBig
    return total


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator > 64:
        raise _NotExact
    if exponent.denominator > 1:
        if base < 0:
            raise _NotExact
        top, bottom = (_integer_root(part, exponent.denominator) for part in (base.numerator, base.denominator))
        base = Fraction(top, bottom)
    power = exponent.numerator
    if abs(power) * max(abs(base.numerator), base.denominator).bit_length() > MAX_BITS:
        raise _TooBig
    return base**power


def _integer_root(value: int, degree: int) -> int:
    if degree == 2:
        root = isqrt(value)
    else:
        if value.bit_length() > 4096:
            raise _NotExact
        low, high = 0, 1 << (value.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
        root = low
    if root**degree != value:
        raise _NotExact
    return root


def _agree(left: Node, right: Node, *, proportional: bool) -> bool | None:
    import mpmath  # type: ignore[import-untyped]

    points = _POINTS if _letters(left) | _letters(right) else 1
    if proportional and points == 1:
        return None
    seen = 0
    ratio: list[Any] = [None, None]
    for point in range(points):
        try:
            pairs = []
            for digits in _DIGITS:
                with mpmath.workdps(digits):
                    pairs.append((_value(left, point, mpmath.mp), _value(right, point, mpmath.mp)))
        except (_TooBig, RecursionError):
            return None
        except (ZeroDivisionError, ValueError, OverflowError):
            continue
        seen += 1
        with mpmath.workdps(_DIGITS[1]):
            if proportional:
                if any(_is_zero(pairs[0][side], pairs[1][side]) for side in (0, 1)):
                    return None
                for level, (first, second) in enumerate(pairs):
                    quotient = first / second
                    if ratio[level] is None:
                        ratio[level] = quotient
                    elif not _close(quotient, ratio[level], _DIGITS[level]):
                        return False
            elif not _same(pairs):
                return False
            elif not _is_in_range(pairs):
                return None
    return True if seen >= min(points, 3) else None


def _same(pairs: list[tuple[Any, Any]]) -> bool:
    zeros = [_is_zero(pairs[0][side], pairs[1][side]) for side in (0, 1)]
    if any(zeros):
        return all(zeros)
    return all(_close(first, second, digits) for (first, second), digits in zip(pairs, _DIGITS, strict=True))


def _is_in_range(pairs: list[tuple[Any, Any]]) -> bool:
    """Whether the digits suffice to call two close values equal; two true zeros always are."""
    if all(_is_zero(pairs[0][side], pairs[1][side]) for side in (0, 1)):
        return True
    return all(2.0**-_RANGE < abs(value) < 2.0**_RANGE for value in pairs[1])


def _close(first: Any, second: Any, digits: int) -> bool:
    # A fifth of the digits is left to rounding and cancellation.
    return bool(abs(first - second) <= max(abs(first), abs(second)) * 10 ** -(digits * 4 // 5))


def _is_zero(coarse: Any, fine: Any) -> bool:
    """A true zero shrinks when the precision grows; a tiny number does not."""
    return bool(fine == 0 or (abs(coarse) < 1e-35 and abs(fine) < abs(coarse) * 1e-30))


@lru_cache(maxsize=8192)
def _letters(node: Node) -> frozenset[str]:
    if node.op == "var":
        return frozenset((str(node.value),))
    return frozenset().union(*(_letters(argument) for argument in node.args))


@lru_cache(maxsize=1024)
def _point(name: str, point: int) -> float:
    generator = random.Random(f"{name}:{point}")
    sign = -1 if point >= 2 and generator.random() < 0.6 else 1
    return sign * generator.uniform(0.4, 2.6)


def _value(node: Node, point: int, mp: Any) -> Any:
    match node.op:
        case "num":
            assert isinstance(node.value, Fraction)
            return mp.mpf(node.value.numerator) / node.value.denominator
        case "const":
            return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[str(node.value)]
        case "var":
            return mp.mpf(_point(str(node.value), point))
    values = [_value(argument, point, mp) for argument in node.args]
    result = _apply(node.op, values, mp)
    if not mp.isfinite(result):
        raise ZeroDivisionError
    if result != 0 and abs(int(mp.mag(result))) > MAX_MAGNITUDE:
        raise _TooBig
    return result


def _apply(op: str, values: list[Any], mp: Any) -> Any:
    first = values[0]
    match op:
        case "add":
            return mp.fsum(values)
        case "neg":
            return -first
        case "mul":
            return first * values[1]
        case "div":
            return first / values[1]
        case "abs":
            return abs(first)
        case "pow":
            return _power(first, values[1], mp)
        case "root":
            degree = values[1]
            if mp.im(first) == 0 and mp.re(first) < 0 and mp.isint(degree) and int(mp.re(degree)) % 2:
                return -_power(-first, 1 / degree, mp)
            return _power(first, 1 / degree, mp)
        case "fact" | "binom":
            if any(mp.im(value) != 0 or not 0 <= mp.re(value) <= MAX_FACTORIAL for value in values):
                raise _TooBig
            return mp.factorial(first) if op == "fact" else mp.binomial(first, values[1])
    if first != 0 and int(mp.mag(first)) > 24:
        raise _TooBig
    if op == "log":
        return mp.log(first) / mp.log(10)
    names = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
    return getattr(mp, names.get(op, op))(first)


def _power(base: Any, exponent: Any, mp: Any) -> Any:
    if base == 0:
        if mp.re(exponent) > 0:
            return mp.mpf(0)
        raise ZeroDivisionError
    size = max(abs(int(mp.mag(base))), 1)
    if exponent != 0 and int(mp.mag(exponent)) + log2(size) > log2(MAX_MAGNITUDE):
        raise _TooBig
    return base**exponent
