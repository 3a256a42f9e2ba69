"""The command line in this process, for tests that look at what a command prints."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from restem.cli import main

Command = Callable[..., tuple[int, str, str]]
"""Called with arguments; gives exit code, stdout and stderr."""


def in_process(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, columns: int) -> Command:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["restem", name, *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call
