"""Memory at hand, and how the process keeps it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from restem.processes import local_count

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on a device now, in bytes; within a container's limit, and this process's part of a CPU's."""
    if device.type == "cuda":
        import torch

        # What PyTorch keeps for its next tensors is free, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return max(0, free) // local_count()


def hand_back(device: torch.device) -> None:
    """Let others have the memory of a GPU that PyTorch keeps and does not use."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory ran out, on whatever device."""
    import torch

    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "allocate memory" in text


def keep_freed_memory() -> None:
    """Let the C library keep freed memory of up to 32 MB a piece for the next tensor, where it is glibc.

    By default it hands it back to the system, and every tensor of more than a few hundred kilobytes then costs a page fault per
    4 KB: a copy of 1 MB took 23 us with this and 387 us without. At most 1 GB is kept that nothing uses.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_TOP_PAD, 64 << 20)


def total_bytes(device: torch.device) -> int:
    """All the memory that a device has, or that the machine gives to this container, used or not."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    total, limit = int(psutil.virtual_memory().total), Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total
