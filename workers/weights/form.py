"""In which form a parameter is held: "none", in the model's dtype; "fp8", in the checkpoint's blocks; "int8"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import torch

from workers.model.parameters import Parameter
from workers.model.quantization import BlockQuantization
from workers.weights.scales import FP8

__all__ = ["Form", "form_of", "held_bytes"]


class Form(StrEnum):
    DENSE = "none"
    FP8 = "fp8"
    INT8 = "int8"


def form_of(parameter: Parameter, wanted: str, stored: Sequence[str]) -> Form:
    """`stored` are its pieces' dtypes. Only what the checkpoint has in FP8 can be kept in FP8."""
    if not parameter.quantizable or (wanted == Form.FP8 and any(dtype != FP8 for dtype in stored)):
        return Form.DENSE
    return Form(wanted)


def held_bytes(parameter: Parameter, form: Form, dtype: torch.dtype, blocks: BlockQuantization | None) -> int:
    """What the parameter takes in memory, scales included."""
    num_items = math.prod(parameter.shape)
    if form is Form.DENSE:
        return num_items * (torch.float32 if parameter.full_precision else dtype).itemsize
    num_scales = parameter.shape[0]
    if form is Form.FP8:
        columns = parameter.pieces[0].columns
        assert blocks is not None
        assert columns is not None
        num_scales *= (columns[1] - 1) // blocks.columns - columns[0] // blocks.columns + 1
    return num_items + num_scales * torch.float32.itemsize
