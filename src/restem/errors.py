"""The one family of errors that a user can mend. Printed without a traceback; the command line exits with 1.

A message has four parts: what happened, where, the values, what to do. Our own broken promises are `assert`s instead.
"""

from __future__ import annotations


class RestemError(Exception):
    """Something that the user can fix: a wrong recipe, a missing file, a full disk."""


class MissingExtra(RestemError):
    """An optional dependency is not installed; the message holds the line that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f'{purpose} needs the package "{package}", which is not installed.\nInstall it with: pip install "restem[{extra}]"'
        )
