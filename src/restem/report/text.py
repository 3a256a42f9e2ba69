"""How values are shown: numbers with their intervals, and hostile text made harmless.

HTML escaping is the template's business (autoescape); here only what escaping leaves alone is dealt with: control characters,
characters that reorder or hide what stands near them, and endless text.
"""

from __future__ import annotations

import math
import unicodedata
from typing import Any

LONGEST = 1500
"""Characters of a question or completion that are shown."""
MARKS = 3
"""Combining marks in a row that are kept; more of them would climb out of their line."""


def clean(value: Any) -> Any:
    """Make text harmless to look at: controls, bidirectional and invisible characters appear as <U+202E>.

    The template calls it on every value that it prints. What is no text is returned as it is, so markup stays markup.
    """
    if type(value) is not str or (value.isascii() and value.isprintable()):
        return value
    shown, marks = [], 0
    for character in value:
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if character in "\n\t" or (category not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and marks <= MARKS):
            shown.append(character)
        elif marks <= MARKS:
            shown.append(f"<U+{ord(character):04X}>")
    return "".join(shown)


def cut(value: str, longest: int = LONGEST) -> str:
    """The beginning of a text, with a note of how much is left out."""
    return value if len(value) <= longest else f"{value[:longest]} ... ({len(value) - longest:,} more characters)"


def percent(metric: dict[str, Any] | None) -> str:
    """ "63.0%" of a metric's value; "-" where nothing was measured."""
    return f"{metric['value']:.1%}" if is_measured(metric) and metric else "-"


def limits(metric: dict[str, Any]) -> str:
    """ "[58.2, 67.6]" in percent."""
    return f"[{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"


def interval(metric: dict[str, Any] | None) -> str:
    """ "63.0% [58.2, 67.6], n = 400": how a share is written in a sentence."""
    return f"{percent(metric)} {limits(metric)}, n = {metric['n']}" if metric and is_measured(metric) else "-"


def is_measured(metric: dict[str, Any] | None) -> bool:
    """Whether there is a value: a metric with n = 0 has none."""
    return bool(metric and metric["n"] and not math.isnan(metric["value"]))


def points(fraction: float) -> str:
    """ "+52.0": a difference of shares in percentage points."""
    return f"{100 * fraction:+.1f}"


def p_value(p: float) -> str:
    return f"p = {p:.2g}"


def number(value: Any) -> str:
    """A measurement without an interval: four digits, whole numbers as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
