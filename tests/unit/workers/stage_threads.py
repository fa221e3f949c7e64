"""A pipeline whose stages are threads of this process: its real ends, connected by sockets, around a fake model."""

from __future__ import annotations

import socket
import zlib
from array import array
from collections.abc import Callable

import torch

from workers.execution import Follower
from workers.inputs import StepInputs
from workers.parallel.channel import PlanReceiver, PlanSender
from workers.parallel.results import ResultReceiver, ResultSender
from workers.pipeline import FirstStage, LastStage, StageRanks

__all__ = ["NoisyCache", "StageThreads", "noise"]


def noise(history: array[int], vocab_size: int) -> torch.Tensor:
    """A row of logits that depends on everything before."""
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(zlib.crc32(history.tobytes()))) * 3


class NoisyCache:
    """A stage's runner: keeps tokens in blocks and reads whole sequences back. The last one gives `noise`."""

    def __init__(self, block_size: int, vocab_size: int, *, last: bool) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._last = last
        self._tokens: dict[tuple[int, int], int] = {}
        self.num_steps = 0

    def forward(self, inputs: StepInputs) -> torch.Tensor | None:
        self.num_steps += 1
        rows: list[torch.Tensor] = []
        token = block = 0
        for count, done, num_blocks, num_logits in zip(
            inputs.num_tokens, inputs.num_computed, inputs.num_blocks, inputs.num_logits, strict=True
        ):
            table = inputs.block_ids[block : block + num_blocks].tolist()
            for place in range(done, done + count):
                self._tokens[table[place // self._block_size], place % self._block_size] = int(inputs.token_ids[token])
                token += 1
            block += num_blocks
            for end in range(done + count - num_logits + 1, done + count + 1):
                rows.append(noise(self._read(table, end), self._vocab_size))
        if not self._last:
            return None
        return torch.stack(rows) if rows else torch.empty(0, self._vocab_size)

    def keep_step(self) -> None:
        raise AssertionError("there are no other groups")

    def _read(self, table: list[int], end: int) -> array[int]:
        size = self._block_size
        return array("q", [self._tokens[table[place // size], place % size] for place in range(end)])


class StageThreads:
    """`first` is for a step loop, which `start` tells of results and of the end of it all."""

    def __init__(self, num_stages: int, *, block_size: int, vocab_size: int, generation: int = 1) -> None:
        last = num_stages - 1
        self.caches = [NoisyCache(block_size, vocab_size, last=rank == last) for rank in range(num_stages)]
        self._connect(generation)
        self.first = FirstStage(
            self.caches[0],
            self._sender,
            self._results,
            StageRanks(frozenset(), frozenset(range(1, num_stages)), last, num_stages),
            step_timeout_s=10.0,
        )

    def start(self, on_result: Callable[[], None], on_gone: Callable[[str], None]) -> None:
        self._results.start(on_result, on_gone)
        for follower in self._followers:
            follower.start()

    def hang_up(self) -> None:
        """As a rank does that takes no more steps. From any thread."""
        self._sender.hang_up()

    def cut(self, rank: int) -> None:
        """A rank behind the first one goes, with its connections. From any thread."""
        self._receivers[rank].hang_up()
        if rank == len(self.caches) - 1:
            self._answers.close()

    def regroup(self, generation: int) -> None:
        """New connections between the same ranks, each with what it holds. With the loop at rest."""
        self._leave()
        self._connect(generation)
        self.first.regrouped(self._sender, self._results, None)

    def close(self) -> None:
        """After the loop has stopped."""
        self.first.dismiss()
        self._leave()

    def _connect(self, generation: int) -> None:
        last = len(self.caches) - 1
        plans = {rank: socket.socketpair() for rank in range(1, last + 1)}
        back = socket.socketpair()
        self._sender = PlanSender(generation, {rank: ends[0] for rank, ends in plans.items()})
        self._receivers = {rank: PlanReceiver(generation, ends[1]) for rank, ends in plans.items()}
        self._results = ResultReceiver(generation, back[0])
        self._answers = ResultSender(back[1])
        self._followers = [
            Follower(
                self.caches[rank],
                receiver,
                rank=rank,
                answer=LastStage(self._answers) if rank == last else None,
            )
            for rank, receiver in self._receivers.items()
        ]

    def _leave(self) -> None:
        for follower in self._followers:
            assert follower.stop(10)
        self._results.close()
        self._answers.close()
        self._sender.close()
        for receiver in self._receivers.values():
            receiver.close()
