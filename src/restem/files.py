"""Writing files so that a kill at any instant leaves each of them complete or absent, and reading them back.

Every write goes to a temporary name beside the target, is synced, and renamed. Names that begin with ".tmp-" are leftovers of
a kill and may be deleted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    with finish_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_rows(path: Path, rows: list[dict[str, Any]], schema: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Write a Parquet file with this pyarrow schema; `metadata` goes into its footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows, schema=schema.with_metadata(dict(metadata or {})))
    with finish_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return read_table(path).to_pylist()  # type: ignore[no-any-return]


def read_table(path: Path) -> Any:
    """A Parquet file as a pyarrow Table."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read()


def read_metadata(path: Path) -> dict[str, str]:
    import pyarrow.parquet as pq

    return {key.decode(): value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}


@contextmanager
def finish_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, what was written there appears under `path` at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{path.name}"
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def finish_directory(path: Path) -> Iterator[Path]:
    """Like `finish_file`, for a directory. An existing directory of that name is replaced."""
    temporary = path.parent / f".tmp-{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        remove_directory(path)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_directory(path: Path) -> None:
    """Delete a directory so that a kill on the way leaves it whole or under a temporary name."""
    if path.is_dir():
        doomed = path.parent / f".tmp-removed-{path.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def remove_leftovers(path: Path) -> None:
    """Delete what kills left half-written or half-deleted anywhere below a directory."""
    for leftover in list(path.rglob(".tmp-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
