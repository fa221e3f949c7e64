"""A step's numbers: from the plan, over the wire, and as index tensors held to a token-by-token account."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.shoal.v1 import session_pb2
from scheduler.plan import ScheduledSequence, StepPlan
from scheduler.request import SamplingParams
from workers.inputs import StepInputs
from workers.step import StepTensors, build_tensors

BLOCK_SIZE = 4


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    sequences = []
    next_block = 0
    for index in range(draw(st.integers(1, 8))):
        num_computed = draw(st.sampled_from((0, 1, 3, 4, 11, 700)))
        num_tokens = draw(st.sampled_from((1, 1, 1, 2, 5)))
        spare = draw(st.integers(0, 2))
        num_blocks = -(-(num_computed + num_tokens) // BLOCK_SIZE) + spare
        sequences.append(
            ScheduledSequence(
                key=str(index),
                history=[index * 1000 + n for n in range(num_computed + num_tokens + draw(st.integers(0, 2)))],
                num_prompt_tokens=1,
                num_computed=num_computed,
                num_tokens=num_tokens,
                block_ids=[next_block + n for n in reversed(range(num_blocks))],
                num_logits=draw(st.integers(0, num_tokens)),
                samples=False,
                sampling=SamplingParams(),
            )
        )
        next_block += num_blocks
    return StepPlan(generation=3, step=9, sequences=tuple(sequences))


def _build(plan: StepPlan) -> StepTensors:
    return build_tensors(StepInputs.from_plan(plan), BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))


@given(plans())
@settings(deadline=None, derandomize=True)
def test_the_wire_keeps_everything(plan: StepPlan) -> None:
    inputs = StepInputs.from_plan(plan)
    message = session_pb2.StepPlan.FromString(inputs.to_proto().SerializeToString())
    again = StepInputs.from_proto(message)
    assert (again.generation, again.step) == (3, 9)
    assert again.to_proto() == inputs.to_proto()


@given(plans())
@settings(deadline=None, derandomize=True)
def test_every_token_has_its_place(plan: StepPlan) -> None:
    step = _build(plan)
    found = sorted(zip(step.token_ids.tolist(), step.positions.tolist(), step.slots.tolist(), strict=True))
    expected = []
    for sequence in plan.sequences:
        for position in range(sequence.num_computed, sequence.num_computed + sequence.num_tokens):
            slot = sequence.block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            expected.append((sequence.history[position], position, slot))
    assert found == sorted(expected)


@given(plans())
@settings(deadline=None, derandomize=True)
def test_logits_come_in_the_plans_order(plan: StepPlan) -> None:
    step = _build(plan)
    token_ids = step.token_ids if step.logit_rows is None else step.token_ids[step.logit_rows]
    expected: list[int] = []
    for sequence in plan.sequences:
        stop = sequence.num_computed + sequence.num_tokens
        expected += sequence.history[stop - sequence.num_logits : stop]
    assert token_ids.tolist() == expected


@given(plans())
@settings(deadline=None, derandomize=True)
def test_each_row_sees_its_own_past_and_nothing_else(plan: StepPlan) -> None:
    step = _build(plan)
    by_token = {s.history[s.num_computed]: s for s in plan.sequences}
    rows = 0
    for group in step.decode:
        blocks = group.block_ids.view(group.stop - group.start, -1)
        for row in range(group.start, group.stop):
            sequence = by_token[int(step.token_ids[row])]
            seen = _slots(blocks[row - group.start])[: group.context]
            if group.mask is not None:
                seen = seen[group.mask[row - group.start, 0, 0] == 0]
            assert seen.tolist() == _past(sequence, sequence.num_computed)
        rows += group.stop - group.start
    for chunk in step.prefill:
        sequence = by_token[int(step.token_ids[chunk.start])]
        assert chunk.stop - chunk.start == sequence.num_tokens
        rows += sequence.num_tokens
        if chunk.block_ids is None:
            assert sequence.num_computed == 0
            assert chunk.mask is None
            continue
        assert chunk.mask is not None
        slots = _slots(chunk.block_ids)[: chunk.context]
        for row in range(sequence.num_tokens):
            assert slots[chunk.mask[row] == 0].tolist() == _past(sequence, sequence.num_computed + row)
    assert rows == plan.num_tokens


def test_sequences_of_very_different_lengths_are_not_padded_to_the_longest() -> None:
    lengths = (4000, 3, 3, 3, 3900, 3)
    sequences = tuple(
        ScheduledSequence(
            key=str(index),
            history=range(length),
            num_prompt_tokens=1,
            num_computed=length - 1,
            num_tokens=1,
            block_ids=range(-(-length // BLOCK_SIZE)),
            num_logits=1,
            samples=True,
            sampling=SamplingParams(),
        )
        for index, length in enumerate(lengths)
    )
    step = _build(StepPlan(generation=1, step=1, sequences=sequences))
    assert [(group.stop - group.start, group.context) for group in step.decode] == [(4, 3), (2, 4000)]


def _slots(block_ids: torch.Tensor) -> torch.Tensor:
    return (block_ids[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()


def _past(sequence: ScheduledSequence, position: int) -> list[int]:
    return [sequence.block_ids[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(position + 1)]
