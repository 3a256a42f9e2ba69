r"""Split an answer such as "29 dollars", "60%", "90^\circ" or "1011_2" into its number and what the number counts.

A unit, a percent sign or a base may be missing on one side when the other is a bare number; two that are both written
must agree. "5 million" is a number, not five of a unit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from restem.verifiers.math.expression import parse
from restem.verifiers.math.normalise import key
from restem.verifiers.math.numbers import exact, same_value

_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_TEXT_UNIT = re.compile(
    r"(?P<number>.*?[\d})!ix])\s*\\text\s*\{\s*(?P<unit>[A-Za-z][^{}\\]*)\}\s*(?P<power>\^\s*\{?\s*[23]\s*\}?)?"
)
_PLAIN_UNIT = re.compile(
    r"(?P<number>.*\d\}*\)?|\\frac.*\})\s*"
    r"(?P<unit>[a-zA-Z][a-z]+\.?(?:[ -][a-z]+\.?){0,2})(?P<power>\^[23])?"
)
_BASE = re.compile(r"(?P<digits>-?[0-9A-Fa-f.]+)\s*_\s*(?:\{\s*(\d+|[a-z]+)\s*\}|(\d+))")
# fmt: off
_NO_UNIT = {
    "not", "or", "and", "less", "more", "than", "plus", "minus", "times", "remainder", "over", "is", "pi", "sqrt",
    "to", "squared", "cubed", "mod", "modulo", "if", "when", "for", "except", "but", "wrong", "sin", "cos", "tan",
    "ln", "log", "exp", "through", "divided", "by", "up", "down", "negative", "per", "point", "half", "halves",
    "third", "thirds", "quarter", "quarters",
}
# fmt: on
# fmt: off
_SHORT_UNITS = {
    "cm", "km", "mm", "kg", "mg", "ft", "in", "lb", "lbs", "mi", "oz", "hr", "hrs", "min", "sec", "mph", "am",
    "pm", "m", "g", "s", "L",
}
# fmt: on
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_ABBREVIATIONS = {
    "cm": "centimeter",
    "m": "meter",
    "km": "kilometer",
    "kg": "kilogram",
    "g": "gram",
    "ft": "foot",
    "in": "inch",
    "hr": "hour",
    "min": "minute",
    "sec": "second",
    "lb": "pound",
    "mph": "mile per hour",
}
_PERCENT = {"percent", "percentage", "pct", "%"}


@dataclass(frozen=True, slots=True)
class Quantity:
    """A formula and, where written, its unit ("dollars", "%", "base 2"); `unit` is empty for a bare number."""

    number: str
    unit: str = ""


def read(text: str) -> Quantity:
    """Split normalised text into number and unit; text without a unit comes back whole."""
    text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text) if "(" not in text else text
    if text.endswith("%") and text[:-1].strip():
        return Quantity(text[:-1].strip(), "%")
    base = _BASE.fullmatch(text)
    if base:
        return Quantity(base["digits"], f"base {base[2] or base[3]}")
    found = _TEXT_UNIT.fullmatch(text) or _PLAIN_UNIT.fullmatch(text)
    if found is None:
        return Quantity(text)
    words = re.findall(r"[a-z%]+", found["unit"].lower())
    if not words or _NO_UNIT & set(words) or _is_product(text, found):
        return Quantity(text)
    number = found["number"].strip()
    if words[0] in _SCALES:
        number = f"({number}) \\cdot {_SCALES[words.pop(0)]}"
    if words and words[0] in _PERCENT and len(words) == 1:
        return Quantity(number, "%")
    return Quantity(number, " ".join(_singular(word) for word in words) + re.sub(r"[^\^\d]", "", found["power"] or ""))


def _is_product(text: str, found: re.Match[str]) -> bool:
    """Whether what looks like a plain unit may be letters that multiply, as in 3xy."""
    word = found["unit"].split()[0]
    is_spaced = text[: found.start("unit")].endswith((" ", "}"))
    return r"\text" not in text and word not in _SHORT_UNITS and len(word) < (3 if is_spaced else 4)


def same_quantity(gold: Quantity, answer: Quantity) -> bool | None:
    """Whether two quantities are equal; None when a number cannot be read."""
    if "base" in gold.unit or "base" in answer.unit:
        return _same_in_base(gold, answer)
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return _same_across_units(gold, answer)
    if gold.unit == answer.unit or "%" not in (gold.unit, answer.unit):
        return same_value(gold.number, answer.number)
    return _same_percent(gold, answer)


def _same_percent(gold: Quantity, answer: Quantity) -> bool | None:
    """Exactly one side has a percent sign: 60% is 60 where percents were asked for, and always 0.6."""
    same = same_value(gold.number, answer.number)
    if same is None:
        return None
    if same:
        # A bare gold below 1 is a share, not a count of percents: 0.5% is no answer to 0.5.
        value = _value(gold.number)
        return gold.unit == "%" or value is None or abs(value) >= 1
    left, right = (f"({side.number})/100" if side.unit == "%" else side.number for side in (gold, answer))
    return same_value(left, right)


def _same_across_units(gold: Quantity, answer: Quantity) -> bool:
    money = {"dollar": 100, "cent": 1}
    if gold.unit in money and answer.unit in money:
        left, right = (f"({side.number})\\cdot {money[side.unit]}" for side in (gold, answer))
        return same_value(left, right) is True
    names = []
    for side in (gold, answer):
        name, _, power = side.unit.partition("^")
        name = re.sub(r"^(?:square|sq) ", "", name) if not power else name
        power = power or ("2" if re.match(r"(?:square|sq) ", side.unit) else "3" if side.unit.startswith("cubic ") else "")
        name = re.sub(r"^cubic ", "", name)
        names.append((_ABBREVIATIONS.get(name, name), power))
    return names[0] == names[1] and same_value(gold.number, answer.number) is True


def _same_in_base(gold: Quantity, answer: Quantity) -> bool:
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if not all("base" in side.unit or re.fullmatch(r"-?[0-9A-Fa-f.]+", side.number) for side in (gold, answer)):
        return False
    return key(gold.number).lower() == key(answer.number).lower()


def _value(number: str) -> Fraction | None:
    node = parse(number)
    return exact(node) if node is not None else None


def _singular(word: str) -> str:
    if word == "feet":
        return "foot"
    if word in ("inches", "boxes", "classes", "dishes", "lunches", "batches", "branches"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 2 else word
