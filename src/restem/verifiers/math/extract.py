r"""Find the answer that a completion states. Not for judging it, and never a guess.

The one thing a newcomer would get wrong: the last number of a completion is not its answer. A completion that states no
answer has none, because a lucky number would be trained on.
"""

from __future__ import annotations

import re

from restem.errors import RestemError

STYLES = ("auto", "boxed", "minerva", "gsm8k", "answer-is")

_MINERVA_START = re.compile(r"Final Answer:\s*The final answer is", re.IGNORECASE)
_MINERVA_END = re.compile(r"\.?\s*I hope it is correct", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_ANSWER_IS = re.compile(r"\banswer(?:\*\*)?\s*(?:is\b|:|=)(?:\s*:)?(?:\*\*)?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?;](?=$|[\s*\"'])|,(?=\s+(?!and\b|or\b)[a-z]{2})")
_MONEY = re.compile(r"^\\?\$\s*(?=[-\d.])")


def extract(completion: str, *, style: str = "auto") -> str | None:
    r"""Return the answer stated in `completion`, tidied, or None when it states none.

    Styles and their rules:

    - `minerva`: the first "Final Answer: The final answer is X. I hope it is correct." The first, because a model that
      is not stopped goes on to invent the next problem.
    - `boxed`: the last `\boxed{X}` or `\fbox{X}`, by counting braces; `\boxed 17` is read too. When the last box is not
      terminated there is no answer: an earlier box never gets the credit.
    - `gsm8k`: the rest of the line after the first `####`.
    - `answer-is`: the last "answer is X", "answer: X" or "answer = X" up to the end of the sentence. The point of 3.5
      and the comma of 9,500 end no sentence; ", because" does.
    - `auto`: the first of these that applies, in the order minerva, boxed, gsm8k, answer-is. An unterminated last box
      is no answer here either. The last number of the text is never taken.

    Tidying removes dollars, bold, math delimiters and punctuation at the end; a box inside the answer is opened.
    """
    if style not in STYLES:
        raise RestemError(f'there is no answer style "{style}". Use one of: {", ".join(STYLES)}')
    if style == "minerva":
        return _tidy(_minerva(completion))
    if style == "boxed":
        return _tidy(last_box(completion))
    if style == "gsm8k":
        return _tidy(_after_hashes(completion))
    if style == "answer-is":
        return _tidy(_answer_is(completion))
    sentence = _minerva(completion)
    if sentence is not None:
        return _tidy(sentence)
    if _BOX.search(completion):
        return _tidy(last_box(completion))
    return _tidy(_after_hashes(completion)) or _tidy(_answer_is(completion))


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed` or `\fbox`; None when there is none or it is not terminated."""
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    rest = text[start:].lstrip()
    if not rest.startswith("{"):
        bare = re.match(r"[^\s$]+", rest)
        return bare.group() if bare else None
    depth = 0
    escaped = False
    for position, char in enumerate(rest):
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return rest[1:position]
    return None


def _minerva(text: str) -> str | None:
    start = _MINERVA_START.search(text)
    if start is None:
        return None
    following = _MINERVA_START.search(text, start.end())
    sentence = text[start.end() : following.start() if following else len(text)]
    end = _MINERVA_END.search(sentence)
    return sentence[: end.start()] if end else None


def _after_hashes(text: str) -> str | None:
    _, found, rest = text.partition("####")
    return rest.lstrip(" \t#").partition("\n")[0] if found else None


def _answer_is(text: str) -> str | None:
    start = None
    for match in _ANSWER_IS.finditer(text):
        start = match.end()
    if start is None:
        return None
    line = text[start:].lstrip(" \t\r\n*").partition("\n")[0]
    # A full stop inside $...$ or braces belongs to the formula.
    for end in _SENTENCE_END.finditer(line):
        before = line[: end.start()]
        if before.count("{") <= before.count("}") and (before.count("$") % 2 == 0 or _MONEY.match(before)):
            return before
    return line


def _tidy(answer: str | None) -> str | None:
    if answer is None:
        return None
    if _BOX.search(answer):
        answer = last_box(answer)
        if answer is None:
            return None
    text = answer.replace("**", "").replace("`", "").strip()
    previous = None
    while previous != text:
        previous = text
        text = text.rstrip(".,;:? \t\r\n") if not text.endswith(("\\,", "\\;", "\\:", "\\!", "\\ ")) else text[:-2]
        text = _MONEY.sub("", text).strip()
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if len(text) >= len(left) + len(right) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : -len(right)].strip()
        if text.count("$") == 1 and text.endswith("$") and not text.endswith(r"\$"):
            text = text[:-1].strip()
    return text or None
