"""A step as the model reads it: index tensors, with the rows in an order that suits the model.

Sequences with one token come first, shortest context first, so that those of about one length can be attended to
together; then the chunks of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from workers.inputs import Ints, StepInputs

__all__ = ["DecodeGroup", "PrefillChunk", "StepTensors", "build_tensors"]

# How many slots more than needed a group of decoding sequences may read for being padded to one length: about as many
# as take the time of one more call, so that padding and calls together cost the least.
_SPARE_SLOTS = 256


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one token each in rows `start` to `stop`, padded to the longest context.

    `block_ids` [sequences * blocks of the longest] reads their contexts, of which the first `lengths` [sequences]
    slots of each count; `context` is the largest. `mask` [sequences, 1, 1, context] hides the padding; None where
    there is none, or the step is ragged.
    """

    start: int
    stop: int
    block_ids: torch.Tensor
    lengths: torch.Tensor
    context: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Several tokens of one sequence in rows `start` to `stop`.

    `block_ids` reads its context, these tokens included; None where they are all there is. `mask`
    [tokens, context] is causal; None with `block_ids`.
    """

    start: int
    stop: int
    block_ids: torch.Tensor | None
    context: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class StepTensors:
    """T rows; `slots` are where they go in the cache.

    `logit_rows` are the rows that need logits, in the plan's order; None where that is every row in place.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillChunk, ...]
    logit_rows: torch.Tensor | None


def build_tensors(
    inputs: StepInputs, block_size: int, *, dtype: torch.dtype, device: torch.device, ragged: bool = False
) -> StepTensors:
    """The index tensors of a step; `dtype` is that of the masks.

    With `ragged` all decoding sequences form one group, and no mask hides what is behind the shorter ones.
    """
    return _Builder(inputs, block_size, dtype, device, ragged).build()


class _Builder:
    """The step's sequences in the model's order."""

    def __init__(
        self, inputs: StepInputs, block_size: int, dtype: torch.dtype, device: torch.device, ragged: bool
    ) -> None:
        context = inputs.num_computed + inputs.num_tokens
        single = inputs.num_tokens == 1
        order = np.lexsort((np.where(single, context, 0), ~single))
        self._inputs = inputs
        self._block_size = block_size
        self._dtype = dtype
        self._device = device
        self._ragged = ragged
        self._order = order
        self._num_single = int(single.sum())
        self._context = context[order]
        self._num_tokens = inputs.num_tokens[order]
        self._stops = self._num_tokens.cumsum()
        self._starts = self._stops - self._num_tokens
        self._first_blocks = (inputs.num_blocks.cumsum() - inputs.num_blocks)[order]

    def build(self) -> StepTensors:
        inputs, num_tokens = self._inputs, self._num_tokens
        rows = np.arange(int(self._stops[-1]))
        positions = rows + np.repeat(inputs.num_computed[self._order] - self._starts, num_tokens)
        old_starts = (inputs.num_tokens.cumsum() - inputs.num_tokens)[self._order]
        token_ids = inputs.token_ids[rows + np.repeat(old_starts - self._starts, num_tokens)]
        blocks = inputs.block_ids[np.repeat(self._first_blocks, num_tokens) + positions // self._block_size]
        slots = blocks * self._block_size + positions % self._block_size
        logit_rows = self._logit_rows()
        return StepTensors(
            self._tensor(token_ids),
            self._tensor(positions),
            self._tensor(slots),
            tuple(self._group(start, stop) for start, stop in self._groups()),
            tuple(self._chunk(index, positions) for index in range(self._num_single, len(self._order))),
            None if np.array_equal(logit_rows, rows) else self._tensor(logit_rows),
        )

    def _logit_rows(self) -> Ints:
        inputs = self._inputs
        stops = np.empty_like(self._stops)
        stops[self._order] = self._stops
        counts = inputs.num_logits
        rows: Ints = np.arange(int(counts.sum())) + np.repeat(stops - counts.cumsum(), counts)
        return rows

    def _groups(self) -> Iterator[tuple[int, int]]:
        count = self._num_single
        if not self._ragged:
            yield from _groups(self._context[:count])
        elif count:
            yield 0, count

    def _group(self, start: int, stop: int) -> DecodeGroup:
        lengths = self._context[start:stop]
        context = int(lengths[-1])
        mask = None
        if not self._ragged and int(lengths[0]) != context:
            mask = self._mask((np.arange(context) >= lengths[:, None])[:, None, None, :])
        blocks = self._tensor(self._blocks(start, stop))
        return DecodeGroup(start, stop, blocks, self._tensor(lengths), context, mask)

    def _chunk(self, index: int, positions: Ints) -> PrefillChunk:
        start, stop, context = int(self._starts[index]), int(self._stops[index]), int(self._context[index])
        if stop - start == context:
            return PrefillChunk(start, stop, None, context, None)
        mask = self._mask(np.arange(context) > positions[start:stop, None])
        return PrefillChunk(start, stop, self._tensor(self._blocks(index, index + 1)), context, mask)

    def _blocks(self, start: int, stop: int) -> Ints:
        """The contexts' blocks [sequences * blocks of the longest], the shorter ones filled up with their last."""
        needed = -(-self._context[start:stop] // self._block_size)
        columns = np.minimum(np.arange(int(needed.max())), needed[:, None] - 1)
        blocks: Ints = self._inputs.block_ids[self._first_blocks[start:stop, None] + columns]
        return blocks.reshape(-1)

    def _mask(self, hidden: NDArray[np.bool_]) -> torch.Tensor:
        zeros = torch.zeros(hidden.shape, dtype=self._dtype)
        return zeros.masked_fill_(torch.from_numpy(hidden), -torch.inf).to(self._device)

    def _tensor(self, values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


def _groups(context: Ints) -> Iterator[tuple[int, int]]:
    """Cuts sequences, sorted by context, into runs whose padding to one length costs little."""
    start = total = 0
    for index, length in enumerate(context.tolist()):
        padded = length * (index + 1 - start)
        if padded > total + length + _SPARE_SLOTS:
            yield start, index
            start, total = index, 0
        total += length
    if len(context):
        yield start, len(context)
