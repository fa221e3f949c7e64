"""This package's own kernels for CPUs (`native.cpp`), where they have been compiled.

They take the place of small operations whose torch versions cost more in calls, copies and barriers than in
arithmetic; matrix products stay oneDNN's but for few rows (`few_rows.py`). Everything else falls back on
`PackedKernels`.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from functools import cache

import torch

from workers.cache import LayerCache
from workers.kernels.build import library_path
from workers.kernels.cpu import PackedKernels
from workers.kernels.few_rows import FewRows
from workers.kernels.latent import HeadProjections
from workers.kernels.quantized import Weight
from workers.kernels.routing import NativeMoves, NativeRouting
from workers.kernels.seam import GatedLinear, Linear, MLPPart, Norm, PartialLinear, PartLimits
from workers.model.moe_config import GateRule
from workers.parallel.dispatch import Routing
from workers.step import DecodeGroup

__all__ = ["NativeKernels", "find_native"]

log = logging.getLogger(__name__)

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
# out, q, q_row, cache, cache_row, block_ids, blocks_per_sequence, lengths, block_size, sequences, kv_heads, group,
# width, scale, threads
_ATTEND = (_POINTER, _POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER, *(_INT,) * 5, _FLOAT, _INT)
_RMS_NORM = (_POINTER, _POINTER, _INT, _POINTER, _INT, _INT, _FLOAT, _INT)
# out, logits, x, x_row, weight, rows, vocabulary, width, candidates, threads
_REFINE = (_POINTER, _POINTER, _POINTER, _INT, _POINTER, *(_INT,) * 5)
_ROTATE = (_POINTER, _INT, _INT, _POINTER, _POINTER, _INT, _INT, _INT, _INT)


@cache
def find_native() -> ctypes.PyDLL | None:
    """The compiled kernels; None, and a line in the log, where there are none that work."""
    path = library_path()
    if not path.is_file():
        log.warning("kernels: %s is missing, torch's operations serve; `python -m workers.kernels.build`", path)
        return None
    try:
        # PyDLL: a call is too short to hand the interpreter to another thread and to wait for it afterwards.
        library = ctypes.PyDLL(str(path))
    except OSError as error:
        log.warning("kernels: torch's operations serve: %s", error)
        return None
    for name, types in (
        ("shoal_attend_paged", _ATTEND),
        ("shoal_rms_norm", _RMS_NORM),
        ("shoal_rms_norm_wide", _RMS_NORM),
        ("shoal_rotate", _ROTATE),
        ("shoal_refine", _REFINE),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    library.shoal_attends.argtypes, library.shoal_attends.restype = (_INT,), ctypes.c_bool
    return library


class _Norm:
    __slots__ = ("_dtype", "_epsilon", "_narrow", "_weight", "_wide", "_width")

    def __init__(self, library: ctypes.PyDLL, weight: torch.Tensor, epsilon: float) -> None:
        self._dtype = weight.dtype
        self._narrow, self._wide = library.shoal_rms_norm, library.shoal_rms_norm_wide
        self._weight = weight.float().contiguous()
        self._width = len(weight)
        self._epsilon = epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=self._dtype)
        if x.dim() != 2 or x.stride(1) != 1:
            x = x.reshape(-1, self._width).contiguous()
        norm = self._narrow if x.dtype == self._dtype else self._wide
        norm(
            out.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            self._weight.data_ptr(),
            len(x),
            self._width,
            self._epsilon,
            torch.get_num_threads(),
        )
        return out


class NativeKernels(PackedKernels):
    """See `Kernels`. For bf16 on a CPU, where `library` was found."""

    description = "oneDNN packed weights, own attention, norms, routing and few rows"

    def __init__(self, library: ctypes.PyDLL) -> None:
        super().__init__()
        self._library = library
        self._few_rows = FewRows(library_path())
        self._head_projections = HeadProjections(library_path())
        self._routing = NativeRouting(library)
        self.moves = NativeMoves(library)

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        return self._few_rows.linear(weight, bias) or super().linear(weight, bias)

    def gated_linear(self, weight: Weight, bias: torch.Tensor | None) -> GatedLinear:
        return self._few_rows.gated_linear(weight, bias) or super().gated_linear(weight, bias)

    def in_parts(self, linear: Linear) -> PartialLinear | None:
        return self._few_rows.in_parts(linear)

    def few_rows_experts(
        self,
        experts: Sequence[tuple[GatedLinear, Linear]],
        x: torch.Tensor,
        counts: Sequence[int],
        part: MLPPart | None = None,
    ) -> torch.Tensor | None:
        return self._few_rows.experts(experts, x, counts, part)

    def mlp_parts(self, gated: GatedLinear, down: Linear) -> PartLimits | None:
        return self._few_rows.mlp_parts(gated, down)

    def choose_experts(
        self, logits: torch.Tensor, rule: GateRule, correction_bias: torch.Tensor | None = None
    ) -> Routing:
        return self._routing.choose(logits, rule, correction_bias)

    def rms_norm(self, weight: torch.Tensor, epsilon: float) -> Norm:
        return _Norm(self._library, weight, epsilon)

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        rows, heads, width = x.shape
        self._library.shoal_rotate(
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            cos.data_ptr(),
            sin.data_ptr(),
            rows,
            heads,
            width,
            torch.get_num_threads(),
        )

    def refine(self, logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, candidates: int) -> torch.Tensor:
        if not (logits.dtype == x.dtype == weight.dtype == torch.bfloat16):
            return super().refine(logits, x, weight, candidates)
        rows, vocabulary = logits.shape
        logits, weight = logits.contiguous(), weight.contiguous()
        refined = torch.empty(rows, vocabulary, dtype=torch.float32)
        self._library.shoal_refine(
            refined.data_ptr(),
            logits.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            rows,
            vocabulary,
            x.shape[1],
            candidates,
            torch.get_num_threads(),
        )
        return refined

    def per_head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        found = self._head_projections(x, weight)
        return super().per_head(x, weight) if found is None else found

    def ragged(self, width: int) -> bool:
        return bool(self._library.shoal_attends(width))

    def attend_cached(
        self, q: torch.Tensor, cache: LayerCache, group: DecodeGroup, kv_heads: int, width: int
    ) -> torch.Tensor:
        if not self.ragged(width):
            return super().attend_cached(q, cache, group, kv_heads, width)
        sequences, wide = q.shape
        out = torch.empty(sequences, wide, dtype=q.dtype)
        self._library.shoal_attend_paged(
            out.data_ptr(),
            q.data_ptr(),
            q.stride(0),
            cache.slots.data_ptr(),
            cache.slots.shape[1],
            group.block_ids.data_ptr(),
            len(group.block_ids) // sequences,
            group.lengths.data_ptr(),
            cache.block_size,
            sequences,
            kv_heads,
            wide // width // kv_heads,
            width,
            1.0 / math.sqrt(width),
            torch.get_num_threads(),
        )
        return out
