"""The documentation holds: its examples run, its links resolve, and the tests and recipe keys that it names exist.

A block is executed if the line before it is `<!-- test -->`: Python in one namespace per page, and console lines that begin
with "$ " through the shell, all in one new directory per page. `<!-- test: file NAME -->` writes the block to a file there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from restem.config import describe_fields

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("README.md")])
BLOCK = re.compile(r"^<!-- test(?:: file (?P<file>\S+))? -->\n```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SECTIONS = "|".join(sorted({key.partition(".")[0] for key in describe_fields() if "." in key}))
KEY = re.compile(rf"(?<![\w./])(?:{SECTIONS})\.[a-z_]+\b(?![(.])")
ENDINGS = {"py", "json", "jsonl", "parquet", "toml", "md", "html", "safetensors"}


class Block(NamedTuple):
    file: str | None
    kind: str
    body: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["file"], found["kind"], found["body"], text.count("\n", 0, found.start("body")))
        for found in BLOCK.finditer(text)
    ]


def code_of(page: Path) -> Iterator[str]:
    """Inline code and blocks other than Python, in which a recipe key would be an attribute."""
    text = page.read_text(encoding="utf-8")
    yield from (found for found in FENCE.findall(text) if not found.startswith("```python"))
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def name_of(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    for block in blocks(page):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.body, encoding="utf-8")
        elif block.kind == "python":
            exec(compile("\n" * block.line + block.body, str(page), "exec"), names)
        else:
            assert block.kind == "console", f"{page.name}, line {block.line}: a block of kind {block.kind!r} cannot be run"
            for line in block.body.splitlines():
                if line.startswith("$ "):
                    command = re.sub(r"^restem\b", f"'{sys.executable}' -m restem.cli", line.removeprefix("$ "))
                    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
                    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def test_every_marked_block_is_found() -> None:
    for page in PAGES:
        assert len(re.findall(r"^<!-- test", page.read_text(encoding="utf-8"), re.MULTILINE)) == len(blocks(page)), page.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_resolves(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8")))
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_test_that_is_named_exists() -> None:
    files = ROOT.glob("tests/*.py")
    tests = {path.name: set(re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)) for path in files}
    known = set().union(*tests.values()) | {name.removesuffix(".py") for name in tests}
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            file, _, name = span.rpartition("::")
            if file.endswith(".py"):
                assert name in tests.get(Path(file).name, set()), f"{page.name}: {span}"
            else:
                assert {word.removesuffix(".py") for word in re.findall(r"\btest_\w+", span)} <= known, f"{page.name}: {span}"


def test_the_check_list_is_whole() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "checklist.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 59))


def test_every_recipe_key_that_is_named_exists() -> None:
    found = {(page.name, key) for page in PAGES for code in code_of(page) for key in KEY.findall(code)}
    unknown = {(page, key) for page, key in found if key.partition(".")[2] not in ENDINGS and key not in describe_fields()}
    assert len(found) > 30
    assert unknown == set()
