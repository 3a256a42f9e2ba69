"""Trains a tiny model: for tests that kill it, or start it in several processes. Arguments: start, directory, settings.

Several trainings are a list of settings, each with its folder "out" in the directory, and maybe another "start". Settings of
our own: "examples" takes SOME instead of many; "stop_after" drops a training after so many intervals; the process of the rank
"fails" does so at the end of one. What this process held of gathered tensors, at most and in bytes, is written to
directory/gathered-RANK.
"""

import json
import os
import sys
import weakref
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from restem.errors import RestemError
from restem.training import TreeTrainer
from restem.training.launch import only_the_first_process_goes_on
from restem.training.session import Session
from test_tree_trainer import SOME, random_tree, settings


class Gathered:
    """Counts the whole tensors that are alive in this process, from now on."""

    def __init__(self) -> None:
        self.now = self.most = 0
        gather = DTensor.full_tensor

        def counted(tensor: DTensor, **keywords: Any) -> torch.Tensor:
            full = gather(tensor, **keywords)
            size = full.numel() * full.itemsize
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(full, self.free, size)
            return full

        DTensor.full_tensor = counted  # type: ignore[method-assign]

    def free(self, size: int) -> None:
        self.now -= size


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    start, directory, given = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    gathered = Gathered()
    failing = given.pop("fails", None) if isinstance(given, dict) else None
    if failing is not None and failing == os.environ.get("RANK"):
        Session.is_finite = None  # type: ignore[assignment,method-assign]
    with only_the_first_process_goes_on("cpu") as is_first:
        if is_first:
            print("begins", flush=True)
            for changes in given if isinstance(given, list) else [given]:
                train(changes.pop("start", start), directory / changes.pop("out", "."), changes)
    if isinstance(given, list):
        (directory / f"gathered-{os.environ['RANK']}").write_text(str(gathered.most))


def train(start: str, directory: Path, changes: dict[str, Any]) -> None:
    examples: Any = SOME if changes.pop("examples", None) else random_tree(branches=(1,) * 30, longest=6, seed=11)
    stop_after = changes.pop("stop_after", None)
    running = TreeTrainer(settings(**changes)).train(start, examples, directory, stream="s")
    list(islice(running, stop_after))
    running.close()


if __name__ == "__main__":
    try:
        main()
    except RestemError as error:
        print(f"restem: {error}", file=sys.stderr)
        sys.exit(1)
