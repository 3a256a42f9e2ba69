"""The program in a completion. Rules, in this order:

1. Fenced blocks: of those that are Python by their label, or have none, the last that parses and defines a function or a class;
   else the last that parses and does something; else the last. A fence that is never closed ends with the text.
2. No fence: the whole text if it parses; else the longest run of lines from the first line of code on that parses.
3. Code that continues a prompt (HumanEval): a block or text that defines the asked function stands for itself, behind the
   prompt's imports; anything else is the rest of the prompt's last function, and ends where that function ends.
"""

from __future__ import annotations

import ast
import re
import textwrap

_LONGEST = 200_000  # characters that are looked at
_TRIES = 200  # texts that are parsed at most
_PYTHON = {"", "python", "py", "python3", "py3", "pycon", "python2"}
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n]*$", re.MULTILINE)
_CODE_LINE = re.compile(
    r"^(import |from \w|def |class |@|async def |if |for |while |try:|with |print\(|\w[\w.\[\], ]*\s*[-+*/|&^%]?=[^=])"
)
_END_OF_FUNCTION = re.compile(r"\n(?=[^\s#)\]}])|\n(?=#)")


def extract(completion: str) -> str | None:
    """The program; None if the text holds none."""
    text = completion[:_LONGEST].replace("\r\n", "\n")
    blocks = _blocks(text)
    if blocks:
        return _best(blocks)
    stripped = textwrap.dedent(text).strip("\n")
    if not stripped.strip():
        return None
    return stripped if _does_something(stripped) else _run_of_code(text)


def complete(prompt: str, completion: str, entry_point: str | None) -> str | None:
    """The program that a completion makes of the code that it continues."""
    text = completion[:_LONGEST].replace("\r\n", "\n")
    blocks = _blocks(text)
    code = _best(blocks) if blocks else text
    if not code or not code.strip():
        return None
    if entry_point and re.search(rf"^(async )?def {re.escape(entry_point)}\b", code, re.MULTILINE):
        own = code if blocks else _run_of_code(code) or code
        return _helpers(prompt, entry_point) + "\n" + own
    if blocks and not code.startswith((" ", "\t")):
        code = textwrap.indent(code, "    ")
    end = _END_OF_FUNCTION.search("\n" + code)
    body = ("\n" + code)[: end.start()][1:] if end and end.start() > 0 else code
    start = prompt if prompt.endswith("\n") else prompt + "\n"
    indented = textwrap.indent(code, "    ")
    return start + (indented if not _parses(start + body) and _parses(start + indented) else body)


def _blocks(text: str) -> list[str]:
    """The contents of the fenced blocks that may be Python."""
    found, opened = [], None
    for fence in _FENCE.finditer(text):
        marks, label = fence.group(1), fence.group(2).lower()
        if opened is None:
            opened = (marks, label, fence.end() + 1)
        elif marks.startswith(opened[0]) and not label:
            found.append((opened[1], text[opened[2] : fence.start()]))
            opened = None
    if opened is not None:
        found.append((opened[1], text[opened[2] :]))
    return [textwrap.dedent(content).strip("\n") for label, content in found if label in _PYTHON and content.strip()]


def _best(blocks: list[str]) -> str | None:
    parsed = [block for block in blocks[-_TRIES:] if _does_something(block)]
    defining = [block for block in parsed if re.search(r"^(async def|def|class) ", block, re.MULTILINE)]
    for choice in (defining, parsed, blocks):
        if choice:
            return choice[-1]
    return None


def _run_of_code(text: str) -> str | None:
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if _CODE_LINE.match(line)]
    tries = 0
    for start in starts[:20]:
        end = len(lines)
        while end > start and tries < _TRIES:
            tries += 1
            piece = "\n".join(lines[start:end]).rstrip()
            error = _error_line(piece)
            if error is None:
                return piece if _does_something(piece) else None
            end = min(end - 1, start + error - 1)  # nothing behind the first error can mend it
    return None


def _helpers(prompt: str, entry_point: str) -> str:
    """What stands before the asked function in the prompt: imports and helpers."""
    at = re.search(rf"^(async )?def {re.escape(entry_point)}\b", prompt, re.MULTILINE)
    before = prompt[: at.start()] if at else ""
    return before if _parses(before) else ""


def _does_something(code: str) -> bool:
    """Whether it parses and is more than names and numbers: "5" and "yes" parse, and are output or prose."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call | ast.Await) for node in body)


def _parses(code: str) -> bool:
    return _error_line(code) is None


def _error_line(code: str) -> int | None:
    """The line of the first syntax error, from 1; None if it compiles."""
    try:
        compile(code, "program", "exec", dont_inherit=True)  # parsing alone lets a `return` outside a function pass
    except SyntaxError as error:
        return max(1, error.lineno or 1)
    except (ValueError, RecursionError, MemoryError):
        return 1
    return None
