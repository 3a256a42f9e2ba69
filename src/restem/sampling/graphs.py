"""A step that is launched once as a whole, instead of operation by operation: CUDA graphs, one for each size that occurs.

A recorded step reads and writes what lay at the same addresses when it was recorded, so the step must be a function of buffers
that stay where they are, and must not wait for the device. No step is trusted: what a recording computes first is compared with
what the operations themselves computed. Without a recorder, or when one fails, steps are launched operation by operation.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Step = Callable[[], None]

_AFTER = 3  # a size is recorded when it comes this often: recording takes as long as a few steps


class Replays:
    """Runs steps by size. `record`: makes a replay of a step, or None. `say` is told when recording is given up."""

    def __init__(self, record: Callable[[Step], Step] | None, say: Callable[[str], None]) -> None:
        self._record, self._say = record, say
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, Step] = {}

    def run(self, size: Hashable, step: Step, out_XR: Tensor) -> None:
        """`step` writes `out_XR`: a token and its log-probability in the first two rows, for each row in flight."""
        if replay := self._recorded.get(size):
            replay()
            return
        step()
        self._seen[size] += 1
        if self._record is not None and self._seen[size] >= _AFTER:
            self._prove(self._record, size, step, out_XR)

    def _prove(self, record: Callable[[Step], Step], size: Hashable, step: Step, out_XR: Tensor) -> None:
        expected_XR = out_XR.clone()
        try:
            replay = record(step)
            out_XR.zero_()
            replay()
        except RuntimeError as error:
            self._give_up(f"recording one failed ({str(error).splitlines()[0][:200]})")
        else:
            if _agree(expected_XR, out_XR):
                self._recorded[size] = replay
            else:
                self._give_up("a recorded one computed something else")
        out_XR.copy_(expected_XR)

    def _give_up(self, reason: str) -> None:
        self._record = None
        self._recorded.clear()
        self._say(f"sampling steps are launched operation by operation, which is slower: {reason}")


def _agree(expected_XR: Tensor, found_XR: Tensor) -> bool:
    """Up to rounding: sums of many parts may come in another order, and a token may lie on a border."""
    near_R = (expected_XR[0] == found_XR[0]) & ((expected_XR[1] - found_XR[1]).abs() < 0.1)
    return bool(near_R.double().mean() > 0.9)


def recorder(device: torch.device) -> Callable[[Step], Step] | None:
    """CUDA's graphs, which share the memory of what lives within a step; None elsewhere."""
    if device.type != "cuda":
        return None
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(step: Step) -> Step:
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), _refusing_to_wait():
                step()  # libraries make their handles and workspaces per stream, and not while recording
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                step()
        return graph.replay

    return record


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Waiting for the device is an error: found before recording, since a recording that fails may leave PyTorch's memory in a
    state that it does not recover from (pytorch#180395)."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not find everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def rounded(count: int, least: int = 16) -> int:
    """The next power of two, or the middle between two: so that sizes are few, and at most a third is empty."""
    size = max(least, 1 << max(0, count - 1).bit_length())
    return max(least, size * 3 // 4) if count <= size * 3 // 4 else size


def rounded_down(count: int) -> int:
    """The largest of these sizes that is not larger than `count`."""
    size = (1 << count.bit_length()) >> 1
    return size * 3 // 2 if size * 3 // 2 <= count else size
