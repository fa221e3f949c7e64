"""The words in which a model says which bytes of a checkpoint it needs: names, shapes and ranges, and no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Output", "Parameter", "Piece", "columns", "matrix", "stack", "vector"]

# A projection's module, how many outputs it has, and the range of them that the rank holds.
Output = tuple[str, int, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a checkpoint tensor: `rows` and `columns` are half-open ranges, columns None for a vector.

    A tensor of more dimensions counts as a matrix: all but the last are its rows.
    """

    name: str
    shape: tuple[int, ...]  # of the whole tensor, as the checkpoint must have it
    rows: tuple[int, int]
    columns: tuple[int, int] | None

    @property
    def num_rows(self) -> int:
        return self.rows[1] - self.rows[0]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the cut model: its pieces stacked by rows, and rows of zeros up to `shape` behind them.

    `full_precision`: held in fp32 whatever the model's dtype. `quantizable`: the weight of a linear layer that may be
    held in eight bits.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    full_precision: bool = False
    quantizable: bool = False


def stack(name: str, outputs: Sequence[Output], width: int | None, *, quantizable: bool = True) -> Parameter:
    """Output slices of several projections of `width` inputs, or with None of their biases, in one tensor."""
    suffix, tail = ("bias", ()) if width is None else ("weight", (width,))
    inputs = None if width is None else (0, width)
    pieces = tuple(Piece(f"{module}.{suffix}", (total, *tail), rows, inputs) for module, total, rows in outputs)
    num_rows = sum(piece.num_rows for piece in pieces)
    return Parameter(name, (num_rows, *tail), pieces, quantizable=quantizable and width is not None)


def columns(name: str, module: str, rows: int, width: int, part: tuple[int, int]) -> Parameter:
    """The weight of a projection of `width` inputs, of which the rank has a part."""
    piece = Piece(f"{module}.weight", (rows, width), (0, rows), part)
    return Parameter(name, (rows, part[1] - part[0]), (piece,), quantizable=True)


def matrix(name: str, tensor: str, rows: int, width: int, *, full_precision: bool = False) -> Parameter:
    piece = Piece(tensor, (rows, width), (0, rows), (0, width))
    return Parameter(name, (rows, width), (piece,), full_precision)


def vector(name: str, tensor: str, size: int, *, full_precision: bool = False) -> Parameter:
    return Parameter(name, (size,), (Piece(tensor, (size,), (0, size), None),), full_precision)
