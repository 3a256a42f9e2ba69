"""The processes of one run, started by `torchrun` or `accelerate launch`. Loads no torch where there is only one.

The first process runs the whole command. The others attend: they wait for jobs (training, drawing samples), do their share of
each, and wait for the next. The one thing a newcomer would get wrong: jobs and samples travel through torch's store, where
waiting for hours costs nothing; collectives run inside a training job only, under the ordinary time limits.
"""

from __future__ import annotations

import functools
import os
import pickle
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from restem.errors import RestemError

if TYPE_CHECKING:
    from torch import Tensor, nn

_PIECE = 4 << 20  # the store takes no values above 8 MB
_POLL = 0.02  # seconds between two looks into the store


class Job:
    """What the first process asks of the others. It is pickled."""

    def work(self, processes: Processes, held: dict[str, Any]) -> None:
        """This process's share. `held`: what it keeps from one job to the next."""
        raise NotImplementedError


class Processes:
    """The processes of one run. With one process every method does nothing, at no cost."""

    def __init__(self) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.is_main = self.rank == 0
        self._store: Any = None
        self._sent = self._received = 0

    def start(self, device: str) -> None:
        """Join the others. `device`: a kind of device, on which all of them compute; each CUDA process takes its own card."""
        if self.count == 1 or self._store is not None:
            return
        import torch
        from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        self._store, *_ = next(rendezvous("env://", self.rank, self.count))
        group = PrefixStore("restem/group", self._store)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=group, rank=self.rank, world_size=self.count)

    def device(self, device: str) -> str:
        """This process's own device of a kind."""
        if self.count > 1 and device == "cuda":
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return device

    # --- jobs ---------------------------------------------------------------------------------------------------------------

    def send(self, message: Any) -> None:
        """The first process: hand a job, or the end of a pause, to all others. Does not wait for them."""
        if self.count > 1:
            self._sent += 1
            self.put(f"message {self._sent}", message)

    def attend(self) -> Any:
        """The others: do jobs until the first process sends something that is no job; returns it."""
        held: dict[str, Any] = {}
        while True:
            self._received += 1
            key = f"message {self._received}"
            while not self.has(key):
                time.sleep(_POLL)
            message = self.take(key, readers=self.count - 1)
            if not isinstance(message, Job):
                return message
            message.work(self, held)

    def meet(self, message: Any) -> Any:
        """Like `tell`, at the end of a pause: until the first process comes, the others do the jobs that it sends."""
        if not self.is_main:
            return self.attend()
        self.send(message)
        return message

    def finish(self, *, seconds: float) -> None:
        """The first process: there will be no more jobs. Waits so long for the others to take their leave."""
        if self.count > 1 and self._store is not None:
            with suppress(RestemError), _reaching():  # those who cannot be reached have ended
                self.put("over", None)
                self.send(None)
                until = time.monotonic() + seconds
                while time.monotonic() < until and self._store.add("restem/left", 0) < self.count - 1:
                    time.sleep(_POLL)
            self._part()

    def is_over(self) -> bool:
        """The others: whether the first process has ended the run, orderly or not."""
        return self.has("over")

    def leave(self) -> None:
        """The others: part from the run, as every process must: one that ends still connected may be aborted while it ends."""
        with suppress(RestemError), _reaching():
            self._store.add("restem/left", 1)
        self._part()

    def _part(self) -> None:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self._store = None

    # --- the store ----------------------------------------------------------------------------------------------------------

    def put(self, key: str, value: Any) -> None:
        data = pickle.dumps(value)
        pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
        with _reaching():
            for number, piece in enumerate(pieces):
                self._store.set(f"restem/{key}/{number}", piece)
            self._store.set(f"restem/{key}", str(len(pieces)))

    def has(self, key: str) -> bool:
        """Whether something was put there."""
        with _reaching():
            return bool(self._store.check([f"restem/{key}"]))

    def take(self, key: str, *, readers: int = 1) -> Any:
        """What was put there. The last of so many readers deletes it."""
        with _reaching():
            pieces = [f"restem/{key}/{number}" for number in range(int(self._store.get(f"restem/{key}")))]
            value = pickle.loads(b"".join(self._store.get(piece) for piece in pieces))
            if readers == 1 or self._store.add(f"restem/{key}/readers", 1) == readers:
                for name in (*pieces, f"restem/{key}", *([f"restem/{key}/readers"] if readers > 1 else [])):
                    self._store.delete_key(name)
        return value

    # --- inside a training job ------------------------------------------------------------------------------------------------

    def tell(self, message: Any) -> Any:
        """What the first process says, in every process."""
        if self.count == 1:
            return message
        import torch

        box = [message]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def share(self, items: list[Any]) -> list[Any]:
        """This process's share; as many items for everyone, with None for what is missing."""
        most = -(-len(items) // self.count)
        own = items[self.rank :: self.count]
        return own + [None] * (most - len(own))

    def sum(self, values: Tensor) -> Tensor:
        if self.count > 1:
            import torch

            torch.distributed.all_reduce(values)
        return values

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        if self.count == 1:
            return value
        import torch

        box = torch.tensor(value)
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MIN)
        return int(box)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum whole gradients over processes, many small ones in one message; those that lie in parts are summed already.

        What is frozen, or has no gradient in any process, gets none: an optimiser leaves it alone, as in one process.
        """
        if self.count == 1:
            return
        import torch

        trained = [parameter for parameter in parameters if parameter.requires_grad]
        known = self.sum(torch.tensor([float(parameter.grad is not None) for parameter in trained])).tolist()
        batch: list[Tensor] = []
        for parameter, processes in zip(trained, known, strict=True):
            if not processes or hasattr(parameter, "full_tensor"):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            batch.append(parameter.grad)
            if sum(gradient.numel() for gradient in batch) > 1 << 24:
                _sum_together(batch)
                batch = []
        if batch:
            _sum_together(batch)


@functools.cache
def of_this_run() -> Processes:
    """The processes that this one was started with."""
    return Processes()


def local_count() -> int:
    """How many of them share this machine."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0")) + 1)


def _sum_together(gradients: list[Tensor]) -> None:
    import torch

    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def _reaching() -> Iterator[None]:
    """Says in one sentence that the store is gone: the process that holds it, torchrun's or the first one, has ended."""
    import torch

    try:
        yield
    except torch.distributed.DistError:
        raise RestemError("the connection to the other processes of this run is lost, so this one ends too.") from None
