"""The operations in plain torch: right on every device and in every dtype, and what faster ones are tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from workers.cache import LayerCache
from workers.kernels.quantized import QuantizedLinear, Weight
from workers.kernels.seam import GatedLinear, Linear, MLPPart, Norm, PartialLinear, PartLimits
from workers.model.gate import choose_experts
from workers.model.moe_config import GateRule
from workers.parallel.dispatch import Routing
from workers.parallel.moves import RowMoves, TorchMoves
from workers.step import DecodeGroup

__all__ = ["ReferenceKernels"]

_REFINED_ROWS = 64  # at a time: their candidates' weights are gathered in fp32


class _Linear:
    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual.add_(F.linear(x, self._weight, self._bias))


class _GatedLinear:
    __slots__ = ("_gate_up",)

    def __init__(self, gate_up: Linear) -> None:
        self._gate_up = gate_up

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class _Norm:
    __slots__ = ("_epsilon", "_weight", "_wide")

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self._weight = weight
        self._wide = weight.float()
        self._epsilon = epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self._weight.dtype:
            return F.rms_norm(x, self._wide.shape, self._wide, self._epsilon).to(self._weight.dtype)
        return F.rms_norm(x, self._weight.shape, self._weight, self._epsilon)


class ReferenceKernels:
    """See `Kernels`."""

    description = "torch"
    packs_weights = False
    groups_experts = False
    one_form = False

    def describe(self, quantization: str) -> str:
        if quantization == "none":
            return self.description
        return f"{self.description}; {quantization} weights dequantised in tiles"

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        return _Linear(weight, bias) if isinstance(weight, torch.Tensor) else QuantizedLinear(weight, bias)

    def gated_linear(self, weight: Weight, bias: torch.Tensor | None) -> GatedLinear:
        return _GatedLinear(self.linear(weight, bias))

    def in_parts(self, linear: Linear) -> PartialLinear | None:
        return None

    def few_rows_experts(
        self,
        experts: Sequence[tuple[GatedLinear, Linear]],
        x: torch.Tensor,
        counts: Sequence[int],
        part: MLPPart | None = None,
    ) -> torch.Tensor | None:
        return None

    def mlp_parts(self, gated: GatedLinear, down: Linear) -> PartLimits | None:
        return None

    moves: RowMoves = TorchMoves()

    def choose_experts(
        self, logits: torch.Tensor, rule: GateRule, correction_bias: torch.Tensor | None = None
    ) -> Routing:
        return choose_experts(logits, rule, correction_bias)

    def rms_norm(self, weight: torch.Tensor, epsilon: float) -> Norm:
        return _Norm(weight, epsilon)

    def per_head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, weight)

    def by_rows(self, act: Callable[[torch.Tensor], Sequence[torch.Tensor]], x: torch.Tensor) -> Sequence[torch.Tensor]:
        return act(x)

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        rolled = torch.roll(x, x.shape[-1] // 2, -1)
        x.mul_(cos).addcmul_(rolled, sin)

    def ragged(self, width: int) -> bool:
        return False

    def attend_cached(
        self, q: torch.Tensor, cache: LayerCache, group: DecodeGroup, kv_heads: int, width: int
    ) -> torch.Tensor:
        # Every view costs a microsecond and a layer is run some thirty times a token: one strided view each.
        kept = cache.read(group.block_ids)
        sequences, row = len(q), kept.shape[1]
        shape = (sequences, kv_heads, group.context, width)
        strides = (len(kept) // sequences * row, width, row, 1)
        queries = q.shape[1] // width // kv_heads
        heads = q.as_strided((sequences, kv_heads, queries, width), (q.stride(0), queries * width, width, 1))
        k, v = kept.as_strided(shape, strides, 0), kept.as_strided(shape, strides, kv_heads * width)
        return self.attend_decode(heads, k, v, group.mask)

    def ragged_latent(self, row: int, rank: int) -> bool:
        return False

    def attend_latent(
        self, q: torch.Tensor, cache: LayerCache, group: DecodeGroup, rank: int, scale: float
    ) -> torch.Tensor:
        sequences, heads, row = q.shape
        kept = cache.read(group.block_ids).view(sequences, 1, -1, row)[:, :, : group.context]
        # The whole row serves as value, because fast kernels want values as wide as keys; its key is cut off after.
        sums = self.attend_decode(q.unsqueeze(1), kept, kept, group.mask, scale)
        return sums.view(sequences, heads, row)[..., :rank]

    def attend_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None = None,
    ) -> torch.Tensor:
        # The queries that share a kv head are rows of one small matrix: no key or value is repeated.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out.reshape(q.shape[0], -1)

    def refine(self, logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, candidates: int) -> torch.Tensor:
        if logits.dtype == torch.float32:
            return logits
        refined = logits.float()
        likely = logits.topk(min(candidates, logits.shape[-1]), dim=-1, sorted=False).indices
        for start in range(0, len(x), _REFINED_ROWS):
            rows = slice(start, start + _REFINED_ROWS)
            exact = (weight[likely[rows]].float() * x[rows].float().unsqueeze(1)).sum(dim=-1)
            refined[rows].scatter_(1, likely[rows], exact)
        return refined

    def attend_prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None = None,
    ) -> torch.Tensor:
        missing = k.shape[-1] - v.shape[-1]
        if missing > 0:  # torch's fast attention wants values as wide as keys
            v = F.pad(v, (0, missing))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        if missing > 0:
            out = out[..., :-missing]
        return out.transpose(1, 2).reshape(q.shape[2], -1)
