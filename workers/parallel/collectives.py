"""What a model asks of the ranks it is cut over."""

from __future__ import annotations

import itertools
import time
from typing import Any, Protocol

import torch

from workers.parallel import shm

__all__ = [
    "Collectives",
    "CurrentCollectives",
    "GlooCollectives",
    "ProcessGroupCollectives",
    "SharedMemoryCollectives",
    "SingleRank",
]

# A ring sends less of what is large: 2 x (size - 1) / size of it from each rank, where sending to all takes size - 1.
_AT_ONCE_BYTES = 256 << 10


class Collectives(Protocol):
    """The collectives of one axis; `index` is this rank's place on it.

    Every call must be made by all ranks of the axis in the same order. A peer's death or a step timeout raises
    RuntimeError.
    """

    @property
    def size(self) -> int: ...

    @property
    def index(self) -> int: ...

    @property
    def kind(self) -> str:
        """What carries the bytes, in words for `shoal status`."""
        ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the axis, in the dtype of `x`; may work in place."""
        ...

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """The ranks' `x`, of one shape, joined along the last dimension at index 0; None at the others."""
        ...

    def minimum(self, value: int) -> int:
        """The smallest of the ranks' values. Waits long: for agreements while loading, not for steps."""
        ...


class SingleRank:
    """An axis of one rank."""

    size = 1
    index = 0
    kind = "none (one rank)"

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        return x

    def minimum(self, value: int) -> int:
        return value


class CurrentCollectives:
    """The collectives of whichever generation is in force: what a model holds for as long as it lives.

    Between generations there are none, and nothing may be asked of them.
    """

    def __init__(self, first: Collectives) -> None:
        self.index = first.index
        self.size = first.size
        self._current: Collectives | None = first
        self.meetings = 1  # generations so far

    def follow(self, current: Collectives) -> None:
        """The axis meets anew: the same ranks in the same order."""
        assert (current.index, current.size) == (self.index, self.size)
        self._current = current
        self.meetings += 1

    def leave(self) -> None:
        """Lets go of the generation that is over."""
        self._current = None

    @property
    def kind(self) -> str:
        return self._now.kind

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._now.all_reduce(x)

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        return self._now.gather(x)

    def minimum(self, value: int) -> int:
        return self._now.minimum(value)

    @property
    def _now(self) -> Collectives:
        if self._current is None:
            raise RuntimeError("the ranks of this axis are between two generations")
        return self._current


class ProcessGroupCollectives:
    """A process group, through deepspeed.comm, with the all-reduce of its backend.

    `step_group` gives up after the step timeout, `slow_group` only after the loading timeout.
    """

    def __init__(self, *, index: int, size: int, first_rank: int, step_group: Any, slow_group: Any, kind: str) -> None:
        from deepspeed import comm  # heavy, and one rank alone needs none of it

        self._comm = comm
        self.index = index
        self.size = size
        self.kind = kind
        self._first_rank = first_rank
        self._step_group = step_group
        self._slow_group = slow_group

    @property
    def step_group(self) -> Any:
        """The ranks of the axis, for a library that wants to know them."""
        return self._step_group

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        self._comm.all_reduce(x, group=self._step_group)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.index == 0 else None
        self._comm.gather(x, parts, dst=self._first_rank, group=self._step_group)
        return None if parts is None else torch.cat(parts, dim=-1)

    def minimum(self, value: int) -> int:
        agreed = torch.tensor(value)
        self._comm.all_reduce(agreed, op=self._comm.ReduceOp.MIN, group=self._slow_group)
        return int(agreed)


class GlooCollectives(ProcessGroupCollectives):
    """Between CPUs, with an all-reduce that waits once.

    gloo's own passes parts round a ring, and waits 2 x (size - 1) times. Up to `_AT_ONCE_BYTES` every rank sends its
    part to all others instead, and adds up what it has in the order of the ranks: all have the same bits.
    """

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if x.nbytes > _AT_ONCE_BYTES:
            return super().all_reduce(x)
        parts = x.new_empty((self.size, *x.shape))
        self._comm.all_to_all_single(parts, x.expand(parts.shape).contiguous(), group=self._step_group)
        wide = parts.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else parts
        total = wide[0]
        for part in wide[1:]:
            total = total + part
        return total.to(x.dtype)


class SharedMemoryCollectives(GlooCollectives):
    """All-reduce in DeepSpeed's shared memory, which a dead peer would make wait for ever.

    `blocked_s` says how long an all-reduce has been waiting; `release` ends that wait from another thread, and the
    all-reduce raises RuntimeError.
    """

    def __init__(self, *, index: int, size: int, first_rank: int, step_group: Any, slow_group: Any, kind: str) -> None:
        super().__init__(
            index=index, size=size, first_rank=first_rank, step_group=step_group, slow_group=slow_group, kind=kind
        )
        self._buffers = shm.mapped_buffers()
        assert len(self._buffers) == size, f"{len(self._buffers)} shared buffers for {size} ranks"
        self._entered_s: float | None = None
        self._released = False

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return super().all_reduce(x)  # the op would leave it as it is
        x = x.contiguous()
        self._entered_s = time.monotonic()
        if not self._released:
            self._comm.inference_all_reduce(x, group=self._step_group)
        self._entered_s = None
        if self._released:
            raise RuntimeError("a peer left the shared-memory all-reduce")
        return x

    def blocked_s(self) -> float:
        """Seconds that the all-reduce in progress has taken; 0 where there is none."""
        entered_s = self._entered_s
        return 0.0 if entered_s is None else time.monotonic() - entered_s

    def release(self) -> None:
        """Makes every all-reduce fail from now on, and the one that waits return."""
        self._released = True
        attempts = itertools.count()
        while self._entered_s is not None:
            shm.release_waiters(self._buffers, self.index, next(attempts))
            time.sleep(0.0005)  # the waiting thread must see a value before the next one overwrites it
