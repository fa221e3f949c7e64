"""Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), read from config.json."""

from __future__ import annotations

from dataclasses import dataclass

from workers.model.fields import Fields

__all__ = ["MLAConfig", "read_mla"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MLAConfig:
    """Widths per head, and the ranks of the latents that keys, values and queries are made from.

    `interleaved`: the checkpoint's rotary dimensions are neighbours (0, 1), (2, 3)... rather than halves.
    """

    q_rank: int | None  # None: queries come straight from the hidden state
    kv_rank: int
    nope_dim: int  # of queries and keys, without position
    rope_dim: int  # of queries and keys, rotated; the heads share the key's
    v_dim: int
    interleaved: bool

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def cache_row(self) -> int:
        """What is kept of a token in a layer, whatever the number of heads: its latent and its rotated key."""
        return self.kv_rank + self.rope_dim


def read_mla(fields: Fields, *, always_interleaved: bool) -> MLAConfig:
    mla = MLAConfig(
        q_rank=fields.optional_size("q_lora_rank"),
        kv_rank=fields.size("kv_lora_rank"),
        nope_dim=fields.size("qk_nope_head_dim"),
        rope_dim=fields.size("qk_rope_head_dim"),
        v_dim=fields.size("v_head_dim"),
        interleaved=always_interleaved or fields.flag("rope_interleave", True),
    )
    if mla.rope_dim % 2:
        raise ValueError(f"config.json: qk_rope_head_dim must be even, not {mla.rope_dim}")
    return mla
