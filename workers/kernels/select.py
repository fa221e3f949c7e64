"""Chooses the kernels for a device and a dtype, once, when a model is built."""

from __future__ import annotations

import torch

from workers.kernels.cpu import PackedKernels, can_pack
from workers.kernels.cuda import CudaKernels
from workers.kernels.deterministic import DeterministicKernels
from workers.kernels.native import NativeKernels, find_native
from workers.kernels.reference import ReferenceKernels
from workers.kernels.seam import Kernels

__all__ = ["select_kernels"]


def select_kernels(device: torch.device, dtype: torch.dtype, *, deterministic: bool = False) -> Kernels:
    """The fastest kernels that this machine runs; their `description` says which.

    With `deterministic`, those whose result for a token does not depend on what else is in the step.
    """
    fastest: Kernels = CudaKernels() if device.type == "cuda" else ReferenceKernels()
    if device.type == "cpu" and can_pack(dtype):
        fastest = PackedKernels()
        if dtype == torch.bfloat16 and not deterministic:
            native = find_native()
            fastest = PackedKernels("this package's own are not compiled") if native is None else NativeKernels(native)
    return DeterministicKernels(fastest) if deterministic else fastest
