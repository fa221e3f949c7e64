"""`attend_latent_paged` as Triton kernels. Not run on a GPU: run under Triton's interpreter, and compiled for sm_90.

All heads attend to one row of the cache per token, so a program takes some heads of a sequence and a part of its
tokens, and reads each row once for them: the latent's part in two ways, as key and as value. The parts' sums are put
together by a second kernel (Dao et al., "Flash-Decoding", 2023). The number of parts is a launch's constant, never a
length: a recorded step stays the same while sequences grow.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["attend_latent_paged", "combine_kernel", "constants", "latent_kernel"]

_LEAST = 16  # rows and columns of the smallest matrix product
_HEADS = 16  # of a program: the sums of 16 x 512 in fp32 are 64 registers of each of 128 threads
_TOKENS = 32
_PARTS = 8


@triton.jit  # type: ignore[untyped-decorator]
def latent_kernel(  # type: ignore[no-untyped-def]
    q,
    slots,
    block_table,
    lengths,
    sums,
    peaks,
    totals,
    scale,
    q_stride,
    q_head_stride,
    row_stride,
    table_stride,
    heads,
    rank,
    rope,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """`sums` [B, heads, PARTS, rank], `peaks` and `totals` [B, heads, PARTS] are fp32; RANK and ROPE are powers of two
    that cover `rank` and `rope`."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    part = tl.program_id(2)
    length = tl.load(lengths + sequence)
    # A part is a whole number of steps; the last ones may be empty.
    share = tl.cdiv(tl.cdiv(length, PARTS), TOKENS) * TOKENS
    first = part * share
    last = tl.minimum(first + share, length)
    latent = tl.arange(0, RANK)
    rotated = tl.arange(0, ROPE)
    token = tl.arange(0, TOKENS)
    used = (head < heads)[:, None]
    from_q = q + sequence * q_stride + head[:, None] * q_head_stride
    q_latent = tl.load(from_q + latent[None, :], mask=used & (latent < rank)[None, :], other=0.0)
    q_rotated = tl.load(from_q + rank + rotated[None, :], mask=used & (rotated < rope)[None, :], other=0.0)
    highest = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    summed = tl.zeros([HEADS, RANK], tl.float32)
    for start in range(first, last, TOKENS):
        position = start + token
        inside = position < last
        block = tl.load(block_table + sequence * table_stride + position // BLOCK_SIZE, mask=inside, other=0)
        row = slots + (block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE)[:, None] * row_stride
        kept = tl.load(row + latent[None, :], mask=inside[:, None] & (latent < rank)[None, :], other=0.0)
        key = tl.load(row + rank + rotated[None, :], mask=inside[:, None] & (rotated < rope)[None, :], other=0.0)
        scores = tl.dot(q_latent, tl.trans(kept), input_precision="ieee")
        scores += tl.dot(q_rotated, tl.trans(key), input_precision="ieee")
        scores = tl.where(inside[None, :], scores * scale, -float("inf"))
        raised = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - raised[:, None])
        shrunk = tl.exp(highest - raised)
        summed = summed * shrunk[:, None] + tl.dot(weights.to(kept.dtype), kept, input_precision="ieee")
        total = total * shrunk + tl.sum(weights, axis=1)
        highest = raised
    place = (sequence * heads + head) * PARTS + part
    tl.store(peaks + place, highest, mask=head < heads)
    tl.store(totals + place, total, mask=head < heads)
    tl.store(sums + place[:, None] * rank + latent[None, :], summed, mask=used & (latent < rank)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def combine_kernel(  # type: ignore[no-untyped-def]
    sums,
    peaks,
    totals,
    out,
    rank,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One (sequence, head) of `out` [B, heads, rank]. An empty part has a peak of -inf, and so weighs nothing."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    latent = tl.arange(0, RANK)
    peak = tl.load(peaks + row * PARTS + part)
    weight = tl.exp(peak - tl.max(peak, axis=0))
    total = tl.sum(weight * tl.load(totals + row * PARTS + part), axis=0)
    there = (latent < rank)[None, :]
    found = tl.load(sums + (row * PARTS + part)[:, None] * rank + latent[None, :], mask=there, other=0.0)
    tl.store(out + row * rank + latent, tl.sum(found * weight[:, None], axis=0) / total, mask=latent < rank)


def constants(rank: int, rope: int, block_size: int) -> dict[str, int]:
    """What `latent_kernel` is compiled for."""
    return {
        "BLOCK_SIZE": block_size,
        "HEADS": _HEADS,
        "RANK": max(_LEAST, triton.next_power_of_2(rank)),
        "ROPE": max(_LEAST, triton.next_power_of_2(rope)),
        "TOKENS": _TOKENS,
        "PARTS": _PARTS,
    }


def attend_latent_paged(
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
    sequences, heads, row = q.shape
    assert q.stride(2) == slots.stride(1) == block_table.stride(1) == 1
    compiled = constants(rank, row - rank, block_size)
    sums = torch.empty(sequences, heads, _PARTS, rank, dtype=torch.float32, device=q.device)
    peaks, totals = torch.empty(2, sequences, heads, _PARTS, dtype=torch.float32, device=q.device)
    out = torch.empty(sequences, heads, rank, dtype=q.dtype, device=q.device)
    launch: Any = latent_kernel[(sequences, triton.cdiv(heads, _HEADS), _PARTS)]
    launch(
        q,
        slots,
        block_table,
        lengths,
        sums,
        peaks,
        totals,
        scale,
        q.stride(0),
        q.stride(1),
        slots.stride(0),
        block_table.stride(0),
        heads,
        rank,
        row - rank,
        **compiled,
    )
    combine: Any = combine_kernel[(sequences * heads,)]
    combine(sums, peaks, totals, out, rank, RANK=compiled["RANK"], PARTS=_PARTS)
    return out
