"""Matrix products of few rows (`few_rows.cpp`), on the same packed weights as oneDNN's.

A token's time is that of reading the weights, and oneDNN reads them at two thirds of what memory gives. Nothing is
held twice: these read oneDNN's own blocks. How those lie is nobody's promise, and they are wider on some processors. So
the first layer of each shape is computed both ways when it is built, and where the results differ that shape stays
oneDNN's.
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
from workers.kernels.seam import GatedLinear, Linear, MLPPart, PartialLinear, PartLimits

__all__ = ["FewRows"]

log = logging.getLogger(__name__)

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_LINEAR = (_POINTER, _POINTER, _INT, _POINTER, _POINTER, _POINTER, *(_INT,) * 5)
_GATED = (_POINTER, _POINTER, _INT, _POINTER, _POINTER, *(_INT,) * 5)
_EXPERTS = (*(_POINTER,) * 4, *(_INT,) * 5)
_MULTIPLE = 32  # what every size is of
_UNITS = (32, 64)  # outputs of a block
_EXPERT_WORDS = 7
# A call that reads more than this lets other threads have the interpreter meanwhile; for a shorter one that, and the
# wait for it afterwards, would take longer than the call.
_LONG_BYTES = 2 << 20


class FewRows:
    """The library's products; layers that they are not for are None."""

    def __init__(self, library: Path) -> None:
        self._short, self._long = _Calls(ctypes.PyDLL(str(library))), _Calls(ctypes.CDLL(str(library)))
        self.most, self.most_in_parts = self._short.most, self._short.most_in_parts
        self._fits: dict[tuple[int, ...], bool] = {}
        self.unit = self._find_unit() if self.most else _UNITS[0]

    def calls(self, size_bytes: int) -> _Calls:
        """For a call that reads so much."""
        return self._long if size_bytes > _LONG_BYTES else self._short

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear | None:
        if not self._may(weight):
            return None
        layer = _FewRowsLinear(self, weight, bias)
        return layer if self._check(tuple(weight.shape), layer) else None

    def gated_linear(self, weight: Weight, bias: torch.Tensor | None) -> GatedLinear | None:
        if bias is not None or not self._may(weight) or len(weight) % (2 * _MULTIPLE):
            return None
        layer = _FewRowsGatedLinear(self, weight)
        return layer if self._check((2, *weight.shape), layer) else None

    def in_parts(self, linear: Linear) -> PartialLinear | None:
        """See `Kernels.in_parts`."""
        return _FewRowsParts(self, linear) if isinstance(linear, _FewRowsLinear) and linear.bare else None

    def mlp_parts(self, gated: GatedLinear, down: Linear) -> PartLimits | None:
        """See `Kernels.mlp_parts`."""
        if not isinstance(gated, _FewRowsGatedLinear) or not isinstance(down, _FewRowsLinear) or not down.bare:
            return None
        return PartLimits(self.most_in_parts, gated.outputs, self.unit)

    def experts(
        self,
        experts: Sequence[tuple[GatedLinear, Linear]],
        x: torch.Tensor,
        counts: Sequence[int],
        part: MLPPart | None = None,
    ) -> torch.Tensor | None:
        """See `Kernels.few_rows_experts`."""
        if counts and max(counts) > self.most:
            return None
        table = array("q")
        first = most = inner = 0
        for (gated, down), count in zip(experts, counts, strict=True):
            if not isinstance(gated, _FewRowsGatedLinear) or not isinstance(down, _FewRowsLinear):
                return None
            width = gated.outputs
            table.extend((first, count, gated.gate_address, gated.up_address, down.address, width, width))
            first, inner, most = first + count, inner + width, max(most, width)
        if part is not None:
            width = part.last - part.first
            table.extend((first, part.rows, *_part_words(part, self.unit * x.itemsize)))
            inner, most = inner + width, max(most, width)
        x = x.contiguous()
        hidden = x.shape[1]
        out, scratch = torch.empty_like(x), x.new_empty(len(x), most)
        self.calls(3 * inner * hidden * x.itemsize).experts(
            out.data_ptr(),
            x.data_ptr(),
            scratch.data_ptr(),
            table.buffer_info()[0],
            len(table) // _EXPERT_WORDS,
            hidden,
            most,
            self.unit,
            torch.get_num_threads(),
        )
        return out

    def _find_unit(self) -> int:
        weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        if self._may(weight):
            for self.unit in _UNITS:
                if self._agree(weight.shape[1], _FewRowsLinear(self, weight, None)):
                    return self.unit
        return _UNITS[0]  # which the check of each shape will find wrong

    def _may(self, weight: Weight) -> TypeGuard[torch.Tensor]:
        if not isinstance(weight, torch.Tensor) or not self.most or not hasattr(torch.ops.mkldnn, "data_ptr"):
            return False
        return not any(size % _MULTIPLE for size in weight.shape)

    def _check(self, shape: tuple[int, ...], layer: _FewRowsLinear | _FewRowsGatedLinear) -> bool:
        if shape not in self._fits:
            self._fits[shape] = self._agree(shape[-1], layer)
            if not self._fits[shape]:
                log.warning("kernels: oneDNN serves few rows, too: its blocks for %s are not as expected", shape)
        return self._fits[shape]

    def _agree(self, inputs: int, layer: _FewRowsLinear | _FewRowsGatedLinear) -> bool:
        x = torch.randn(2, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
        ours, theirs = layer(x).float(), layer.by_onednn(x).float()
        return bool((ours - theirs).abs().max() <= 0.02 * theirs.abs().max() + 1e-6)


class _Calls:
    def __init__(self, library: ctypes.CDLL) -> None:
        library.shoal_most_few_rows.restype = _INT
        library.shoal_most_part_rows.restype = _INT
        self.most: int = library.shoal_most_few_rows()
        self.most_in_parts: int = library.shoal_most_part_rows()
        self.linear, self.gated, self.experts = library.shoal_linear, library.shoal_gated, library.shoal_experts
        for function, types in ((self.linear, _LINEAR), (self.gated, _GATED), (self.experts, _EXPERTS)):
            function.argtypes, function.restype = types, None


class _FewRowsLinear(PackedLinear):
    __slots__ = ("_call", "_few_rows", "_inputs", "_outputs", "address")

    def __init__(self, few_rows: FewRows, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self._outputs, self._inputs = weight.shape
        self._few_rows = few_rows
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
        return self._few(x, None) if len(x) <= self._few_rows.most else super().__call__(x)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if len(x) > self._few_rows.most:
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
            self._few_rows.unit,
            torch.get_num_threads(),
        )
        return out


class _FewRowsParts:
    """See `PartialLinear`: the outputs' blocks lie one after the other."""

    def __init__(self, few_rows: FewRows, linear: _FewRowsLinear) -> None:
        self.most, self.step = few_rows.most_in_parts, few_rows.unit
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
            self.step,
            torch.get_num_threads(),
        )
        return out


class _FewRowsGatedLinear(PackedGatedLinear):
    __slots__ = ("_call", "_few_rows", "gate_address", "inputs", "outputs", "up_address")

    def __init__(self, few_rows: FewRows, weight: torch.Tensor) -> None:
        super().__init__(weight, None)
        self.outputs, self.inputs = len(weight) // 2, weight.shape[1]
        self._few_rows = few_rows
        self._call = few_rows.calls(weight.nbytes).gated
        self.gate_address, self.up_address = (
            int(torch.ops.mkldnn.data_ptr(part.packed)) for part in (self._gate, self._up)
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self._few_rows.most:
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
            self._few_rows.unit,
            torch.get_num_threads(),
        )
        return out

    def by_onednn(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x)


def _part_words(part: MLPPart, output_bytes: int) -> tuple[int, ...]:
    """Where the part's weights begin, how many inner values it has, and how many there are. Blocks of outputs lie one
    after the other, and in a block its inputs do, `output_bytes` each."""
    gated, down, first, last, _ = part
    assert isinstance(gated, _FewRowsGatedLinear)
    assert isinstance(down, _FewRowsLinear)
    before = first * gated.inputs * torch.bfloat16.itemsize
    address = down.address + first * output_bytes
    return gated.gate_address + before, gated.up_address + before, address, last - first, gated.outputs
