r"""Parse one formula, LaTeX or plain, into a small tree; the whole text must be consumed, or nothing is.

Not a computer algebra system: numbers, letters, sums, products, powers, roots and the usual functions. Words are never
products of letters ("even" is not e*v*e*n), two numbers side by side are an error, and no text reaches Python's `eval`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

# fmt: off
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "ln", "log", "exp", "sinh", "cosh",
    "tanh",
}
_GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "nu", "rho", "sigma", "tau", "phi",
    "varphi", "psi", "omega", "infty", "ell", "emptyset", "Delta", "Omega", "eta", "kappa", "xi", "zeta", "chi",
}
# fmt: on
MAX_DEPTH = 120
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_SCIENTIFIC = re.compile(r"(\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})(?![\dA-Za-z])")
_TIMES = re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])|\*")
_DIVIDE = re.compile(r"\\div(?![A-Za-z])|/")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_WORD = re.compile(r"[A-Za-z]+")
_SUBSCRIPT = re.compile(r"_\s*(?:\{\s*([A-Za-z0-9]+)\s*\}|([A-Za-z0-9]))")
_FUNCTION_START = re.compile(r"\\?(?:" + "|".join(sorted(FUNCTIONS)) + ")")
# Digits only: reading the arguments as formulas and stepping back would cost 2^depth.
_MIXED_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")


class Unreadable(ValueError):
    """The text is no formula that this parser knows."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: `num`, `const`, `var`, `add`, `mul`, `div`, `neg`, `pow`, `root`, `fact`, `abs`, `binom`, or a
    function."""

    op: str
    args: tuple[Node, ...] = ()
    value: Fraction | str | None = None


@lru_cache(maxsize=8192)
def parse(text: str) -> Node | None:
    """Return the tree of `text`, or None when any part of it cannot be read."""
    try:
        parser = _Parser(text)
        node = parser.sum()
        return node if parser.at_end() and not _is_deep(node) else None
    except (Unreadable, RecursionError):
        return None


def _is_deep(node: Node) -> bool:
    """Whether walking the tree by recursion, as everything that follows does, could exhaust the stack."""
    level = [node]
    for _ in range(MAX_DEPTH):
        level = [argument for parent in level for argument in parent.args]
        if not level:
            return False
    return True


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0
        self.bars = 0

    def at_end(self) -> bool:
        self.blanks()
        return self.pos == len(self.text)

    def blanks(self) -> None:
        while self.pos < len(self.text) and self.text[self.pos].isspace():
            self.pos += 1

    def peek(self) -> str:
        self.blanks()
        return self.text[self.pos : self.pos + 1]

    def take(self, what: str) -> bool:
        self.blanks()
        if not self.text.startswith(what, self.pos):
            return False
        self.pos += len(what)
        return True

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        self.blanks()
        found = pattern.match(self.text, self.pos)
        if found:
            self.pos = found.end()
        return found

    def expect(self, what: str) -> None:
        if not self.take(what):
            raise Unreadable(what)

    def sum(self) -> Node:
        terms = [self.signed_term()]
        while self.peek() in ("+", "-") and self.peek():
            terms.append(self.signed_term())
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def signed_term(self) -> Node:
        negative = False
        while self.peek() in ("+", "-") and self.peek():
            negative ^= self.take("-") or not self.take("+")
        term = self.product()
        return Node("neg", (term,)) if negative else term

    def product(self) -> Node:
        node = self.power()
        while True:
            if self.match(_TIMES):
                node = Node("mul", (node, self.signed_factor()))
            elif self.match(_DIVIDE):
                node = Node("div", (node, self.signed_factor()))
            elif self.starts_factor():
                node = Node("mul", (node, self.power()))
            else:
                return node

    def signed_factor(self) -> Node:
        if self.take("-"):
            return Node("neg", (self.power(),))
        self.take("+")
        return self.power()

    def starts_factor(self) -> bool:
        # A digit starts no implicit factor: "3 5" and "x2" mean nothing certain.
        char = self.peek()
        if char == "|":
            return self.bars == 0
        if char == "\\":
            return not re.match(r"\\(?:cdot|times|ast|div|rfloor|rceil|pm|mp)(?![A-Za-z])|\\[^A-Za-z]", self.text[self.pos :])
        return bool(char) and (char.isalpha() or char in "({[")

    def power(self) -> Node:
        node = self.atom()
        while True:
            if self.take("!"):
                node = Node("fact", (node,))
            elif self.take("^"):
                node = Node("pow", (node, self.exponent()))
            else:
                return node

    def exponent(self) -> Node:
        if self.take("-"):
            return Node("neg", (self.exponent(),))
        number = self.match(_NUMBER)
        if number:
            return Node("num", value=Fraction(number.group()))
        return self.atom()

    def atom(self) -> Node:
        char = self.peek()
        if not char:
            raise Unreadable("end")
        if char.isdigit() or char == ".":
            return self.number()
        for left, right in (("(", ")"), ("{", "}"), ("[", "]")):
            if self.take(left):
                bars, self.bars = self.bars, 0
                node = self.sum()
                self.expect(right)
                self.bars = bars
                return node
        if self.take("|"):
            self.bars += 1
            node = self.sum()
            self.expect("|")
            self.bars -= 1
            return Node("abs", (node,))
        if char == "\\":
            return self.command()
        if char.isalpha() and char.isascii():
            return self.letters()
        raise Unreadable(char)

    def number(self) -> Node:
        repeating = self.match(_REPEATING)
        if repeating:
            whole, fixed, cycle = repeating.groups()
            scale = 10 ** len(fixed)
            value = Fraction(int(whole + fixed or "0"), scale) + Fraction(int(cycle), scale * (10 ** len(cycle) - 1))
            return Node("num", value=value)
        scientific = self.match(_SCIENTIFIC)
        if scientific:
            return Node("num", value=Fraction(scientific[1]) * Fraction(10) ** int(scientific[2]))
        found = self.match(_NUMBER)
        if found is None or self.peek() == "_":
            raise Unreadable("number")
        value = Fraction(found.group())
        mixed = None if "." in found.group() else self.match(_MIXED_FRACTION)
        if mixed is None:
            return Node("num", value=value)
        top, bottom = int(mixed[1] or mixed[2]), int(mixed[3] or mixed[4])
        if not 0 < top < bottom:
            raise Unreadable("a mixed number or a product")
        return Node("num", value=value + Fraction(top, bottom))

    def letters(self) -> Node:
        word = _WORD.match(self.text, self.pos)
        assert word is not None
        run = word.group()
        if run in FUNCTIONS or run == "sqrt":
            self.pos = word.end()
            return self.root() if run == "sqrt" else self.function(run)
        if len(run) > 3 or (len(run) > 1 and not run.islower()):
            raise Unreadable("a word")
        self.pos += 1
        return self.symbol(run[0])

    def symbol(self, name: str) -> Node:
        subscript = self.match(_SUBSCRIPT)
        if subscript:
            return Node("var", value=f"{name}_{subscript[1] or subscript[2]}")
        if name in "fgh" and self.peek() == "(":
            raise Unreadable("a function without a meaning")
        return Node("const", value=name) if name in ("e", "i") else Node("var", value=name)

    def command(self) -> Node:
        found = self.match(_COMMAND)
        if found is None:
            raise Unreadable("escape")
        name = found[1]
        if name in ("frac", "dfrac", "tfrac", "binom"):
            top = self.argument()
            return Node("div" if name.endswith("frac") else "binom", (top, self.argument()))
        if name == "sqrt":
            return self.root()
        if name == "pi":
            return Node("const", value="pi")
        if name in FUNCTIONS:
            return self.function(name)
        if name in _GREEK:
            return self.symbol("\\" + name)
        raise Unreadable(name)

    def argument(self) -> Node:
        r"""One TeX argument: a group or a single character, so `\frac12` is a half."""
        char = self.peek()
        if char.isdigit():
            self.pos += 1
            return Node("num", value=Fraction(char))
        if char.isalpha():
            self.pos += 1
            return self.symbol(char)
        if char not in ("{", "\\", "("):
            raise Unreadable("argument")
        return self.atom()

    def root(self) -> Node:
        degree = Node("num", value=Fraction(2))
        if self.take("["):
            degree = self.sum()
            self.expect("]")
        if re.match(r"\s*\d\d", self.text[self.pos : self.pos + 9]):
            raise Unreadable("how far the root goes")
        return Node("root", (self.argument(), degree))

    def function(self, name: str) -> Node:
        base: Node | None = None
        exponent: Node | None = None
        if name == "log" and self.take("_"):
            base = self.argument()
        if self.take("^"):
            exponent = self.exponent()
            if exponent.op == "neg":
                raise Unreadable("an inverse or a reciprocal")
        if self.peek() in ("(", "{", "["):
            inner = self.atom()
        else:
            inner = self.power()
            while self.starts_factor() and not _FUNCTION_START.match(self.text, self.pos):
                inner = Node("mul", (inner, self.power()))
        node = Node(name, (inner,)) if base is None else Node("div", (Node("ln", (inner,)), Node("ln", (base,))))
        return Node("pow", (node, exponent)) if exponent else node
