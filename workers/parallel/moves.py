"""How rows are put in their experts' order and summed at home again, in plain torch.

Kernels may have faster forms of the same (`Kernels.moves`): a decode step moves a few rows eleven times and more, and
then calls cost more than the rows. Shape suffixes are those of `dispatch.py`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

__all__ = ["RowMoves", "Survey", "TorchMoves", "group_by_expert", "weighted_sum"]

# Elements that are summed at a time on a CPU, so that in fp32 they stay in its cache.
_CACHED = 1 << 18


class Survey(NamedTuple):
    """What all ranks send, as one of them sees it."""

    per_slot: list[int]  # rows that come for each of its slots
    sent: list[int]  # rows that it sends to each rank
    received: list[int]  # and gets from each
    chosen: list[int]  # of each rank's slots but the last, those that rows go to


class RowMoves(Protocol):
    def group(self, slots: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The stable order that sorts `slots` [N], and the number of entries of each slot [num_slots]."""
        ...

    def merge(self, arrived: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The order that puts rows sorted by (rank, slot) by (slot, rank), and the number of each slot's.

        `arrived` [ranks, slots] counts them.
        """
        ...

    def take(self, x: torch.Tensor, order: torch.Tensor, shared: int) -> torch.Tensor:
        """Row `order[r] // shared` of x for each r."""
        ...

    def put(self, y: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Row r of y at `places[r]`, which are all places there are."""
        ...

    def spread(
        self, x: torch.Tensor, places_TK: torch.Tensor, num_places: int, slots: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows of x [T, D] once for each of their choices, sorted by where they go; their order, as `group` gives
        it for the flat (token, choice); and how many go to each place.

        Choices are `places_TK` and, unless `slots` is 0, the last of every `slots` places.
        """
        ...

    def survey(self, told: torch.Tensor, index: int) -> Survey:
        """Of `told` [ranks, ranks, slots], the rows that each rank sends to each for each slot, for rank `index`."""
        ...

    def weighted_sum(
        self, y_RD: torch.Tensor, order: torch.Tensor, weights_TK: torch.Tensor, plain: int = 0
    ) -> torch.Tensor:
        """`sum_k weights[t, k] * y[row of (t, k)]` in fp32, left to right over k, in the dtype of `y` [T, D].

        `order[r]` is the flat (t, k) of row r; a choice without a row counts as zeros. Behind the K choices follow
        `plain` ones, of weight one.
        """
        ...


class TorchMoves:
    """See `RowMoves`."""

    def group(self, slots: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        return group_by_expert(slots, num_slots)

    def merge(self, arrived: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ranks, slots = arrived.shape
        slot_of_row = torch.arange(slots, device=arrived.device).repeat(ranks).repeat_interleave(arrived.flatten())
        return group_by_expert(slot_of_row, slots)

    def take(self, x: torch.Tensor, order: torch.Tensor, shared: int) -> torch.Tensor:
        return x.index_select(0, order if shared == 1 else order // shared)

    def put(self, y: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(y).index_copy_(0, places, y)

    def spread(
        self, x: torch.Tensor, places_TK: torch.Tensor, num_places: int, slots: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if slots:
            last = torch.arange(slots - 1, num_places, slots, device=x.device)
            places_TK = torch.cat((places_TK, last.expand(len(x), -1)), 1)
        order, counts = self.group(places_TK.flatten(), num_places)
        return self.take(x, order, places_TK.shape[1]), order, counts

    def survey(self, told: torch.Tensor, index: int) -> Survey:
        return Survey(
            told[:, index].sum(dim=0).tolist(),
            told[index].sum(dim=1).tolist(),
            told[:, index].sum(dim=1).tolist(),
            told.sum(dim=0)[:, :-1].count_nonzero(dim=1).tolist(),
        )

    def weighted_sum(
        self, y_RD: torch.Tensor, order: torch.Tensor, weights_TK: torch.Tensor, plain: int = 0
    ) -> torch.Tensor:
        return weighted_sum(y_RD, order, weights_TK, plain)


def group_by_expert(slots: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The stable order that sorts `slots` [N], and the number of entries of each slot [num_slots]."""
    order = slots.argsort(stable=True)
    return order, torch.bincount(slots, minlength=num_slots)


def weighted_sum(y_RD: torch.Tensor, order: torch.Tensor, weights_TK: torch.Tensor, plain: int = 0) -> torch.Tensor:
    """`sum_k weights[t, k] * y[row of (t, k)]` in fp32, left to right over k, in the dtype of `y` [T, D].

    `order[r]` is the flat (t, k) of row r; a choice without a row counts as zeros; `plain` choices of weight one follow
    the K. A library's reduction may split the
    sum in a way that depends on the shape; this one never does.
    """
    if plain:
        weights_TK = torch.cat((weights_TK, weights_TK.new_ones(len(weights_TK), plain)), 1)
    (num_tokens, top_k), width = weights_TK.shape, y_RD.shape[1]
    row_of = order.new_full((num_tokens * top_k,), len(order))
    row_of.scatter_(0, order, torch.arange(len(order), device=order.device))
    if len(order) < num_tokens * top_k:
        y_RD = torch.cat((y_RD, y_RD.new_zeros(1, width)))
    step = max(1, _CACHED // (top_k * width) if y_RD.device.type == "cpu" else num_tokens)
    if num_tokens <= step:
        return _sum_tile(y_RD, row_of, weights_TK).to(y_RD.dtype)
    out = y_RD.new_empty(num_tokens, width)
    for start in range(0, num_tokens, step):
        rows = row_of[start * top_k : (start + step) * top_k]
        out[start : start + step] = _sum_tile(y_RD, rows, weights_TK[start : start + step])
    return out


def _sum_tile(y_RD: torch.Tensor, row_of: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    top_k = weights_TK.shape[1]
    y = y_RD.index_select(0, row_of).float().view(-1, top_k, y_RD.shape[1])
    weights = weights_TK.unsqueeze(-1)
    total = y[:, 0] * weights[:, 0]
    for k in range(1, top_k):
        total.addcmul_(y[:, k], weights[:, k])
    return total
