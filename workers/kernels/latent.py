"""The heads' own projections around latent attention by this package's own kernel (`latent.cpp`), in bf16 on a CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

__all__ = ["HeadProjections"]

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
# out, x, x_row, x_head, weight, rows, heads, inputs, outputs, transposed, threads
_PER_HEAD = (_POINTER, _POINTER, _INT, _INT, _POINTER, *(_INT,) * 4, ctypes.c_bool, _INT)
_FEW_ROWS = 2  # more are worth torch's product (README.md)


class HeadProjections:
    """By the compiled library at `path`."""

    __slots__ = ("_function",)

    def __init__(self, path: Path) -> None:
        self._function = ctypes.PyDLL(str(path)).shoal_per_head
        self._function.argtypes, self._function.restype = _PER_HEAD, None

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """See `Kernels.per_head`; None for more rows than it is good for, or another layout."""
        rows, heads, inputs = x.shape
        transposed = weight.transpose(1, 2).is_contiguous()
        if rows > _FEW_ROWS or x.stride(2) != 1 or not (transposed or weight.is_contiguous()):
            return None
        outputs = weight.shape[2]
        out = torch.empty(rows, heads, outputs, dtype=x.dtype)
        self._function(
            out.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            weight.data_ptr(),
            rows,
            heads,
            inputs,
            outputs,
            transposed,
            torch.get_num_threads(),
        )
        return out
