"""The numbers of a step: what every rank of a DP group must know to run the same forward pass.

`StepInputs` is the numeric part of the batcher's plan, in the plan's order, and crosses processes as a proto.
`StepTensors` is what the model reads: the same step as index tensors, with its rows in an order that suits the
model (sequences with one token first, shortest context first).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from protos.shoal.v1 import session_pb2
from scheduler.plan import StepPlan

__all__ = ["DecodeGroup", "PrefillChunk", "StepInputs", "StepTensors", "build_tensors"]

Ints = NDArray[np.int64]
# Padding a group of decoding sequences to one length may read this many slots more than needed, and a quarter more.
_SPARE_SLOTS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """Per sequence, in the plan's order; `token_ids` and `block_ids` are the sequences' own, concatenated."""

    generation: int
    step: int
    token_ids: Ints
    num_tokens: Ints
    num_computed: Ints
    block_ids: Ints
    num_blocks: Ints
    num_logits: Ints

    @classmethod
    def from_plan(cls, plan: StepPlan) -> StepInputs:
        """Copies what it needs: the plan's histories may grow afterwards."""
        sequences = plan.sequences
        tokens = [s.history[s.num_computed : s.num_computed + s.num_tokens] for s in sequences]
        return cls(
            generation=plan.generation,
            step=plan.step,
            token_ids=_array(chain.from_iterable(tokens)),
            num_tokens=_array(s.num_tokens for s in sequences),
            num_computed=_array(s.num_computed for s in sequences),
            block_ids=_array(chain.from_iterable(s.block_ids for s in sequences)),
            num_blocks=_array(len(s.block_ids) for s in sequences),
            num_logits=_array(s.num_logits for s in sequences),
        )

    @classmethod
    def from_proto(cls, message: session_pb2.StepPlan) -> StepInputs:
        return cls(
            generation=message.generation,
            step=message.step,
            token_ids=_array(message.token_ids),
            num_tokens=_array(message.num_tokens),
            num_computed=_array(message.num_computed),
            block_ids=_array(message.block_ids),
            num_blocks=_array(message.num_blocks),
            num_logits=_array(message.num_logits),
        )

    def to_proto(self) -> session_pb2.StepPlan:
        return session_pb2.StepPlan(
            generation=self.generation,
            step=self.step,
            token_ids=self.token_ids.tolist(),
            num_tokens=self.num_tokens.tolist(),
            num_computed=self.num_computed.tolist(),
            block_ids=self.block_ids.tolist(),
            num_blocks=self.num_blocks.tolist(),
            num_logits=self.num_logits.tolist(),
        )


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one token each in rows `start` to `stop`, padded to the longest context.

    `block_ids` [sequences * blocks of the longest] reads their contexts, of which the first `context` slots of each
    count. `mask` [sequences, 1, 1, context] hides the padding; None where there is none.
    """

    start: int
    stop: int
    block_ids: torch.Tensor
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
    """A step as the model reads it. T rows; `slots` are where they go in the cache.

    `logit_rows` are the rows that need logits, in the plan's order; None where that is every row in place.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillChunk, ...]
    logit_rows: torch.Tensor | None


def build_tensors(inputs: StepInputs, block_size: int, *, dtype: torch.dtype, device: torch.device) -> StepTensors:
    """The index tensors of a step; `dtype` is that of the masks."""
    context = inputs.num_computed + inputs.num_tokens
    single = inputs.num_tokens == 1
    order = np.lexsort((np.where(single, context, 0), ~single))
    num_tokens, num_computed, context = inputs.num_tokens[order], inputs.num_computed[order], context[order]
    ends = num_tokens.cumsum()
    starts = ends - num_tokens
    old_starts = inputs.num_tokens.cumsum() - inputs.num_tokens
    first_blocks = (inputs.num_blocks.cumsum() - inputs.num_blocks)[order]

    rows = np.arange(int(ends[-1]))
    positions = rows + np.repeat(num_computed - starts, num_tokens)
    token_ids = inputs.token_ids[rows + np.repeat(old_starts[order] - starts, num_tokens)]
    blocks = inputs.block_ids[np.repeat(first_blocks, num_tokens) + positions // block_size]
    slots = blocks * block_size + positions % block_size

    new_starts = np.empty_like(starts)
    new_starts[order] = starts
    first_logits = new_starts + inputs.num_tokens - inputs.num_logits
    within = np.arange(int(inputs.num_logits.sum())) - np.repeat(
        inputs.num_logits.cumsum() - inputs.num_logits, inputs.num_logits
    )
    logit_rows = np.repeat(first_logits, inputs.num_logits) + within

    def tensor(values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(device)

    def mask(hidden: NDArray[np.bool_]) -> torch.Tensor:
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf).to(device)

    def contexts(first: Ints, length: Ints) -> Ints:
        """The block ids of several contexts, the shorter ones filled up with their last."""
        needed = -(-length // block_size)
        columns = np.minimum(np.arange(int(needed.max())), needed[:, None] - 1)
        return inputs.block_ids[first[:, None] + columns].reshape(-1)

    num_single = int(single.sum())
    decode = []
    for start, stop in _groups(context[:num_single]):
        lengths = context[start:stop]
        longest = int(lengths[-1])
        hidden = None
        if int(lengths[0]) != longest:
            hidden = mask((np.arange(longest) >= lengths[:, None])[:, None, None, :])
        block_ids = tensor(contexts(first_blocks[start:stop], lengths))
        decode.append(DecodeGroup(start, stop, block_ids, longest, hidden))
    prefill = []
    for index in range(num_single, len(order)):
        start, stop, length = int(starts[index]), int(ends[index]), int(context[index])
        if stop - start == length:
            prefill.append(PrefillChunk(start, stop, None, length, None))
            continue
        later = np.arange(length) > positions[start:stop, None]
        block_ids = tensor(contexts(first_blocks[index : index + 1], context[index : index + 1]))
        prefill.append(PrefillChunk(start, stop, block_ids, length, mask(later)))
    return StepTensors(
        tensor(token_ids),
        tensor(positions),
        tensor(slots),
        tuple(decode),
        tuple(prefill),
        None if np.array_equal(logit_rows, rows) else tensor(logit_rows),
    )


def _groups(context: Ints) -> Iterator[tuple[int, int]]:
    """Cuts sequences, sorted by context, into runs whose padding to one length costs little."""
    start = total = 0
    for index, length in enumerate(context.tolist()):
        padded = length * (index + 1 - start)
        if padded > (total + length) * 1.25 + _SPARE_SLOTS:
            yield start, index
            start, total = index, 0
        total += length
    if len(context):
        yield start, len(context)


def _array(values: object) -> Ints:
    return np.fromiter(values, dtype=np.int64)  # type: ignore[call-overload, no-any-return]
