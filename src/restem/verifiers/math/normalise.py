r"""Bring the spellings of one answer to one text, without ever dropping what carries meaning.

After hendrycks/math and Minerva, minus their known faults: no left side of "=" is removed here, no unit, no base, and
the blank of "3 5" stays, since it is not 35. Factorials keep their "!", but the sentence's "!" went at extraction.
"""

from __future__ import annotations

import re

MAX_LENGTH = 2000
MAX_NESTING = 50

_SYMBOLS = {
    "\u2212": "-",
    "\u2013": "-",
    "\u2014": "-",
    "\u2010": "-",
    "\u00d7": r"\times ",
    "\u00f7": r"\div ",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u03c0": r"\pi ",
    "\u03b8": r"\theta ",
    "\u221e": r"\infty ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u00b0": r"^\circ ",
    "\u00b2": "^2",
    "\u00b3": "^3",
    "\u00bd": r"\frac{1}{2}",
    "\u00bc": r"\frac{1}{4}",
    "\u00be": r"\frac{3}{4}",
    "\u222a": r"\cup ",
    "\u2208": r"\in ",
    "\u00b1": r"\pm ",
    "\u2019": "'",
    "\u00a0": " ",
    "\u202f": " ",
    "\u2009": " ",
    "\u221a": r"\sqrt ",
    "\u2205": r"\emptyset ",
    "\u200b": "",
    "\u200c": "",
    "\u200d": "",
    "\u2060": "",
    "\ufeff": "",
    "\u20ac": r"\text{euros} ",
    "\u00a3": r"\text{pounds} ",
}
_TABLE = str.maketrans(_SYMBOLS)
_COMMANDS = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)\s*(?=\\[{}|]|[\[\]()|.<>/]|\\[lr]angle)"), ""),
    (re.compile(r"\\[bB]igg?[lrm]?(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits|bf|rm|it)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\neq(?![A-Za-z])|\\not\s*=|!="), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:ldots|cdots|dotsc?)(?![A-Za-z])|\.\.\.+"), r"\\ldots "),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (
        re.compile(r"\\(?:mbox|mathrm|textbf|textit|textrm|mathbf|operatorname|hbox|textnormal)\s*\*?\s*(?=\{)"),
        r"\\text",
    ),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\degree(?![A-Za-z])"), r"\\text{ degrees}"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"(?<=\d)\\[,; ](?=\d{3}(?!\d))"), ","),
    (re.compile(r"(?<!\\)\\!"), ""),
    (re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|\\phantom(?![A-Za-z])|~"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"^\s*(-?)\s*\\\$\s*([\d.,]+)\s*$"), r"\1\2\\text{ dollars}"),
    (re.compile(r"\\?\$"), " "),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"\*\*(?=[\d({-])"), "^"),
    (re.compile(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])"), r"\1\\frac{\2}{\3}"),
)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{(.*)\}", re.DOTALL)
_GROUPS = re.compile(r"-?\d{1,3}(?: \d{3})+")
"""Thousands by blanks. Groups of three only: "3 5" is not 35."""


def normalise(answer: str) -> str:
    r"""Return `answer` with one spelling for each command. Blanks stay; `\text{...}` stays; `$` goes."""
    text = answer.strip().replace("**", "^") if re.search(r"\w\*\*[\w(]", answer) else answer.strip().replace("**", "")
    text = text.translate(_TABLE)
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if (box := _BOX.fullmatch(text)) and is_sane(box[1]) and _closes_last(box[1]):
        text = box[1].strip()
    if _GROUPS.fullmatch(text):
        text = text.replace(" ", "")
    while text.endswith((".", ",", ";", ":")):
        text = text[:-1].rstrip()
    return text


def _closes_last(inside: str) -> bool:
    """Whether a brace opened before `inside` is closed only behind it."""
    depth = 0
    for char in re.sub(r"\\[{}]", "", inside):
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return True


def key(text: str) -> str:
    r"""Return what two normalised texts must share to be the same string: blanks and text commands do not count.

    Words are compared without case ("Monday", `\text{monday}`); single letters keep it, since A and a are two names.
    """
    text = _TEXT.sub(lambda match: f" {match.group(1)} ", text)
    text = re.sub(r"(?<=\d)\s+(?=\d)", "_", text.strip())
    text = re.sub(r"(?<=[A-Za-z])\s+(?=[A-Za-z])", "_", text)
    text = re.sub(r"\s+", "", text).rstrip(".")
    text = re.sub(r"([_^])\{([A-Za-z0-9])\}", r"\1\2", text)
    text = re.sub(r"\\(frac|sqrt)(\d|\{(\w)\})", lambda m: rf"\{m[1]}{m[3] or m[2]}" if m[1] == "sqrt" else m[0], text)
    if re.fullmatch(r"\([A-Za-z]\)", text):
        text = text[1:-1]
    return text.lower() if re.fullmatch(r"[A-Za-z_']{2,}", text) else text


def is_sane(text: str) -> bool:
    """Whether `text` is short, shallow and balanced enough to be read at all."""
    if len(text) > MAX_LENGTH:
        return False
    depth = deepest = 0
    for char in re.sub(r"\\[{}]", "", text):
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    braces = re.sub(r"\\[{}]", "", text)
    return deepest <= MAX_NESTING and braces.count("{") == braces.count("}")
