"""The way of rows to their experts by `routing.cpp`: a call each for what takes torch five to twenty operations."""

from __future__ import annotations

import ctypes
from array import array

import torch

from workers.model.moe_config import GateRule
from workers.parallel.dispatch import Routing
from workers.parallel.moves import Survey, weighted_sum

__all__ = ["NativeMoves", "NativeRouting"]

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_WORD = 8
_TYPES = {
    # ids, weights, logits, bias, rows, experts, groups, groups kept, top k, sigmoid, normalize, scale, threads
    "shoal_choose": (*(_POINTER,) * 4, *(_INT,) * 7, _FLOAT, _INT),
    "shoal_group": (*(_POINTER,) * 3, *(_INT,) * 2),
    "shoal_merge": (*(_POINTER,) * 3, *(_INT,) * 2),
    "shoal_take": (_POINTER, _POINTER, _INT, _POINTER, *(_INT,) * 4),
    "shoal_put": (*(_POINTER,) * 3, *(_INT,) * 3),
    # out, order, counts, x, x_row, places, tokens, top k, places there are, slots, width
    "shoal_spread": (*(_POINTER,) * 4, _INT, _POINTER, *(_INT,) * 5),
    "shoal_survey": (*(_POINTER,) * 5, *(_INT,) * 3),
    "shoal_weighted_sum": (*(_POINTER,) * 4, *(_INT,) * 6),
}


class NativeRouting:
    """The gate's choice; see `workers.model.gate.choose_experts`. Of equally good experts the lower ids are chosen."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        for name, types in _TYPES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
        self._choose = library.shoal_choose

    def choose(self, logits: torch.Tensor, rule: GateRule, correction_bias: torch.Tensor | None) -> Routing:
        logits = logits.float().contiguous()
        bias = None if correction_bias is None else correction_bias.float().contiguous()
        rows = len(logits)
        ids = torch.empty(rows, rule.top_k, dtype=torch.int64)
        weights = torch.empty(rows, rule.top_k)
        self._choose(
            ids.data_ptr(),
            weights.data_ptr(),
            logits.data_ptr(),
            None if bias is None else bias.data_ptr(),
            rows,
            rule.num_experts,
            rule.num_groups,
            rule.groups_kept,
            rule.top_k,
            rule.sigmoid,
            rule.normalize,
            rule.scale,
            torch.get_num_threads(),
        )
        return Routing(ids, weights)


class NativeMoves:
    """See `RowMoves`; for tensors on the CPU."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        self._group, self._merge = library.shoal_group, library.shoal_merge
        self._take, self._put = library.shoal_take, library.shoal_put
        self._weighted_sum = library.shoal_weighted_sum
        self._spread, self._survey = library.shoal_spread, library.shoal_survey

    def group(self, slots: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        slots = slots.contiguous()
        order, counts = torch.empty_like(slots), slots.new_empty(num_slots)
        self._group(order.data_ptr(), counts.data_ptr(), slots.data_ptr(), len(slots), num_slots)
        return order, counts

    def merge(self, arrived: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        arrived = arrived.contiguous()
        ranks, slots = arrived.shape
        order, counts = arrived.new_empty(int(arrived.sum())), arrived.new_empty(slots)
        self._merge(order.data_ptr(), counts.data_ptr(), arrived.data_ptr(), ranks, slots)
        return order, counts

    def take(self, x: torch.Tensor, order: torch.Tensor, shared: int) -> torch.Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        rows, width = len(order), x.shape[1]
        out = x.new_empty(rows, width)
        size = x.itemsize
        self._take(
            out.data_ptr(),
            x.data_ptr(),
            x.stride(0) * size,
            order.data_ptr(),
            shared,
            rows,
            width * size,
            torch.get_num_threads(),
        )
        return out

    def put(self, y: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        y = y.contiguous()
        out = torch.empty_like(y)
        rows, width = y.shape
        self._put(out.data_ptr(), y.data_ptr(), places.data_ptr(), rows, width * y.itemsize, torch.get_num_threads())
        return out

    def spread(
        self, x: torch.Tensor, places_TK: torch.Tensor, num_places: int, slots: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if x.stride(1) != 1:
            x = x.contiguous()
        places = places_TK.contiguous()
        tokens, top_k = places.shape
        rows, width = tokens * (top_k + (num_places // slots if slots else 0)), x.shape[1]
        out, order, counts = x.new_empty(rows, width), places.new_empty(rows), places.new_empty(num_places)
        size = x.itemsize
        self._spread(
            out.data_ptr(),
            order.data_ptr(),
            counts.data_ptr(),
            x.data_ptr(),
            x.stride(0) * size,
            places.data_ptr(),
            tokens,
            top_k,
            num_places,
            slots,
            width * size,
        )
        return out, order, counts

    def survey(self, told: torch.Tensor, index: int) -> Survey:
        told = told.contiguous()
        ranks, _, slots = told.shape
        numbers = array("q", bytes((slots + 3 * ranks) * _WORD))
        at = numbers.buffer_info()[0]
        sent_at = at + slots * _WORD
        ends = [sent_at + rank * _WORD for rank in (0, ranks, 2 * ranks)]
        self._survey(at, *ends, told.data_ptr(), index, ranks, slots)
        found = numbers.tolist()
        sums = found[slots:]
        return Survey(found[:slots], sums[:ranks], sums[ranks : 2 * ranks], sums[2 * ranks :])

    def weighted_sum(
        self, y_RD: torch.Tensor, order: torch.Tensor, weights_TK: torch.Tensor, plain: int = 0
    ) -> torch.Tensor:
        if y_RD.dtype != torch.bfloat16:
            return weighted_sum(y_RD, order, weights_TK, plain)
        y, weights = y_RD.contiguous(), weights_TK.contiguous()
        (tokens, top_k), (rows, width) = weights.shape, y.shape
        out = y.new_empty(tokens, width)
        self._weighted_sum(
            out.data_ptr(),
            y.data_ptr(),
            order.data_ptr(),
            weights.data_ptr(),
            rows,
            tokens,
            top_k,
            plain,
            width,
            torch.get_num_threads(),
        )
        return out
