"""Our paged cache as an attention implementation of transformers.

A step is one forward pass of batch size one: the tokens of all its sequences side by side. Everything but attention
treats tokens one by one, given each one's position; attention comes here (`paged_attention`), where keys and values are
written to the cache and each sequence attends to its own. Which masks a layer needs is said by its window alone:
transformers makes none for an implementation that it has no mask function for.

Shape suffixes: T tokens of the step, B sequences, C context length, H query heads, K key-value heads, D width of a
query, V of a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from workers.cache import KVCache
from workers.step import DecodeGroup, PrefillChunk, StepTensors

__all__ = ["NAME", "AttentionLayer", "PagedStep", "Survey", "paged_attention"]

NAME = "shoal_paged"
# What some models pass that decides who attends to whom, beyond what is computed here.
_FOREIGN = ("position_bias", "indices", "block_indices", "block_mask", "cu_seq_lens_q", "encoder_hidden_states")


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What a layer keeps of a token on this rank: K keys of width D and K values of width V.

    A token attends to the last `window` tokens, itself included; None: to all before it.
    """

    num_kv_heads: int
    key_width: int
    value_width: int
    window: int | None

    @property
    def cache_row(self) -> int:
        return self.num_kv_heads * (self.key_width + self.value_width)


@dataclass(frozen=True, slots=True)
class Options:
    """How scores are made: times `scale` (None: 1 / sqrt(D)), then `softcap * tanh(scores / softcap)`.

    `sinks` [H] are one more score for each query, which takes its part of the softmax and has no value
    (Xiao et al., arXiv 2309.17453, as in gpt-oss).
    """

    scale: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


class Attend(Protocol):
    """What a forward pass hands down to its attention layers."""

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
    ) -> torch.Tensor:
        """q [1, H, T, D], k [1, K, T, D], v [1, K, T, V], gives [T, H * V]."""
        ...


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    paged: Attend | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """The function that transformers' models call; gives [1, T, H, V]. Raises ValueError for what it cannot do."""
    if paged is None:
        raise ValueError("the model does not hand the cache down to its attention")
    unknown = [name for name in _FOREIGN if others.get(name) is not None]
    if attention_mask is not None or unknown:
        raise ValueError(
            f"the model's attention uses {', '.join(unknown) or 'a mask of its own'}, which is not supported"
        )
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError("the model attends to tokens that are still to come")
    out = paged.attend(module, query, key, value, Options(scaling, sliding_window, softcap, s_aux))
    return out.view(1, query.shape[2], query.shape[1], value.shape[3]), None


class Survey:
    """A pass over one whole sequence, without a cache, that finds the model's attention layers in their order."""

    def __init__(self) -> None:
        self.layers: dict[nn.Module, AttentionLayer] = {}

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
    ) -> torch.Tensor:
        if module in self.layers:
            raise ValueError("a layer of the model attends twice in one pass")
        self.layers[module] = AttentionLayer(k.shape[1], k.shape[3], v.shape[3], options.window)
        positions = torch.arange(q.shape[2], device=q.device)
        out = _attend(q, k, v, _visible(positions, len(positions), options.window), options)
        return out.transpose(1, 2).reshape(q.shape[2], -1)


class PagedStep:
    """One step; `numbers` says which layer of the cache belongs to an attention module."""

    def __init__(self, step: StepTensors, cache: KVCache, numbers: Mapping[nn.Module, int]) -> None:
        self._step = step
        self._cache = cache
        self._numbers = numbers
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
    ) -> torch.Tensor:
        layer = self._cache.layers[self._numbers[module]]
        split = k.shape[1] * k.shape[3]
        rows = torch.cat([x[0].transpose(0, 1).flatten(1) for x in (k, v)], dim=-1)
        layer.write(self._step.slots, rows)
        parts = []
        for group in self._step.decode:
            kept = layer.read(group.block_ids).view(group.stop - group.start, -1, rows.shape[1])[:, : group.context]
            queries = q[0, :, group.start : group.stop].transpose(0, 1).unsqueeze(2)
            parts.append(self._part(queries, kept, split, k.shape[1], group, options))
        for chunk in self._step.prefill:
            own = rows[chunk.start : chunk.stop] if chunk.block_ids is None else layer.read(chunk.block_ids)
            queries = q[:, :, chunk.start : chunk.stop]
            parts.append(self._part(queries, own[None, : chunk.context], split, k.shape[1], chunk, options))
        return torch.cat(parts)

    def _part(
        self,
        q: torch.Tensor,
        kept: torch.Tensor,
        split: int,
        num_kv_heads: int,
        part: DecodeGroup | PrefillChunk,
        options: Options,
    ) -> torch.Tensor:
        """Attention of q [B, H, n, D] to the rows `kept` [B, C, row], gives [B * n, H * V]."""
        k, v = (x.view(*x.shape[:2], num_kv_heads, -1).transpose(1, 2) for x in (kept[..., :split], kept[..., split:]))
        out = _attend(q, k, v, self._mask(part, options.window), options)
        return out.transpose(1, 2).reshape(q.shape[0] * q.shape[2], -1)

    def _mask(self, part: DecodeGroup | PrefillChunk, window: int | None) -> torch.Tensor:
        """Made once a step for each window, whatever the number of layers."""
        key = part.start, window
        if key not in self._masks:
            visible = _visible(self._step.positions[part.start : part.stop], part.context, window)
            self._masks[key] = visible[:, None, None, :] if isinstance(part, DecodeGroup) else visible
        return self._masks[key]


def _visible(positions: torch.Tensor, context: int, window: int | None) -> torch.Tensor:
    """Which of `context` tokens those at `positions` [n] attend to: [n, context] bool."""
    keys = torch.arange(context, device=positions.device)
    visible = keys <= positions[:, None]
    return visible if window is None else visible & (keys > positions[:, None] - window)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, options: Options) -> torch.Tensor:
    """q [B, H, n, D], k [B, K, C, D], v [B, K, C, V], `visible` [n, C] or [B, 1, 1, C], gives [B, H, n, V]."""
    if options.softcap is None and options.sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=options.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    group = q.shape[1] // k.shape[1]
    scale = q.shape[3] ** -0.5 if options.scale is None else options.scale
    scores = q @ k.repeat_interleave(group, dim=1).transpose(2, 3) * scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.float().masked_fill(~visible, -torch.inf)
    if options.sinks is not None:
        sinks = options.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]].to(v.dtype)
    return weights @ v.repeat_interleave(group, dim=1)
