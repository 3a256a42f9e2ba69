"""`restem run` in one process or, under `torchrun` or `accelerate launch`, in several. Loads no torch for one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from restem.errors import RestemError
from restem.processes import Processes, local_count, of_this_run

_SECONDS = 10.0  # in which processes part


@contextmanager
def only_the_first_process_goes_on(device: str = "auto") -> Iterator[bool]:
    """True in the process that is to run everything. The others get False, after they have done their share of all jobs.

    `device`: as in a recipe.
    """
    processes = of_this_run()
    if processes.count == 1:
        yield True
        return
    try:
        kind = _common_device(device)
    except RestemError:
        if processes.is_main:
            raise
        sys.exit(0)  # the first process has said why, and its exit code counts
    if kind == "cpu":
        _divide_cores()
    processes.start(kind)
    if not processes.is_main:
        _serve(processes)
        yield False
        return
    is_done = False
    try:
        yield True
        is_done = True
    finally:
        processes.finish(seconds=_SECONDS if is_done else 0.0)


def _common_device(device: str) -> str:
    """The kind of device on which all processes compute: "cuda", each on the card of its own LOCAL_RANK, or "cpu"."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise RestemError(
            f'model.device = "{device}" names one device, and there are {os.environ["WORLD_SIZE"]} processes: say "cuda", '
            'where each takes the card of its own LOCAL_RANK, or "cpu".'
        )
    cards, needed = torch.cuda.device_count(), local_count()
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if cards < needed:
        raise RestemError(
            f"{needed} processes on this machine, and {cards} GPUs that PyTorch can use. Start one process a GPU "
            '(--nproc-per-node), or set model.device = "cpu".'
        )
    return "cuda"


def _divide_cores() -> None:
    """Give each process its part of the cores. torchrun says OMP_NUM_THREADS=1 where the user says nothing."""
    import torch

    if os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_count()))


def _serve(processes: Processes) -> None:
    """What every process but the first does.

    An error that all processes meet at once, such as a diverged training, is the first one's to tell. One that this process
    meets alone ends it, and with it the others, which may be waiting for it.
    """
    try:
        processes.attend()
    except KeyboardInterrupt:
        sys.exit(130)  # in silence: the first process speaks
    except Exception:
        if not _is_over(processes):
            raise
    processes.leave()


def _is_over(processes: Processes) -> bool:
    """Whether the first process ends as well, within some seconds."""
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        if processes.is_over():
            return True
        time.sleep(0.1)
    return False
