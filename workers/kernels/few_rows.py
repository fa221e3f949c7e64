"""Matrix products of up to eight rows (`few_rows.cpp`), on the same packed weights as oneDNN's.

A token's time is that of reading the weights, and oneDNN reads them at two thirds of what memory gives. Nothing is
held twice: these read oneDNN's own blocks. How those lie is nobody's promise, so the first layer of each shape is
computed both ways when it is built, and where the results differ that shape stays oneDNN's.
"""

from __future__ import annotations

import ctypes
import logging
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

import torch

from workers.kernels.cpu import PackedGatedLinear, PackedLinear
from workers.kernels.quantized import Weight
from workers.kernels.seam import GatedLinear, Linear, PartialLinear

__all__ = ["FewRows"]

log = logging.getLogger(__name__)

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_LINEAR = (_POINTER, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT)
_GATED = (_POINTER, _POINTER, _INT, _POINTER, _POINTER, _INT, _INT, _INT, _INT)
_EXPERTS = (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT)
_BLOCK = 32
# A call that reads more than this lets other threads have the interpreter meanwhile; for a shorter one that, and the
# wait for it afterwards, would take longer than the call.
_LONG_BYTES = 2 << 20


class FewRows:
    """The library's products; layers that they are not for are None."""

    def __init__(self, library: Path) -> None:
        self._short, self._long = _Calls(ctypes.PyDLL(str(library))), _Calls(ctypes.CDLL(str(library)))
        self.most = self._short.most
        self._fits: dict[tuple[int, ...], bool] = {}

    def calls(self, size_bytes: int) -> _Calls:
        """For a call that reads so much."""
        return self._long if size_bytes > _LONG_BYTES else self._short

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear | None:
        if not self._may(weight):
            return None
        layer = _FewRowsLinear(self, weight, bias)
        return layer if self._check(tuple(weight.shape), layer) else None

    def gated_linear(self, weight: Weight, bias: torch.Tensor | None) -> GatedLinear | None:
        if bias is not None or not self._may(weight) or len(weight) % (2 * _BLOCK):
            return None
        layer = _FewRowsGatedLinear(self, weight)
        return layer if self._check((2, *weight.shape), layer) else None

    def in_parts(self, linear: Linear) -> PartialLinear | None:
        """See `Kernels.in_parts`."""
        return _FewRowsParts(self, linear) if isinstance(linear, _FewRowsLinear) and linear.bare else None

    def experts(
        self, experts: Sequence[tuple[GatedLinear, Linear]], x: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor | None:
        """See `Kernels.few_rows_experts`."""
        if max(counts) > self.most:
            return None
        table = array("q")
        first = inner = hidden = 0
        for (gated, down), count in zip(experts, counts, strict=True):
            if not isinstance(gated, _FewRowsGatedLinear) or not isinstance(down, _FewRowsLinear):
                return None
            table.extend((first, count, gated.gate_address, gated.up_address, down.address))
            first, inner, hidden = first + count, gated.outputs, gated.inputs
        x = x.contiguous()
        out, scratch = torch.empty_like(x), x.new_empty(len(x), inner)
        self.calls(len(experts) * 3 * inner * hidden * x.itemsize).experts(
            out.data_ptr(),
            x.data_ptr(),
            scratch.data_ptr(),
            table.buffer_info()[0],
            len(experts),
            hidden,
            inner,
            torch.get_num_threads(),
        )
        return out

    def _may(self, weight: Weight) -> TypeGuard[torch.Tensor]:
        if not isinstance(weight, torch.Tensor) or not self.most or not hasattr(torch.ops.mkldnn, "data_ptr"):
            return False
        return not any(size % _BLOCK for size in weight.shape)

    def _check(self, shape: tuple[int, ...], layer: _FewRowsLinear | _FewRowsGatedLinear) -> bool:
        if shape not in self._fits:
            x = torch.randn(2, shape[-1], generator=torch.Generator().manual_seed(0)).bfloat16()
            ours, theirs = layer(x).float(), layer.by_onednn(x).float()
            self._fits[shape] = bool((ours - theirs).abs().max() <= 0.02 * theirs.abs().max() + 1e-6)
            if not self._fits[shape]:
                log.warning("kernels: oneDNN serves few rows, too: its blocks for %s are not as expected", shape)
        return self._fits[shape]


class _Calls:
    def __init__(self, library: ctypes.CDLL) -> None:
        library.shoal_most_few_rows.restype = _INT
        self.most: int = library.shoal_most_few_rows()
        self.linear, self.gated, self.experts = library.shoal_linear, library.shoal_gated, library.shoal_experts
        for function, types in ((self.linear, _LINEAR), (self.gated, _GATED), (self.experts, _EXPERTS)):
            function.argtypes, function.restype = types, None


class _FewRowsLinear(PackedLinear):
    __slots__ = ("_call", "_inputs", "_most", "_outputs", "address")

    def __init__(self, few_rows: FewRows, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self._outputs, self._inputs = weight.shape
        self._most = few_rows.most
        self._call = few_rows.calls(weight.nbytes).linear
        self.address = int(torch.ops.mkldnn.data_ptr(self.packed))

    @property
    def bare(self) -> bool:
        """Whether it has no bias."""
        return self._bias is None

    @property
    def inputs(self) -> int:
        return self._inputs

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._few(x, None) if len(x) <= self._most else super().__call__(x)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if len(x) > self._most:
            return super().plus(x, residual)
        return self._few(x, residual.contiguous())

    def by_onednn(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x)

    def _few(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        out = x.new_empty(len(x), self._outputs)
        self._call(
            out.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            self.address,
            None if self._bias is None else self._bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            len(x),
            self._outputs,
            self._inputs,
            torch.get_num_threads(),
        )
        return out


class _FewRowsParts:
    """See `PartialLinear`: the outputs' blocks lie one after the other."""

    step = _BLOCK

    def __init__(self, few_rows: FewRows, linear: _FewRowsLinear) -> None:
        self.most = few_rows.most
        self._linear = linear
        self._call = few_rows.calls(linear.packed.nbytes).linear

    def __call__(self, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        x = x.contiguous()
        inputs = self._linear.inputs
        out = x.new_empty(len(x), last - first)
        self._call(
            out.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            self._linear.address + first * inputs * x.itemsize,
            None,
            None,
            len(x),
            last - first,
            inputs,
            torch.get_num_threads(),
        )
        return out


class _FewRowsGatedLinear(PackedGatedLinear):
    __slots__ = ("_call", "_most", "gate_address", "inputs", "outputs", "up_address")

    def __init__(self, few_rows: FewRows, weight: torch.Tensor) -> None:
        super().__init__(weight, None)
        self.outputs, self.inputs = len(weight) // 2, weight.shape[1]
        self._most = few_rows.most
        self._call = few_rows.calls(weight.nbytes).gated
        self.gate_address, self.up_address = (
            int(torch.ops.mkldnn.data_ptr(part.packed)) for part in (self._gate, self._up)
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self._most:
            return super().__call__(x)
        if x.stride(1) != 1:
            x = x.contiguous()
        out = x.new_empty(len(x), self.outputs)
        self._call(
            out.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            self.gate_address,
            self.up_address,
            len(x),
            self.outputs,
            self.inputs,
            torch.get_num_threads(),
        )
        return out

    def by_onednn(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x)
