"""Rows of a benchmark: from the folder the user names, or else from the Hugging Face hub."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restem.errors import MissingExtra, RestemError
from restem.tasks.files import Row, split_rows
from restem.tasks.splits import closest


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a benchmark's rows are."""

    name: str
    data: Path | None
    """A folder with one folder per set, or the set's own folder; None = the hub."""
    hub_id: str
    configs: Sequence[str] = ()
    """The hub configurations that make up the set, joined in this order; empty = all that the data set has."""

    def rows(self, split: str) -> list[Row]:
        return split_rows(self.data, self.name, split) if self.data else _hub_rows(self, split)

    def where(self, split: str) -> str:
        """Name a split in messages."""
        return f"{self.name}/{split} in {self.data}" if self.data else f"{split} of {self.hub_id}"


def read_hub_id(options: Mapping[str, Any] | None, task: str, default: str) -> str:
    """Read the one option that benchmarks have: `hub_id`, another copy of the set on the hub."""
    for key in options or {}:
        if key != "hub_id":
            raise RestemError(f'{task} has no option "{key}"{closest(key, ["hub_id"])}')
    return str((options or {}).get("hub_id", default))


def _hub_rows(source: Source, split: str) -> list[Row]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingExtra("datasets", "datasets", f"Loading {source.name} from the Hugging Face hub") from error
    try:
        configs = source.configs or datasets.get_dataset_config_names(source.hub_id)
        return [dict(row) for config in configs for row in datasets.load_dataset(source.hub_id, config, split=split)]
    except Exception as error:  # offline, gated, renamed, removed: the libraries below raise a dozen unrelated types
        raise RestemError(
            f"cannot load {split} of {source.hub_id} from the Hugging Face hub: {type(error).__name__}: {error}\n"
            f"Give a folder with the files instead: task.data = FOLDER, holding {source.name}/{split}.jsonl.gz (or "
            '.jsonl, .json, .parquet); or name another copy: task.options = { hub_id = "OWNER/NAME" }.'
        ) from error
