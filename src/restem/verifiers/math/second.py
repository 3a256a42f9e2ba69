r"""Second opinions: what the literature's graders would say of an answer, so that published numbers can be compared.

They are not used for rewards. "hendrycks": equal text after the clean-up that the MATH paper describes (arXiv 2103.03874,
appendix; our own writing of its rules). "math-verify": Math-Verify as it comes, behind a time limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable


def hendrycks(gold: str, answer: str) -> bool | None:
    """Equal text after clean-up."""
    return _clean(gold) == _clean(answer)


def math_verify(gold: str, answer: str) -> bool | None:
    """Math-Verify's own verdict on the boxed answer; None if it fails or takes more than its 5 seconds."""
    try:
        from math_verify import parse, verify

        return bool(verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}")))
    except BaseException as error:  # its time limit is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return None


OPINIONS: dict[str, Callable[[str, str], bool | None]] = {"hendrycks": hendrycks, "math-verify": math_verify}


def _clean(text: str) -> str:
    for old, new in (
        ("\n", ""),
        (r"\!", ""),
        (r"\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        (r"\left", ""),
        (r"\right", ""),
    ):
        text = text.replace(old, new)
    text = text.replace(r"^{\circ}", "").replace(r"^\circ", "").replace(r"\$", "")
    text = re.sub(r"\\text\{ .*$", "", text)  # a unit on the right
    text = text.replace(r"\%", "").replace("%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    left, equals, right = text.partition("=")
    if equals and len(left) <= 2 and "=" not in right:
        text = right
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(\w)(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\w)\{", r"\\frac{\1}{", text)
    if text == "0.5":
        return r"\frac{1}{2}"
    whole = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    return rf"\frac{{{whole[1]}}}{{{whole[2]}}}" if whole else text
