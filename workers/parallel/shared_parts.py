"""Expert dispatch between ranks of one host that read the shared experts once between them.

Each rank has the whole shared experts. But a step of few rows takes as long as reading weights, and each rank would
read them for its own tokens. So tokens go to every rank, behind those for its routed experts, and each rank computes
what some of the inner values give: as one expert more, whose outputs are summed with the others'. How many inner values
those are evens out that chosen experts are never equally many on all ranks. A rank with more tokens than that is good
for computes them alone, and still helps the others. See `all_to_all.py`; sums are rounded otherwise than there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scheduler.experts import ExpertPlacement
from workers.parallel.all_to_all import AllToAllDispatch, AllToAllHandle
from workers.parallel.dispatch import EveryonesRows, ExpertRows, Meanwhile, Routing
from workers.parallel.exchange import Exchange
from workers.parallel.moves import RowMoves

__all__ = ["SharedPartsDispatch", "SharedWork", "fill"]


@dataclass(frozen=True, slots=True)
class SharedWork:
    """What the shared experts of a layer are: `inner` values, cut at multiples of `step`, computed for at most `rows`
    tokens of all ranks. A routed expert has `expert_inner`.
    """

    rows: int
    inner: int
    step: int
    expert_inner: int


class SharedPartsDispatch(AllToAllDispatch):
    """`shared` is the same on every rank."""

    def __init__(
        self,
        shared: SharedWork,
        exchange: Exchange,
        placement: ExpertPlacement,
        *,
        device: torch.device | None = None,
        moves: RowMoves | None = None,
    ) -> None:
        super().__init__(exchange, placement, device=device, moves=moves)
        self._shared = shared
        size, slots = exchange.size, self._slots
        # Behind each rank's slots there is one for everyone's rows.
        self._wide = self._physical + self._physical // slots
        self._every = torch.arange(size).mul_(slots + 1).add_(slots)

    @classmethod
    def instead_of(cls, dispatch: AllToAllDispatch, shared: SharedWork) -> SharedPartsDispatch:
        """For the same ranks and placement."""
        return cls(shared, dispatch._exchange, dispatch.placement, device=dispatch._device, moves=dispatch._moves)

    def relocated(self, placement: ExpertPlacement) -> AllToAllDispatch:
        return self.regrouped(self._exchange, placement)

    def regrouped(self, exchange: Exchange, placement: ExpertPlacement) -> AllToAllDispatch:
        return SharedPartsDispatch(self._shared, exchange, placement, device=self._device, moves=self._moves)

    def takes_shared(self, num_tokens: int) -> bool:
        return num_tokens * self._exchange.size <= self._shared.rows and self.neighbours is not None

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, meanwhile: Meanwhile | None = None
    ) -> tuple[ExpertRows, AllToAllHandle]:
        ranks = self.neighbours
        if ranks is None:
            return super().dispatch(x_TD, routing, meanwhile)
        size, width, num_tokens = ranks.size, self._slots + 1, len(x_TD)
        places, weights = self._place(routing.expert_ids, self._wide), routing.weights
        if self.takes_shared(num_tokens):
            places = torch.cat((places, self._every.expand(num_tokens, size)), 1)
            weights = torch.cat((weights, weights.new_ones(num_tokens, size)), 1)
        order, counts = self._moves.group(places.flatten(), size * width)
        counts = counts.view(size, width)
        rows, told = ranks.surveyed_rows(self._moves.take(x_TD, order, places.shape[1]), counts, meanwhile)
        arrived = told[:, ranks.index].contiguous()
        arrival, per_slot = self._moves.merge(arrived)
        *routed, count = per_slot.tolist()
        every = EveryonesRows(count, *self._inner(told)) if count else None
        handle = AllToAllHandle(
            slice(0, num_tokens),
            num_tokens,
            order,
            arrival,
            counts.sum(dim=1).tolist(),
            arrived.sum(dim=1).tolist(),
            weights,
        )
        return ExpertRows(self._moves.take(rows, arrival, 1), routed[: self._ours], every=every), handle

    def _inner(self, told: torch.Tensor) -> tuple[int, int]:
        """This rank's inner values, by what all ranks have told; all of them come to the same."""
        shared, index = self._shared, self._exchange.index
        chosen = told.sum(dim=0)[:, :-1].count_nonzero(dim=1).tolist()
        # The last step may be a short one.
        steps = fill([count * shared.expert_inner // shared.step for count in chosen], -(-shared.inner // shared.step))
        before = sum(steps[:index])
        first, last = before * shared.step, (before + steps[index]) * shared.step
        return min(first, shared.inner), min(last, shared.inner)


def fill(loads: Sequence[int], more: int) -> list[int]:
    """Cuts `more` into parts that make the largest of the loads with their parts as small as can be."""
    order = sorted(range(len(loads)), key=lambda index: loads[index])
    filled, level, left = 1, loads[order[0]], more
    while filled < len(order) and (loads[order[filled]] - level) * filled <= left:  # those behind stand higher
        left -= (loads[order[filled]] - level) * filled
        level = loads[order[filled]]
        filled += 1
    each, rest = divmod(left, filled)
    parts = [0] * len(loads)
    for place, index in enumerate(order[:filled]):
        parts[index] = level - loads[index] + each + (place < rest)
    return parts
