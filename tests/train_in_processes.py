"""Trains a tiny model: for tests that kill it, or start it in several processes. Arguments: start, directory, settings."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from restem.training import TreeTrainer
from restem.training.launch import only_the_first_process_goes_on
from test_tree_trainer import SOME, random_tree, settings


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    start, directory, changes = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    examples: Any = SOME if changes.pop("examples", None) else random_tree(branches=(1,) * 30, longest=6, seed=11)
    with only_the_first_process_goes_on("cpu") as is_first:
        if is_first:
            print("begins", flush=True)
            list(TreeTrainer(settings(**changes)).train(start, examples, directory, stream="s"))


if __name__ == "__main__":
    main()
