"""Operations whose result for a token has the same bits whatever else is in the call.

A matrix library chooses its order of summation by the shape of the call, so every call here has a shape that the batch
cannot change:

- rows are cut into tiles of `ROWS`, the last one padded; what a row's place in a tile and its neighbours are does not
  matter to the library, its shape does (README.md);
- a query is attended to in the tile of `ROWS` positions that it belongs to, at its place there, against as many key
  slots as its position alone decides: decode, a chunk of a prompt and a whole prompt give it the same call. Masked
  slots add exact zeros;
- torch computes the elements at the end of a call with another exponential than those before them. So activations run
  on pieces without such an end;
- with fewer outputs than twelve, MKL on AMD's processors sums a row by its place among the others. So narrow products
  are filled with zeros to `_NARROW` outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from workers.kernels.quantized import Weight
from workers.kernels.reference import ReferenceKernels
from workers.kernels.seam import GatedLinear, Kernels, Linear

__all__ = ["ROWS", "DeterministicKernels", "key_slots"]

ROWS = 16
# torch's vectorised loops take at most 64 elements at a time, and split a call over threads from 32768 elements on.
# So tiles of whatever is done to rows of any width are of this many rows.
_VECTOR = 64
_PIECE = 16384
_NARROW = 16


def key_slots(position: int) -> int:
    """Key slots for a query at `position`: few different numbers, so that queries share calls, and little padding."""
    needed = position + 1
    for slots in (32, 64, 128, 192, 256, 384, 512):
        if needed <= slots:
            return slots
    return -(-needed // 512) * 512


def silu(x: torch.Tensor) -> torch.Tensor:
    """`F.silu`, each element by the vectorised loop of one thread."""
    if x.device.type != "cpu":
        return F.silu(x)
    flat = x.reshape(-1)
    padded = F.pad(flat, (0, -len(flat) % _VECTOR))
    return torch.cat([F.silu(piece) for piece in torch.split(padded, _PIECE)])[: len(flat)].view(x.shape)


class _NarrowLinear:
    """A linear layer of few outputs, computed as one of `_NARROW`."""

    __slots__ = ("_linear", "_outputs")

    def __init__(self, base: Kernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._outputs = len(weight)
        self._linear = base.linear(_fill(weight.t()).t().contiguous(), None if bias is None else _fill(bias))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x)[:, : self._outputs]

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual.add_(self(x))


class _TiledLinear:
    __slots__ = ("_linear",)

    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _in_tiles(self._linear, x)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return _in_tiles(self._linear.plus, x, residual)


class _TiledGatedLinear:
    """`apply` may be any gated linear whose activation treats every element of a tile alike."""

    __slots__ = ("_apply",)

    def __init__(self, apply: GatedLinear) -> None:
        self._apply = apply

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _in_tiles(self._apply, x)


class _GatedLinear:
    __slots__ = ("_gate_up",)

    def __init__(self, gate_up: Linear) -> None:
        self._gate_up = gate_up

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return silu(gate).mul_(up)


class DeterministicKernels(ReferenceKernels):
    """See `Kernels`. Linear layers are those of `base`, which also keeps the weights."""

    one_form = True

    def __init__(self, base: Kernels) -> None:
        self._base = base
        self.description = f"the same bits in any batch, over {base.description}"
        self.packs_weights = base.packs_weights

    def describe(self, quantization: str) -> str:
        return f"the same bits in any batch, over {self._base.describe(quantization)}"

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        return _TiledLinear(self._linear(weight, bias))

    def gated_linear(self, weight: Weight, bias: torch.Tensor | None) -> GatedLinear:
        if self._base.packs_weights and isinstance(weight, torch.Tensor):
            # the activation is oneDNN's, which treats all elements alike
            return _TiledGatedLinear(self._base.gated_linear(weight, bias))
        return _TiledGatedLinear(_GatedLinear(self._linear(weight, bias)))

    def _linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        if isinstance(weight, torch.Tensor) and len(weight) < _NARROW:
            return _NarrowLinear(self._base, weight, bias)
        return self._base.linear(weight, bias)

    def per_head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide, outputs = _fill(weight), weight.shape[2]
        return _in_tiles(lambda tile: torch.bmm(tile.transpose(0, 1), wide).transpose(0, 1)[..., :outputs], x)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, _fill(weight))[:, : weight.shape[1]]

    def by_rows(self, act: Callable[[torch.Tensor], Sequence[torch.Tensor]], x: torch.Tensor) -> Sequence[torch.Tensor]:
        parts = [[part[: len(tile)] for part in act(_pad(tile, _VECTOR))] for tile in torch.split(x, _VECTOR)]
        return parts[0] if len(parts) == 1 else [torch.cat(same) for same in zip(*parts, strict=True)]

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        # Products and sums one by one: fused ones are rounded once or twice depending on the loop.
        rolled = torch.roll(x, x.shape[-1] // 2, -1).float()
        x.copy_((x.float() * cos.float()).add_(rolled.mul_(sin.float())))

    def attend_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None = None,
    ) -> torch.Tensor:
        sequences, _, context, _ = k.shape
        queries = q.reshape(sequences, -1, q.shape[3])
        lengths = [context] * sequences if mask is None else (mask == 0).flatten(1).sum(-1).tolist()
        out = queries.new_empty(sequences, queries.shape[1], v.shape[3])
        by_slots: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            by_slots.setdefault(key_slots(length - 1), []).append(index)
        for slots, members in by_slots.items():
            positions = torch.tensor([lengths[index] - 1 for index in members], device=q.device)
            rows = torch.tensor(members, device=q.device)
            places = (torch.arange(len(members), device=q.device), positions % ROWS)
            tiles = q.new_zeros(len(members), ROWS, *queries.shape[1:])
            tiles[places] = queries[rows]
            keys, values = (_widen(part if len(members) == sequences else part[rows], slots) for part in (k, v))
            out[rows] = _attend(tiles, positions // ROWS, keys, values, scale)[places]
        return out.view(sequences, -1)

    def attend_prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None = None,
    ) -> torch.Tensor:
        _, heads, num_tokens, width = q.shape
        stop = k.shape[2]
        start = stop - num_tokens
        first, last = start // ROWS, (stop - 1) // ROWS + 1
        tiles = q.new_zeros((last - first) * ROWS, heads, width)
        ours = slice(start - first * ROWS, stop - first * ROWS)
        tiles[ours] = q[0].transpose(0, 1)
        tiles = tiles.view(-1, ROWS, heads, width)
        slots = [key_slots(tile * ROWS + ROWS - 1) for tile in range(first, last)]
        keys, values = _widen(k, slots[-1]), _widen(v, slots[-1])
        outputs = []
        begin = 0
        while begin < len(slots):
            end = begin + slots[begin:].count(slots[begin])
            numbers = torch.arange(first + begin, first + end, device=q.device)
            shared = [part[:, : slots[begin]].expand(end - begin, -1, -1, -1) for part in (keys, values)]
            outputs.append(_attend(tiles[begin:end], numbers, shared[0], shared[1], scale))
            begin = end
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out.flatten(0, 1)[ours].flatten(1)


def _fill(x: torch.Tensor) -> torch.Tensor:
    """`x` with as many outputs, its last dimension, as are no narrow product."""
    missing = _NARROW - x.shape[-1]
    return F.pad(x, (0, missing)) if missing > 0 else x


def _pad(tile: torch.Tensor, rows: int = ROWS) -> torch.Tensor:
    """`tile` as so many contiguous rows."""
    if len(tile) == rows:
        return tile.contiguous()
    padded = tile.new_zeros(rows, *tile.shape[1:])
    padded[: len(tile)] = tile
    return padded


def _in_tiles(act: Callable[..., torch.Tensor], *operands: torch.Tensor) -> torch.Tensor:
    """`act` on tiles of the operands' rows, which it may overwrite in all but the first."""
    tiles = zip(*(torch.split(operand, ROWS) for operand in operands), strict=True)
    parts = [act(*map(_pad, tile))[: len(tile[0])] for tile in tiles]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _widen(x: torch.Tensor, slots: int) -> torch.Tensor:
    """[B, slots, K, D] of [B, K, C, D], cut or filled with zeros."""
    kept = x[:, :, :slots].transpose(1, 2)
    wide = x.new_empty(x.shape[0], slots, x.shape[1], x.shape[3])
    wide[:, : kept.shape[1]] = kept
    wide[:, kept.shape[1] :] = 0
    return wide


def _attend(
    tiles: torch.Tensor, numbers: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Queries [B, ROWS, H, D], the tiles of those `numbers` [B], to keys [B, C, K, D]; gives [B, ROWS, H, V]."""
    missing = keys.shape[-1] - values.shape[-1]
    if missing > 0:
        values = F.pad(values, (0, missing))
    slots = torch.arange(keys.shape[1], device=tiles.device)
    positions = numbers[:, None] * ROWS + torch.arange(ROWS, device=tiles.device)
    hidden = slots > positions[:, :, None]
    mask = torch.zeros(hidden.shape, dtype=tiles.dtype, device=tiles.device).masked_fill_(hidden, -torch.inf)
    q, k, v = (part.transpose(1, 2) for part in (tiles, keys, values))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1), scale=scale, enable_gqa=True)
    if missing > 0:
        out = out[..., :-missing]
    return out.transpose(1, 2)
