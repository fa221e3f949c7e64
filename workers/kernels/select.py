"""Chooses the kernels for a device and a dtype, once, when a model is built."""

from __future__ import annotations

import torch

from workers.kernels.cpu import PackedKernels, can_pack
from workers.kernels.reference import ReferenceKernels
from workers.kernels.seam import Kernels

__all__ = ["select_kernels"]


def select_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels that this machine runs; their `description` says which."""
    if device.type == "cpu" and can_pack(dtype):
        return PackedKernels()
    return ReferenceKernels()
