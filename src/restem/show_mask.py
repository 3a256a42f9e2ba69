"""How `restem show-mask` prints a pack: for a terminal in colours, and as well without them, by a sign before each line.

What a newcomer would get wrong: a completion is hostile input. It may hold escape sequences that steer a terminal and text that
looks like markup or like our own signs. So every text passes `visible`, and each of its lines gets its sign from us.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.cells import chop_cells
from rich.console import Console
from rich.text import Text

from restem.mask import MaskNode, MaskView

EDGE = 24
"""Tokens that are shown of each end of a long prompt node."""


def print_mask(view: MaskView, console: Console, *, full: bool = False) -> None:
    """Print the pack: legend, nodes, matrix, totals. All of it can be read without colours."""
    lines = [Text(_title(f"{view.title}; {view.origin}"), "bold"), Text(), *_legend(), Text()]
    for number, node in enumerate(view.nodes):
        lines += [*_node(view, number, node, console.width, full), Text()]
    marks = ("#", "\\", ".") if console.options.ascii_only else ("\u25a0", "\u25e3", "\u00b7")
    lines += _matrix(view.nodes, console.width, marks)
    print_lines([*lines, *_totals(view)], console)


def print_lines(lines: Iterable[Text], console: Console) -> None:
    """Print lines that are folded already; what the terminal's encoding lacks is escaped."""
    for line in lines:
        line.plain = line.plain.encode(console.encoding, "backslashreplace").decode(console.encoding)
        console.print(line, soft_wrap=True)


def visible(text: str) -> str:
    """Text with every character shown that is none to see or that steers a terminal; line ends are kept, and marked."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "\u23ce\n"
    if code < 32 or code == 127:
        return "\u2421" if code == 127 else chr(0x2400 + code)
    kind = unicodedata.category(character)
    return f"<U+{code:04X}>" if kind.startswith("C") or kind in ("Zl", "Zp") else character


def _title(text: str) -> str:
    return visible(text).replace("\n", "")


class Mark(NamedTuple):
    """How a kind of token looks: a sign at the left margin, and a style where there are colours."""

    sign: str
    style: str
    meaning: str


READ = Mark("|", "dim", "read, not trained: prompts")
TRAINED = Mark(">", "black on green", "target: predicted from the token before it, trained, and read by what follows")
UNREAD = Mark("+", "black on yellow", "last target: predicted and trained, never read, so it has no place in the pack")
LEFT_OUT = Mark("~", "italic", "left out here")


def _legend() -> list[Text]:
    marks = [Text.assemble("  ", (f"{m.sign} ", "bold"), (m.meaning, m.style)) for m in (READ, TRAINED, UNREAD)]
    return [*marks, Text("  \u23ce is a line end of the text; other characters that cannot be seen are spelled out")]


def _node(view: MaskView, number: int, node: MaskNode, width: int, full: bool) -> Iterator[Text]:
    margin = "    " * node.depth
    yield Text.assemble(margin, (_title(f"[{number}] {node.name}"), "bold"))
    above = [f"[{n}] {ranges(range(view.nodes[n].start, view.nodes[n].end))}" for n in node.ancestors if view.nodes[n].tokens]
    seen = " and ".join([", ".join(above), "itself, causally"]) if above else "itself, causally"
    if node.tokens:
        restarts = " (restarts here)" if node.position != node.start else ""
        positions = ranges(range(node.position, node.position + len(node.tokens)))
        yield Text(f"{margin}    packed {ranges(range(node.start, node.end))}, position in the text {positions}{restarts}")
        yield Text(f"{margin}    attends to {seen}")
    else:
        yield Text(f"{margin}    no packed tokens")
    if node.targets:
        training = f"trained with weight {node.weight:.4g} each" if node.weight else "not trained: weight 0"
        count = "1 target" if len(node.targets) == 1 else f"{len(node.targets)} targets"
        yield Text(f"{margin}    {count}, predicted at packed {ranges(node.sources)}, {training}")
    for mark, text in _pieces(view, node, full):
        for line in fold(visible(text), max(20, width - len(margin) - 6)):
            yield Text.assemble(margin, "    ", (f"{mark.sign} ", "bold"), (line, mark.style))


def _pieces(view: MaskView, node: MaskNode, full: bool) -> Iterator[tuple[Mark, str]]:
    """The node's text, cut where the mark changes."""
    hidden = len(node.tokens) - 2 * EDGE
    if node.kind == "completion":
        trained = node.weight > 0
        yield TRAINED if trained else READ, view.decode(node.tokens)
        yield UNREAD if trained else READ, view.decode(node.targets[-1:])
    elif full or hidden <= EDGE:
        yield READ, view.decode(node.tokens)
    else:
        yield READ, view.decode(node.tokens[:EDGE])
        yield LEFT_OUT, f"{hidden} of {len(node.tokens)} tokens left out; --full shows them"
        yield READ, view.decode(node.tokens[-EDGE:])


def fold(text: str, width: int) -> Iterator[str]:
    """Lines of at most so many columns that hold every character: broken behind a blank if there is one."""
    for line in text.split("\n"):
        while line:
            head = chop_cells(line[:width], width)[0]
            if len(head) < len(line):
                head = head[: head.rfind(" ") + 1] or head
            yield head
            line = line[len(head) :]


def ranges(indices: Sequence[int]) -> str:
    """ "470, 517-522", last index included; the indices ascend."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _matrix(nodes: Sequence[MaskNode], width: int, marks: tuple[str, str, str]) -> list[Text]:
    """Node by node: which attends to which. Nothing if it is wider than the terminal."""
    whole, causal, none = marks
    cell = len(str(len(nodes) - 1)) + 1
    if cell * (len(nodes) + 2) > width:
        return []

    def mark(row: int, column: int) -> str:
        if not nodes[row].tokens or not nodes[column].tokens:
            return none
        return causal if row == column else whole if column in nodes[row].ancestors else none

    numbers = range(len(nodes))
    lines = ["".join(f"{name:>{cell}}" for name in ["", *numbers])]
    lines += ["".join(f"{name:>{cell}}" for name in [row, *(mark(row, column) for column in numbers)]) for row in numbers]
    return [
        Text(f"rows attend to columns: {whole} all of it, {causal} causally, {none} not at all"),
        *(Text(f"  {line}") for line in lines),
        Text(),
    ]


def _totals(view: MaskView) -> list[Text]:
    totals = view.totals
    unread = int(totals["rows"])
    return [
        Text(f"packed tokens  {totals['packed_tokens']}"),
        Text(
            f"as rows        {totals['row_tokens']}, one sequence a row and {unread} rows without padding: "
            f"{totals['row_tokens'] / max(1, totals['packed_tokens']):.1f} times as many"
        ),
        Text(f"targets        {totals['targets']}, of which {unread} are never read"),
        Text(
            f'weights        sum to {totals["weight"]:.4g} over the targets (improve.objective = "{view.objective}", this pack)'
        ),
    ]
