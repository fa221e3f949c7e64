"""Grammars' masks on logits: one operation for all rows that have one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from workers.guided import Allowed

__all__ = ["allow_only"]


def allow_only(logits: torch.Tensor, allowed: Allowed) -> None:
    """Makes what may not come impossible, in place; `logits` [rows, vocab] fp32."""
    hidden = _hidden(allowed.bits, logits.shape[1], logits.device)
    if len(allowed.rows) == len(logits):
        logits.masked_fill_(hidden, -torch.inf)
    else:
        logits[allowed.rows] = logits[allowed.rows].masked_fill_(hidden, -torch.inf)


def _hidden(bits: NDArray[np.int32], vocab_size: int, device: torch.device) -> torch.Tensor:
    """[rows, vocab] of bool: the bits, spread and turned round."""
    if device.type == "cpu":
        spread = np.unpackbits(bits.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(spread).view(torch.bool).logical_not_()
    words = torch.from_numpy(bits).to(device)
    shifts = torch.arange(32, dtype=torch.int32, device=device)
    return ((words[:, :, None] >> shifts) & 1 == 0).flatten(1)[:, :vocab_size]
