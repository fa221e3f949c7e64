"""Expert dispatch over the ranks of a stage: rows travel to their experts and back, with exact counts.

Nothing is padded and nothing is dropped. Two exchanges a layer: the rows, with how many are for which slot, and the
experts' outputs back. See `dispatch.py` for the seam and the shape suffixes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scheduler.experts import ExpertPlacement
from workers.parallel.dispatch import ExpertRows, Meanwhile, Neighbourhood, Routing
from workers.parallel.exchange import Exchange
from workers.parallel.host_exchange import HostExchange
from workers.parallel.moves import RowMoves, TorchMoves

__all__ = ["AllToAllDispatch", "AllToAllHandle"]


@dataclass(frozen=True, slots=True)
class AllToAllHandle:
    """The way back. `own`: which of the tokens are this rank's to send. `order` [T * K]: which flat (token, choice)
    each sent row is; `arrival` [R]: where each computed row lay when it arrived; `sent` and `received` are row counts
    by rank. `plain`: how many choices of weight one follow the K.
    """

    own: slice
    num_tokens: int
    order: torch.Tensor
    arrival: torch.Tensor
    sent: list[int]
    received: list[int]
    weights: torch.Tensor
    plain: int = 0


class AllToAllDispatch:
    """Experts live where `placement` says; a redundant expert's tokens take turns among its slots.

    Which slot computes a row does not change its bits, for all hold the same weights.
    """

    def __init__(
        self,
        exchange: Exchange,
        placement: ExpertPlacement,
        *,
        part: tuple[int, int] = (0, 1),
        device: torch.device | None = None,
        moves: RowMoves | None = None,
    ) -> None:
        """`part` (index, size): the ranks of a tensor axis have the same tokens, and each sends its part of them."""
        assert exchange.size == placement.num_ranks
        self._exchange = exchange
        self._part = part
        self._device = device
        self._moves = moves or TorchMoves()
        self.placement = placement
        self._slots = placement.slots_per_rank
        self._ours = len(placement.slots[exchange.index])
        replicas = placement.replicas()
        most = max(map(len, replicas))
        self._copies = torch.tensor([len(physical) for physical in replicas], device=device)
        padded = [[*physical, *physical[:1] * (most - len(physical))] for physical in replicas]
        self._physical = torch.tensor(padded, device=device)

    @property
    def held(self) -> tuple[int, ...]:
        """The experts of this rank's slots."""
        return self.placement.slots[self._exchange.index]

    def relocated(self, placement: ExpertPlacement) -> AllToAllDispatch:
        """The same exchange for experts that live elsewhere."""
        return AllToAllDispatch(self._exchange, placement, part=self._part, device=self._device, moves=self._moves)

    def regrouped(self, exchange: Exchange, placement: ExpertPlacement) -> AllToAllDispatch:
        """The same rank among others."""
        return AllToAllDispatch(exchange, placement, part=self._part, device=self._device, moves=self._moves)

    @property
    def kind(self) -> str:
        return f"all-to-all over {self._exchange.kind}"

    @property
    def neighbours(self) -> Neighbourhood | None:
        return self._host

    @property
    def _host(self) -> HostExchange | None:
        """The exchange, where it is one of ranks with tokens of their own on one host."""
        alone = self._part[1] == 1
        return self._exchange if alone and isinstance(self._exchange, HostExchange) else None

    def takes_shared(self, num_tokens: int) -> bool:
        return False

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, meanwhile: Meanwhile | None = None
    ) -> tuple[ExpertRows, AllToAllHandle]:
        size, slots = self._exchange.size, self._slots
        index, parts = self._part
        num_tokens = len(x_TD)
        own = slice(num_tokens * index // parts, num_tokens * (index + 1) // parts)
        if parts > 1:
            x_TD, routing = x_TD[own], Routing(routing.expert_ids[own], routing.weights[own])
        physical = self._place(routing.expert_ids, self._physical).flatten()
        order, counts = self._moves.group(physical, size * slots)
        counts = counts.view(size, slots)
        rows = self._moves.take(x_TD, order, routing.expert_ids.shape[1])
        rows, arrived = self._exchange.counted_rows(rows, counts, meanwhile)
        sent, received = counts.sum(dim=1).tolist(), arrived.sum(dim=1).tolist()
        # What arrives is sorted by (rank, slot); the experts want it by (slot, rank).
        arrival, per_slot = self._moves.merge(arrived)
        handle = AllToAllHandle(own, num_tokens, order, arrival, sent, received, routing.weights)
        return ExpertRows(self._moves.take(rows, arrival, 1), per_slot.tolist()[: self._ours]), handle

    def combine(self, y_RD: torch.Tensor, handle: AllToAllHandle) -> torch.Tensor:
        back = self._exchange.rows(self._moves.put(y_RD, handle.arrival), handle.received, handle.sent)
        ours = self._moves.weighted_sum(back, handle.order, handle.weights, handle.plain)
        if len(ours) == handle.num_tokens:
            return ours
        out = ours.new_zeros(handle.num_tokens, ours.shape[-1])
        out[handle.own] = ours
        return out

    def _place(self, expert_ids: torch.Tensor, physical: torch.Tensor) -> torch.Tensor:
        """Physical ids [T, K] of expert ids [T, K]; `physical` [experts, most copies]."""
        if physical.shape[1] == 1:
            return physical.take(expert_ids)
        turn = torch.arange(len(expert_ids), device=expert_ids.device).unsqueeze(1) + self._exchange.index
        return physical[expert_ids, turn % self._copies[expert_ids]]
