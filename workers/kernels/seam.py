"""What a model asks of the device it runs on.

Shape suffixes: T tokens of the step, B sequences that decode, C context length, H query heads, K key-value heads,
G = H / K, D width of a head, V of its values. Every operation has a plain torch reference (`reference.py`) that a
faster version must match; `select.py` chooses once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from workers.cache import LayerCache
from workers.kernels.quantized import Weight
from workers.model.moe_config import GateRule
from workers.parallel.dispatch import Routing
from workers.parallel.moves import RowMoves
from workers.step import DecodeGroup

__all__ = ["GatedLinear", "Kernels", "Linear", "MLPPart", "Norm", "PartLimits", "PartialLinear"]


class Linear(Protocol):
    """`x @ weight.T + bias` for x [T, in]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The same plus `residual` [T, out], which may be overwritten."""
        ...


class PartialLinear(Protocol):
    """Some outputs of a linear layer at a time, for few rows."""

    most: int  # rows
    step: int  # parts begin and end at multiples of it

    def __call__(self, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Outputs `first` to `last` [T, last - first] for x [T, in]."""
        ...


class GatedLinear(Protocol):
    """`silu(x @ gate.T) * (x @ up.T)`, each with its bias, for x [T, in]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class PartLimits(NamedTuple):
    """Of a gated MLP's parts."""

    rows: int  # at most
    inner: int  # values there are
    step: int  # parts begin and end at multiples of it


class MLPPart(NamedTuple):
    """What the inner values `first` to `last` of a gated MLP give of its outputs, for the last `rows` of a call's."""

    gated: GatedLinear
    down: Linear
    first: int
    last: int
    rows: int


class Norm(Protocol):
    """Root-mean-square normalisation over the last dimension, times a weight, of x [..., width].

    x is in fp32, as the residual is, or in the weight's dtype, and the result in the latter. The mean square is taken
    in fp32 (Zhang and Sennrich, arXiv 1910.07467).
    """

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class Kernels(Protocol):
    """The operations of a model, for one dtype on one device."""

    @property
    def description(self) -> str:
        """In words for `shoal status`."""
        ...

    def describe(self, quantization: str) -> str:
        """The same with how weights of that quantization, "none", "fp8" or "int8", are computed with."""
        ...

    @property
    def packs_weights(self) -> bool:
        """Whether a linear layer keeps a copy in its own layout instead of the weight it was given."""
        ...

    @property
    def groups_experts(self) -> bool:
        """Whether torch's grouped matrix product serves a layer's routed experts."""
        ...

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        """Takes `weight` [out, in] over: the caller must not keep it unless it means to hold it twice."""
        ...

    def gated_linear(self, weight: Weight, bias: torch.Tensor | None) -> GatedLinear:
        """`weight` [2 * inner, in] holds gate above up."""
        ...

    def in_parts(self, linear: Linear) -> PartialLinear | None:
        """None where these kernels have no such form of that layer."""
        ...

    def few_rows_experts(
        self,
        experts: Sequence[tuple[GatedLinear, Linear]],
        x: torch.Tensor,
        counts: Sequence[int],
        part: MLPPart | None = None,
    ) -> torch.Tensor | None:
        """`down(gated(x))` of the first `counts[0]` rows of x [R, hidden] by the first of `experts`, and so on; then
        what `part` gives of its rows.

        None where these kernels have nothing better for so many rows than one expert after the other. Never that for
        a part alone, with the limits of `mlp_parts`.
        """
        ...

    def mlp_parts(self, gated: GatedLinear, down: Linear) -> PartLimits | None:
        """None where these kernels do not compute that MLP in parts."""
        ...

    @property
    def moves(self) -> RowMoves:
        """How rows are put in their experts' order."""
        ...

    def choose_experts(
        self, logits: torch.Tensor, rule: GateRule, correction_bias: torch.Tensor | None = None
    ) -> Routing:
        """See `workers.model.gate.choose_experts`."""
        ...

    def rms_norm(self, weight: torch.Tensor, epsilon: float) -> Norm:
        """`weight` [width]."""
        ...

    @property
    def one_form(self) -> bool:
        """Whether a token must be computed in the same way alone, in a chunk and in a batch, at any price."""
        ...

    def per_head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Each head's own projection: x [T, H, in] times `weight` [H, in, out], gives [T, H, out]."""
        ...

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [T, in] times `weight` [in, out], both in fp32."""
        ...

    def by_rows(self, act: Callable[[torch.Tensor], Sequence[torch.Tensor]], x: torch.Tensor) -> Sequence[torch.Tensor]:
        """What `act` makes of x [T, ...]: tensors [T, ...], each row of which depends on that row of x alone."""
        ...

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotates x [T, heads, D] in place by a `RotaryTable`'s rows [T, 1, D]."""
        ...

    def ragged(self, width: int) -> bool:
        """Whether `attend_cached`, for heads of that width, goes by each sequence's length: it wants neither groups
        of one length nor masks.
        """
        ...

    def attend_cached(
        self, q: torch.Tensor, cache: LayerCache, group: DecodeGroup, kv_heads: int, width: int
    ) -> torch.Tensor:
        """A decode group's attention to its cached keys and values: q [B, H * D], rows apart, gives [B, H * D].

        The cache's rows hold the keys of all `kv_heads`, each `width` elements, and then their values.
        """
        ...

    def ragged_latent(self, row: int, rank: int) -> bool:
        """The same of `attend_latent`, for cache rows of `row` elements with a latent of `rank`."""
        ...

    def attend_latent(
        self, q: torch.Tensor, cache: LayerCache, group: DecodeGroup, rank: int, scale: float
    ) -> torch.Tensor:
        """A decode group's absorbed latent attention: q [B, H, row] gives [B, H, rank].

        A cache row is the key of all heads, and its first `rank` elements are their value. `scale` is on the scores.
        """
        ...

    def attend_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """One query token for each of B sequences: q [B, K, G, D], k and v [B, K, C, D], gives [B, H * D].

        `mask` [B, 1, 1, C] is added to the scores, in the dtype of q. `scale` is on them; None is 1 / sqrt(D).
        """
        ...

    def refine(self, logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, candidates: int) -> torch.Tensor:
        """Logits [T, vocabulary] in fp32, the largest few of each row anew as `x @ weight.T` with sums in fp32."""
        ...

    def attend_prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """T query tokens of one sequence: q [1, H, T, D], k [1, K, C, D], v [1, K, C, V], gives [T, H * V].

        `mask` [T, C] is added to the scores; None is the causal mask of C = T. `scale` is as for `attend_decode`.
        """
        ...
