"""`restem run` in one process or, under `torchrun` or `accelerate launch`, in several. Loads no torch for one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_the_first_process_goes_on() -> Iterator[bool]:
    """True in the process that is to run everything. The others get False, after they have done their share of all training."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    from restem.training.processes import Processes, serve

    processes = Processes()
    processes.start()
    if not processes.is_main:
        serve(processes)
        yield False
        return
    yield True
    processes.finish()
