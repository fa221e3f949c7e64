"""Latent attention of decoding sequences by FlashMLA (deepseek-ai/FlashMLA), where it is installed. Not run on a GPU.

Its dense decoding kernel takes what DeepSeek's own models have and nothing else: latents of 512 beside keys of 64,
blocks of 64 tokens, bf16 or fp16, on devices of compute capability 9.0 (`csrc/api/dense_decode.h`).
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["BLOCK_SIZE", "FlashMLA", "takes"]

BLOCK_SIZE = 64
_RANK, _ROW = 512, 576


def takes(row: int, rank: int, block_size: int, dtype: torch.dtype) -> bool:
    """Whether its kernel is made for such a cache."""
    return (row, rank, block_size) == (_ROW, _RANK, BLOCK_SIZE) and dtype in (torch.bfloat16, torch.float16)


class FlashMLA:
    """`library` is the module `flash_mla`, or what has its two functions."""

    def __init__(self, library: Any) -> None:
        self._metadata = library.get_mla_metadata
        self._attend = library.flash_mla_with_kvcache

    def __call__(
        self,
        q: torch.Tensor,
        slots: torch.Tensor,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        *,
        block_size: int,
        rank: int,
        scale: float,
    ) -> torch.Tensor:
        """See `workers.kernels.paged.attend_latent_paged`."""
        heads, row = q.shape[1:]
        lengths = lengths.to(torch.int32)
        # How sequences are spread over the device is found out anew at each call, on the device: kept between calls it
        # would be that of other lengths, and in a recorded step that of the recording for ever. Its first version wants
        # these arguments and gives two tensors; the present one ignores them and gives an empty record and None, which
        # go the same way.
        schedule, splits = self._metadata(lengths, heads, 1)
        out: torch.Tensor = self._attend(
            q.unsqueeze(1),
            slots.view(-1, block_size, 1, row),
            block_table.to(torch.int32),
            lengths,
            rank,
            schedule,
            splits,
            softmax_scale=scale,
            causal=False,
        )[0]
        return out.squeeze(1)
