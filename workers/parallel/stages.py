"""The way of a step through the stages of a pipeline: each holds some layers and hands its rows on to the next.

    stages.send(x)           to the same rank of the next stage
    x = stages.receive(...)  from the one before

Every stage runs the same steps in the same order, so what arrives needs no name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch

__all__ = ["CurrentStages", "OneStage", "ProcessGroupStages", "Stages"]


class Stages(Protocol):
    """The pipeline axis of one tensor rank; `index` is the stage. A peer's death or a timeout raises RuntimeError."""

    @property
    def size(self) -> int: ...

    @property
    def index(self) -> int: ...

    @property
    def kind(self) -> str:
        """What carries the bytes, in words for `shoal status`."""
        ...

    def send(self, x: torch.Tensor) -> None:
        """Hands x on; it must not change afterwards. Comes back at once."""
        ...

    def receive(self, num_rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What the stage before sent next [num_rows, width], in memory of its own."""
        ...

    def minimum(self, value: int) -> int:
        """The smallest of the stages' values. Waits long: for agreements while loading, not for steps."""
        ...


class OneStage:
    """All layers on this rank and its tensor peers."""

    size = 1
    index = 0
    kind = "none (one stage)"

    def send(self, x: torch.Tensor) -> None:
        raise AssertionError("the last stage has nobody to send to")

    def receive(self, num_rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        raise AssertionError("the first stage has nobody to receive from")

    def minimum(self, value: int) -> int:
        return value


class CurrentStages:
    """The stages of whichever generation is in force: what a model holds for as long as it lives.

    Between generations there are none: what is sent or awaited then fails as a peer's death does.
    """

    def __init__(self, first: Stages) -> None:
        self.index = first.index
        self.size = first.size
        self._current: Stages | None = first

    def follow(self, current: Stages) -> None:
        """The column meets anew: the same ranks in the same order."""
        assert (current.index, current.size) == (self.index, self.size)
        self._current = current

    def leave(self) -> None:
        """Lets go of the generation that is over; whoever waits for this rank then sees it go."""
        self._current = None

    @property
    def kind(self) -> str:
        return self._now.kind

    def send(self, x: torch.Tensor) -> None:
        self._now.send(x)

    def receive(self, num_rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self._now.receive(num_rows, width, dtype=dtype, device=device)

    def minimum(self, value: int) -> int:
        return self._now.minimum(value)

    @property
    def _now(self) -> Stages:
        if self._current is None:
            raise RuntimeError("the stages are between two generations")
        return self._current


class ProcessGroupStages:
    """Over process groups, through deepspeed.comm: gloo between CPUs, NCCL between GPUs.

    `ranks` are those of this column, by stage. `step_group` gives up after the step timeout, `slow_group` only after
    the loading timeout. gloo must be told `timeout` with each message: it knows the one alone that a group was made
    with.
    """

    def __init__(
        self,
        *,
        index: int,
        ranks: Sequence[int],
        step_group: Any,
        slow_group: Any,
        timeout: timedelta | None,
        kind: str,
    ) -> None:
        from deepspeed import comm  # heavy, and one rank alone needs none of it

        self._comm = comm
        self._ranks = tuple(ranks)
        self._step_group = step_group
        self._slow_group = slow_group
        self._timeout = () if timeout is None else (timeout,)
        # Under way, each with what must stay in memory until it has gone.
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()
        self.index = index
        self.size = len(self._ranks)
        self.kind = kind

    def send(self, x: torch.Tensor) -> None:
        if len(self._sent) == self.size:
            # A step is begun only when all but `size - 1` of those before it have ended: this one has gone long ago.
            self._sent.popleft()[0].wait(*self._timeout)
        x = x.contiguous()
        work = self._comm.isend(x, self._ranks[self.index + 1], group=self._step_group)
        self._sent.append((work, x))

    def receive(self, num_rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        x = torch.empty(num_rows, width, dtype=dtype, device=device)
        self._comm.irecv(x, self._ranks[self.index - 1], group=self._step_group).wait(*self._timeout)
        return x

    def minimum(self, value: int) -> int:
        agreed = torch.tensor(value)
        self._comm.all_reduce(agreed, op=self._comm.ReduceOp.MIN, group=self._slow_group)
        return int(agreed)
