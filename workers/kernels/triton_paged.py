"""`attend_paged` as a Triton kernel. Not run on a GPU: run under Triton's interpreter, and compiled for sm_90.

One program for each sequence and key-value head walks over the sequence's tokens with a running maximum and sum
(Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135), for all queries of that head at once. It reads
the lengths on the device, so its launch is the same at every step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["attend_paged", "constants", "paged_kernel"]

_LEAST = 16  # rows and columns of the smallest matrix product
_TOKENS = 64


@triton.jit  # type: ignore[untyped-decorator]
def paged_kernel(  # type: ignore[no-untyped-def]
    q,
    slots,
    block_table,
    lengths,
    out,
    scale,
    q_stride,
    out_stride,
    row_stride,
    table_stride,
    group,
    width,
    value_start,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """`group` query heads share a key-value head of `width`; the capitals are powers of two that cover them."""
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    length = tl.load(lengths + sequence)
    heads = tl.arange(0, GROUP)
    columns = tl.arange(0, WIDTH)
    token = tl.arange(0, TOKENS)
    head = (kv_head * group + heads)[:, None] * width + columns[None, :]
    used = (heads < group)[:, None] & (columns < width)[None, :]
    queries = tl.load(q + sequence * q_stride + head, mask=used, other=0.0)
    highest = tl.full([GROUP], -float("inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    summed = tl.zeros([GROUP, WIDTH], tl.float32)
    for start in range(0, length, TOKENS):
        position = start + token
        inside = position < length
        block = tl.load(block_table + sequence * table_stride + position // BLOCK_SIZE, mask=inside, other=0)
        row = (block * BLOCK_SIZE + position % BLOCK_SIZE) * row_stride + kv_head * width
        place = row[:, None] + columns[None, :]
        there = inside[:, None] & (columns < width)[None, :]
        k = tl.load(slots + place, mask=there, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, -float("inf"))
        raised = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - raised[:, None])
        shrunk = tl.exp(highest - raised)
        v = tl.load(slots + value_start + place, mask=there, other=0.0)
        summed = summed * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrunk + tl.sum(weights, axis=1)
        highest = raised
    tl.store(out + sequence * out_stride + head, summed / total[:, None], mask=used)


def constants(group: int, width: int, block_size: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    return {
        "BLOCK_SIZE": block_size,
        "GROUP": max(_LEAST, triton.next_power_of_2(group)),
        "WIDTH": max(_LEAST, triton.next_power_of_2(width)),
        "TOKENS": _TOKENS,
    }


def attend_paged(
    q: torch.Tensor,
    slots: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    block_size: int,
    kv_heads: int,
    width: int,
) -> torch.Tensor:
    """See `workers.kernels.paged.attend_paged`."""
    sequences, wide = q.shape
    group = wide // width // kv_heads
    out = q.new_empty(sequences, wide)
    launch: Any = paged_kernel[(sequences, kv_heads)]
    launch(
        q,
        slots,
        block_table,
        lengths,
        out,
        1.0 / math.sqrt(width),
        q.stride(0),
        out.stride(0),
        slots.stride(0),
        block_table.stride(0),
        group,
        width,
        kv_heads * width,
        **constants(group, width, block_size),
    )
    return out
