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
        # Behind each rank's slots there is one for everyone's rows.
        self._wide = self._physical + self._physical // self._slots

    @classmethod
    def instead_of(cls, dispatch: AllToAllDispatch, shared: SharedWork) -> SharedPartsDispatch:
        """For the same ranks and placement."""
        return cls(shared, dispatch._exchange, dispatch.placement, device=dispatch._device, moves=dispatch._moves)

    def relocated(self, placement: ExpertPlacement) -> AllToAllDispatch:
        return self.regrouped(self._exchange, placement)

    def regrouped(self, exchange: Exchange, placement: ExpertPlacement) -> AllToAllDispatch:
        return SharedPartsDispatch(self._shared, exchange, placement, device=self._device, moves=self._moves)

    def takes_shared(self, num_tokens: int) -> bool:
        return num_tokens * self._exchange.size <= self._shared.rows and self._host is not None

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, meanwhile: Meanwhile | None = None
    ) -> tuple[ExpertRows, AllToAllHandle]:
        ranks = self._host
        if ranks is None:
            return super().dispatch(x_TD, routing, meanwhile)
        size, width, num_tokens = ranks.size, self._slots + 1, len(x_TD)
        together = self.takes_shared(num_tokens)
        places = self._place(routing.expert_ids, self._wide)
        rows, order, counts = self._moves.spread(x_TD, places, size * width, width if together else 0)
        rows, told = ranks.surveyed_rows(rows, counts.view(size, width), meanwhile)
        arrival, _ = self._moves.merge(told[:, ranks.index])
        survey = self._moves.survey(told, ranks.index)
        *routed, every = survey.per_slot
        handle = AllToAllHandle(
            slice(0, num_tokens),
            num_tokens,
            order,
            arrival,
            survey.sent,
            survey.received,
            routing.weights,
            plain=size if together else 0,
        )
        part = EveryonesRows(every, *self._inner(survey.chosen)) if every else None
        return ExpertRows(self._moves.take(rows, arrival, 1), routed[: self._ours], every=part), handle

    def _inner(self, chosen: Sequence[int]) -> tuple[int, int]:
        """This rank's inner values, by how many experts are chosen on each; all ranks come to the same."""
        shared, index = self._shared, self._exchange.index
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
