"""Values as text, both ways: builtin data only, so that nothing with behaviour of its own crosses the wall of a sandbox.

Used on both sides. Exact types are kept (a tuple stays a tuple). Of a subclass only the builtin value travels, read with the
builtin's own methods, so an `__eq__` that always agrees stays behind. What is no data stays where it is and travels as a
reference, which comes back as the same object.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict, deque

TYPE_CHECKING = False  # without importing typing
if TYPE_CHECKING:
    from typing import Any

MOST_ITEMS = 1_000_000
DEEPEST = 200


class Unplain(Exception):
    """A value that cannot be sent: too large, too deep, or no data where only data may be."""


class Reference:
    """An object that stayed on the other side."""

    def __init__(self, number: int, kind: str) -> None:
        self.number, self.kind = number, kind


def encode(value: object, keep: object = None) -> str:
    """A value as JSON text. `keep(object) -> Reference` is asked for what is no data; without it that is an error."""
    return json.dumps(_pack(value, keep, [0], 0), ensure_ascii=True, allow_nan=True)


def decode(text: str, fetch: object = None) -> Any:
    """The value of a text that `encode` made. `fetch(number, kind)` gives what a reference stands for."""
    try:
        return _unpack(json.loads(text), fetch, 0)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, AttributeError) as error:
        raise Unplain(f"not a value: {type(error).__name__}") from None


def _pack(value, keep, count, depth):
    count[0] += 1
    if count[0] > MOST_ITEMS or depth > DEEPEST:
        raise Unplain("the value is too large or too deep")
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is type and value in _TYPES.values():
        return {"ty": value.__name__}
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, int):
        number = int.__int__(value) if kind is int else int.__add__(value, 0)
        return number if -(2**53) < number < 2**53 else {"i": format(number, "x")}
    if isinstance(value, float):
        return {"f": float.hex(value)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        name = "b" if isinstance(value, bytes) else "ba"
        return {name: bytes(memoryview(value)).hex()}
    if isinstance(value, complex):
        value = complex.__add__(value, 0)
        return {"c": [float.hex(value.real), float.hex(value.imag)]}

    def items(values):
        return [_pack(item, keep, count, depth + 1) for item in values]

    for base, name, walk in _CONTAINERS:
        if isinstance(value, base):
            return {name: items(walk(value))}
    for base in (dict, OrderedDict, Counter, defaultdict):
        if kind is base or (base is dict and isinstance(value, dict)):
            pairs = [[_pack(k, keep, count, depth + 1), _pack(v, keep, count, depth + 1)] for k, v in dict.items(value)]
            return {_DICTS.get(kind, "d"): pairs}
    if (kind.__module__, kind.__name__) == ("fractions", "Fraction"):
        return {"q": [format(int(value.numerator), "x"), format(int(value.denominator), "x")]}
    if (kind.__module__, kind.__name__) == ("decimal", "Decimal"):
        return {"n": str.__str__(str(value))}
    if kind is range:
        return {"r": [format(part, "x") for part in (value.start, value.stop, value.step)]}
    return _odd(value, keep)


def _odd(value, keep):
    """Numbers of numpy become plain ones, where they say that they are; the rest stays behind."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return _pack(value.tolist(), None, [0], 0)
    if keep is None:
        raise Unplain(f"a {type(value).__name__} is no data")
    reference = keep(value)
    return {"ref": [reference.number, reference.kind]}


_TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)}
_CONTAINERS = (
    (list, "l", list.__iter__),
    (tuple, "t", tuple.__iter__),
    (set, "s", set.__iter__),
    (frozenset, "fs", frozenset.__iter__),
    (deque, "dq", deque.__iter__),
    (type({}.keys()), "l", iter),
    (type({}.values()), "l", iter),
    (type({}.items()), "l", iter),
)
_DICTS = {OrderedDict: "od", Counter: "ct", defaultdict: "d"}


def _unpack(value, fetch, depth):
    if depth > DEEPEST:
        raise Unplain("the value is too deep")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise Unplain("not a value")
    ((name, inner),) = value.items()
    if name in _MAKERS:
        return _MAKERS[name](_unpack(item, fetch, depth + 1) for item in inner)
    if name in ("d", "od", "ct"):
        pairs = [(_unpack(k, fetch, depth + 1), _unpack(v, fetch, depth + 1)) for k, v in inner]
        return {"d": dict, "od": OrderedDict, "ct": lambda p: Counter(dict(p))}[name](pairs)
    if name == "ref":
        if fetch is None:
            raise Unplain("an object that is no data")
        return fetch(int(inner[0]), str(inner[1]))
    return _SCALARS[name](inner)


def _imported(module, name):
    """Only where it is needed: an import costs a sandbox milliseconds."""
    return getattr(__import__(module), name)


_MAKERS = {"l": list, "t": tuple, "s": set, "fs": frozenset, "dq": deque}
_SCALARS = {
    "i": lambda text: int(text, 16),
    "f": float.fromhex,
    "ty": _TYPES.__getitem__,
    "b": bytes.fromhex,
    "ba": lambda text: bytearray(bytes.fromhex(text)),
    "c": lambda parts: complex(float.fromhex(parts[0]), float.fromhex(parts[1])),
    "q": lambda parts: _imported("fractions", "Fraction")(int(parts[0], 16), int(parts[1], 16)),
    "n": lambda text: _imported("decimal", "Decimal")(text),
    "r": lambda parts: range(*(int(part, 16) for part in parts)),
}
