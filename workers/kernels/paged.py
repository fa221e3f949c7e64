"""Attention of decoding sequences that reads the paged cache where it lies, with shapes that no length changes.

That is what a CUDA graph needs (`workers/graphs.py`). These are the plain torch references; `triton_paged.py` and
`triton_latent.py` are the kernels.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["attend_latent_paged", "attend_paged"]


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
    """One query token for each of B sequences: q [B, H * D], rows apart, `slots` [S, row], gives [B, H * D].

    A row holds the keys of all `kv_heads`, each `width` elements, and then their values. The first `lengths[b]` tokens
    count, at least one, the query's own included. Block m of sequence b is `block_table[b, m]`; entries behind the last
    one that is needed may be any valid ones.
    """
    sequences, columns = block_table.shape
    places = (block_table.unsqueeze(-1) * block_size + torch.arange(block_size, device=q.device)).flatten()
    kept = slots.index_select(0, places).view(sequences, columns * block_size, 2, kv_heads, width)
    k, v = kept[:, :, 0].transpose(1, 2), kept[:, :, 1].transpose(1, 2)
    visible = torch.arange(columns * block_size, device=q.device) < lengths[:, None]
    heads = q.unflatten(-1, (kv_heads, -1, width))  # type: ignore[no-untyped-call]
    return F.scaled_dot_product_attention(heads, k, v, attn_mask=visible[:, None, None, :]).reshape(sequences, -1)


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
    """Absorbed latent attention of one query token for each of B sequences: q [B, H, row] gives [B, H, rank].

    A row of `slots` [S, row] is the key of all heads and its first `rank` elements are their value; `lengths` and
    `block_table` are as for `attend_paged`.
    """
    sequences, columns = block_table.shape
    places = (block_table.unsqueeze(-1) * block_size + torch.arange(block_size, device=q.device)).flatten()
    kept = slots.index_select(0, places).view(sequences, 1, columns * block_size, -1)
    visible = torch.arange(columns * block_size, device=q.device) < lengths[:, None]
    out = F.scaled_dot_product_attention(q.unsqueeze(1), kept, kept, attn_mask=visible[:, None, None, :], scale=scale)
    return out.squeeze(1)[..., :rank]
